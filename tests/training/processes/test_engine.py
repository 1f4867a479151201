"""Test that accelerate's configuration changes no recipe, and what a run says about its processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator

from spectune.errors import InputError, SpectuneError
from spectune.training.processes import engine
from spectune.training.processes.engine import (
    described_processes,
    lost_connection_explained,
    make_accelerator,
    unused_gpus,
)
from tests.training.conftest import MakeRecipe


@pytest.mark.parametrize(
    "variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"]
)
def test_other_engines_are_refused(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match="accelerate is configured for") as caught:
        make_accelerator(make_recipe())
    assert "torchrun --nproc_per_node N -m spectune train" in str(caught.value.hint)


def test_the_environment_of_accelerate_changes_nothing(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    made = make_accelerator(make_recipe(run={"accumulation": 3, "device": "cpu"}))
    assert (made.mixed_precision, made.gradient_accumulation_steps) == ("no", 3)
    assert made.state.dynamo_plugin is not None
    assert made.state.dynamo_plugin.backend == "NO"
    assert made.ddp_handler is not None
    assert not made.ddp_handler.broadcast_buffers
    assert made.ddp_handler.gradient_as_bucket_view


def test_the_processes_are_described(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    four = cast("Accelerator", SimpleNamespace(num_processes=4))
    recipe = make_recipe(run={"batch": 3, "accumulation": 2})
    assert described_processes(four, recipe) == (
        "4 processes on 2 hosts, connected by nccl: 24 images per optimizer step (3 per batch, 2 batches per "
        "process)"
    )
    assert described_processes(cast("Accelerator", SimpleNamespace(num_processes=1)), recipe) is None


@pytest.mark.parametrize(
    ("device", "used", "warned"), [("auto", "1", True), ("auto", "4", False), ("cuda:1", "1", False)]
)
def test_unused_gpus_are_a_warning(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, device: str, used: str, *, warned: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", used)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda", 0))
    found = list(unused_gpus(on_gpu, make_recipe(run={"device": device})))
    assert bool(found) == warned
    assert all("torchrun --nproc_per_node 4" in line for line in found)


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 12000ms", "no answer for .* = 0.2$"),
        ("[gloo/transport/tcp/pair.cc:538] Connection closed by peer", "one of them has ended$"),
    ],
)
def test_a_lost_connection_is_explained_once_on_each_host(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, what: str, cause: str
) -> None:
    two = cast("Accelerator", SimpleNamespace(num_processes=2, process_index=1))
    recipe = make_recipe(run={"timeout_minutes": 0.2})
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with (
            pytest.raises(SpectuneError, match=f"process 1 .* lost the other processes: {cause}") as caught,
            lost_connection_explained(two, recipe),
        ):
            raise RuntimeError(what)
        assert caught.value.is_reported == (rank == "1")


def test_another_error_is_not_explained_as_a_lost_connection(make_recipe: MakeRecipe) -> None:
    two = cast("Accelerator", SimpleNamespace(num_processes=2, process_index=1))
    with pytest.raises(RuntimeError, match="shapes"), lost_connection_explained(two, make_recipe()):
        raise RuntimeError("shapes differ")

"""Several processes train the same as one process with accumulation, share the work, and stop together."""

from __future__ import annotations

import os
import re
import signal
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from spectune.model.network import Sdxl
from spectune.training import loop
from spectune.training.data import folders, latents
from spectune.training.data.cache import filling
from spectune.training.frames import making
from spectune.training.loop import train
from spectune.training.output import step_of
from spectune.training.recipe.recipe import Recipe, parse_recipe
from spectune.training.state import load_state
from tests.training.ranks import (
    Ended,
    Ranks,
    deltas,
    errors,
    largest_difference,
    launch,
    stop_when_saved,
    write_recipe,
)


class Counts(dict[str, int]):
    """Work that a process does: encoded images, split layers, bytes of gradients that DDP sends."""

    def __init__(self) -> None:
        super().__init__(images=0, layers=0, sent=0)

    def calls(self, key: str, function: Any, amount: Any = lambda *args: 1) -> Any:
        """Return a function that counts its calls."""

        def counted(*args: Any) -> Any:
            self[key] += amount(*args)
            return function(*args)

        return counted

    def sum_gradients(self, bucket: Any) -> Any:
        self["sent"] += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(None, bucket)  # pyright: ignore[reportArgumentType]


def count_work(rank: int) -> Counts:
    """Count what this process does. Few images are divided among the processes."""
    counts = Counts()
    latents.ENCODE_BATCH = 1
    made, connect = making.make_frame, loop.make_accelerator
    encode = counts.calls("images", Sdxl.encode_posteriors, lambda model, pixels: len(pixels))
    Sdxl.encode_posteriors = encode  # pyright: ignore[reportAttributeAccessIssue]
    making.make_frame = counts.calls("layers", made)

    def connected(recipe: Recipe) -> Any:
        accelerator = connect(recipe)
        prepare: Any = accelerator.prepare

        def prepared(*things: Any, **options: Any) -> Any:
            made = prepare(*things, **options)
            if len(things) == 2:  # the network and its optimizer
                made[0].register_comm_hook(None, lambda state, bucket: counts.sum_gradients(bucket))
            return made

        accelerator.prepare = prepared
        return accelerator

    loop.make_accelerator = connected
    return counts


def run(folder: Path, recipe: Recipe, processes: int, *, second: Recipe | None = None) -> list[Ended]:
    """Train in several processes; `second` is the recipe of the second process."""
    commands = [["train", str(write_recipe(recipe, folder / "recipe.toml"))] for _ in range(processes)]
    if second is not None:
        commands[1][1] = str(write_recipe(second, folder / "second" / "recipe.toml"))
    return Ranks(folder, commands, prepare=count_work).wait()


def trained(folder: Path, recipe: Recipe, processes: int) -> list[Ended]:
    """Train in several processes; the test fails if they do."""
    ended = run(folder, recipe, processes)
    for one in ended:
        assert one.code == 0, one.said[-3000:]
    return ended


EDM2 = pytest.param({"weighting": "edm2"}, marks=pytest.mark.slow, id="edm2")


@pytest.mark.parametrize("loss", [pytest.param({}, id="plain"), EDM2])
def test_two_and_four_processes_equal_one_with_accumulation(
    recipe_for: Any, picture_folder: Path, tmp_path: Path, loss: dict[str, Any]
) -> None:
    data = {"random_crop": False, "validation_folder": picture_folder / "held_out"}
    train(recipe_for("1", 4, loss=loss, data=data))
    one = tmp_path / "1" / "t.safetensors"
    for processes in (2, 4):
        name = str(processes)
        ended = trained(
            tmp_path / "logs" / name, recipe_for(name, 4 // processes, loss=loss, data=data), processes
        )
        assert largest_difference(one, tmp_path / name / "t.safetensors") <= 1e-6
        for key, total in (("images", 2 * 6 + 2), ("layers", len(deltas(one)) // 2)):
            # pictures for training, also mirrored, and for validation; each is encoded once
            counts = [process.counts[key] for process in ended]
            assert sum(counts) == total
            assert max(counts) - min(counts) <= 1
        if not loss:
            numbers = sum(tensor.numel() for tensor in deltas(one).values())
            sent = {process.counts["sent"] for process in ended}
            assert sent == {2 * 4 * numbers}  # steps, bytes of float32


@pytest.mark.slow
def test_one_process_writes_the_cache_of_all(
    recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, once = {"random_crop": False, "cache_folder": tmp_path / "cache"}, {"steps": 1}
    ended = trained(tmp_path / "logs", recipe_for("two", 1, data=data, run=once), 2)
    assert [process.counts["images"] for process in ended] == [6, 6]
    assert len(list((tmp_path / "cache").rglob("[0-9]*.safetensors"))) == 1
    monkeypatch.setattr(filling, "encode_views", lambda *_: pytest.fail("encoded twice"))
    train(recipe_for("one", 2, data=data, run=once))
    assert largest_difference(*(tmp_path / name / "t.safetensors" for name in ("one", "two"))) <= 1e-6


def test_a_run_continues_with_half_of_the_processes_and_says_what_changes(
    recipe_for: Any, tmp_path: Path
) -> None:
    """The order of the images stays the same: that of one process with as many images per step."""
    train(recipe_for("one", 4, run={"steps": 1}))
    train(recipe_for("one", 2))
    trained(tmp_path / "logs" / "4", recipe_for("many", 1, run={"steps": 1}), 4)
    main, other = trained(tmp_path / "logs" / "2", recipe_for("many", 1), 2)
    assert largest_difference(*(tmp_path / name / "t.safetensors" for name in ("one", "many"))) <= 1e-6
    said = " ".join(main.said.split())
    assert "an optimizer step had 4 batches and now has 2" in said
    assert "the order of the images continues" in said
    assert "warning" not in other.said


@pytest.mark.slow
def test_two_processes_continue_after_four_were_killed(recipe_for: Any, tmp_path: Path) -> None:
    saving = {"steps": 100_000, "save_every_steps": 1}
    recipe = write_recipe(recipe_for("many", 1, run=saving), tmp_path / "recipe.toml")
    ranks = Ranks(tmp_path / "killed", [["train", str(recipe)]] * 4)
    ranks.wait_for_files(tmp_path / "many", "*.state")
    for process in ranks.processes:
        process.kill()
    ranks.wait()
    last = {"steps": max(step_of(path) for path in (tmp_path / "many").glob("*.state")) + 1}
    trained(tmp_path / "logs", recipe_for("many", 2, run=last), 2)
    train(recipe_for("one", 4, run=last))
    assert largest_difference(*(tmp_path / name / "t.safetensors" for name in ("one", "many"))) <= 1e-6


@pytest.mark.parametrize(
    ("second", "message"),
    [
        pytest.param(
            {"optimizer": {"learning_rate": 2e-3}},
            "the recipe of process 0 on .* and of process 1 on .* differ",
            id="another recipe",
        ),
        pytest.param(
            {"data": {"folders": ["/nowhere"]}},
            "process 1 on .*: .*nowhere",
            id="missing pictures",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_different_inputs_stop_all_processes_with_one_message(
    recipe_for: Any, tmp_path: Path, second: dict[str, Any], message: str
) -> None:
    sections: dict[str, Any] = recipe_for("two", 1).model_dump(exclude_unset=True)
    for section, keys in second.items():
        sections[section] |= keys
    ended = run(tmp_path / "logs", recipe_for("two", 1), 2, second=parse_recipe(sections))
    assert [one.code for one in ended] == [2, 2]
    assert [re.match(message, error) is not None for error in errors(ended)] == [True]
    assert not (tmp_path / "two").exists()


def test_an_error_before_the_processes_connect_is_printed_once(tmp_path: Path) -> None:
    ended = Ranks(tmp_path / "logs", [["train", str(tmp_path / "missing.toml")]] * 2).wait()
    assert [one.code for one in ended] == [2, 2]
    assert ["missing.toml does not exist" in error for error in errors(ended)] == [True]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="torchrun ends its processes without a signal on Windows")
def test_sigterm_to_torchrun_saves(recipe_for: Any, tmp_path: Path) -> None:
    run = {"steps": 100_000, "save_every_steps": 3}
    recipe = recipe_for("run", 1, run=run, data={"workers": 1})
    log = tmp_path / "log.txt"
    path = write_recipe(recipe, tmp_path / "recipe.toml")
    launcher = launch(path, log, "--standalone", "--nproc_per_node", "2")
    stop_when_saved([launcher], tmp_path / "run", log)


# The place in the code where process 1 and its data workers get a signal in its second call, by stage.
PLACES: dict[str, tuple[Any, str]] = {
    "scanning": (folders, "scan_folder"),
    "splitting": (making, "make_frame"),
    "encoding": (Sdxl, "encode_posteriors"),
    "training": (loop, "train_batch"),
}


def send_in_stage(stage: str, number: int, rank: int) -> None:
    """Let process 1 get a signal in the second call of a stage."""
    latents.ENCODE_BATCH = 1
    os.setpgrp()  # without the process that runs the tests
    owner, name = PLACES[stage]
    function, calls = getattr(owner, name), count(1)

    def call(*args: Any, **options: Any) -> Any:
        if rank == 1 and next(calls) == 2:
            os.killpg(os.getpgrp(), number)
        return function(*args, **options)

    setattr(owner, name, call)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        pytest.param("scanning", "SIGTERM", marks=pytest.mark.slow),
        pytest.param("splitting", "SIGUSR1", marks=pytest.mark.slow),
        ("encoding", "SIGTERM"),
        ("training", "SIGUSR1"),
    ],
)
def test_a_signal_to_one_process_ends_all(
    recipe_for: Any, picture_folder: Path, tmp_path: Path, stage: str, name: str
) -> None:
    number, cache = int(signal.Signals[name]), tmp_path / "cache"
    data = {"validation_folder": picture_folder / "held_out", "cache_folder": cache, "random_crop": False}
    data["workers"] = int(stage == "training")
    recipe = recipe_for("two", 1, data=data, run={"steps": 1000})
    path = write_recipe(recipe, tmp_path / "recipe.toml")
    ended = Ranks(
        tmp_path / "logs", [["train", str(path)]] * 2, prepare=partial(send_in_stage, stage, number)
    ).wait()
    said = "".join(one.said for one in ended)
    assert "Traceback" not in said, said
    if stage == "training":
        # data workers, which are in the group, do not end
        assert [one.code for one in ended] == [130, 130]
        assert said.count("to continue from this step, run the same command again") == 1
        (state,) = (tmp_path / "two").glob("*.state")
        assert load_state(state).header.step == 2
        return
    assert [one.code for one in ended] == [128 + number] * 2
    assert len(re.findall(f"stopped by {name}", said)) == 1
    assert not (tmp_path / "two").exists()
    files = [file for file in cache.rglob("*") if file.is_file()] if cache.exists() else []
    assert all(load_file(file) for file in files)  # complete, and no temporary file
    assert bool(files) == (stage == "encoding")

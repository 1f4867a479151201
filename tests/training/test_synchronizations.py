"""A step waits for the device at most twice: each read of a value keeps the host from running ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectune.model.device import tf32_products
from spectune.training import loop, train_step
from spectune.training.denoiser import Denoiser
from spectune.training.loop import train
from tests.training.conftest import MakeRecipe

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")


class Reads(TorchDispatchMode):
    """Counts operations that wait for the values of a tensor: item, float, bool, tolist, cpu."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        self.is_on = False
        self.on_host: list[Tensor] = []  # what `cpu` returned; reading it again costs nothing
        for name in ("tolist", "cpu"):
            monkeypatch.setattr(Tensor, name, self._counted(getattr(Tensor, name)))

    def __enter__(self) -> Reads:
        self.is_on = True
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.is_on = False
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in READS:
            self.count += all(
                args[0].untyped_storage().data_ptr() != host.data_ptr() for host in self.on_host
            )
        return func(*args, **(kwargs or {}))

    def _counted(self, plain: Any) -> Any:
        def method(tensor: Tensor, *args: Any) -> Any:
            self.count += self.is_on
            result = plain(tensor, *args)
            if self.is_on and isinstance(result, Tensor):
                self.on_host.append(result)
            return result

        return method


@pytest.mark.parametrize(
    ("optimizer", "model", "run"),
    [
        ("adamw", {}, {}),
        ("adamw", {"form": "residual"}, {"precision": "bf16", "gradient_checkpointing": True}),
        ("adamw", {"parts": ["unet"]}, {"precision": "fp16", "stream": True}),
        ("prodigy_plus_schedule_free", {}, {"precision": "bf16"}),
        ("prodigy", {}, {}),
        ("lion", {}, {}),
        ("adafactor", {}, {}),
    ],
)
def test_a_step_reads_at_most_two_values(
    optimizer: str,
    model: dict[str, Any],
    run: dict[str, Any],
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = Reads(monkeypatch)
    counts: list[int] = []
    plain_step, plain_info = loop.train_batch, loop.step_info

    def train_batch(*args: Any, **options: Any) -> Any:
        reads.count = 0
        with reads:
            return plain_step(*args, **options)

    def step_info(*args: Any, **options: Any) -> Any:
        with reads:
            info = plain_info(*args, **options)
        counts.append(reads.count)
        return info

    monkeypatch.setattr(loop, "train_batch", train_batch)
    monkeypatch.setattr(loop, "step_info", step_info)
    loss = {"weighting": "min_snr"}
    train(make_recipe(model=model, loss=loss, optimizer={"name": optimizer, "learning_rate": ...}, run=run))
    assert len(counts) == 3
    assert all(1 <= count <= 2 for count in counts[1:]), counts  # the first step makes the optimizer's state


def test_only_training_steps_use_tf32(
    make_recipe: MakeRecipe, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames, validation and previews keep all bits of float32 on a GPU."""
    inside: list[str] = []
    monkeypatch.setattr(train_step, "tf32_products", lambda device: tf32_products(torch.device("cuda")))
    plain = Denoiser.forward

    def forward(denoiser: Denoiser, *args: Any) -> Tensor:
        inside.append(f"{denoiser.training} {torch.get_float32_matmul_precision()}")
        return plain(denoiser, *args)

    monkeypatch.setattr(Denoiser, "forward", forward)
    held_out = picture_folder / "held_out"
    train(
        make_recipe(
            model={"frame": "gradient", "frame_batches": 1},
            data={"validation_folder": held_out},
            run={"steps": 1},
        )
    )
    assert set(inside) == {"True highest", "True high", "False highest"}, set(inside)

"""The setup that fits a GPU: the ladder, the choice and its recipe."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from spectune.errors import InputError
from spectune.training.memory.account import Fixed, Memory, Setup
from spectune.training.memory.meter import MemoryMeter
from spectune.training.memory.search import described, ladder, plan, recipe_text
from spectune.training.recipe.recipe import parse_recipe


def memory_of(unet: int) -> Memory:
    ways = {"float32": 0, "tiles": 0}
    return Memory(Fixed(unet, 0, 0, 0, 0, 0), 0, 0, 0, 0, 0, 0, ways, 0, 0, ways)


def test_the_total_is_the_largest_stage_and_a_reserve() -> None:
    memory = Memory(
        fixed=Fixed(unet=1000, encoders=200, vae=0, frame=20, joined=10, trained=30),
        gradients=30,
        optimizer=60,
        average=0,
        kept=400,
        working=50,
        unpacked=0,
        encoding={"float32": 2760, "bfloat16": 1780, "tiles": 1760},
        encoding_text=300,
        sampling=1400,
        decoding={"float32": 2000, "tiles": 1500},
    )
    assert (memory.allocated, memory.limit) == (1800, "training")
    assert memory.total == 1800 + 600_000_000 + 90
    text = replace(memory, encoding_text=1900)
    assert (text.limit, text.total) == ("encoding captions", 1900 + 600_000_000 + 95)
    images = replace(memory, encoding={"float32": 2760, "tiles": 1900})
    assert (images.limit, images.peak) == ("encoding images", 1900)
    assert replace(memory, sampling=1900).limit == "sampling previews"
    assert replace(memory, decoding={"float32": 2000, "tiles": 1900}).limit == "decoding previews"


def test_a_stage_is_done_in_the_most_exact_way_that_fits() -> None:
    memory = replace(memory_of(10), encoding={"float32": 300, "bfloat16": 200, "tiles": 100})
    ways = {vram: memory.way_within("encoding images", 600_000_000 + vram) for vram in (315, 314, 209, 1)}
    assert ways == {315: "float32", 314: "bfloat16", 209: "tiles", 1: "tiles"}


class FakeMeter(MemoryMeter):
    """A meter with invented sizes. The first setup of the ladder is the largest."""

    def __init__(self, requested: Setup) -> None:
        self.setups = list(ladder(requested))
        self.measured: list[Setup] = []

    def measure(self, setup: Setup) -> Memory:
        self.measured.append(setup)
        return memory_of(1_000_000_000 * (len(self.setups) - self.setups.index(setup)))

    def least(self, setup: Setup) -> int:
        return memory_of(900_000_000 * (len(self.setups) - self.setups.index(setup))).total


def test_the_ladder_goes_from_the_request_to_the_smallest_setup() -> None:
    setups = [described(setup) for setup in ladder(Setup(rank=16))]
    lean = "checkpointing, text+vae offloaded"
    assert setups == [
        "rank 16, unet+te1+te2, delta, bf16 base",
        *(
            f"rank {rank}, {settings}"
            for rank in (16, 8)
            for settings in (
                "unet+te1+te2, delta, bf16 base, checkpointing",
                "unet+te1+te2, delta, bf16 base, checkpointing, vae offloaded",
                f"unet, delta, bf16 base, {lean}",
                f"unet, delta, bf16 base, {lean}, streamed",
                f"unet, residual, bf16 base, {lean}, streamed",
                f"unet, residual, int8 base, {lean}",
                f"unet, residual, nf4 base, {lean}",
            )
        ),
    ]
    rounding = Setup(rank=8, parts=("unet",), optimizer="prodigy_plus_schedule_free")
    assert described(list(ladder(rounding))[-1]) == (
        f"rank 8, unet, residual, bf16 base, bf16 trained, {lean}, streamed"
    )


def test_the_first_setup_that_fits_is_the_best_and_two_more_are_returned() -> None:
    meter = FakeMeter(Setup(rank=16))
    third = meter.measure(meter.setups[2]).total
    meter.measured.clear()
    result = plan(meter, meter.setups[0], third)
    assert result.best.setup == meter.setups[2]
    assert [candidate.setup for candidate in result.too_large] == meter.setups[:2]
    assert [candidate.setup for candidate in result.runners_up] == meter.setups[3:5]
    assert plan(meter, meter.setups[0], third - 1).best.setup == meter.setups[3]


def test_setups_that_are_too_large_without_activations_are_not_measured() -> None:
    meter = FakeMeter(Setup(rank=16))
    result = plan(meter, meter.setups[0], meter.least(meter.setups[4]))
    assert set(meter.setups[:4]).isdisjoint(meter.measured)
    assert [candidate.memory for candidate in result.too_large[:4]] == [None] * 4


def test_the_error_names_the_smallest_setup() -> None:
    meter = FakeMeter(Setup(rank=16))
    with pytest.raises(
        InputError, match=r"nothing fits 1\.00 GB: the smallest setup, rank 8, .* takes 1\.65 GB"
    ):
        plan(meter, meter.setups[0], 10**9)


@pytest.mark.parametrize("index", [0, 2, 3, 5, 7])
def test_the_recipe_has_the_planned_setup(index: int) -> None:
    setup = list(ladder(Setup(rank=16, batch=3, resolution_px=768)))[index]
    data = tomllib.loads(recipe_text(setup, 'models/the "best".safetensors'))
    data["data"]["folders"] = ["pictures"]
    data["run"] |= {"name": "t", "output": "out", "steps": 1}
    recipe = parse_recipe(data)
    model, run = recipe.model, recipe.run
    assert model.base == Path('models/the "best".safetensors')
    assert setup == Setup(
        rank=model.rank or 0,
        parts=model.parts,
        resolution_px=recipe.data.resolution_px,
        batch=run.batch,
        form=model.form,
        quantize=model.quantize,
        precision=run.precision,
        trained_precision=run.trained_precision,
        gradient_checkpointing=run.gradient_checkpointing,
        offload=run.offload,
        stream=run.stream,
        optimizer=recipe.optimizer.name,
    )


def test_full_fine_tuning_has_a_ladder_of_its_own() -> None:
    requested = Setup(rank="full", optimizer="adafactor", trained_precision="bf16", step_in_backward=True)
    setups = list(ladder(requested))
    assert [described(setup) for setup in setups] == [
        "full, unet+te1+te2, step in backward, bf16 base",
        "full, unet+te1+te2, step in backward, bf16 base, checkpointing",
        "full, unet+te1+te2, step in backward, bf16 base, checkpointing, vae offloaded",
        "full, unet, step in backward, bf16 base, checkpointing, text+vae offloaded",
    ]
    recipe = tomllib.loads(recipe_text(setups[-1], "base.safetensors"))
    assert recipe["model"] == {"base": "base.safetensors", "rank": "full", "parts": ["unet"]}
    assert recipe["optimizer"] == {"name": "adafactor", "max_grad_norm": 0, "step_in_backward": True}
    assert "all gradients" not in described(setups[0])
    after = replace(requested, step_in_backward=False)
    assert "step after backward" in described(after)

"""Runs that fold their changes into the weights and take new frames."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.refresh_matrix import left_over
from spectune.adapters.adapter import REPLACED
from spectune.checkpoints.open import open_checkpoint
from spectune.core.frames import principal_frame
from spectune.errors import InputError
from spectune.model.inject import AdaptedLayer
from spectune.ops.rebuild import rebuild
from spectune.sdxl.layers import build_catalogue, layer_weight
from spectune.training import loop
from spectune.training.frames.refresh import Refresher
from spectune.training.loop import train
from spectune.training.recipe.recipe import Recipe
from spectune.training.recipe.sections.model import ModelSection
from spectune.training.run import Run
from spectune.training.saving.disk import plan_saves
from tests.training.conftest import FEW_LAYERS, MakeRecipe
from tests.training.test_distributed import trained
from tests.training.test_loop import same_tensors

# one of the three layers of a joined tensor, and all three
LAYERS = [*FEW_LAYERS["unet"], "te2.*.0.*q_proj", "te2.*.1.*_proj"]


def refreshed(make_recipe: MakeRecipe, **sections: dict[str, Any]) -> Recipe:
    model = {"layers": LAYERS, "refresh_every_steps": 2, "refresh_warmup_steps": 1}
    sections["model"] = {**model, **sections.get("model", {})}
    return make_recipe(**sections)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Return the list of the runs that `train` makes from here on."""
    made: list[Run] = []
    assemble = loop.assemble

    def keep(*args: Any) -> Run:
        made.append(assemble(*args))
        return made[-1]

    monkeypatch.setattr(loop, "assemble", keep)
    return made


def weights_of(run: Run) -> dict[str, Tensor]:
    return {name: layer.base.weight.detach() for name, layer in run.model.injection.layers.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rebuild_gives_the_trained_weights_bit_for_bit(
    make_recipe: MakeRecipe, tiny_checkpoint: Path, tmp_path: Path, runs: list[Run], precision: str
) -> None:
    recipe = refreshed(make_recipe, run={"steps": 3, "precision": precision})
    report = train(recipe)
    assert any("refresh_every_steps hardly changes the principal frame" in line for line in report.warnings)
    (run,) = runs
    trained = weights_of(run)
    assert not any(tensor.any() for tensor in run.optimization.parameters.values()), "not folded at the end"
    file = report.files[-1]
    assert all(name.startswith(REPLACED) for name in load_file(file))
    assert file.stat().st_size == pytest.approx(plan_saves(run, loop.Progress()).adapter_bytes, abs=20_000)

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = rebuild(tiny_checkpoint, file, tmp_path / "model.safetensors", dtype=dtype).path
    touched = set[str]()
    with open_checkpoint(model) as built, open_checkpoint(tiny_checkpoint) as base:
        for layer in build_catalogue(built, all_layers=True):
            weight, before = layer_weight(built, layer), layer_weight(base, layer)
            if layer.name in trained:
                assert torch.equal(weight, trained[layer.name]), layer.name
                assert not torch.equal(weight, before.to(dtype)), layer.name
                touched.add(layer.tensor)
            else:
                assert torch.equal(weight, before.to(weight.dtype)), layer.name
        assert {f"{REPLACED}{name}" for name in touched} == set(load_file(file))


@pytest.mark.parametrize("frame", ["principal", pytest.param("plain", marks=pytest.mark.slow)])
def test_a_run_resumes_bit_for_bit_before_at_and_after_a_refresh(
    make_recipe: MakeRecipe, tmp_path: Path, frame: str
) -> None:
    def recipe(name: str) -> Recipe:
        run = {"output": tmp_path / name, "steps": 4, "precision": "bf16", "keep_last": 9}
        return refreshed(make_recipe, model={"frame": frame}, run={**run, "save_every_steps": 1})

    whole = train(recipe("whole")).files[-1]
    for step in (1, 2, 3):
        state = f"t-step{step:08d}.state"
        shutil.copytree(tmp_path / "whole" / state, tmp_path / f"from{step}" / state)
        report = train(recipe(f"from{step}"))
        assert report.first_step == step
        assert same_tensors(report.files[-1], whole), step
        last = "t-step00000004.state"
        for name in ("trained", "frames", "optimizer", "extras"):
            one, other = (
                tmp_path / folder / last / f"{name}.safetensors" for folder in ("whole", f"from{step}")
            )
            assert same_tensors(one, other), (step, name)


def test_the_rank_of_a_frame_does_not_limit_the_change(
    make_recipe: MakeRecipe, tiny_checkpoint: Path, runs: list[Run]
) -> None:
    ranks: dict[bool, int] = {}
    for refreshes in (False, True):
        model: dict[str, Any] = {"parts": ["unet"], "layers": ["unet.*attn2.to_k"]}
        more = {} if refreshes else {"refresh_every_steps": None, "refresh_warmup_steps": 2}
        run = {"steps": 6, "resume": False, "name": f"t{refreshes}"}
        train(refreshed(make_recipe, model={**model, **more}, run=run))
        name, weight = next(iter(weights_of(runs[-1]).items()))
        with open_checkpoint(tiny_checkpoint) as base:
            before = layer_weight(base, build_catalogue(base).by_name[name]).float()
        if not refreshes:
            layer = runs[-1].model.injection.layers[name]
            weight = before + layer.scale * (
                layer.up @ (layer.frame_down + layer.down) + layer.frame_up @ layer.down
            )
        s = torch.linalg.svdvals((weight.detach() - before).double())
        ranks[refreshes] = int((s > 1e-5 * s[0]).sum())
    assert ranks[False] <= 2 * 2
    assert ranks[True] > 2 * 2


def test_a_refresh_learns_a_change_of_full_rank_except_in_the_principal_frame() -> None:
    """The largest directions hardly change when a small change is added to their weight."""
    assert 0.7 < left_over(1, 1e-1, "plain") < 0.9
    assert left_over(1, 1e-1, "plain", every=20) < 0.3
    assert left_over(1, 3e-3, "principal", every=20) > 0.8
    assert left_over(1, 1e-1, "plain", every=20, keep=True) > 0.3  # the averages of the old directions


def adapted(dtype: torch.dtype) -> tuple[AdaptedLayer, Refresher]:
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(24, 16, dtype=dtype)
    base.weight.data = torch.randn(16, 24, generator=generator).to(dtype)
    layer = AdaptedLayer(base, principal_frame(base.weight.detach(), rank=3), "delta", torch.float32)
    section = ModelSection(base=Path("x"), rank=3, refresh_every_steps=10, refresh_warmup_steps=4)
    return layer, Refresher(section, 0, {"unet.x": layer}, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_changes_are_not_lost_in_rounding(dtype: torch.dtype) -> None:
    layer, refresher = adapted(dtype)
    optimizer = torch.optim.AdamW([layer.down, layer.up], lr=1e-3)
    start = layer.base.weight.detach().double()
    expected, rounded, generator = start.clone(), layer.base.weight.detach().clone(), torch.Generator()
    direction = torch.randn(16, 3, generator=generator.manual_seed(1))
    for step in range(30):
        layer.up.data = 1e-3 * direction
        added = (1e-3 * direction.double()) @ layer.frame_down.double()
        expected += added
        rounded = (rounded.double() + added).to(dtype)
        refresher.refresh(step, optimizer, lambda done, total: None)
        assert not layer.up.any()
    change = (expected - start).norm()
    exact = layer.base.weight.detach().double()
    if dtype == torch.bfloat16:
        assert (rounded.double() - expected).norm() > 0.1 * change  # without the rests
        assert (exact - expected).norm() < 2.0**-9 * expected.norm()  # the last rounding
        exact = exact + refresher.rests["unet.x"].double()
    assert (exact - expected).norm() < 1e-3 * change
    frame = principal_frame(layer.base.weight.detach(), rank=3)
    assert torch.equal(layer.frame_up, frame.up)


def test_the_learning_rate_rises_again_after_each_refresh() -> None:
    _, refresher = adapted(torch.float32)
    factors = [refresher.rate_factor(step) for step in range(26)]
    assert factors[:10] == [1.0] * 10
    assert factors[10:15] == factors[20:25] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [step for step in range(1, 26) if refresher.is_due(step, 25)] == [10, 20, 25]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion", "adafactor"])
def test_the_optimizer_starts_anew(make_recipe: MakeRecipe, runs: list[Run], name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    optimizer = {"name": name, "learning_rate": 1e-3}
    train(
        refreshed(make_recipe, optimizer=optimizer, model={"parts": ["unet"], "layers": FEW_LAYERS["unet"]})
    )
    assert runs[0].optimization.optimizer.state_dict()["state"] == {}


@pytest.mark.slow
def test_streamed_weights_are_refreshed_too(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def file(name: str, **run: Any) -> bytes:
        settings = {"output": tmp_path / name, "precision": "bf16", **run}
        return train(refreshed(make_recipe, run=settings)).files[-1].read_bytes()

    assert file("plain") == file("streamed", stream=True)


@pytest.mark.slow
def test_two_processes_refresh_like_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def recipe(name: str, accumulation: int) -> Recipe:
        run = {"name": name, "output": tmp_path / name, "steps": 3, "batch": 2, "accumulation": accumulation}
        return refreshed(make_recipe, run=run, optimizer={"learning_rate": 1e-3, "options": {"eps": 1e-2}})

    one = load_file(train(recipe("one", 2)).files[-1])
    trained(tmp_path / "ranks", recipe("two", 1), 2)
    two = load_file(tmp_path / "two" / "two.safetensors")
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-6


REFUSED: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "residual": ({"model": {"form": "residual"}}, 'needs `form = "delta"`'),
    "gradient": ({"model": {"frame": "gradient"}}, 'cannot be combined with `frame = "gradient"`'),
    "ema": ({"run": {"ema_decay": 0.9}}, r"run\.ema_decay averages the trained tensors"),
    "schedule-free": (
        {"optimizer": {"name": "adamw_schedule_free"}},
        "adamw_schedule_free averages its steps since the start",
    ),
    "prodigy": (
        {"optimizer": {"name": "prodigy", "learning_rate": 1.0}},
        "prodigy finds its own step size since the start: use adamw, adamw8bit, lion or adafactor",
    ),
    "teacher": (
        {"objective": {"kind": "flow", "teacher": "eps"}},
        "needs the weights of the base, which model.refresh_every_steps changes",
    ),
    "without": (
        {"model": {"refresh_every_steps": None}},
        "`refresh_warmup_steps` does nothing without `refresh_every_steps`",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_refresh_cannot_be_combined_with(make_recipe: MakeRecipe, kind: str) -> None:
    sections, what = REFUSED[kind]
    with pytest.raises(InputError, match=what):
        refreshed(make_recipe, **sections)

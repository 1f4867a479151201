"""Every recipe trains for two steps on the embedded base, with few images and small batches."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_any_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.layout import part_of
from spectune.training.callbacks import Callbacks, StepInfo
from spectune.training.loop import train
from spectune.training.output import adapter_file
from spectune.training.recipe.file import load_recipe
from spectune.training.recipe.recipe import Recipe

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
STEPS = 2
IMAGES = 2
EDGE_PX = 32  # half the resolution of the base: a quarter of the work

# Overrides for recipes that need bitsandbytes, if it is not installed.
HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None
WITHOUT_BITSANDBYTES = {
    "emoji3d_8gb": ('model.quantize="none"', 'optimizer.name="adamw"'),
    "emoji3d_flow_noobai": ('optimizer.name="adamw"',),
}

# Objective, loss, weighting and trained parts of each recipe, from the guide and its tips.
UNET, ENCODERS = ("unet",), ("te1", "te2")
CASES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "emoji3d_8gb": ("eps", "mse", "min_snr", UNET),
    "emoji3d_edm2": ("eps", "mse", "edm2", UNET),
    "emoji3d_encoders": ("eps", "mse", "debiased", ENCODERS),
    "emoji3d_eps": ("eps", "mse", "min_snr", UNET),
    "emoji3d_flow": ("flow", "fft", "none", UNET + ENCODERS),
    "emoji3d_flow_bigasp": ("flow", "mse", "none", UNET),
    "emoji3d_flow_noobai": ("flow", "mse", "none", UNET),
    "emoji3d_full": ("eps", "mse", "min_snr", UNET),
    "emoji3d_gpus": ("eps", "mse", "min_snr", UNET + ENCODERS),
    "emoji3d_to_flow": ("flow", "mse", "none", UNET),
    "emoji3d_unet": ("eps", "mse", "min_snr", UNET),
    "emoji3d_v": ("v", "mse", "min_snr", UNET + ENCODERS),
    "emoji3d_vae": ("eps", "mse", "min_snr", UNET + ENCODERS),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: threads do not speed up tensors this small, and slow them down on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Losses(Callbacks):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step(self, info: StepInfo) -> None:
        self.seen.append(info.loss)


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of a few training and validation images of the demo, in kohya's layout."""
    parents: dict[str, Path] = {}
    for kind, source in (("images", "10_emoji3d"), ("validation", "1_emoji3d")):
        parents[kind] = tmp_path_factory.mktemp(kind)
        folder = parents[kind] / "1_few"
        folder.mkdir()
        for image in sorted((ROOT / "demo" / kind / source).glob("*.webp"))[:IMAGES]:
            shutil.copy(image, folder)
            shutil.copy(image.with_suffix(".txt"), folder)
    return parents


def short_recipe(path: Path, images: dict[str, Path], output: Path) -> Recipe:
    """Return a recipe that takes seconds but keeps its method."""
    overrides = [
        f"run.steps={STEPS}",
        f"run.output={output.as_posix()}",
        "run.batch=2",
        "run.accumulation=1",
        "run.tensorboard=false",
        "run.validation_times=1",
        f"data.resolution_px={EDGE_PX}",
        f"data.folders=['{images['images'].as_posix()}']",
        f"data.validation_folder={images['validation'].as_posix()}",
        *(() if HAS_BITSANDBYTES else WITHOUT_BITSANDBYTES.get(path.stem, ())),
    ]
    if load_recipe(path).optimizer.warmup_steps:
        overrides.append("optimizer.warmup_steps=1")
    if load_recipe(path).objective.start == "warm":
        overrides.append("objective.warm_images=8")
    return load_recipe(path, overrides)


def test_there_is_a_recipe_for_every_case() -> None:
    recipes = {path.stem: load_recipe(path) for path in RECIPES}
    cases = {
        name: (recipe.objective.kind, recipe.loss.kind, recipe.loss.weighting, recipe.model.parts)
        for name, recipe in recipes.items()
    }
    assert cases == CASES
    assert recipes["emoji3d_flow"].objective.flow_shift == 2.5
    assert recipes["emoji3d_flow"].optimizer.name == "prodigy_plus_schedule_free"
    assert recipes["emoji3d_to_flow"].objective.start == "warm"
    assert recipes["emoji3d_to_flow"].objective.teacher == "eps"
    assert recipes["emoji3d_flow_noobai"].objective.flow_pairing == "optimal_transport"
    assert recipes["emoji3d_full"].model.is_full
    assert recipes["emoji3d_full"].optimizer.step_in_backward
    assert recipes["emoji3d_vae"].vae.name == "eq-anzhc"
    assert recipes["emoji3d_8gb"].model.quantize == "nf4"
    launch = "torchrun --nproc_per_node 2 -m spectune train recipes/emoji3d_gpus.toml"
    assert launch in (ROOT / "recipes" / "emoji3d_gpus.toml").read_text(encoding="utf-8")


QUICK = ("emoji3d_flow", "emoji3d_encoders", "emoji3d_edm2")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_every_recipe_trains(path: Path, few_images: dict[str, Path], tmp_path: Path) -> None:
    recipe = short_recipe(path, few_images, tmp_path / "out")
    losses = Losses()
    report = train(recipe, callbacks=[losses])
    assert (report.steps, report.first_step, report.interrupted) == (STEPS, 0, False)
    assert len(losses.seen) == STEPS
    assert all(math.isfinite(loss) for loss in losses.seen)
    before, after = report.validation_before, report.validation_after
    assert before is not None
    assert after is not None
    assert math.isfinite(after)
    assert after != before, "two steps did not change the model"
    assert_trained(adapter_file(recipe.run.output, recipe.run.name), recipe)


def assert_trained(path: Path, recipe: Recipe) -> None:
    """Check that exactly the parts of the recipe changed, and that the file declares the new prediction."""
    with open_checkpoint(recipe.model.checkpoint) as source:
        catalogue = build_catalogue(source, all_layers=True)
    with open_any_adapter(path, catalogue) as tuned:
        assert isinstance(tuned, TunedAdapter)
        parts = {name.partition(".")[0] for name in tuned.layers}
        changed = {name.partition(".")[0] for name, delta in tuned.layers.items() if bool(delta.up.any())}
        if recipe.model.is_full:
            parts = changed = {part_of(name) for name in tuned.replaced}
        assert parts == changed == set(recipe.model.parts)
        assert tuned.provenance.prediction == recipe.objective.kind

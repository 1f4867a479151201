"""Fixtures for all tests: a tiny SDXL on disk, and the names and shapes of the full SDXL."""

from __future__ import annotations

import csv
import gc
import gzip
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from spectune.checkpoints.open import open_checkpoint
from spectune.files.source import MemorySource, TensorInfo
from spectune.files.writer import write_tensors
from spectune.sdxl.layout import hints_metadata
from tests.folder_fixtures import folder, tiny_folder  # noqa: F401
from tests.layouts import TINY, Modules, build_modules
from tests.split_fixtures import tiny_split  # noqa: F401

DATA = Path(__file__).parent / "data"


def pytest_configure() -> None:
    """Let Ctrl-C interrupt, also where a shell started the tests in the background and so has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shots", metavar="FOLDER", help="Write the screenshots of the browser tests there.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the browser tests, unless `-m` names them: `-m "not slow"` would select them."""
    if "browser" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def shots_folder(request: pytest.FixtureRequest) -> Path | None:
    """Return the folder of `--shots`."""
    chosen = request.config.getoption("--shots")
    return None if chosen is None else Path(chosen)


def pytest_collection_finish() -> None:
    """Take what is loaded out of garbage collection, which took a sixth of the time to visit it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session")
def tiny_modules() -> Modules:
    """Return the modules of the tiny SDXL, with random float32 parameters that fp16 represents exactly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = build_modules(TINY)
        with torch.no_grad():
            for module in (modules.unet, modules.te1, modules.te2, modules.vae):
                for parameter in module.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter)).copy_(parameter.half())
                module.eval().requires_grad_(False)
    return modules


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_modules: Modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny SDXL as a single file in fp16 (4.5 MB); copy it before changing it."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    tensors = {
        name: t.half() if t.is_floating_point() else t for name, t in tiny_modules.single_file().items()
    }
    write_tensors(path, tensors, metadata=hints_metadata(TINY))
    return path


@pytest.fixture(scope="session")
def source(tiny_checkpoint: Path) -> MemorySource:
    """Return the tiny SDXL in memory."""
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        values = {name: checkpoint.load(name) for name in checkpoint.tensors}
        return MemorySource(values, dict(checkpoint.metadata), checkpoint.label)


@pytest.fixture(scope="session")
def full_infos() -> Mapping[str, TensorInfo]:
    """Return the names and shapes of all 2515 tensors of the SDXL base checkpoint, in fp16."""
    lines = gzip.decompress((DATA / "sdxl_keys.tsv.gz").read_bytes()).decode().splitlines()[1:]
    return {info.name: info for info in map(_info, lines)}


def _info(line: str) -> TensorInfo:
    name, shape = line.split("\t")
    dtype = torch.int64 if name.endswith("position_ids") else torch.float16
    return TensorInfo(name, dtype, () if shape == "scalar" else tuple(int(n) for n in shape.split("x")))


@pytest.fixture(scope="session")
def diffusers_modules() -> Mapping[str, tuple[int, ...]]:
    """Return the weight shapes of all linear layers and convolutions of SDXL, by path: `unet.conv_in`."""
    text = gzip.decompress((DATA / "sdxl_modules_diffusers.csv.gz").read_bytes()).decode()
    rows = csv.DictReader(text.splitlines())
    return {f"{row['model']}.{row['module']}": tuple(int(n) for n in row["shape"].split("x")) for row in rows}

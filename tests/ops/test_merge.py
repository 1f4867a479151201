"""Test `merge`: the files that it writes, and the inputs that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import spectune
from spectune.checkpoints.open import open_checkpoint
from spectune.cli.app import run
from spectune.errors import InputError
from spectune.files.provenance import Role
from spectune.files.weights_hash import weights_hash
from spectune.ops.options.values import Summand, parse_summand
from spectune.pairs.strength import ModelWeights
from spectune.sdxl.layers import build_catalogue
from tests.loras import same_tensors, saved_lora
from tests.sample_pairs import read_metadata
from tests.split_fixtures import TinySplit


@pytest.fixture(scope="module")
def other(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merge") / "other.safetensors"
    moved = {n: t * 2 if t.is_floating_point() else t for n, t in load_file(tiny_checkpoint).items()}
    trained = {
        "ss_steps": "100",
        "spectune.adapters": "[]",
        "modelspec.title": "Other",
        "spectune.base_hash": "ab",
    }
    save_file(moved, path, metadata=read_metadata(tiny_checkpoint) | trained)
    return path


def test_merge_writes_the_sum_and_records_its_sources(
    tiny_checkpoint: Path, other: Path, tmp_path: Path
) -> None:
    words = [f"{other}:0.25", str(tiny_checkpoint)]
    report = spectune.merge(words, tmp_path / "x.safetensors")
    tiny = load_file(tiny_checkpoint)
    expected = {n: (t.float() * 1.25).half() if t.is_floating_point() else t for n, t in tiny.items()}
    skipped = "conditioner.embedders.1.model.logit_scale"  # no module of SDXL uses it
    made = load_file(report.path)
    assert torch.equal(made.pop(skipped), load_file(other)[skipped])
    expected.pop(skipped)
    assert same_tensors(made, expected)
    with open_checkpoint(report.path) as written, open_checkpoint(other) as source:
        declared, metadata = written.provenance, dict(written.metadata)
        assert report.hash == weights_hash(written)
        assert report.models[0].hash == weights_hash(source)
    assert json.loads(metadata["spectune.merged"]) == [
        {"file": "other.safetensors", "weights": "0.25", "hash": report.models[0].hash},
        {"file": "tiny.safetensors", "weights": "the rest", "hash": report.models[1].hash},
    ]
    assert (declared.role, declared.base_hash) == (Role.MODEL, None)
    assert metadata["modelspec.merged_from"] == "other.safetensors, tiny.safetensors"
    assert metadata["modelspec.title"] == "x"
    assert not {"ss_steps", "spectune.adapters"} & metadata.keys()
    assert report.summed == len(tiny) - 2


def test_a_model_merged_with_itself_is_copied_byte_for_byte(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = spectune.merge([f"{tiny_checkpoint}:0.3", f"{tiny_checkpoint}:0.7"], tmp_path / "x.safetensors")
    assert same_tensors(load_file(report.path), load_file(tiny_checkpoint))
    assert (report.summed, report.hash) == (0, report.models[0].hash)


def test_steps_4_and_5_of_the_guide_give_the_diff_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as source:
        extract = saved_lora(tmp_path / "extract.safetensors", build_catalogue(source))
    null, filled = tmp_path / "null.safetensors", tmp_path / "filled.safetensors"
    spectune.null(tiny_checkpoint, null)
    spectune.rebuild(null, extract, filled)
    diff = spectune.merge([f"{tiny_checkpoint}:1", f"{filled}:-1"], tmp_path / "diff.safetensors")
    direct = spectune.rebuild(tiny_checkpoint, extract, tmp_path / "direct.safetensors", strength=-1)
    one, other, tiny = (load_file(path) for path in (diff.path, direct.path, tiny_checkpoint))
    for name, tensor in one.items():
        assert float((tensor.double() - other[name].double()).abs().max()) <= 2**-10 * float(
            tiny[name].double().abs().max() + 1
        )
    assert diff.warnings == ()


def test_every_file_that_is_no_checkpoint_is_named(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    out, pair = tmp_path / "x.safetensors", tiny_split(None)
    assert pair.residual is not None
    with pytest.raises(InputError) as caught:
        spectune.merge([tiny_checkpoint, f"{pair.residual}:0.5", f"{pair.principal}:0.1"], out)
    assert f"{pair.residual.name} is a residual: expected a complete model; " in caught.value.what
    assert f"{pair.principal.name} is an adapter: expected a checkpoint" in caught.value.what
    assert "`spectune rebuild` adds an adapter" in (caught.value.hint or "")
    for words, message in (
        ([tiny_checkpoint], "got 1 checkpoint: expected two or more"),
        ([tiny_checkpoint, tiny_checkpoint], "2 files have no weight"),
        ([tiny_checkpoint, f"{tiny_checkpoint}:0,5"], "cannot parse '5' in the weights '0,5'"),
        ([tiny_checkpoint, f"{tiny_checkpoint}:half"], "unreadable weight 'half'"),
        ([tiny_checkpoint, f"{tiny_checkpoint}:te=1,te=2"], "te appears twice in the weights"),
        ([tiny_checkpoint, f"{tiny_checkpoint}:inf=inf"], "the weight in 'inf=inf' is inf"),
    ):
        with pytest.raises(InputError, match=message):
            spectune.merge(words, out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "path", "weights"),
    [
        ("a.safetensors", "a.safetensors", None),
        ("a.safetensors:-1", "a.safetensors", ModelWeights(-1.0)),
        (r"C:\models\a.safetensors", r"C:\models\a.safetensors", None),
        (r"C:\models\a.safetensors:.5", r"C:\models\a.safetensors", ModelWeights(0.5)),
        (r"C:\models\a:unet=0.3,te=0", r"C:\models\a", ModelWeights(0.0, {"unet": 0.3, "te": 0.0})),
        ("C:/models/pony", "C:/models/pony", None),
        ("pony:1e-1,vae=0", "pony", ModelWeights(0.1, {"vae": 0.0})),
    ],
)
def test_weights_follow_the_last_colon(word: str, path: str, weights: ModelWeights | None) -> None:
    summand = parse_summand(word)
    assert summand == Summand(Path(path), weights)
    assert parse_summand(f"{path}:{weights}") == summand if weights else str(summand) == "the rest"


def test_copies_that_are_cast_are_counted(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cast.safetensors"
    words = [f"{tiny_checkpoint}:0.5", f"{tiny_checkpoint}:0.5", "--dtype", "bfloat16", "-o", str(out)]
    assert run(["merge", *words]) == 0
    with open_checkpoint(tiny_checkpoint) as before, open_checkpoint(out) as after:
        cast = sum(before.tensors[name].dtype != info.dtype for name, info in after.tensors.items())
        count = len(after.tensors)
    assert cast > 0
    text = (
        f"0 of {count} tensors are sums, {cast} are cast to bfloat16, {count - cast} are copied byte for byte"
    )
    assert text in capsys.readouterr().err

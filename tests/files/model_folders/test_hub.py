"""Downloads: only for hub:owner/name, only .safetensors, and after the size was said. No network."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectune.errors import InputError, SpectuneError
from spectune.files.model_folders import hub
from spectune.ops.options.training import PlanOptions


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the hub by a repository with two files; return the downloads."""
    files: list[str] = []
    sizes = {"model.safetensors": 6_940_000_000, "vae/weights.safetensors": 300_000_000}
    monkeypatch.setattr(hub, "list_files", lambda repository: sizes)
    monkeypatch.setattr(hub, "fetch", lambda repository, file: Path(files.append(file) or "cache", file))
    return files


@pytest.mark.parametrize("word", ["hub:owner/name", "hub:owner/name/model.safetensors"])
def test_the_size_is_said_before_the_download(fetched: list[str], word: str) -> None:
    said: list[str] = []
    assert PlanOptions(model=word, notify=said.append).model == Path("cache/model.safetensors")  # pyright: ignore[reportArgumentType]
    assert said == ["downloading model.safetensors of owner/name, 6.94 GB, if not cached"]
    assert fetched == ["model.safetensors"]


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("hub:owner", "not of the form hub:owner/name"),
        ("hub:owner/../x.safetensors", "not of the form hub:owner/name"),
        ("hub:owner/name/model.ckpt", "only .safetensors files are downloaded"),
        ("hub:owner/name/pytorch_model.bin", "only .safetensors files are downloaded"),
        ("hub:owner/name/other.safetensors", "has no file other.safetensors"),
    ],
)
def test_other_words_download_nothing(fetched: list[str], word: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        hub.download(word)
    assert fetched == []


def test_several_checkpoints_are_listed_with_their_sizes(
    fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"a.safetensors": 6_900_000_000, "b.safetensors": 7_000_000_000}
    monkeypatch.setattr(hub, "list_files", lambda repository: sizes)
    with pytest.raises(InputError, match=r"2 .safetensors files at its root: expected 1") as caught:
        hub.download("hub:owner/name")
    assert "a.safetensors (6.90 GB), b.safetensors (7.00 GB)" in str(caught.value.hint)
    assert fetched == []


def test_an_unreachable_hub_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repository: str) -> dict[str, int]:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "list_files", refuse)
    with pytest.raises(SpectuneError, match="cannot download hub:owner/name: no route to host"):
        hub.download("hub:owner/name")

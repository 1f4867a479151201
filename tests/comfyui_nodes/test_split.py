"""Test the node Spectune Split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import spectune
from tests.comfyui_nodes.conftest import BASE
from tests.comfyui_nodes.fakes import Comfy, Interrupted

INPUTS: dict[str, Any] = {
    "checkpoint": BASE,
    "rank": 4,
    "residual_folder": "",
    "principal_folder": "",
}
RESIDUAL, PRINCIPAL = "tiny.residual.safetensors", "tiny.principal-r4.safetensors"


def run(comfy: Comfy, **changes: Any) -> tuple[str, str]:
    return comfy.run("SpectuneSplit", **{**INPUTS, **changes})


def test_both_files_appear_in_the_lists(comfy: Comfy) -> None:
    assert run(comfy) == (RESIDUAL, PRINCIPAL)
    assert comfy.files("checkpoints") == [RESIDUAL, BASE]
    assert comfy.files("loras") == [PRINCIPAL]
    assert sorted(path.name for path in comfy.folders["checkpoints"].iterdir()) == [RESIDUAL, BASE]
    done, total = comfy.bars[0][-1]
    assert done == total > 100
    report = spectune.verify(
        comfy.folders["checkpoints"] / BASE,
        comfy.folders["checkpoints"] / RESIDUAL,
        comfy.folders["loras"] / PRINCIPAL,
    )
    assert report.ok


def test_split_writes_the_same_files_as_the_library(comfy: Comfy, tmp_path: Path) -> None:
    run(comfy, residual_dtype="float32", layers="all")
    made = spectune.split(
        comfy.folders["checkpoints"] / BASE,
        tmp_path / "out",
        rank=4,
        residual_dtype="float32",
        layers=("all",),
    )
    assert made.residual is not None
    assert (comfy.folders["checkpoints"] / RESIDUAL).read_bytes() == made.residual.read_bytes()
    assert (comfy.folders["loras"] / PRINCIPAL).read_bytes() == made.principal.read_bytes()


def test_folders_are_inside_the_folders_of_comfyui(comfy: Comfy) -> None:
    assert run(comfy, residual_folder="parts", principal_folder="parts\\r4") == (
        str(Path("parts") / RESIDUAL),
        str(Path("parts") / "r4" / PRINCIPAL),
    )
    assert str(Path("parts") / "r4" / PRINCIPAL) in comfy.files("loras")


@pytest.mark.parametrize("folder", ["../outside", "a/../../outside"])
def test_folders_outside_are_refused(comfy: Comfy, folder: str) -> None:
    with pytest.raises(RuntimeError, match="is not a valid file name in loras"):
        run(comfy, principal_folder=folder)


def test_files_are_named_after_a_link_and_not_its_target(comfy: Comfy) -> None:
    (comfy.folders["checkpoints"] / "linked.safetensors").symlink_to(comfy.folders["checkpoints"] / BASE)
    assert run(comfy, checkpoint="linked.safetensors") == (
        "linked.residual.safetensors",
        "linked.principal-r4.safetensors",
    )


def test_existing_files_are_kept_without_overwrite(comfy: Comfy) -> None:
    (comfy.folders["loras"] / PRINCIPAL).write_text("mine")
    with pytest.raises(RuntimeError, match=r"already exists in loras\nhint: turn overwrite on"):
        run(comfy)
    assert (comfy.folders["loras"] / PRINCIPAL).read_text() == "mine"
    assert comfy.files("checkpoints") == [BASE]
    run(comfy, overwrite=True)
    assert len(load_file(comfy.folders["loras"] / PRINCIPAL)) > 100


@pytest.mark.parametrize("at", [1, 40])
def test_the_interrupt_button_leaves_no_file(comfy: Comfy, at: int) -> None:
    comfy.stop_at = at
    with pytest.raises(Interrupted):
        run(comfy)
    assert comfy.steps == at, "the node continued after the interrupt"
    assert comfy.files("checkpoints") == [BASE]
    assert comfy.files("loras") == []
    assert sorted(path.name for path in comfy.folders["checkpoints"].iterdir()) == [BASE]


def test_errors_show_the_problem_and_a_hint(comfy: Comfy) -> None:
    run(comfy)
    with pytest.raises(
        RuntimeError, match=r"is a residual: expected a complete model\nhint: pass the original"
    ):
        run(comfy, checkpoint=RESIDUAL)


def test_a_changed_file_is_split_again(comfy: Comfy) -> None:
    node = comfy.nodes.NODE_CLASS_MAPPINGS["SpectuneSplit"]
    before = node.IS_CHANGED(**INPUTS)
    assert node.IS_CHANGED(**INPUTS) == before != ""
    with (comfy.folders["checkpoints"] / BASE).open("ab") as file:
        file.write(b"x")
    assert node.IS_CHANGED(**INPUTS) != before
    assert node.IS_CHANGED(**{**INPUTS, "checkpoint": "gone.safetensors"}) == ""

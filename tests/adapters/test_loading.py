from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from spectune.adapters.loading import Loading, loading_table
from spectune.adapters.programs import CHECKPOINT_PROGRAMS, Feature, Program
from spectune.adapters.spellings import Spelling, spelled
from spectune.files.source import MemorySource, TensorInfo
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue
from tests.sample_adapters import (
    Tensors,
    as_peft,
    as_tuned,
    kohya_style,
    pair,
    pairs,
    renamed,
    without,
)


@pytest.fixture(scope="module")
def catalogue(source: MemorySource) -> Catalogue:
    return build_catalogue(source, all_layers=True)


@pytest.fixture(scope="module")
def default(catalogue: Catalogue) -> list[Layer]:
    return [layer for layer in catalogue if layer.default]


@pytest.fixture(scope="module")
def plain(default: list[Layer]) -> Tensors:
    return pairs(default)


@pytest.fixture(scope="module")
def layer(catalogue: Catalogue) -> Layer:
    return catalogue.by_name["unet.input_blocks.3.1.transformer_blocks.0.attn1.to_v"]


def loadings_of(tensors: dict[str, Tensor], catalogue: Catalogue) -> dict[Program, Loading]:
    found = loading_table(MemorySource(tensors, {}), catalogue)
    assert [loading.program for loading in found] == list(Program)
    return {loading.program: loading for loading in found}


def loads(loadings: dict[Program, Loading]) -> dict[str, int]:
    return {program.name.lower(): loading.loads for program, loading in loadings.items()}


def test_each_row_has_a_program_at_most_once_with_a_reason() -> None:
    assert len(Feature) == len(Feature.__members__)
    for feature in Feature:
        programs = [program for cell in feature.value for program in cell.programs]
        assert programs
        assert len(programs) == len(set(programs)), feature
        assert all(cell.reason for cell in feature.value)


def test_checkpoint_rows_do_not_contain_lycoris() -> None:
    rows = list(Feature)[list(Feature).index(Feature.OUTSIDE) :]
    programs = {program for row in rows for cell in row.value for program in cell.programs}
    assert programs == set(CHECKPOINT_PROGRAMS) == set(Program) - {Program.LYCORIS, Program.LYCORIS_FILE}


def test_the_default_layers_load_everywhere(plain: Tensors, catalogue: Catalogue) -> None:
    loadings = loadings_of(plain, catalogue)
    assert set(loads(loadings).values()) == {192}
    assert all(loading.complete and loading.of == 192 for loading in loadings.values())


def test_extra_layers(catalogue: Catalogue) -> None:
    loadings = loadings_of(pairs(catalogue), catalogue)
    assert loads(loadings) == {
        "comfyui": 198,
        "sd_scripts": 192,
        "lycoris": 192,
        "lycoris_file": 198,
        "diffusers": 198,
    }
    (ignored,) = loadings[Program.SD_SCRIPTS].ignores
    assert ignored.names == (
        "unet.time_embed.0",
        "unet.time_embed.2",
        "unet.label_emb.0.0",
        "unet.label_emb.0.2",
        "unet.input_blocks.0.0",
        "unet.out.2",
    )
    assert str(ignored).startswith("6 (unet.time_embed.0 (5 more)): does not train time and label embedding")
    (note,) = loadings[Program.DIFFUSERS].notes
    assert note.reason == "only since mid-2026; older versions refuse the file"
    assert loadings[Program.COMFYUI].complete


def test_one_missing_alpha_is_reported(plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    loadings = loadings_of(without(plain, f"{layer.kohya}.alpha"), catalogue)
    assert loads(loadings) == {
        "comfyui": 192,
        "sd_scripts": 192,
        "lycoris": 192,
        "lycoris_file": 0,
        "diffusers": 192,
    }
    reasons = {program.name: (c.refuses + c.notes)[0] for program, c in loadings.items()}
    assert {finding.names for finding in reasons.values()} == {(layer.name,)}
    assert reasons["COMFYUI"].reason == "uses scale 1 for a missing alpha"
    assert reasons["SD_SCRIPTS"].reason == "uses alpha = rank (scale 1) for a missing alpha"
    assert reasons["LYCORIS_FILE"].reason == "cannot build a layer without alpha"
    assert reasons["DIFFUSERS"].reason == "uses the most frequent alpha of the part for a missing alpha"


def test_a_file_without_alphas_is_reported(plain: Tensors, catalogue: Catalogue) -> None:
    loadings = loadings_of(without(plain, ".alpha"), catalogue)
    assert [len(note.names) for note in loadings[Program.DIFFUSERS].notes] == [192]
    assert loadings[Program.DIFFUSERS].notes[0].reason == "uses alpha = rank (scale 1) for a missing alpha"


@pytest.mark.parametrize(
    ("suffix", "shape"), [("diff_b", (32,)), ("diff", (32, 32)), ("lora_mid.weight", (2, 2, 1, 1))]
)
def test_keys_in_addition_to_a_pair_are_reported(
    suffix: str, shape: tuple[int, ...], plain: Tensors, layer: Layer, catalogue: Catalogue
) -> None:
    key = f"{layer.kohya}.{suffix}"
    loadings = loadings_of(plain | {key: torch.zeros(shape)}, catalogue)
    assert loadings[Program.COMFYUI].loads == loadings[Program.LYCORIS].loads == 192
    assert loadings[Program.LYCORIS].ignores[0].names == (key,)
    assert (loadings[Program.DIFFUSERS].loads, loadings[Program.DIFFUSERS].of) == (0, 192)
    assert str(loadings[Program.DIFFUSERS].refuses[0]) == f"1 ({key}): cannot rename these keys"


def test_norms_are_reported(plain: Tensors, catalogue: Catalogue) -> None:
    loadings = loadings_of(plain | {"lora_unet_out_0.w_norm": torch.zeros(16)}, catalogue)
    assert loadings[Program.COMFYUI].complete
    assert str(loadings[Program.LYCORIS].ignores[0]) == "1 (lora_unet_out_0.w_norm): train_norm=False"
    assert loadings[Program.DIFFUSERS].refuses


def test_a_difference_instead_of_a_pair_is_reported(
    plain: Tensors, layer: Layer, catalogue: Catalogue
) -> None:
    rest = {key: tensor for key, tensor in plain.items() if not key.startswith(f"{layer.kohya}.")}
    loadings = loadings_of(rest | {f"{layer.kohya}.diff": torch.zeros(layer.shape)}, catalogue)
    assert loads(loadings) == {
        "comfyui": 192,
        "sd_scripts": 191,
        "lycoris": 191,
        "lycoris_file": 192,
        "diffusers": 0,
    }


@pytest.mark.parametrize("suffix", ["hada_w1_a", "lokr_w2", "oft_blocks", "a1.weight"])
def test_other_kinds_of_adapter(suffix: str, plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    rest = {key: tensor for key, tensor in plain.items() if not key.startswith(f"{layer.kohya}.lora")}
    loadings = loadings_of(rest | {f"{layer.kohya}.{suffix}": torch.zeros(1)}, catalogue)
    assert loads(loadings)["comfyui"] == 192
    assert loads(loadings)["sd_scripts"] == 191
    assert loadings[Program.SD_SCRIPTS].ignores[0].names == (layer.name,)
    assert loadings[Program.DIFFUSERS].refuses


def test_peft_keys_are_reported(plain: Tensors, default: list[Layer], catalogue: Catalogue) -> None:
    loadings = loadings_of(as_peft(plain, default), catalogue)
    attention = [layer for layer in default if layer.part == "unet" and ".to_" in layer.name]
    assert loads(loadings) == {
        "comfyui": 192 - len(attention),
        "sd_scripts": 0,
        "lycoris": 0,
        "lycoris_file": 0,
        "diffusers": 192,
    }
    assert loadings[Program.COMFYUI].ignores[0].names == tuple(layer.name for layer in attention)
    assert loadings[Program.DIFFUSERS].complete


def test_one_layer_with_peft_keys_is_reported(plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    loadings = loadings_of(as_peft(plain, [layer]), catalogue)
    assert loads(loadings) == {
        "comfyui": 191,
        "sd_scripts": 191,
        "lycoris": 191,
        "lycoris_file": 191,
        "diffusers": 1,
    }


def test_one_layer_with_diffusers_names_is_reported(
    plain: Tensors, layer: Layer, catalogue: Catalogue
) -> None:
    loadings = loadings_of(renamed(plain, layer.kohya, kohya_style(layer)), catalogue)
    assert kohya_style(layer) == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v"
    # diffusers still loads that layer and those of the text encoders
    assert loads(loadings) == {
        "comfyui": 192,
        "sd_scripts": 192,
        "lycoris": 191,
        "lycoris_file": 191,
        "diffusers": 1 + 24,
    }
    assert loadings[Program.DIFFUSERS].ignores[0].reason == (
        "drops the sgm layers of a file with both spellings"
    )
    assert "can cause an error" in loadings[Program.SD_SCRIPTS].notes[1].reason


def test_a_file_with_diffusers_names_is_reported(
    plain: Tensors, default: list[Layer], catalogue: Catalogue
) -> None:
    tensors = plain
    for layer in default:
        if layer.part == "unet":
            tensors = renamed(tensors, layer.kohya, kohya_style(layer))
    found = loads(loadings_of(tensors, catalogue))
    assert (found["comfyui"], found["sd_scripts"], found["lycoris"], found["diffusers"]) == (
        192,
        192,
        24,
        192,
    )


def test_a_text_projection_is_reported(plain: Tensors, catalogue: Catalogue) -> None:
    stem = "lora_te2_text_projection"
    extra = {f"{stem}.lora_down.weight": torch.zeros(2, 24), f"{stem}.lora_up.weight": torch.zeros(20, 2)}
    loadings = loadings_of(plain | extra | {f"{stem}.alpha": torch.tensor(2.0)}, catalogue)
    assert loads(loadings)["sd_scripts"] == loads(loadings)["lycoris"] == 192
    assert loads(loadings)["comfyui"] == loads(loadings)["diffusers"] == 193
    assert "transposed" in loadings[Program.COMFYUI].notes[0].reason


def test_unknown_layers_and_keys_are_reported(plain: Tensors, catalogue: Catalogue) -> None:
    strange = pair(catalogue.by_name["unet.middle_block.1.proj_in"])
    strange = renamed(strange, "lora_unet_middle_block_1_proj_in", "lora_unet_middle_block_7_proj_in")
    loadings = loadings_of(plain | strange, catalogue)
    assert {(loading.loads, loading.of) for loading in loadings.values()} == {(192, 193)}
    assert {loading.ignores[0].reason for loading in loadings.values()} == {"SDXL has no such layer"}
    loadings = loadings_of(plain | {"bundle_emb.x": torch.zeros(1)}, catalogue)
    assert loads(loadings)["comfyui"] == loads(loadings)["lycoris_file"] == 192
    assert loadings[Program.DIFFUSERS].refuses[0].names == ("bundle_emb.x",)


@pytest.mark.parametrize(("side", "comfyui"), [("lora_up.weight", 191), ("lora_down.weight", 0)])
def test_half_a_pair(side: str, comfyui: int, plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    found = loads(loadings_of(without(plain, f"{layer.kohya}.{side}"), catalogue))
    assert (found["comfyui"], found["sd_scripts"], found["lycoris_file"], found["diffusers"]) == (
        comfyui,
        191,
        0,
        0,
    )


def test_no_program_loads_a_tuned_file_as_a_lora(plain: Tensors, catalogue: Catalogue) -> None:
    loadings = loadings_of(as_tuned(plain), catalogue)
    assert set(loads(loadings).values()) == {0}
    for loading in loadings.values():
        (finding,) = loading.ignores + loading.refuses
        assert len(finding.names) == loading.of == 192
        assert finding.reason == "trained deltas are not a LoRA: `spectune export` writes one"


def test_alpha_other_than_the_rank_is_reported(plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    loadings = loadings_of(plain | pair(layer, rank=2, alpha=1.0), catalogue)
    assert {program for program, loading in loadings.items() if loading.complete} == {
        Program.COMFYUI,
        Program.SD_SCRIPTS,
        Program.LYCORIS_FILE,
    }
    assert loadings[Program.LYCORIS].notes[0].names == (layer.name,)
    assert "command line" in loadings[Program.LYCORIS].notes[0].reason


def test_alphas_that_differ_between_layers_are_reported(
    plain: Tensors, layer: Layer, default: list[Layer], catalogue: Catalogue
) -> None:
    """Such alphas come from ranks by energy; alphas of other parts do not matter."""
    convolution = catalogue.by_name["unet.input_blocks.1.0.in_layers.2"]
    loadings = loadings_of(plain | pair(layer, rank=3) | pair(convolution, rank=3), catalogue)
    (note,) = loadings[Program.DIFFUSERS].notes
    assert note.names == (layer.name,)
    assert note.reason.startswith("wrong scale: attention layers get the most frequent alpha of the part")
    assert loadings[Program.COMFYUI].complete
    encoder = pairs([layer for layer in default if layer.part == "te1"], rank=3)
    assert loadings_of(plain | encoder, catalogue)[Program.DIFFUSERS].complete


def test_an_alpha_rounded_by_its_dtype_is_reported(
    plain: Tensors, layer: Layer, catalogue: Catalogue
) -> None:
    large = pair(layer, rank=257)
    assert loadings_of(plain | large, catalogue)[Program.COMFYUI].complete
    large[f"{layer.kohya}.alpha"] = torch.tensor(257.0).bfloat16()
    loadings = loadings_of(plain | large, catalogue)
    assert str(loadings[Program.COMFYUI].notes[0]) == (
        f"1 ({layer.name}): wrong scale: a 16-bit alpha cannot hold this rank"
    )
    assert loadings[Program.COMFYUI].loads == 192


def test_table_rows_are_text(plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    key = f"{layer.kohya}.diff_b"
    rows = [loading.row for loading in loadings_of(plain | {key: torch.zeros(32)}, catalogue).values()]
    assert rows[0] == ("ComfyUI", "192 of 192", "", "")
    assert rows[1] == ("sd-scripts", "192 of 192", f"1 ({key}): reads no biases", "")
    assert rows[4] == ("diffusers", "refuses the file", "", f"1 ({key}): cannot rename these keys")


def test_only_alphas_are_read(plain: Tensors, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load = MemorySource.load

    def noted(self: MemorySource, name: str) -> Tensor:
        read.append(name)
        return load(self, name)

    monkeypatch.setattr(MemorySource, "load", noted)
    loadings_of(plain, catalogue)
    assert len(read) == 192
    assert all(name.endswith(".alpha") for name in read)


@pytest.mark.slow
def test_all_layers_of_the_full_layout_are_counted(full_infos: Mapping[str, TensorInfo]) -> None:
    catalogue = build_catalogue(full_infos, all_layers=True)
    tensors = {
        f"{layer.kohya}.{side}.weight": torch.empty(shape)
        for layer in catalogue
        for side, shape in (("lora_down", (1, layer.in_features)), ("lora_up", (layer.out_features, 1)))
    }
    tensors |= {f"{layer.kohya}.alpha": torch.tensor(1.0) for layer in catalogue}
    assert loads(loadings_of(tensors, catalogue)) == {
        "comfyui": 1058,
        "sd_scripts": 1052,
        "lycoris": 1052,
        "lycoris_file": 1058,
        "diffusers": 1058,
    }


def test_comfyui_keys_are_reported(plain: Tensors, default: list[Layer], catalogue: Catalogue) -> None:
    tensors = plain
    for layer in default:
        tensors = renamed(tensors, layer.kohya, spelled(layer.name, layer.diffusers, Spelling.COMFYUI))
    loadings = loadings_of(tensors, catalogue)
    assert loadings[Program.COMFYUI].complete
    assert loads(loadings) == {
        "comfyui": 192,
        "sd_scripts": 0,
        "lycoris": 0,
        "lycoris_file": 0,
        "diffusers": 0,
    }
    assert loadings[Program.DIFFUSERS].refuses[0].reason == "cannot rename these keys"


def test_a_spelling_without_a_row_is_not_counted(layer: Layer, catalogue: Catalogue) -> None:
    keys = (f"{layer.diffusers}.lora_A.default.weight", f"{layer.diffusers}.lora_B.default.weight")
    loadings = loadings_of({key: torch.zeros(2, 2) for key in keys}, catalogue)
    assert {(loading.loads, loading.of) for loading in loadings.values()} == {(0, 1)}
    assert {str(loading.ignores[0]) for loading in loadings.values()} == {
        f"1 ({layer.name}): not counted: this table does not cover these keys"
    }


def test_layers_default_to_those_of_sdxl() -> None:
    stem = "lora_unet_input_blocks_4_1_proj_in"
    tensors = {f"{stem}.{key}": torch.zeros(2, 2) for key in ("hada_w1_a", "dora_scale", "diff_b")}
    tensors["lora_unet_input_blocks_4_1_norm.w_norm"] = torch.zeros(2)
    rows = [loading.row for loading in loading_table(MemorySource(tensors, {}))]
    layer = "unet.input_blocks.4.1.proj_in"
    assert rows[0] == ("ComfyUI", "1 of 1", "", "")
    assert rows[1][:2] == ("sd-scripts", "0 of 1")
    assert rows[1][2].startswith(f"1 ({layer}): reads only pairs; 1 ({stem}.diff_b): reads no biases; ")
    assert rows[4][1] == "refuses the file"

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from spectune.adapters.coverage import ProgramCoverage, adapter_coverage, coverage_rows
from spectune.adapters.coverage_checkpoint import CHECKPOINT_RULES
from spectune.adapters.coverage_rules import ADAPTER_RULES, Program, Trait
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

ALL = set(Program)


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


def covered(tensors: dict[str, Tensor], catalogue: Catalogue) -> dict[Program, ProgramCoverage]:
    found = adapter_coverage(MemorySource(tensors, {}), catalogue)
    assert [coverage.program for coverage in found] == list(Program)
    return {coverage.program: coverage for coverage in found}


def loads(coverages: dict[Program, ProgramCoverage]) -> dict[str, int]:
    return {program.name.lower(): coverage.loads for program, coverage in coverages.items()}


def test_every_trait_has_a_rule_for_every_program_of_one_table() -> None:
    assert set(ADAPTER_RULES) | set(CHECKPOINT_RULES) == set(Trait)
    assert not set(ADAPTER_RULES) & set(CHECKPOINT_RULES)
    assert all(set(rules) == ALL for rules in ADAPTER_RULES.values())
    assert {frozenset(rules) for rules in CHECKPOINT_RULES.values()} == {
        frozenset({Program.COMFYUI, Program.SD_SCRIPTS, Program.DIFFUSERS})
    }


def test_the_default_layers_load_everywhere(plain: Tensors, catalogue: Catalogue) -> None:
    coverages = covered(plain, catalogue)
    assert set(loads(coverages).values()) == {192}
    assert all(coverage.complete and coverage.of == 192 for coverage in coverages.values())


def test_extra_layers(catalogue: Catalogue) -> None:
    coverages = covered(pairs(catalogue), catalogue)
    assert loads(coverages) == {
        "comfyui": 198,
        "sd_scripts": 192,
        "lycoris": 192,
        "lycoris_file": 198,
        "diffusers": 198,
    }
    (ignored,) = coverages[Program.SD_SCRIPTS].ignores
    assert ignored.names == (
        "unet.time_embed.0",
        "unet.time_embed.2",
        "unet.label_emb.0.0",
        "unet.label_emb.0.2",
        "unet.input_blocks.0.0",
        "unet.out.2",
    )
    assert ignored.text.startswith("6 (unet.time_embed.0 (5 more)): no layer that it trains")
    (note,) = coverages[Program.DIFFUSERS].notes
    assert note.reason == "only since mid-2026; before, the file is refused"
    assert coverages[Program.COMFYUI].complete


def test_one_alpha_less(plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    coverages = covered(without(plain, f"{layer.kohya}.alpha"), catalogue)
    assert loads(coverages) == {
        "comfyui": 192,
        "sd_scripts": 192,
        "lycoris": 192,
        "lycoris_file": 0,
        "diffusers": 192,
    }
    reasons = {program.name: (c.raises + c.notes)[0] for program, c in coverages.items()}
    assert {finding.names for finding in reasons.values()} == {(layer.name,)}
    assert reasons["COMFYUI"].reason == "without alpha it takes scale 1"
    assert reasons["SD_SCRIPTS"].reason == "without alpha it takes alpha = rank, scale 1"
    assert reasons["LYCORIS_FILE"].reason == "it builds no layer without alpha"
    assert reasons["DIFFUSERS"].reason == "without alpha it takes the most frequent alpha of the part"


def test_no_alpha_at_all(plain: Tensors, catalogue: Catalogue) -> None:
    coverages = covered(without(plain, ".alpha"), catalogue)
    assert [len(note.names) for note in coverages[Program.DIFFUSERS].notes] == [192]
    assert coverages[Program.DIFFUSERS].notes[0].reason == "without alpha it takes alpha = rank, scale 1"


@pytest.mark.parametrize(
    ("suffix", "shape"), [("diff_b", (32,)), ("diff", (32, 32)), ("lora_mid.weight", (2, 2, 1, 1))]
)
def test_what_stands_beside_a_pair(
    suffix: str, shape: tuple[int, ...], plain: Tensors, layer: Layer, catalogue: Catalogue
) -> None:
    key = f"{layer.kohya}.{suffix}"
    coverages = covered(plain | {key: torch.zeros(shape)}, catalogue)
    assert coverages[Program.COMFYUI].loads == coverages[Program.LYCORIS].loads == 192
    assert coverages[Program.LYCORIS].ignores[0].names == (key,)
    assert (coverages[Program.DIFFUSERS].loads, coverages[Program.DIFFUSERS].of) == (0, 192)
    assert coverages[Program.DIFFUSERS].raises[0].text == f"1 ({key}): keys that it cannot rename"


def test_norms(plain: Tensors, catalogue: Catalogue) -> None:
    coverages = covered(plain | {"lora_unet_out_0.w_norm": torch.zeros(16)}, catalogue)
    assert coverages[Program.COMFYUI].complete
    assert coverages[Program.LYCORIS].ignores[0].text == "1 (lora_unet_out_0.w_norm): train_norm=False"
    assert coverages[Program.DIFFUSERS].raises


def test_a_difference_instead_of_a_pair(plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    rest = {key: tensor for key, tensor in plain.items() if not key.startswith(f"{layer.kohya}.")}
    coverages = covered(rest | {f"{layer.kohya}.diff": torch.zeros(layer.shape)}, catalogue)
    assert loads(coverages) == {
        "comfyui": 192,
        "sd_scripts": 191,
        "lycoris": 191,
        "lycoris_file": 192,
        "diffusers": 0,
    }


@pytest.mark.parametrize("suffix", ["hada_w1_a", "lokr_w2", "oft_blocks", "a1.weight"])
def test_other_kinds_of_adapter(suffix: str, plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    rest = {key: tensor for key, tensor in plain.items() if not key.startswith(f"{layer.kohya}.lora")}
    coverages = covered(rest | {f"{layer.kohya}.{suffix}": torch.zeros(1)}, catalogue)
    assert loads(coverages)["comfyui"] == 192
    assert loads(coverages)["sd_scripts"] == 191
    assert coverages[Program.SD_SCRIPTS].ignores[0].names == (layer.name,)
    assert coverages[Program.DIFFUSERS].raises


def test_peft_names(plain: Tensors, default: list[Layer], catalogue: Catalogue) -> None:
    coverages = covered(as_peft(plain, default), catalogue)
    attention = [layer for layer in default if layer.part == "unet" and ".to_" in layer.name]
    assert loads(coverages) == {
        "comfyui": 192 - len(attention),
        "sd_scripts": 0,
        "lycoris": 0,
        "lycoris_file": 0,
        "diffusers": 192,
    }
    assert coverages[Program.COMFYUI].ignores[0].names == tuple(layer.name for layer in attention)
    assert coverages[Program.DIFFUSERS].complete


def test_one_layer_in_peft_names(plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    coverages = covered(as_peft(plain, [layer]), catalogue)
    assert loads(coverages) == {
        "comfyui": 191,
        "sd_scripts": 191,
        "lycoris": 191,
        "lycoris_file": 191,
        "diffusers": 1,
    }


def test_one_layer_spelled_as_diffusers_does(plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    coverages = covered(renamed(plain, layer.kohya, kohya_style(layer)), catalogue)
    assert kohya_style(layer) == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v"
    # what is left to diffusers: that layer and those of the text encoders
    assert loads(coverages) == {
        "comfyui": 192,
        "sd_scripts": 192,
        "lycoris": 191,
        "lycoris_file": 191,
        "diffusers": 1 + 24,
    }
    assert coverages[Program.DIFFUSERS].ignores[0].reason == (
        "of a file with both spellings it drops the sgm layers"
    )
    assert "can stop with an error" in coverages[Program.SD_SCRIPTS].notes[1].reason


def test_all_layers_spelled_as_diffusers_does(
    plain: Tensors, default: list[Layer], catalogue: Catalogue
) -> None:
    tensors = plain
    for layer in default:
        if layer.part == "unet":
            tensors = renamed(tensors, layer.kohya, kohya_style(layer))
    found = loads(covered(tensors, catalogue))
    assert (found["comfyui"], found["sd_scripts"], found["lycoris"], found["diffusers"]) == (
        192,
        192,
        24,
        192,
    )


def test_text_projection(plain: Tensors, catalogue: Catalogue) -> None:
    stem = "lora_te2_text_projection"
    extra = {f"{stem}.lora_down.weight": torch.zeros(2, 24), f"{stem}.lora_up.weight": torch.zeros(20, 2)}
    coverages = covered(plain | extra | {f"{stem}.alpha": torch.tensor(2.0)}, catalogue)
    assert loads(coverages)["sd_scripts"] == loads(coverages)["lycoris"] == 192
    assert loads(coverages)["comfyui"] == loads(coverages)["diffusers"] == 193
    assert "held transposed" in coverages[Program.COMFYUI].notes[0].reason


def test_layers_and_keys_that_nobody_knows(plain: Tensors, catalogue: Catalogue) -> None:
    strange = pair(catalogue.by_name["unet.middle_block.1.proj_in"])
    strange = renamed(strange, "lora_unet_middle_block_1_proj_in", "lora_unet_middle_block_7_proj_in")
    coverages = covered(plain | strange, catalogue)
    assert {(coverage.loads, coverage.of) for coverage in coverages.values()} == {(192, 193)}
    assert {coverage.ignores[0].reason for coverage in coverages.values()} == {"SDXL has no such layer"}
    coverages = covered(plain | {"bundle_emb.x": torch.zeros(1)}, catalogue)
    assert loads(coverages)["comfyui"] == loads(coverages)["lycoris_file"] == 192
    assert coverages[Program.DIFFUSERS].raises[0].names == ("bundle_emb.x",)


@pytest.mark.parametrize(("side", "comfyui"), [("lora_up.weight", 191), ("lora_down.weight", 0)])
def test_half_a_pair(side: str, comfyui: int, plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    found = loads(covered(without(plain, f"{layer.kohya}.{side}"), catalogue))
    assert (found["comfyui"], found["sd_scripts"], found["lycoris_file"], found["diffusers"]) == (
        comfyui,
        191,
        0,
        0,
    )


def test_nobody_takes_a_tuned_file_for_a_lora(plain: Tensors, catalogue: Catalogue) -> None:
    coverages = covered(as_tuned(plain), catalogue)
    assert set(loads(coverages).values()) == {0}
    for coverage in coverages.values():
        (finding,) = coverage.ignores + coverage.raises
        assert len(finding.names) == coverage.of == 192
        assert finding.reason == "trained deltas are no LoRA: `spectune export` writes one"


def test_alpha_that_is_not_the_rank(plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    coverages = covered(plain | pair(layer, rank=2, alpha=1.0), catalogue)
    assert {program for program, coverage in coverages.items() if coverage.complete} == {
        Program.COMFYUI,
        Program.SD_SCRIPTS,
        Program.LYCORIS_FILE,
    }
    assert coverages[Program.LYCORIS].notes[0].names == (layer.name,)
    assert "command line" in coverages[Program.LYCORIS].notes[0].reason


def test_alphas_that_differ_from_layer_to_layer(
    plain: Tensors, layer: Layer, default: list[Layer], catalogue: Catalogue
) -> None:
    """As ranks by energy give them; in one part, the others do not matter."""
    convolution = catalogue.by_name["unet.input_blocks.1.0.in_layers.2"]
    coverages = covered(plain | pair(layer, rank=3) | pair(convolution, rank=3), catalogue)
    (note,) = coverages[Program.DIFFUSERS].notes
    assert note.names == (layer.name,)
    assert note.reason.startswith("scaled wrongly: attention layers get the most frequent alpha of the part")
    assert coverages[Program.COMFYUI].complete
    encoder = pairs([layer for layer in default if layer.part == "te1"], rank=3)
    assert covered(plain | encoder, catalogue)[Program.DIFFUSERS].complete


def test_alpha_that_its_type_cannot_hold(plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    large = pair(layer, rank=257)
    assert covered(plain | large, catalogue)[Program.COMFYUI].complete
    large[f"{layer.kohya}.alpha"] = torch.tensor(257.0).bfloat16()
    coverages = covered(plain | large, catalogue)
    assert coverages[Program.COMFYUI].notes[0].text == (
        f"1 ({layer.name}): a 16-bit alpha cannot hold this rank, so the layer is scaled wrongly"
    )
    assert coverages[Program.COMFYUI].loads == 192


def test_rows(plain: Tensors, layer: Layer, catalogue: Catalogue) -> None:
    key = f"{layer.kohya}.diff_b"
    rows = coverage_rows(covered(plain | {key: torch.zeros(32)}, catalogue).values())
    assert rows[0] == ("ComfyUI", "192 of 192", "", "")
    assert rows[1] == ("sd-scripts", "192 of 192", f"1 ({key}): biases are not read", "")
    assert rows[4] == ("diffusers", "refuses the file", "", f"1 ({key}): keys that it cannot rename")


def test_only_alphas_are_read(plain: Tensors, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load = MemorySource.load

    def noted(self: MemorySource, name: str) -> Tensor:
        read.append(name)
        return load(self, name)

    monkeypatch.setattr(MemorySource, "load", noted)
    covered(plain, catalogue)
    assert len(read) == 192
    assert all(name.endswith(".alpha") for name in read)


def test_the_full_layout(full_infos: Mapping[str, TensorInfo]) -> None:
    catalogue = build_catalogue(full_infos, all_layers=True)
    tensors = {
        f"{layer.kohya}.{side}.weight": torch.empty(shape)
        for layer in catalogue
        for side, shape in (("lora_down", (1, layer.in_features)), ("lora_up", (layer.out_features, 1)))
    }
    tensors |= {f"{layer.kohya}.alpha": torch.tensor(1.0) for layer in catalogue}
    assert loads(covered(tensors, catalogue)) == {
        "comfyui": 1058,
        "sd_scripts": 1052,
        "lycoris": 1052,
        "lycoris_file": 1058,
        "diffusers": 1058,
    }

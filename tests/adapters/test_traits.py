"""Traits select layers by part, block, pattern, and by a JSON file of the B-LoRA slicer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

from spectune.adapters.traits import TRAITS, TraitRule, read_traits, trait_layers
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.source import TensorInfo
from spectune.ops.options.values import Slice
from spectune.ops.slice import slice
from spectune.sdxl.layers import Catalogue, build_catalogue
from tests.loras import same_tensors, saved_lora

# the file of the guide, and the file of the slicer, which has diffusers names
GUIDE = {
    "te": {
        "whitelist": ["lora_te1_text_model_encoder_layers_", "lora_te2_text_model_encoder_layers_"],
        "blacklist": [],
    }
}
SLICER = {
    "content": {
        "whitelist": ["lora_unet_output_blocks_0_1", "lora_te1_"],
        "blacklist": ["alpha", "attn2"],
    },
    "style": {"whitelist": ["lora_unet_output_blocks_1_1"], "blacklist": ["alpha"]},
}


@pytest.fixture(scope="module")
def full(full_infos: Mapping[str, TensorInfo]) -> Catalogue:
    return build_catalogue(full_infos)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Catalogue:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_catalogue(source)


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("trait", "count"),
    [
        (None, 1052),
        ("te", 264),
        ("te1", 72),
        ("te2", 192),
        ("unet", 788),
        ("te1+te2", 264),
        ("te1+unet", 860),
        ("content", 80),  # 10 blocks with 2 attentions of 4 projections
        ("style", 80),
        ("mid", 108),
        ("te1.3", 6),
        ("te1.3+te2.31", 12),
        ("mid + te1.3", 114),
        ("unet.*attn2*", 280),
        ("conv", 49),
        ("unet.*attn2*+unet.*attn1*", 560),
    ],
)
def test_traits_select_the_known_number_of_layers(trait: str | None, count: int, full: Catalogue) -> None:
    found = trait_layers(full, trait, {})
    assert len(found) == count
    order = [layer.name for layer in full]
    assert [layer.name for layer in found] == sorted((layer.name for layer in found), key=order.index)


def test_content_and_style_are_the_two_transformers_of_b_lora(full: Catalogue) -> None:
    for trait, place in (("content", 0), ("style", 1)):
        found = trait_layers(full, trait, {})
        root = f"unet.up_blocks.0.attentions.{place}.transformer_blocks."
        assert all(layer.diffusers.startswith(root) for layer in found)
        sgm = f"unet.output_blocks.{place}.1.transformer_blocks."
        assert all(layer.name.startswith(sgm) for layer in found)
        assert {layer.name.rpartition("attn")[2] for layer in found} == {
            f"{attention}.{axis}" for attention in "12" for axis in ("to_q", "to_k", "to_v", "to_out.0")
        }


def test_the_traits_file_of_the_guide_selects_the_encoders(
    tiny: Catalogue, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = written(tmp_path / "blora_traits.json", GUIDE)
    rules = read_traits(file)
    assert rules == {"te": TraitRule(tuple(GUIDE["te"]["whitelist"]), ())}
    lora = saved_lora(tmp_path / "a.safetensors", tiny, alpha=1.0)
    report = slice([Slice(lora, "te")], tmp_path / "b.safetensors", traits=file, base=tiny_checkpoint)
    kept = {key: t for key, t in load_file(lora).items() if key.startswith(("lora_te1_", "lora_te2_"))}
    assert same_tensors(load_file(report.path), kept)


def test_alphas_are_kept_although_the_blacklist_contains_them(
    tiny: Catalogue, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The slicer's blacklist contains alpha, so its files are read at another strength."""
    file = written(tmp_path / "blora_traits.json", SLICER)
    rules = read_traits(file)
    lora = saved_lora(tmp_path / "a.safetensors", tiny, alpha=0.5)
    for trait in SLICER:
        out = tmp_path / f"{trait}.safetensors"
        slice([Slice(lora, trait)], out, traits=file, base=tiny_checkpoint)
        found = load_file(out)
        assert len(found) % 3 == 0
        white, black = rules[trait].whitelist, ("attn2",) if trait == "content" else ()
        assert same_tensors(
            found,
            {
                key: t
                for key, t in load_file(lora).items()
                if any(word in key for word in white) and not any(word in key for word in black)
            },
        )
        assert sum(key.endswith(".alpha") for key in found) == len(found) // 3 > 0


def test_a_traits_file_can_redefine_a_word(full: Catalogue) -> None:
    rules = {
        "style": TraitRule(("lora_unet_middle_block_",), ("attn",)),
        "mid": TraitRule(("lora_te1_",), ()),
    }
    assert {layer.block for layer in trait_layers(full, "style", rules)} == {"mid"}
    assert {layer.part.value for layer in trait_layers(full, "mid", rules)} == {"te1"}
    assert len(trait_layers(full, "content", rules)) == 80


@pytest.mark.parametrize("end", ["lora_up", "lora_down.weight"])
def test_a_trait_cannot_split_a_pair(end: str, full: Catalogue) -> None:
    first = trait_layers(full, "te1", {})[0].kohya
    for rule in (TraitRule(("lora_te1_",), (end,)), TraitRule((end,), ())):
        with pytest.raises(InputError) as caught:
            trait_layers(full, "half", {"half": rule})
        assert caught.value.what.startswith("trait `half` selects one factor of lora_")
        assert caught.value.what.endswith(" without the other")
        assert caught.value.hint == "use words that match complete layers, not lora_up or lora_down"
    with pytest.raises(InputError, match=first):
        trait_layers(full, "half", {"half": TraitRule(("lora_te1_",), (end,))})


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "cannot read traits from"),
        ("[1]", "is not a JSON object"),
        ({"te": ["lora_te1_"]}, "trait `te` of {path} is not an object"),
        ({"te": {"whitelst": ["x"]}}, "has an unknown key `whitelst`; did you mean `whitelist`?"),
        ({"te": {"whitelist": "lora_te1_"}}, "whitelist of trait `te` of {path} is not a list of words"),
        ({"te": {"whitelist": ["x"], "blacklist": [1]}}, "blacklist of trait `te` of {path} is not a list"),
        ({"te": {"whitelist": []}}, "`te` of {path} has an empty whitelist: expected at least one word"),
        ({"te": {"blacklist": ["x"]}}, "`te` of {path} has an empty whitelist: expected at least one word"),
    ],
)  # fmt: skip
def test_traits_files_with_another_structure_are_refused(content: object, what: str, tmp_path: Path) -> None:
    path = written(tmp_path / "traits.json", content)
    with pytest.raises(InputError) as caught:
        read_traits(path)
    assert what.format(path=path) in caught.value.what


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"cannot read traits from {tmp_path / 'gone.json'}"):
        read_traits(tmp_path / "gone.json")


def test_traits_without_a_match_are_errors(full: Catalogue) -> None:
    unet = Catalogue(trait_layers(full, "unet", {}), full.unet)
    encoders = Catalogue(trait_layers(full, "te", {}), full.unet)
    rules = {"nobody": TraitRule(("lora_te3_",), ())}
    for catalogue, trait, what in (
        (unet, "te", "trait `te` selects none of 788 layers"),
        (encoders, "style", "trait `style` selects none of 264 layers"),
        (full, "nobody", "trait `nobody` selects none of 1052 layers"),
        (full, "styel", "no layer matches `styel`; did you mean `style`?"),
        (full, "nobdoy", "no layer matches `nobdoy`; did you mean `nobody`?"),
        (full, "te1+styel", "no layer matches `styel`; did you mean `style`?"),
        (unet, "te1", "trait `te1` selects none of 788 layers"),
    ):
        with pytest.raises(InputError) as caught:
            trait_layers(catalogue, trait, rules)
        assert caught.value.what.startswith(what)


def test_unions_can_join_all_kinds_of_words(full: Catalogue) -> None:
    rules = {"middle": TraitRule(("lora_unet_middle_block_",), ())}
    assert len(trait_layers(full, "content+te1", rules)) == 80 + 72
    assert len(trait_layers(full, "style+content", rules)) == 160
    assert len(trait_layers(full, "te+middle", rules)) == 264 + 108
    assert set(TRAITS) == {"te", "te1", "te2", "unet", "content", "style"}

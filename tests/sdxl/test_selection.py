from __future__ import annotations

from collections.abc import Mapping

import pytest

from spectune.errors import InputError
from spectune.files.source import TensorInfo
from spectune.sdxl.layers import Catalogue, build_catalogue
from spectune.sdxl.selection import select_layers


@pytest.fixture(scope="module")
def full(full_infos: Mapping[str, TensorInfo]) -> Catalogue:
    """All layers of a full SDXL."""
    return build_catalogue(full_infos, all_layers=True)


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        ((), 1052),
        (("default",), 1052),
        (("all",), 1058),
        (("unet",), 788),
        (("te1", "te2"), 264),
        (("te1,te2",), 264),
        (("unet.*attn2*",), 280),
        (("*.attn2.to_[kv]",), 140),
        (("te1.3",), 6),
        (("mid",), 108),
        (("conv",), 49),
        (("embed",), 6),
        (("unet.time_embed.?",), 2),
        (("unet", "embed"), 794),
        (("!te2",), 860),
        (("-te1", "-te2"), 788),
        (("all,!conv",), 1007),
        (("unet,!*.attn?.*,!*.ff.*",), 788 - 560 - 140),
    ],
)
def test_patterns_select_layers(full: Catalogue, patterns: tuple[str, ...], count: int) -> None:
    assert len(select_layers(full, patterns)) == count


def test_layers_keep_the_order_of_the_catalogue(full: Catalogue) -> None:
    chosen = select_layers(full, ["te2.0", "unet.input_blocks.4.*", "!*.proj_in"])
    assert list(chosen) == [layer for layer in full if layer in set(chosen)]
    assert {layer.block for layer in chosen} == {"down.1", "te2.0"}
    assert not any(layer.name.endswith(".proj_in") for layer in chosen)


def test_exclusion_wins_in_any_position(full: Catalogue) -> None:
    assert select_layers(full, ["!te2", "all"]) == select_layers(full, ["all", "!te2"])
    assert len(select_layers(full, ["!te2", "all"])) == 1058 - 192


def test_patterns_that_match_default_layers_select_only_these(full: Catalogue) -> None:
    assert all(layer.default for layer in select_layers(full, ["unet.*", "linear", "conv"]))
    assert not any(layer.default for layer in select_layers(full, ["unet.label_emb.*"]))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("ten2", "no layer matches `ten2`; did you mean `te2`? (out of 1058 layers)"),
        ("defualt", "no layer matches `defualt`; did you mean `default`? (out of 1058 layers)"),
        ("unet,!vae.*", "no layer matches `vae.*` (out of 1058 layers)"),
        ("te1,!te1", "`te1,!te1` selects none of 1058 layers"),
    ],
)
def test_patterns_without_a_match_are_refused(full: Catalogue, pattern: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        select_layers(full, [pattern])
    assert refused.value.what == message
    assert "unet.*attn2*" in (refused.value.hint or "")

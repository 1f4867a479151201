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
def test_what_words_and_patterns_name(full: Catalogue, patterns: tuple[str, ...], count: int) -> None:
    assert len(select_layers(full, patterns)) == count


def test_the_order_is_that_of_the_catalogue(full: Catalogue) -> None:
    chosen = select_layers(full, ["te2.0", "unet.input_blocks.4.*", "!*.proj_in"])
    assert list(chosen) == [layer for layer in full if layer in set(chosen)]
    assert {layer.block for layer in chosen} == {"down.1", "te2.0"}
    assert not any(layer.name.endswith(".proj_in") for layer in chosen)


def test_leaving_out_wins_whatever_the_order(full: Catalogue) -> None:
    assert select_layers(full, ["!te2", "all"]) == select_layers(full, ["all", "!te2"])
    assert len(select_layers(full, ["!te2", "all"])) == 1058 - 192


def test_layers_outside_the_default_set_do_not_slip_in(full: Catalogue) -> None:
    assert all(layer.default for layer in select_layers(full, ["unet.*", "linear", "conv"]))
    assert not any(layer.default for layer in select_layers(full, ["unet.label_emb.*"]))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("ten2", "no layer matches `ten2`; did you mean `te2`? (1058 layers were looked at)"),
        ("defualt", "no layer matches `defualt`; did you mean `default`? (1058 layers were looked at)"),
        ("unet,!vae.*", "no layer matches `vae.*` (1058 layers were looked at)"),
        ("te1,!te1", "`te1,!te1` leaves none of 1058 layers"),
    ],
)
def test_patterns_that_name_nothing_are_refused(full: Catalogue, pattern: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        select_layers(full, [pattern])
    assert refused.value.what == message
    assert "unet.*attn2*" in (refused.value.hint or "")

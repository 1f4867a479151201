from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectune.errors import InputError
from spectune.pairs.strength import Strength, parse_strength, strength_of

numbers = st.floats(-4, 4).map(lambda number: round(number, 3) + 0.0)  # no -0
parts = st.dictionaries(st.sampled_from(["unet", "te1", "te2"]), numbers, max_size=3)


@pytest.mark.parametrize(
    ("word", "unet", "te1", "te2"),
    [
        ("1", 1.0, 1.0, 1.0),
        ("0.8", 0.8, 0.8, 0.8),
        ("-.5", -0.5, -0.5, -0.5),
        ("unet=0.8", 0.8, 1.0, 1.0),
        ("te=0", 1.0, 0.0, 0.0),
        ("unet=0.8, te=0.5", 0.8, 0.5, 0.5),
        ("te=0.5,te2=0.25", 1.0, 0.5, 0.25),
        ("te2=0.25,te=0.5", 1.0, 0.5, 0.25),
        ("te1=2,unet=-1", -1.0, 2.0, 1.0),
    ],
)
def test_a_strength_is_a_number_or_numbers_by_part(word: str, unet: float, te1: float, te2: float) -> None:
    strength = parse_strength(word)
    assert strength == Strength(unet, te1, te2)
    assert strength.of("unet.middle_block.1.proj_in") == unet
    assert strength.of("te1.text_model.encoder.layers.0.mlp.fc1") == te1
    assert strength.of("te2.text_model.encoder.layers.0.mlp.fc1") == te2


@given(parts)
def test_the_text_of_a_strength_parses_back(values: dict[str, float]) -> None:
    strength = strength_of(values)
    assert parse_strength(str(strength)) == strength
    assert strength_of(strength.by_part) == strength_of(strength) == strength
    assert strength.is_one == all(value == 1 for value in strength.by_part.values())


@given(numbers)
def test_one_number_applies_to_all_parts(value: float) -> None:
    assert strength_of(value) == Strength.everywhere(value) == parse_strength(str(value))
    assert str(strength_of(value)) == f"{value:g}"


@pytest.mark.parametrize(
    ("word", "what", "hint"),
    [
        ("strong", "unreadable strength 'strong'", "write it like 0.8 or unet=0.8,te=0.5"),
        ("unet=", "unreadable strength 'unet='", "write it like"),
        ("unet=0.8,0.5", "unreadable strength 'unet=0.8,0.5'", "write it like"),
        ("unett=1", "unknown part 'unett'; did you mean `unet`?", "expected one of unet, te1, te2, te"),
        ("vae=1", "unknown part 'vae'", "expected one of unet, te1, te2, te"),
        ("nan", "the strength of unet is nan: expected a finite number", None),
        ("te2=inf", "the strength of te2 is inf: expected a finite number", None),
    ],
)
def test_other_text_is_refused(word: str, what: str, hint: str | None) -> None:
    with pytest.raises(InputError) as caught:
        parse_strength(word)
    assert caught.value.what.startswith(what)
    assert (caught.value.hint or "").startswith(hint or "")


def test_a_part_that_appears_twice_is_refused() -> None:
    with pytest.raises(InputError, match="unet appears twice in 'unet=1,unet=0'"):
        parse_strength("unet=1,unet=0")


def test_nonfinite_numbers_are_refused_in_python() -> None:
    with pytest.raises(InputError, match="the strength of te1 is inf"):
        strength_of({"te": math.inf})

"""Files of prompts, in the format of sd-scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import InputError
from spectune.model.prediction import Prediction, make_prediction
from spectune.sampling.generate import Request, SampleSettings, find_sampler
from spectune.sampling.prompts import Prompt, read_prompts

DEFAULTS = SampleSettings(width=512, height=512)


def read(tmp_path: Path, text: str | bytes, name: str = "prompts.txt") -> tuple[list[Prompt], list[str]]:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_prompts(file, DEFAULTS)


def test_lines_with_options(tmp_path: Path) -> None:
    text = (
        "# a comment\r\n"
        "\r\n"
        "a red balloon, --n blurry, text --w 832 --h 1216 --d 7 --l 5.5 --s 28 --ss k_euler_a\r\n"
        "a cat -- dog\u2028hybrid --D -1\r\n"
    )
    prompts, notes = read(tmp_path, text)
    assert notes == []
    assert prompts == [
        Prompt(
            Request("a red balloon,", 7),
            SampleSettings(832, 1216, steps=28, cfg=5.5, sampler="k_euler_a", negative="blurry, text"),
        ),
        Prompt(Request("a cat -- dog\u2028hybrid", 1), DEFAULTS),
    ]


def test_a_line_may_be_a_negative_prompt_only(tmp_path: Path) -> None:
    ((prompt,), _) = read(tmp_path, "--n blurry")
    assert (prompt.request.caption, prompt.settings.negative) == ("", "blurry")


TOML = """
[prompt]
negative_prompt = "blurry"
width = 768
[[prompt.subset]]
prompt = "a cat"
sample_steps = 9
scale = 3
[[prompt.subset]]
prompt = "a dog"
seed = 5
sampler = "ddim"
"""
SUBSETS: list[dict[str, Any] | str] = [
    {"prompt": "a cat", "negative": "blurry", "width": 768, "steps": 9, "cfg": 3.0},
    "a dog --n blurry --w 768 --d 5 --ss ddim",
]


@pytest.mark.parametrize(("name", "text"), [("p.toml", TOML), ("p.json", json.dumps(SUBSETS))])
def test_toml_and_json(name: str, text: str, tmp_path: Path) -> None:
    prompts, _ = read(tmp_path, text, name)
    shared = SampleSettings(768, 512, negative="blurry")
    assert [prompt.request for prompt in prompts] == [Request("a cat", 0), Request("a dog", 5)]
    assert prompts[0].settings == SampleSettings(768, 512, negative="blurry", steps=9, cfg=3.0)
    assert prompts[1].settings == SampleSettings(768, 512, negative="blurry", sampler="ddim") != shared


def test_utf16_and_a_byte_order_mark(tmp_path: Path) -> None:
    for raw in ("\ufeffä cat".encode(), "ä cat\r\n".encode("utf-16")):
        ((prompt,), _) = read(tmp_path, raw)
        assert prompt.request.caption == "ä cat"


def test_options_for_other_models_are_named_once(tmp_path: Path) -> None:
    prompts, notes = read(tmp_path, "a --g 3 --fs 1\nb --g 2")
    assert [prompt.request.caption for prompt in prompts] == ["a", "b"]
    assert notes == ["prompts.txt: --g, --fs has no effect on SDXL"]


def test_weights_are_counted(tmp_path: Path) -> None:
    _, notes = read(tmp_path, "a (red:1.2) fox\na fox (at 12:30 pm)\na fox --n (blurry:0.8)")
    assert notes == ["prompts.txt: 2 prompts with weights like (word:1.2), which are used as text"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a\nb --ar 16:9", "line 2: unknown option --ar"),
        ("p.txt", "a --w wide", "line 1: --w is 'wide': expected a whole number from 8 to 16384"),
        ("p.txt", "a --s 0", "expected a whole number from 1 to 1000"),
        ("p.txt", "a --l nan", "expected a number from 0 to 100"),
        ("p.txt", "a --ss eulr", "line 1: --ss: unknown sampler 'eulr'; did you mean `euler`?"),
        ("p.txt", "# nothing\n", "has no prompts"),
        ("p.txt", b"a\n\x82\xa0\x82\xa2\x82\xa4\x82\xa6", "is not valid UTF-8"),
        ("p.toml", "[prompt", "is not valid TOML"),
        ("p.toml", "[prompt]\nsubset = 3", "expected a list of prompts"),
        (
            "p.toml",
            "[[prompt]]\nprompt = 'a'\nwidht = 3",
            "prompt 1: unknown key `widht`; did you mean `width`?",
        ),
        ("p.json", "{", "is not valid JSON"),
        ("p.json", "[3]", "prompt 1: expected a text or a table, found 3"),
        ("p.json", '[{"prompt": "a", "width": true}]', "`width` is True: expected a whole number"),
        ("p.json", "[" * 100_000, "is not valid JSON"),
    ],
)
def test_errors_name_the_place(name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, text, name)
    assert message in str(error.value)
    assert str(error.value).count(name) == 1


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read prompts from .*No such file"):
        read_prompts(tmp_path / "no.txt", DEFAULTS)


EPS, V0 = make_prediction("eps"), make_prediction("v", zero_terminal_snr=True)
FLOW = make_prediction("flow", flow_shift=1.0)


@pytest.mark.parametrize(
    ("name", "prediction", "sampler", "is_noted"),
    [
        ("euler_a", EPS, "euler_a", False),
        ("k_euler_a", EPS, "euler_a", False),
        ("Euler a", EPS, "euler_a", False),
        ("dpmsolver++", EPS, "dpmpp_2m", False),
        ("dpm_2_a", EPS, "euler_a", True),
        ("heun", EPS, "euler", True),
        ("heun", FLOW, "heun", False),
        ("ddim", FLOW, "euler", True),
        ("dpmsolver", FLOW, "euler", True),
        ("pndm", V0, "ddim", True),
        ("euler_a", V0, "euler", True),
    ],
)
def test_samplers_of_other_programs(name: str, prediction: Prediction, sampler: str, is_noted: bool) -> None:
    found, note = find_sampler(name, prediction)
    assert found == sampler
    assert (note is not None) == is_noted
    if note:
        assert name in note
        assert f"{sampler} is used instead" in note


def test_another_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a caf\xe9\r\na fox")
    prompts, notes = read_prompts(tmp_path / "p.txt", SampleSettings())
    assert [prompt.request.caption for prompt in prompts] == ["a caf\u00e9", "a fox"]
    assert notes == ["p.txt is read as cp1252"]

"""From the fields of a record to a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spectune.errors import InputError
from spectune.studio.jobs.arguments import arguments_of, command_named
from spectune.studio.places import Places, Refused


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("m", "a", "-b"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "r.toml").touch()
    return tmp_path


CASES = {
    "options before --, arguments after it": (
        "split",
        {"model": "{}/m.safetensors", "out": "{}/o", "rank": 8, "force": True, "layers": ["unet", "!conv"]},
        ["--rank=8", "--layers=unet", "--layers=!conv", "--out={}/o", "--force", "--", "{}/m.safetensors"],
    ),
    "what begins with a dash": (
        "convert",
        {"source": "{}/-b.safetensors", "out": "-o.safetensors"},
        ["--out=-o.safetensors", "--", "{}/-b.safetensors"],
    ),
    "a flag that turns something off": (
        "export",
        {"tuned": "{}/a.safetensors", "base": "{}/m.safetensors", "out": "{}/o.safetensors"},
        ["--out={}/o.safetensors", "--", "{}/m.safetensors", "{}/a.safetensors"],
    ),
    "several arguments, and text": (
        "sample",
        {"model": "{}/m.safetensors", "adapters": ["{}/a.safetensors:0.8"], "captions": ["a; rm -rf $HOME"]},
        ["--caption=a; rm -rf $HOME", "--", "{}/m.safetensors", "{}/a.safetensors:0.8"],
    ),
    "nothing for None and False": ("train", {"recipe": "{}/r.toml", "force": False}, ["--", "{}/r.toml"]),
}


def filled(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [filled(one, folder) for one in value]
    return value.replace("{}", str(folder)) if isinstance(value, str) else value


@pytest.mark.parametrize("case", CASES)
def test_the_command_line_has_the_values(case: str, files: Path) -> None:
    name, values, expected = CASES[case]
    passed = {key: filled(value, files) for key, value in values.items()}
    words = arguments_of(command_named(name), passed, None)
    assert words[0] == name
    assert sorted(words[1:]) == sorted(filled(expected, files))
    assert words[words.index("--") :] == filled(expected[expected.index("--") :], files)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("train", {"recipe": {"run": {}}}, "`recipe`: expected text or a number"),
        ("train", {"recipe": "r.toml", "callbacks": ["os.system"]}, "unknown option `callbacks`"),
        ("train", {"recipe": "r\0.toml"}, "`recipe` contains a character that no option can have"),
        ("train", {"recipe": "\ud800.toml"}, "`recipe` contains a character that no option can have"),
        ("train", {}, "RECIPE is missing"),
        ("split", {"model": "m.safetensors", "rank": 0}, "--rank"),
        ("split", {"model": "m.safetensors", "rnak": 1}, "unknown option `rnak`"),
    ],
)
def test_values_that_no_command_has_are_errors(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        arguments_of(command_named(name), values, None)
    assert message in error.value.what


@pytest.mark.parametrize("name", ["studio", "new", "recipe import", "splt", "os.system"])
def test_commands_that_are_no_jobs(name: str) -> None:
    with pytest.raises(InputError, match="no job"):
        command_named(name)


OUTSIDE = {
    "a file": ("inspect", {"model": "/etc/passwd"}),
    "a relative file": ("inspect", {"model": "m.safetensors"}),
    "a model by name": ("inspect", {"model": "hub:owner/name"}),
    "a folder to write": ("split", {"model": "{}/m.safetensors", "out": "/etc/parts"}),
    "a way out": ("split", {"model": "{}/m.safetensors", "out": "{}/../parts"}),
    "a slice": ("slice", {"slices": ["/etc/a.safetensors:te:0.8"], "out": "{}/o.safetensors"}),
    "a summand": ("merge", {"models": ["{}/m.safetensors", "/etc/m:0.5"], "out": "{}/o.safetensors"}),
    "an adapter": ("sample", {"model": "{}/m.safetensors", "adapters": ["/etc/a.safetensors:0.8"]}),
    "an adapter of a comparison": ("compare", {"models": ["{}/m.safetensors+/etc/a.safetensors:0.8"]}),
    "a path in an override": ("train", {"recipe": "{}/r.toml", "overrides": ["run.output=/etc"]}),
    "a parent in an override": ("train", {"recipe": "{}/r.toml", "overrides": ["run.output=.."]}),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_paths_outside_of_the_folders_are_refused(case: str, files: Path) -> None:
    name, values = OUTSIDE[case]
    places = Places(models=(files,), data=(), output=files)
    passed = {key: filled(value, files) for key, value in values.items()}
    with pytest.raises(
        (Refused, InputError), match=r"outside of the folders|not an absolute|contains|write path"
    ):
        arguments_of(command_named(name), passed, places)


def test_paths_inside_are_accepted(files: Path) -> None:
    places = Places(models=(files,), data=(), output=files)
    model, adapter = f"{files}/m.safetensors", f"{files}/a.safetensors"
    values = {"models": [model, f"{model}+{adapter}:0.8"], "out": f"{files}/o.png"}
    assert arguments_of(command_named("compare"), values, places)[-2:] == values["models"]
    overrides = ["run.steps=200", "run.preview_every_steps=50"]
    words = arguments_of(
        command_named("train"), {"recipe": f"{files}/r.toml", "overrides": overrides}, places
    )
    assert words[1:3] == ["--set=run.steps=200", "--set=run.preview_every_steps=50"]

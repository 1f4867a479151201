"""Test that the command line and the Python API have the options of the records."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.main
from safetensors.torch import load_file

import spectune
from spectune.cli.app import app, run
from spectune.cli.command import CommandSpec, with_flags
from spectune.cli.commands import COMMANDS
from spectune.errors import InputError
from spectune.operation import OptionField, flags_of, option_fields
from spectune.ops.options.adapter_files import ExportOptions, RebuildOptions

SHARED_FLAGS = {"json", "dry_run", "job"}


def click_command(command: CommandSpec) -> Any:
    group: Any = typer.main.get_command(app)
    if command.name in group.commands:
        return group.commands[command.name]
    for word in command.name.split():
        group = group.commands[word]
    return group


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_command_line_has_the_options_of_the_record(command: CommandSpec) -> None:
    fields = {field.name: field for field in option_fields(command.options)}
    shown = {parameter.name: parameter for parameter in click_command(command).params}
    arguments = {name for name, field in fields.items() if field.argument}
    positional = {"files"} if "files" in shown else arguments
    old = {f"old_{name}" for name in arguments if fields[name].old_flag}
    assert set(shown) - SHARED_FLAGS - {"help"} - old == (set(fields) - arguments) | positional
    for name in set(fields) & set(shown):
        check_parameter(command, fields[name], shown[name])


def check_parameter(command: CommandSpec, field: OptionField, parameter: Any) -> None:
    text = field.off[1] if field.off else field.help
    assert parameter.help.startswith(with_flags(command, text)), field.name
    assert parameter.required == field.required, field.name
    if field.argument:
        return
    assert set(flags_of(field)) == set(parameter.opts), field.name
    if field.off is not None:
        assert (field.default, parameter.default) == (True, False)
    elif field.many:
        assert tuple(parameter.default or ()) == tuple(field.default or ()), field.name
    else:
        assert parameter.default == field.default, field.name


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_function_has_the_options_of_the_record(command: CommandSpec) -> None:
    function = getattr(import_module(command.operation), command.function)
    parameters = inspect.signature(function).parameters
    fields = option_fields(command.options)
    assert set(parameters) == {field.name for field in fields} | {"progress"}
    for field in fields:
        default = parameters[field.name].default
        assert (default is inspect.Parameter.empty) == field.required, field.name
        assert field.required or default == field.default, field.name
        assert f"{field.name}: {field.help}" in function.__doc__, field.name


def test_every_option_has_a_help_text() -> None:
    for command in COMMANDS:
        for field in option_fields(command.options):
            assert field.help.endswith((".", ")")), (command.name, field.name)
            assert field.help[0].isupper() or field.help.startswith("lora"), (command.name, field.name)


def test_the_package_offers_every_operation() -> None:
    names = {command.function for command in COMMANDS} - {"demo", "studio"}
    others = {"Callbacks", "Recipe"}  # arguments of `train`
    assert names == {name for name in spectune.__all__ if not name.endswith("Error")} - others


def test_a_wrong_value_names_the_field() -> None:
    with pytest.raises(InputError, match="unknown option `rnak`; did you mean `rank`"):
        ExportOptions(Path("a"), Path("b"), rnak=3)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="`rank`: input should be greater than or equal to 1, got 0"):
        ExportOptions(Path("a"), Path("b"), rank=0)
    with pytest.raises(InputError, match="`out` is missing"):
        RebuildOptions(Path("a"), Path("b"))  # type: ignore[call-arg]


def test_the_old_order_of_arguments_works_with_a_note(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_checkpoint)
    assert run(["split", model, "-o", str(tmp_path), "--rank", "2", "--residual-dtype", "float32"]) == 0
    residual, principal = (str(next(tmp_path.glob(f"*.{kind}*"))) for kind in ("residual", "principal"))
    old, new, swapped = (str(tmp_path / f"{name}.safetensors") for name in ("old", "new", "swapped"))
    capfd.readouterr()
    assert run(["rebuild", residual, principal, "-o", new]) == 0
    assert "note:" not in capfd.readouterr().err
    assert run(["rebuild", principal, "--base", residual, "-o", old]) == 0
    assert "note: --base is no longer needed: pass MODEL as the first argument" in capfd.readouterr().err
    assert run(["rebuild", principal, residual, "-o", swapped]) == 0
    assert "pass the model first: rebuild" in capfd.readouterr().err
    expected = load_file(new)
    for path in (old, swapped):
        tensors = load_file(path)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_too_many_files_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["rebuild", "a.safetensors", "b.safetensors", "c.safetensors", "-o", "x.safetensors"]) == 2
    assert "got 3 files: expected MODEL ADAPTER" in capfd.readouterr().err

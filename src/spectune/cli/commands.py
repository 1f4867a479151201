"""The table of commands.

A new command needs a row here, options in ops/options, an operation in ops and its output in cli/reports.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from spectune.cli.command import CommandSpec, add_command
from spectune.ops.options.adapter_files import ConvertOptions, ExportOptions, RebuildOptions, SliceOptions
from spectune.ops.options.dataset import DatasetOptions, IndexOptions
from spectune.ops.options.model_files import (
    InspectOptions,
    MergeOptions,
    NullOptions,
    SplitOptions,
    VerifyOptions,
)
from spectune.ops.options.pictures import CompareOptions, SampleOptions
from spectune.ops.options.studio import StudioOptions
from spectune.ops.options.training import (
    DemoOptions,
    DoctorOptions,
    ImportOptions,
    NewOptions,
    PlanOptions,
    TrainOptions,
)

START, TRAIN, FILES, PICTURES = "Start here", "Train", "Files", "Pictures"
_OPERATIONS = {"dataset index": "spectune.ops.dataset.indexing"}  # elsewhere than their name
# Commands whose operation and output are one module, outside of `ops`.
_OWN_MODULES = {"demo": "spectune.cli.demo", "studio": "spectune.studio.serve"}


def _command(
    name: str, options: type, panel: str, example: str, *, report: str | None = None, **more: object
) -> CommandSpec:
    word = name.replace(" ", "_")
    operation = _OPERATIONS.get(name, f"spectune.ops.{word}")
    report = f"spectune.cli.reports.{report or word}"
    if module := _OWN_MODULES.get(name):
        operation = report = module
    return CommandSpec(name, options, operation, report, panel, example, **more)  # pyright: ignore[reportArgumentType]


COMMANDS = (
    _command("demo", DemoOptions, START, "spectune demo", json=False, bar=False),
    _command("studio", StudioOptions, START, "spectune studio", json=False, bar=False),
    _command("doctor", DoctorOptions, START, "spectune doctor", bar=False),
    _command("inspect", InspectOptions, START, "spectune inspect model.safetensors"),
    _command(
        "new",
        NewOptions,
        TRAIN,
        "spectune new model.safetensors pictures/",
        report="starting.new",
        bar=False,
    ),
    _command(
        "dataset",
        DatasetOptions,
        TRAIN,
        "spectune dataset pictures/ --sheet sheet.png",
        report="datasets.dataset",
    ),
    _command(
        "dataset index",
        IndexOptions,
        TRAIN,
        "spectune dataset index pictures/",
        report="datasets.dataset_index",
    ),
    _command("plan", PlanOptions, TRAIN, "spectune plan model.safetensors --vram 12GB", bar=False),
    _command(
        "train",
        TrainOptions,
        TRAIN,
        "spectune train recipes/emoji3d_eps.toml --set run.steps=200",
        dry_run="plan_train",
        bar=False,
    ),
    _command(
        "recipe import", ImportOptions, TRAIN, "spectune recipe import train.bat -o recipe.toml", bar=False
    ),
    _command(
        "split",
        SplitOptions,
        FILES,
        "spectune split model.safetensors --rank 64 -o split/",
        dry_run="plan_split",
    ),
    _command(
        "verify",
        VerifyOptions,
        FILES,
        "spectune verify model.safetensors m.residual.safetensors m.principal-r64.safetensors",
    ),
    _command(
        "rebuild",
        RebuildOptions,
        FILES,
        "spectune rebuild model.safetensors style.safetensors -o tuned.safetensors",
    ),
    _command(
        "export",
        ExportOptions,
        FILES,
        "spectune export model.safetensors style.safetensors -o style_lora.safetensors",
    ),
    _command(
        "slice",
        SliceOptions,
        FILES,
        "spectune slice early.safetensors:te late.safetensors:unet:0.8 -o style.safetensors",
    ),
    _command(
        "merge",
        MergeOptions,
        FILES,
        "spectune merge one.safetensors:0.7 other.safetensors:0.3 -o both.safetensors",
    ),
    _command(
        "convert",
        ConvertOptions,
        FILES,
        "spectune convert lora.safetensors --keys diffusers -o lora_peft.safetensors",
        report="copies",
    ),
    _command(
        "null",
        NullOptions,
        FILES,
        "spectune null model.safetensors -o model_null.safetensors",
        report="copies",
    ),
    _command(
        "sample",
        SampleOptions,
        PICTURES,
        'spectune sample model.safetensors style.safetensors:0.8 -c "a red fox" -o pictures/',
        report="pictures",
        json=False,
    ),
    _command(
        "compare",
        CompareOptions,
        PICTURES,
        'spectune compare base.safetensors base.safetensors+style.safetensors -c "a cat" -o sheet.png',
        report="pictures",
    ),
)


def make_app() -> typer.Typer:
    """Return the typer application with all commands."""
    app = _typer("Fine-tune a full SDXL checkpoint by training only its principal spectrum.", name="spectune")
    groups = {"recipe": _typer("Recipes for training.")}
    for command in COMMANDS:
        word = command.name.partition(" ")[0]
        add_command(groups.get(word, app), command, group=word if word in groups else "")
    for name, group in groups.items():
        app.add_typer(group, name=name, rich_help_panel=TRAIN)
    return app


class _Commands(TyperGroup):
    """The commands, of which `dataset index` has two words but is not in a group: `dataset` is a command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        words = " ".join(args[:2])
        if words in self.commands:
            return words, self.commands[words], args[2:]
        return super().resolve_command(ctx, args)


def _typer(text: str, name: str | None = None) -> typer.Typer:
    return typer.Typer(
        name=name,
        cls=_Commands,
        help=text,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        add_completion=False,
    )

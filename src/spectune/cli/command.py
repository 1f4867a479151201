"""Build a command of the command line from the options record of its operation."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from spectune.cli.console import Report, file_notes, print_json, print_note, print_warning, progress
from spectune.cli.job import Job, is_first_process, recorded
from spectune.errors import InputError, SpectuneError, counted
from spectune.extras import extras_named
from spectune.operation import OperationOptions, OptionField, flags_of, option_fields, run_operation


@dataclass(frozen=True)
class CommandSpec:
    """A row of the table of commands.

    The operation is the function `name` in the module `operation`. The module `report` prints the result with
    `show(report, options, seconds)`. It may also define `as_json(report, options, seconds)`,
    `exit_code(report)`, `show_dry_run(forecast, options)`, `dry_run_json(forecast)`,
    `dry_run_exit_code(forecast)`, `prepare(options)` and `events(options, job)`.
    """

    name: str
    options: type[OperationOptions]
    operation: str
    report: str
    panel: str
    example: str
    json: bool = True
    dry_run: str | None = None  # name of a function in the operation's module that plans without writing
    bar: bool = True  # show a progress bar; False if the operation prints its own progress

    @property
    def function(self) -> str:
        return self.name.replace(" ", "_")


@dataclass(frozen=True)
class Flags:
    """Flags of the command line that are not options of the operation."""

    json: bool = False
    dry_run: bool = False
    job: Path | None = None


def add_command(app: typer.Typer, command: CommandSpec, *, group: str = "") -> None:
    """Register a command, in a group without the word of the group.

    Torch and the operation are imported when it runs, not for `--help`.
    """
    fields = option_fields(command.options)

    def run(context: typer.Context, **values: Any) -> None:
        flags = Flags(**{name: values.pop(name) for name in ("json", "dry_run", "job") if name in values})
        with recorded(flags.job, command.name, context.find_root().obj or []) as job:
            job.exit_code = execute(command, _record_values(fields, values), flags, job)
        if job.exit_code:
            raise typer.Exit(job.exit_code)

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *_parameters(command, fields), *_shared_flags(command)]
    made = cast("Any", run)
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    text = with_flags(command, inspect.cleandoc(command.options.__doc__ or ""))
    word = command.name.removeprefix(f"{group} ")
    app.command(word, help=text, epilog=f"**Example:** `{command.example}`", rich_help_panel=command.panel)(
        run
    )


@extras_named()
def execute(command: CommandSpec, values: Mapping[str, Any], flags: Flags, job: Job | None = None) -> int:
    """Run an operation, print its report, write its events and return the exit code."""
    try:
        return _run(command, values, flags, job or Job())
    except SpectuneError as error:
        # The library names fields. Replace them by flags.
        error.what = with_flags(command, error.what)
        error.hint = None if error.hint is None else with_flags(command, error.hint)
        raise


def _run(command: CommandSpec, values: Mapping[str, Any], flags: Flags, job: Job) -> int:
    operations, reports = import_module(command.operation), import_module(command.report)
    shown: list[str] = []

    def warn(text: str) -> None:
        shown.append(text)
        print_warning(with_flags(command, text))
        job.message(with_flags(command, text), "warning")

    def note(text: str) -> None:
        print_note(text)
        job.message(text, "note")

    started = time.perf_counter()
    bar = progress(command.name) if command.bar else nullcontext()
    with file_notes(note), bar as shown_progress:
        options = command.options(**values, progress=_watched(shown_progress, job), notify=warn)
        _check_inputs(options)
        if flags.dry_run:
            assert command.dry_run is not None
            forecast = getattr(operations, command.dry_run)(options)
            return _show_dry_run(reports, forecast, options, flags, job)
        options = getattr(reports, "prepare", lambda options: options)(options)
        if job.folder is not None:
            if options.notify is not warn:  # `prepare` has replaced it
                options = replace(options, notify=_announced(options, job))
            options = getattr(reports, "events", lambda options, job: options)(options, job)
        result = run_operation(getattr(operations, command.function), options)
    seconds = time.perf_counter() - started
    exit_code = getattr(reports, "exit_code", lambda result: 0)(result)
    if not is_first_process():  # the first one prints the result
        return exit_code
    for text in getattr(result, "warnings", ()):
        if text not in shown:
            warn(text)
    as_json = getattr(reports, "as_json", _as_json) if command.json else _as_json
    if job.folder is not None:
        job.write("result", report=as_json(result, options, seconds))
    if flags.json:
        print_json(as_json(result, options, seconds))
    else:
        reports.show(result, options, seconds)
    return exit_code


def _watched(show: Report | None, job: Job) -> Report | None:
    """Return a progress function that also writes events and stops the command on request."""
    if job.folder is None:
        return show

    def report(done: int, total: int, name: str) -> None:
        job.check_stop()
        if show is not None:
            show(done, total, name)
        job.progress(done, total, name)

    return report


def _announced(options: OperationOptions, job: Job) -> Callable[[str], None]:
    """Return a function for messages that also writes events and stops the command on request."""

    def tell(text: str) -> None:
        job.check_stop()
        options.tell(text)
        job.message(text)

    return tell


def _check_inputs(options: OperationOptions) -> None:
    """Raise InputError if several input files are missing. A single one is left to the operation."""
    written = ("out", "sheet", "plot")
    paths = [
        getattr(options, field.name) for field in option_fields(type(options)) if field.name not in written
    ]
    missing = [str(path) for path in paths if isinstance(path, Path) and not path.exists()]
    if len(missing) > 1:
        raise InputError(f"no such files: {', '.join(missing)}")


def _show_dry_run(reports: Any, forecast: Any, options: OperationOptions, flags: Flags, job: Job) -> int:
    """Print a forecast and return the exit code."""
    as_json = getattr(reports, "dry_run_json", asdict)(forecast)
    job.write("result", report=as_json)
    if flags.json:
        print_json(as_json)
    else:
        reports.show_dry_run(forecast, options)
    exit_code = getattr(reports, "dry_run_exit_code", None)
    return 0 if exit_code is None else exit_code(forecast)


def with_flags(command: CommandSpec, text: str) -> str:
    """Replace each field in backticks by its flag: `conv_rank` -> --conv-rank."""
    spelled = {
        field.name: placeholder(field) if field.argument else flags_of(field)[-1]
        for field in option_fields(command.options)
    }
    return re.sub(r"`(\w+)`", lambda match: spelled.get(match[1], match[0]), text)


def _as_json(report: Any, options: OperationOptions, seconds: float) -> dict[str, Any]:
    assert is_dataclass(report)
    return {**asdict(cast("Any", report)), "seconds": seconds}


# ---------------------------------------------------------------- fields -> parameters of typer


def _parameters(command: CommandSpec, fields: Sequence[OptionField]) -> list[inspect.Parameter]:
    arguments = [field for field in fields if field.argument]
    options = [
        _parameter(field.name, _type(field), _option(command, field), default=_default(field))
        for field in fields
        if not field.argument
    ]
    if any(field.old_flag for field in arguments):
        usage = usage_of(arguments)
        text = " ".join(f"{placeholder(field)}: {field.help}" for field in _in_order(arguments))
        files = _parameter("files", list[Path], typer.Argument(metavar=usage, help=text, show_default=False))
        old = [
            _parameter(
                f"old_{field.name}", Path | None, typer.Option(field.old_flag, hidden=True), default=None
            )
            for field in arguments
            if field.old_flag
        ]
        return [files, *options, *old]
    return [*(_argument(command, field) for field in arguments), *options]


def _in_order(arguments: Sequence[OptionField]) -> list[OptionField]:
    """Return the arguments in command line order: the optional model comes first."""
    return sorted(arguments, key=lambda field: field.required)


def _argument(command: CommandSpec, field: OptionField) -> inspect.Parameter:
    info = typer.Argument(
        help=with_flags(command, field.help), metavar=placeholder(field), show_default=False
    )
    if field.required:
        return _parameter(field.name, _type(field), info)
    return _parameter(field.name, _type(field), info, default=None if field.many else field.default)


def _option(command: CommandSpec, field: OptionField) -> Any:
    metavar = field.metavar or (f"[{'|'.join(field.choices)}]" if field.choices else None)
    help_text = with_flags(command, field.off[1] if field.off else field.help)
    if field.many:
        help_text += " May be given several times."
    return typer.Option(
        *flags_of(field), help=help_text, metavar=metavar, min=field.minimum, max=field.maximum,
        show_default=field.kind is not bool and field.default not in (None, "", ()),
    )  # fmt: skip


def _parameter(
    name: str, kind: Any, info: Any, *, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    annotation = Annotated[kind, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(field: OptionField) -> Any:
    if field.required:
        return inspect.Parameter.empty
    if field.off is not None:
        return False
    return list(field.default) or None if field.many and field.default is not None else field.default


def _type(field: OptionField) -> Any:
    if field.many:
        return list[field.kind] if field.required else list[field.kind] | None  # pyright: ignore[reportInvalidTypeForm]
    return (
        field.kind | None if field.optional or (field.default is None and not field.required) else field.kind
    )


def placeholder(field: OptionField) -> str:
    """Return the name of an argument or of an option's value in help texts."""
    return field.metavar or field.name.upper()


def usage_of(arguments: Sequence[OptionField]) -> str:
    """Return the arguments as in a usage line: `[MODEL] TUNED`."""
    in_order = _in_order(arguments) if any(field.old_flag for field in arguments) else arguments
    return " ".join(placeholder(field) if field.required else f"[{placeholder(field)}]" for field in in_order)


def _shared_flags(command: CommandSpec) -> list[inspect.Parameter]:
    info = typer.Option(
        "--job",
        metavar="FOLDER",
        help="Write events to FOLDER/events.jsonl, and obey the files stop, save and preview in FOLDER.",
    )
    flags = [_parameter("job", Path | None, info, default=None)]
    if command.dry_run is not None:
        info = typer.Option("--dry-run", help="Print the plan and stop.")
        flags.append(_parameter("dry_run", bool, info, default=False))
    if command.json:
        info = typer.Option("--json", help="Print the result as JSON on stdout.")
        flags.append(_parameter("json", bool, info, default=False))
    return flags


# ---------------------------------------------------------------- parsed values -> fields


def _record_values(fields: Sequence[OptionField], parsed: dict[str, Any]) -> dict[str, Any]:
    """Return the values for the record. Options that were not passed keep its defaults."""
    values = dict(parsed)
    if "files" in values:
        values |= _place_files([field for field in fields if field.argument], values.pop("files"), values)
    for field in fields:
        if field.off is not None:
            values[field.name] = not values[field.name]
        elif field.many and not values.get(field.name) and not field.required:
            values.pop(field.name, None)
    return values


def _place_files(
    arguments: Sequence[OptionField], files: Sequence[Path], values: dict[str, Any]
) -> dict[str, Any]:
    """Assign files to positional arguments. The model is the first file, or follows its old flag."""
    placed: dict[str, Any] = {}
    for field in arguments:
        value = values.pop(f"old_{field.name}", None)
        if value is not None:
            placed[field.name] = value
            print_note(
                f"{field.old_flag} is no longer needed: pass {placeholder(field)} as the first argument"
            )
    missing = [field for field in _in_order(arguments) if field.name not in placed]
    if len(files) < len(missing):
        missing = [field for field in missing if field.required]
    if len(files) != len(missing):
        names = " ".join(placeholder(field) for field in missing)
        raise InputError(f"got {counted(len(files), 'file')}: expected {names}", hint="see --help")
    return placed | {field.name: file for field, file in zip(missing, files, strict=True)}

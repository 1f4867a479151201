"""Operations and their options, shared by the command line, the Python API and the ComfyUI nodes.

The options of an operation are one frozen record, which declares names, types, defaults, ranges and help
texts once. An operation is a function that takes its record and returns a report:

    @record
    class NullOptions(OperationOptions):
        model: Path = option(help="A single-file checkpoint.")
        out: Path = option(help="The file to write.", flag="-o")

    @operation(NullOptions)
    def null(options: NullOptions) -> NullReport: ...

`null("model.safetensors", out="zero.safetensors")` creates the record and calls the function.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import (
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from spectune.errors import InputError, did_you_mean
from spectune.extras import extras_named

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type[Any])
OptionsType = TypeVar("OptionsType", bound="OperationOptions")

Progress = Callable[[int, int, str], None]  # (done, total, name of the current item)
_REQUIRED = ...
_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
_CLI = "cli"  # key of json_schema_extra


def option(
    *,
    help: str,
    default: Any = _REQUIRED,
    flag: str | None = None,
    off: tuple[str, str] | None = None,
    metavar: str | None = None,
    ge: float | None = None,
    le: float | None = None,
) -> Any:
    """Declare a field of a record.

    Args:
        help: One or two sentences with meaning and unit. Every interface shows them.
        default: The default value. An option without a default is required.
        flag: Spellings on the command line. "-o" is added to the field's name, "-c/--caption" replaces it.
        off: For a boolean that is on by default, the flag that turns it off and the help text of that flag.
        metavar: Placeholder in the usage line.
        ge: Smallest value.
        le: Largest value.
    """
    extra = {_CLI: {"flag": flag, "off": off, "metavar": metavar}}
    return Field(default, description=help, ge=ge, le=le, json_schema_extra=cast("Any", extra))


def argument(
    *, help: str, default: Any = _REQUIRED, metavar: str | None = None, old_flag: str | None = None
) -> Any:
    """Declare a field that is a positional argument on the command line.

    The command line still accepts `old_flag` and prints a note about it.
    """
    extra = {_CLI: {"argument": True, "metavar": metavar, "old_flag": old_flag}}
    return Field(default, description=help, json_schema_extra=cast("Any", extra))


def hook(*, default: Any, help: str) -> Any:
    """Declare a field that only Python code can set, such as a callback. Interfaces do not show it."""
    return Field(default, description=help, repr=False, json_schema_extra={_CLI: {"hook": True}})


@dataclass_transform(frozen_default=True, field_specifiers=(option, argument, hook))
def record(cls: C) -> C:
    """Turn a class into a frozen options record. An invalid value raises InputError."""
    made = cast("Any", pydantic_dataclass(cls, frozen=True, config=_CONFIG))
    validate = made.__init__
    fields = dataclasses.fields(made)
    names = [field.name for field in fields]
    positional = [field.name for field in fields if not field.kw_only]

    def __init__(self: Any, *args: Any, **values: Any) -> None:
        if len(args) > len(positional):
            raise InputError(f"{len(args)} positional arguments: expected at most {len(positional)}")
        unknown = [name for name in values if name not in names]
        if unknown:
            raise InputError(f"unknown option `{unknown[0]}`{did_you_mean(unknown[0], names)}")
        try:
            validate(self, **dict(zip(positional, args, strict=False)), **values)
        except ValidationError as error:
            problems = [problem_text(dict(details)) for details in error.errors()]
            raise InputError("; ".join(problems)) from None

    made.__init__ = __init__
    return made


@record
class OperationOptions:
    """The fields that all options records share."""

    _: dataclasses.KW_ONLY
    progress: Progress | None = hook(
        default=None, help="Called with (done, total, name) while the operation runs."
    )
    notify: Callable[[str], None] | None = hook(
        default=None, help="Called with each warning as soon as it occurs."
    )

    def tell(self, text: str) -> None:
        """Pass a message to `notify`, if it is set."""
        if self.notify is not None:
            self.notify(text)


def problem_text(details: dict[str, Any]) -> str:
    """Return a message that names the field, for one validation error of pydantic."""
    location = [str(part) for part in details["loc"]]
    name = next((part for part in location if not part.isdecimal()), "")
    match details["type"]:
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"`{name}` is missing"
        case "value_error":
            return str(details["ctx"]["error"])
        case "literal_error":
            expected = str(details["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
            value = str(details["input"])
            close = did_you_mean(value, expected.split(", "))
            return f"unknown `{name}` {value!r}: expected one of {expected}{close}"
        case _:
            message = str(details["msg"])
            return f"`{name}`: {message[:1].lower()}{message[1:]}, got {details['input']!r}"


@dataclasses.dataclass(frozen=True)
class OptionField:
    """One option, with everything that an interface needs to show and parse it."""

    name: str
    kind: type  # str, int, float, bool or Path; str if text is parsed
    many: bool  # a tuple of `kind`
    optional: bool  # None is a value
    choices: tuple[str, ...]  # empty if any value of `kind` is allowed
    default: Any
    required: bool
    positional: bool  # may be a positional argument in Python
    argument: bool  # is a positional argument on the command line
    help: str
    minimum: float | None
    maximum: float | None
    flag: str | None
    old_flag: str | None
    off: tuple[str, str] | None  # the flag that turns it off, and its help text
    metavar: str | None


def option_fields(options: type[OperationOptions]) -> tuple[OptionField, ...]:
    """Return the options of a record in order of declaration, without hooks."""
    hints = get_type_hints(options)
    pydantic_fields = cast("Any", options).__pydantic_fields__
    kw_only = {field.name: field.kw_only for field in dataclasses.fields(cast("Any", options))}
    result: list[OptionField] = []
    for name, field in pydantic_fields.items():
        extra = cast("dict[str, Any]", field.json_schema_extra or {}).get(_CLI, {})
        if extra.get("hook"):
            continue
        kind, many, optional, choices = _shape(hints[name])
        bounds = {type(limit).__name__: limit for limit in field.metadata}
        result.append(
            OptionField(
                name=name,
                kind=kind,
                many=many,
                optional=optional,
                choices=choices,
                default=None if field.is_required() else field.default,
                required=field.is_required(),
                positional=not kw_only[name],
                argument=extra.get("argument", False),
                help=field.description or "",
                minimum=getattr(bounds.get("Ge"), "ge", None),
                maximum=getattr(bounds.get("Le"), "le", None),
                flag=extra.get("flag"),
                old_flag=extra.get("old_flag"),
                off=extra.get("off"),
                metavar=extra.get("metavar"),
            )
        )
    return tuple(result)


def _shape(hint: Any) -> tuple[type, bool, bool, tuple[str, ...]]:
    """Return (kind, many, optional, choices) of a type hint."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return str, False, False, tuple(str(arg) for arg in args)
    if origin is tuple:
        kind, _, _, choices = _shape(args[0])
        return kind, True, False, choices
    if origin is not None and (origin is Union or origin.__name__ == "UnionType"):
        plain = [arg for arg in args if arg is not type(None)]
        kind, many, _, choices = _shape(plain[0])
        return kind, many, len(plain) < len(args), choices
    return hint if hint in (str, int, float, bool, Path) else str, False, False, ()


def operation(options: Callable[P, OptionsType]) -> Callable[[Callable[[OptionsType], R]], Callable[P, R]]:
    """Turn a function that takes a record into a function that takes the record's fields.

    To pass an existing record, call `run_operation(function, options)`.
    """

    def decorate(run: Callable[[OptionsType], R]) -> Callable[P, R]:
        def call(*args: P.args, **values: P.kwargs) -> R:
            with extras_named():  # as a decorator, it would hide `call` from the generator of the API page
                return run(options(*args, **values))

        call.__name__, call.__qualname__, call.__module__ = run.__name__, run.__qualname__, run.__module__
        made = cast("Any", call)
        made.__doc__ = _documented(run.__doc__ or "", cast("type[OperationOptions]", options))
        made.__signature__ = _signature(cast("type[OperationOptions]", options), run)
        made.__wrapped_operation__ = run
        return call

    return decorate


def run_operation(function: Callable[..., R], options: OperationOptions) -> R:
    """Call an operation with an existing record."""
    return cast("Any", function).__wrapped_operation__(options)


def _signature(options: type[OperationOptions], run: Callable[..., Any]) -> inspect.Signature:
    hints = get_type_hints(options)
    parameters: list[inspect.Parameter] = []
    for field in sorted(option_fields(options), key=lambda field: not field.positional):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if field.positional else inspect.Parameter.KEYWORD_ONLY
        default = inspect.Parameter.empty if field.required else field.default
        parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name]))
    parameters.append(inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=None))
    return inspect.Signature(parameters, return_annotation=run.__annotations__.get("return"))


def _documented(text: str, options: type[OperationOptions]) -> str:
    """Append the options to a docstring in Google layout."""
    lines = [f"    {field.name}: {field.help}" for field in option_fields(options)]
    return "\n".join([inspect.cleandoc(text), "", "Args:", *lines])


def flags_of(field: OptionField) -> tuple[str, ...]:
    """Return the spellings of an option on the command line, the long one last."""
    if field.off is not None:
        return (field.off[0],)
    declared = tuple(field.flag.split("/")) if field.flag else ()
    if any(flag.startswith("--") for flag in declared):
        return declared
    return (*declared, f"--{field.name.replace('_', '-')}")

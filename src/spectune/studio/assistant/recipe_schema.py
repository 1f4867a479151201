"""The keys of a recipe as data, for forms: made from the sections' JSON schema."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.recipe.recipe import Recipe, section_of
from spectune.training.recipe.sections.base import OneOf

_LIMITS = {
    "minimum": "minimum", "maximum": "maximum", "exclusiveMinimum": "above", "exclusiveMaximum": "below",
}  # fmt: skip


def recipe_schema() -> dict[str, Any]:
    """Return the sections of a recipe and the options of each optimizer.

    A section is `{"name", "help", "many", "fields"}`; `many` is True for `[[data.sets]]`. See `_fields`.
    """
    options = {
        name: {
            "help": _text(kind.options),
            "learning_rate": kind.learning_rate,
            "fields": list(_fields(kind.options, "optimizer.options")),
        }
        for name, kind in OPTIMIZERS.items()
    }
    return {"sections": list(_sections(Recipe, "")), "optimizers": options}


def _sections(model: type[BaseModel], prefix: str) -> Iterator[dict[str, Any]]:
    for name, field in model.model_fields.items():
        below = section_of(field.annotation)
        if below is not None:
            key = f"{prefix}{name}"
            many = get_origin(field.annotation) is tuple
            fields = list(_fields(below, key))
            yield {"name": key, "help": _text(below), "many": many, "fields": fields}
            yield from _sections(below, f"{key}.")


def _fields(model: type[BaseModel], section: str) -> Iterator[dict[str, Any]]:
    """Yield the fields of a section.

    A field is `{"key", "name", "help", "required", "optional", "default", "kind"}`. `kind` is integer,
    number, boolean, string, path, choice, list, pair, table or any; with `choices`, limits (`minimum`,
    `maximum`, `above`, `below`), `items` (the same for the members of a list or pair), and `other` (other
    types that are accepted too).
    """
    schema = model.model_json_schema()
    required = schema.get("required", [])
    for name, field in model.model_fields.items():
        if section_of(field.annotation) is None:
            shape = _shape(schema["properties"][name], schema.get("$defs", {}), field)
            yield {
                "key": f"{section}.{name}",
                "name": name,
                "help": field.description or "",
                "required": name in required,
                "default": schema["properties"][name].get("default"),
                **shape,
            }


def _shape(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], field: FieldInfo | None
) -> dict[str, Any]:
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    members = schema.get("anyOf", schema.get("oneOf", ()))
    branches = [branch for branch in members if branch.get("type") != "null"]
    if branches:
        first, *others = (_shape(branch, definitions, field) for branch in branches)
        others += first.pop("other", [])
        null = len(branches) < len(members)
        return {**first, "optional": null, **({"other": others} if others else {})}
    shape: dict[str, Any] = {"optional": False, "kind": schema.get("type", "any")}
    shape |= {name: schema[key] for key, name in _LIMITS.items() if key in schema}
    names = _registry(field)
    if schema.get("format") == "path":
        shape["kind"] = "path"
    elif "enum" in schema or "const" in schema or (names and shape["kind"] == "string"):
        shape |= {"kind": "choice", "choices": list(schema.get("enum", names or [schema.get("const")]))}
    elif shape["kind"] == "array":
        pair = "prefixItems" in schema
        items = schema["prefixItems"][0] if pair else schema.get("items", {})
        shape |= {"kind": "pair" if pair else "list", "items": _shape(items, definitions, field)}
    elif shape["kind"] == "object":
        shape["kind"] = "table"
    return shape


def _text(section: type[BaseModel]) -> str:
    return inspect.cleandoc(section.__doc__ or "")


def _registry(field: FieldInfo | None) -> tuple[str, ...]:
    """Return the names that a field with a registry accepts; JSON schema does not have them."""
    if field is None:
        return ()
    for one in [*field.metadata, *_metadata(field.annotation)]:
        if isinstance(one, AfterValidator) and isinstance(one.func, OneOf):
            return one.func.names
    return ()


def _metadata(annotation: Any) -> Iterator[Any]:
    """Yield the metadata of all annotated types inside of a type."""
    if get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
    for inner in get_args(annotation):
        yield from _metadata(inner)

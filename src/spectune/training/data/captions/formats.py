"""Captions in JSON: one object for an image, as sd-scripts, gallery-dl and other downloaders write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from spectune.files.text import UnreadableText, load_json

# What an image shows, in the order of booru prompts. Others, such as `meta` and `rating`, are not captions.
KINDS = ("character", "copyright", "artist", "species", "general")
_EMOTICON = 3  # longest tag whose underscores stay, as in ^_^


def parse_json(text: str) -> object:
    """Parse JSON.

    Raises:
        UnreadableText: The text is not JSON.
    """
    try:
        return load_json(text)
    except ValueError as error:
        raise UnreadableText(f"is not JSON: {error}") from error


def caption_of(record: object) -> str | None:
    """Return the caption in a JSON object, or None if it has none.

    * `caption` and then `tags`, as sd-scripts joins them; or `text`. A `category` marks a record of
      gallery-dl, whose `caption` is the site's description: only its tags are used.
    * Tags by kind: `tags_KIND` or `tag_string_KIND` for each of KINDS, or an object `tags` with the kinds.
    * `tags` or `tag_string`: a list, or a string with commas or spaces. Underscores become spaces, except in
      a string with commas.
    """
    if not isinstance(record, dict):
        return None
    fields = cast("dict[str, Any]", record)
    parts: list[str] = []
    if "category" not in fields:
        parts += [fields[key].strip() for key in ("caption", "text") if isinstance(fields.get(key), str)][:1]
    tags = _tags(fields)
    if not parts and tags is None:
        return None
    return ", ".join(part for part in [*parts, *(tags or [])] if part)


def _tags(fields: Mapping[str, Any]) -> list[str] | None:
    """Return the tags of a record, or None if it has no field for them."""
    by_kind = fields.get("tags")
    if not isinstance(by_kind, dict):
        by_kind = {kind: fields.get(f"tags_{kind}", fields.get(f"tag_string_{kind}")) for kind in KINDS}
    kinds = [tags for kind in KINDS if (tags := _list(cast("dict[str, Any]", by_kind).get(kind))) is not None]
    if kinds:
        return [tag for tags in kinds for tag in tags]
    plain = _list(fields.get("tags"))
    return _list(fields.get("tag_string")) if plain is None else plain


def _list(value: object) -> list[str] | None:
    """Return the tags in a list or a string, or None for other values."""
    if isinstance(value, str):
        if "," in value:
            return [tag.strip() for tag in value.split(",") if tag.strip()]
        return [_readable(tag) for tag in value.split()]
    if isinstance(value, list):
        names = [_name(item) for item in cast("list[object]", value)]
        return [_readable(name.strip()) for name in names if name.strip()]
    return None


def _name(item: object) -> str:
    """Return a tag, which some sites give as an object with its name."""
    if isinstance(item, dict):
        item = cast("dict[str, Any]", item).get("name")
    return item if isinstance(item, str) else ""


def _readable(tag: str) -> str:
    return tag if len(tag) <= _EMOTICON else tag.replace("_", " ")

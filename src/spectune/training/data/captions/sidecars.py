"""Files with the captions of many images: JSONL with file names, and metadata of sd-scripts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from spectune.errors import InputError
from spectune.files.text import UnreadableText, read_text
from spectune.training.data.captions.formats import caption_of, parse_json
from spectune.training.data.pictures.formats import is_picture

_LINE_HINT = 'a line looks like {"file_name": "cat.png", "text": "a cat"}'
_METADATA_HINT = 'expected the metadata of sd-scripts: {"folder/cat": {"caption": "a cat", "tags": "red"}}'


@dataclass
class Sidecar:
    """The captions in a file."""

    path: Path
    captions: dict[str, str]  # by file name, or by key
    encoding: str
    is_shared: bool = False  # with other folders than that of the images
    _keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by name without suffix

    def __post_init__(self) -> None:
        if self.is_metadata:
            for key in self.captions:
                self._keys[_parts(key)[-1]].append(key)

    @property
    def is_metadata(self) -> bool:
        """Whether the file is metadata of sd-scripts, whose keys are paths with or without a suffix."""
        return self.path.suffix.lower() == ".json"

    def find(self, image: Path) -> str | None:
        """Return the caption of an image, or None."""
        key = self.key_of(image)
        return None if key is None else self.captions.get(key)

    def key_of(self, image: Path) -> str | None:
        """Return the key of an image.

        The last folder in a key of shared metadata must be that of the image, because other folders may have
        images of the same name.
        """
        if not self.is_metadata:
            return image.name if image.name in self.captions else None
        parts = (*image.parent.parts, image.stem)
        best: tuple[int, str] | None = None
        for key in self._keys.get(image.stem, ()):
            common = _common_end(_parts(key), parts)
            needed = min(2, len(_parts(key))) if self.is_shared else 1
            if common >= needed and (best is None or common > best[0]):
                best = (common, key)
        return None if best is None else best[1]


def read_sidecar(path: Path, *, is_shared: bool = False) -> Sidecar:
    """Read a sidecar: metadata of sd-scripts if its suffix is `.json`, otherwise JSONL.

    Raises:
        InputError: The file is not of this kind, or repeats a file name. The message gives the line number.
        UnreadableText: The file is not text.
    """
    decoded = read_text(path)
    captions = _metadata(path, decoded.text) if path.suffix.lower() == ".json" else _lines(path, decoded.text)
    return Sidecar(path, captions, decoded.encoding, is_shared)


def _lines(path: Path, text: str) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, caption = _entry(line, f"{path} line {number}")
        if name in captions:
            raise InputError(f"{path} line {number} repeats {name}", hint="keep one entry per file")
        captions[name] = caption.strip()
    return captions


def _entry(line: str, where: str) -> tuple[str, str]:
    fields = _object(line, where, _LINE_HINT)
    name, text = fields.get("file_name"), fields.get("text")
    if not isinstance(name, str) or not isinstance(text, str):
        key = "text" if isinstance(name, str) else "file_name"
        raise InputError(f"{where} has no string `{key}`", hint=_LINE_HINT)
    return name, text


def _metadata(path: Path, text: str) -> dict[str, str]:
    """Return the captions of sd-scripts' metadata. Entries without a caption are left out."""
    entries = _object(text, str(path), _METADATA_HINT)
    found = {key: caption_of(record) for key, record in entries.items() if _parts(key)}
    return {key: caption for key, caption in found.items() if caption is not None}


def _object(text: str, where: str, hint: str) -> dict[str, Any]:
    """Return the JSON object in a text."""
    try:
        value = parse_json(text)
    except UnreadableText as error:
        raise InputError(f"{where} {error}", hint=hint) from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is not an object", hint=hint)
    return cast("dict[str, Any]", value)


def _parts(key: str) -> tuple[str, ...]:
    """Return the folders and the name of a key, without its suffix. Windows separates with backslashes."""
    parts = [part for part in key.replace("\\", "/").split("/") if part not in ("", ".")]
    if parts:
        name, dot, _ = parts[-1].rpartition(".")
        if dot and name and is_picture(Path(parts[-1])):
            parts[-1] = name
    return tuple(parts)


def _common_end(one: tuple[str, ...], two: tuple[str, ...]) -> int:
    """Return the number of equal parts at the end."""
    count = 0
    for left, right in zip(reversed(one), reversed(two), strict=False):
        if left != right:
            break
        count += 1
    return count

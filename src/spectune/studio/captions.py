"""Write caption files beside pictures."""

from __future__ import annotations

from pathlib import Path

from spectune.errors import InputError
from spectune.files.rename import replace_text
from spectune.files.text import UnreadableText, read_text
from spectune.training.data.captions.text import LARGEST_CAPTION

EXTENSIONS = (".txt", ".caption")  # of text files, in the order in which training looks for them
LARGEST_CHARACTERS = 20_000


def caption_file(picture: Path) -> Path:
    """Return the caption file that training reads for a picture, or the one to create."""
    for extension in EXTENSIONS:
        for path in (picture.with_suffix(extension), picture.with_name(picture.name + extension)):
            if path.is_file():
                return path
    return picture.with_suffix(EXTENSIONS[0])


def read_caption(picture: Path) -> str | None:
    """Return the text of the caption file, in any encoding that training reads; None if there is no file.

    Raises:
        InputError: The file is no text. It must not be replaced, because it could not be restored.
    """
    path = caption_file(picture)
    if not path.exists():
        return None
    try:
        return read_text(path, largest=LARGEST_CAPTION).text
    except UnreadableText as error:
        raise InputError(f"{path.name} {error}: it is not changed", hint="save it as UTF-8 first") from error


def write_caption(picture: Path, text: str | None) -> None:
    """Write the caption of a picture as UTF-8; None removes the file."""
    path = caption_file(picture)
    if text is None:
        path.unlink(missing_ok=True)
        return
    if len(text) > LARGEST_CHARACTERS:
        raise InputError(f"the caption has {len(text):,} characters: expected at most {LARGEST_CHARACTERS:,}")
    replace_text(path, text)

"""Read and write picture files and their captions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spectune.errors import InputError
from spectune.files.rename import made_folder, replace_text, replacing
from spectune.files.text import UTF8, UnreadableText, read_text
from spectune.ops.options.pictures import DrawingOptions
from spectune.sampling.contact_sheet import Column
from spectune.training.data.captions.findings import content_findings, finding_warnings
from spectune.training.data.captions.text import text_lines

SIDECAR = "metadata.jsonl"  # the default of data.caption.sidecar


def file_name(number: int, caption: str) -> str:
    """Return a sortable file name that is valid on every system: `003-a-red-balloon.png`."""
    words = re.sub(r"[^\w]+", "-", caption.lower()).strip("-")[:60].strip("-")
    return f"{number:03d}-{words}.png" if words else f"{number:03d}.png"


def picture_files(folder: Path, captions: Sequence[str]) -> list[Path]:
    """Return the files for the pictures of these captions."""
    return [folder / file_name(number, caption) for number, caption in enumerate(captions)]


def refuse_existing(targets: Sequence[Path], *, force: bool) -> None:
    """Raise InputError if a file exists and `force` is off."""
    existing = [target for target in targets if target.exists()]
    if existing and not force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise InputError(
            f"{existing[0]}{more} exists", hint="pass `force` to overwrite, or choose another `out`"
        )


def save_pictures(targets: Sequence[Path], captions: Sequence[str], pictures: Sequence[Image.Image]) -> None:
    """Write PNG files, each with its caption as a text chunk."""
    for target, caption, picture in zip(targets, captions, pictures, strict=True):
        text = PngInfo()
        text.add_itxt("caption", caption)
        save_picture(picture, target, pnginfo=text)


def save_picture(picture: Image.Image, target: Path, **options: Any) -> None:
    """Write a picture completely or not at all, in a folder that may not exist yet."""
    kind = Image.registered_extensions()[target.suffix.lower()]
    with made_folder(target.parent), replacing(target) as partial:
        picture.save(partial, kind, **options)


def save_sidecar(target: Path, pictures: Sequence[Path], captions: Sequence[str]) -> None:
    """Write the captions by file name, one JSON object per line, in the format that training reads."""
    rows = (
        {"file_name": picture.name, "text": caption}
        for picture, caption in zip(pictures, captions, strict=True)
    )
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    replace_text(target, "\n".join(lines) + "\n")


def read_pictures(folder: Path, label: str) -> tuple[Column, list[str]]:
    """Read the PNG files of a folder and their captions, sorted by file name."""
    files = sorted(folder.glob("*.png"))
    if not files:
        raise InputError(
            f"{folder} has no .png pictures", hint="draw them with `spectune sample ... -o FOLDER`"
        )
    pictures: list[Image.Image] = []
    captions: list[str] = []
    for file in files:
        try:
            with Image.open(file, formats=("PNG",)) as picture:
                captions.append(str(picture.info.get("caption", file.stem)))
                pictures.append(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{file} is not a complete PNG picture", hint="remove it") from error
    return Column(label, pictures), captions


def check_sheet_name(path: Path) -> None:
    """Raise InputError if the file name of a sheet has no suffix of a picture format."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(
            f"{path} is not a picture: expected .png, .jpg or .webp", hint="for example sheet.png"
        )


def read_captions(
    captions: Sequence[str], file: Path | None, notify: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Return `captions` and the lines of a text file; `notify` gets its encoding if it is not UTF-8.

    Raises InputError if there are no captions.
    """
    lines: list[str] = []
    if file is not None:
        try:
            decoded = read_text(file)
        except UnreadableText as error:
            raise InputError(f"cannot read captions from {file}: it {error}") from error
        if decoded.encoding != UTF8:
            notify(f"{file.name} is read as {decoded.encoding}")
        lines = text_lines(decoded.text)
    result = [*captions, *(line for line in lines if line)]
    if not result:
        raise InputError("no captions", hint="pass `captions`, or a text file as `captions_file`")
    return result


def caption_notes(captions: Sequence[str], options: DrawingOptions) -> list[str]:
    """Return warnings about captions that are cut, and about weights in captions."""
    named = [(Path(f"caption {number}"), (caption,)) for number, caption in enumerate(captions, start=1)]
    named.append((Path("the negative prompt"), (options.negative,)))
    found = content_findings(named, max_tokens=options.max_tokens, wildcards=True)
    return finding_warnings([finding for findings in found for finding in findings])

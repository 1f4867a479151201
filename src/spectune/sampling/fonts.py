"""The text of sheets: DejaVu for Latin, Greek and Cyrillic, and fonts of the system for other scripts."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

from spectune.errors import FileNote, counted, some_of

ELLIPSIS, REPLACEMENT = "…", "\N{REPLACEMENT CHARACTER}"  # DejaVu has both
_DEJAVU = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
# Files that Pillow finds in the font folders of Linux, Windows and macOS, in this order.
SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "NotoSansJP-Regular.otf",
    "NotoSansSC-Regular.otf", "NotoSansKR-Regular.otf", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc",
    "NotoSansThai-Regular.ttf", "NotoSansDevanagari-Regular.ttf", "NotoEmoji-Regular.ttf", "unifont.otf",
    "msgothic.ttc", "msyh.ttc", "simsun.ttc", "malgun.ttf", "LeelawUI.ttf", "Nirmala.ttc", "Nirmala.ttf",
    "seguisym.ttf", "seguiemj.ttf", "ヒラギノ角ゴシック W3.ttc", "Hiragino Sans GB.ttc", "PingFang.ttc",
    "AppleSDGothicNeo.ttc", "Arial Unicode.ttf",
)  # fmt: skip


class SheetFont:
    """A size of the fonts of sheets. Each character of a text gets the first font that has it."""

    def __init__(self, size_px: int) -> None:
        self.size_px = size_px
        self._ascent = _font(_DEJAVU, size_px).getmetrics()[0]

    def length(self, text: str) -> float:
        """Return the width of a text in pixels."""
        return sum(font.getlength(run) for run, font in self._runs(text))

    def draw(
        self, draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, color: tuple[int, int, int]
    ) -> None:
        """Draw a line of text; `corner` is its left top corner."""
        left, top = corner
        for run, font in self._runs(text):
            # on one base line, because fonts differ in height
            draw.text((left, top + self._ascent), run, color, font, anchor="ls")
            left += font.getlength(run)

    def shortened(self, text: str, width: float) -> str:
        """Return a text that fits into `width`: as it is, or its beginning with an ellipsis."""
        if self.length(text) <= width:
            return text
        return text[: self._fitting(text, width - self.length(ELLIPSIS))].rstrip() + ELLIPSIS

    def wrapped(self, text: str, width: float, most: int) -> list[str]:
        """Return a text in at most `most` lines. Words that are too long are broken; the rest is cut."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.length(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
                continue
            while word and len(lines) <= most:
                count = max(1, self._fitting(word, width))
                lines.append(word[:count])
                word = word[count:]
        if len(lines) <= most:
            return lines
        return [*lines[: most - 1], self.shortened(lines[most - 1] + ELLIPSIS, width)]

    def _fitting(self, text: str, width: float) -> int:
        """Return the number of characters of a text that fit into `width`."""
        return bisect_right(range(1, len(text) + 1), width, key=lambda count: self.length(text[:count]))

    def _runs(self, text: str) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
        for path, chars in groupby(text, key=_path_for):
            run = "".join(chars)
            yield (
                (REPLACEMENT * len(run), _font(_DEJAVU, self.size_px))
                if path is None
                else (run, _font(path, self.size_px))
            )


def note_missing(texts: Iterable[str]) -> None:
    """Warn once of the characters for which there is no font; sheets show a replacement."""
    missing = sorted({char for text in texts for char in text if not char.isspace() and not _path_for(char)})
    if missing:
        warnings.warn(
            FileNote(
                f"no font has {counted(len(missing), 'character')} of the sheet, drawn as {REPLACEMENT}: "
                f"{some_of([f'U+{ord(char):04X}' for char in missing])}; install Noto Sans CJK for Chinese, "
                "Japanese and Korean"
            ),
            stacklevel=2,
        )


@cache
def _font(path: str, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size_px)


@cache
def _path_for(char: str) -> str | None:
    """Return the first font that has a character, or None."""
    for name in (_DEJAVU, *SYSTEM_FONTS):
        path = _found(name)
        if path is not None and _face(path).get_char_index(ord(char)):
            return path
    return None


@cache
def _found(name: str) -> str | None:
    """Return the path of a font file of this computer, or None."""
    try:
        return str(ImageFont.truetype(name, 12).path)
    except OSError:
        return None


@cache
def _face(path: str) -> FT2Font:
    return FT2Font(path)

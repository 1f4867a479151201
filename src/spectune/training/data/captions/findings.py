"""Possible mistakes in captions: counted, with one line for each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from spectune.errors import InputError, counted, printable, some_of
from spectune.model.text import count_tokens, has_weights
from spectune.training.data.captions.draws import has_wildcard

LISTED = 100  # unreadable files in an error


class FindingKind(StrEnum):
    """The kinds of findings."""

    UNREADABLE = "unreadable"
    ENCODING = "encoding"
    NO_CAPTION = "no caption"
    MORE_LINES = "more lines"
    WEIGHTS = "weights"
    WILDCARDS = "wildcards"
    CUT = "cut"


# What is counted, and the rest of the line. Some files are named after it.
_LINES: Mapping[FindingKind, tuple[str, str]] = {
    FindingKind.UNREADABLE: ("caption file", "{detail}"),
    FindingKind.ENCODING: ("caption file", "read as {detail}"),
    FindingKind.NO_CAPTION: ("JSON file", "without a caption, not used"),
    FindingKind.MORE_LINES: (
        "caption",
        "with text beyond the first line: only the first line with text is used, "
        'set data.caption.lines to "all" or "random" to use all',
    ),
    FindingKind.WEIGHTS: ("caption", "with weights like (word:1.2), which are used as text"),
    FindingKind.WILDCARDS: (
        "caption",
        "with wildcards like {{a|b}}, which are used as text unless data.caption.wildcards is on",
    ),
    FindingKind.CUT: ("caption", "longer than {detail} tokens, the rest is not used"),
}


@dataclass(frozen=True)
class CaptionFinding:
    """A finding in a file. `detail` is an encoding, a reason, or the largest number of tokens."""

    kind: FindingKind
    path: Path
    detail: str = ""
    tokens: int = 0  # of a caption that is cut


def content_findings(
    captions: Sequence[tuple[Path, Sequence[str]]], *, max_tokens: int, wildcards: bool
) -> list[list[CaptionFinding]]:
    """Return the findings about the texts of each caption, which comes with the file to name.

    `wildcards`: they are drawn, so they are no finding.
    """
    distinct = list(dict.fromkeys(text for _, texts in captions for text in texts))
    tokens = dict(zip(distinct, count_tokens(distinct), strict=True))
    found: list[list[CaptionFinding]] = []
    for source, texts in captions:
        own: list[CaptionFinding] = []
        if any(map(has_weights, texts)):
            own.append(CaptionFinding(FindingKind.WEIGHTS, source))
        if not wildcards and any(map(has_wildcard, texts)):
            own.append(CaptionFinding(FindingKind.WILDCARDS, source))
        if (longest := max(tokens[text] for text in texts)) > max_tokens:
            own.append(CaptionFinding(FindingKind.CUT, source, str(max_tokens), longest))
        found.append(own)
    return found


def check_readable(findings: Sequence[CaptionFinding]) -> None:
    """Raise InputError if a caption file cannot be read. The message lists all such files."""
    unreadable = [f"{one.path} {one.detail}" for one in findings if one.kind is FindingKind.UNREADABLE]
    if unreadable:
        raise InputError(
            f"{counted(len(unreadable), 'caption file')} cannot be read: {some_of(unreadable, LISTED)}",
            hint="save them as UTF-8 text, or remove them",
        )


def finding_warnings(findings: Sequence[CaptionFinding]) -> list[str]:
    """Return one line for each kind of finding and each detail."""
    lines: list[str] = []
    for kind in FindingKind:
        own = [one for one in findings if one.kind is kind]
        for detail in dict.fromkeys(one.detail for one in own):
            lines.append(_line(kind, detail, [one for one in own if one.detail == detail]))
    return lines


def _line(kind: FindingKind, detail: str, found: Sequence[CaptionFinding]) -> str:
    noun, text = _LINES[kind]
    line = f"{counted(len(found), noun)} {text.format(detail=detail)}"
    if kind is not FindingKind.CUT:
        return f"{line}: {some_of([printable(one.path.name) for one in found])}"
    longest = max(found, key=lambda one: one.tokens)
    return f"{line}; longest: {printable(longest.path.name)} with {counted(longest.tokens, 'token')}"

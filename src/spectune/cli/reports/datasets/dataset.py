"""Output of `dataset`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from textwrap import fill
from typing import Any

from spectune.cli.console import err, heading, say, table
from spectune.errors import counted, printable
from spectune.ops.dataset.records import DatasetReport, Problem
from spectune.ops.options.dataset import DatasetOptions

LISTED = 5  # files of each problem
BUCKETS = 10
_LONGEST_TAG = 50


def as_json(report: DatasetReport, options: DatasetOptions, seconds: float) -> dict[str, Any]:
    pictures = [
        {
            "path": picture.path,
            "size": [picture.placement.original.width, picture.placement.original.height],
            "bucket": [picture.placement.target.width, picture.placement.target.height],
            "cropped": picture.placement.cropped_share,
            "enlarged": picture.enlarged,
            "sharpness": picture.sharpness,
            "repeats": picture.repeats,
            "tokens": picture.tokens,
            "caption": picture.caption,
        }
        for picture in report.pictures
    ]
    sums = {"draws": report.draws, "cropped": report.cropped, "longer_captions": report.longer_captions}
    buckets = [asdict(bucket) for bucket in report.buckets]
    return {**asdict(report), **sums, "buckets": buckets, "pictures": pictures}


def show(report: DatasetReport, options: DatasetOptions, seconds: float) -> None:
    _print_counts(report)
    _print_problems(report.problems)
    if report.install is not None:
        say("near duplicates were not looked for: this needs the package imagehash")
        say(f"  {report.install}")
    _print_buckets(report)
    _print_tags(report)
    if report.sheet is not None:
        say(f"wrote {report.sheet}: {_of(report.shown, len(report.pictures))} pictures; red is cropped away")


def _print_counts(report: DatasetReport) -> None:
    pictures = report.pictures
    say(f"{counted(len(pictures), 'picture')}, {counted(report.draws, 'draw')} per epoch")
    areas = sorted(pictures, key=lambda one: one.placement.original.width * one.placement.original.height)
    middle = areas[len(areas) // 2]
    say(f"  sizes     {areas[0].shape} to {areas[-1].shape} px, the middle one is {middle.shape}")
    enlarged = sum(one.enlarged > 1 for one in pictures)
    say(
        f"  training  at {report.resolution_px} px in {counted(len(report.buckets), 'bucket')}; "
        f"{report.cropped:.1%} of the area is cropped away, {enlarged:,} enlarged"
    )
    say(f"  captions  {_of(report.captioned, len(pictures))} pictures have their own")
    tokens = [one.tokens for one in pictures]
    longer = ", ".join(f"{count:,} over {step}" for step, count in report.longer_captions.items())
    say(f"  tokens    {min(tokens)} to {max(tokens)}, median {median(tokens):.0f}; {longer}")


def _print_problems(problems: Sequence[Problem]) -> None:
    if not problems:
        say("no problems were found")
        return
    heading("may be a mistake")
    for problem in problems:
        say(_wrapped(problem.text))
        for item in problem.items[:LISTED]:
            say(f"    {item}")
        if len(problem.items) > LISTED:
            say(f"    ... {len(problem.items) - LISTED:,} more")


def _wrapped(text: str) -> str:
    # whole words: a name must stay in one piece, so that it can be copied
    return fill(
        text,
        err.width,
        initial_indent="- ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _print_buckets(report: DatasetReport) -> None:
    shown, rest = report.buckets[:BUCKETS], report.buckets[BUCKETS:]
    rows = [
        (f"{row.size.width}x{row.size.height}", f"{row.pictures:,}", f"{row.draws:,}", f"{row.cropped:.1%}")
        for row in shown
    ]
    if rest:
        pictures, draws = sum(row.pictures for row in rest), sum(row.draws for row in rest)
        rows.append((f"{len(rest)} more", f"{pictures:,}", f"{draws:,}", ""))
    table("training sizes", ("bucket", "pictures", "per epoch", "cropped"), rows)


def _print_tags(report: DatasetReport) -> None:
    shared = [(tag, count) for tag, count in report.tags if count > 1]
    if report.tags and not shared:
        say("no two captions share a tag (text between commas)")
        return
    rows = [
        (printable(tag, _LONGEST_TAG), f"{count:,}", f"{count / len(report.pictures):.0%}")
        for tag, count in shared
    ]
    if rows:
        title = f"the most frequent of {counted(report.different_tags, 'tag')}"
        table(title, ("tag", "captions", "share"), rows)


def _of(count: int, total: int) -> str:
    return f"all {total:,}" if count == total else f"{count:,} of {total:,}"

"""Output of `new`: what was chosen on stderr, the command to run on stdout. It asks on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import typer

from spectune.cli.console import say, show_result
from spectune.errors import counted
from spectune.ops.new import NewReport
from spectune.ops.options.training import NewOptions


def prepare(options: NewOptions) -> NewOptions:
    """Let the operation ask, if somebody can answer."""
    can_ask = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    options = replace(options, notify=say)
    return replace(options, ask=ask) if can_ask and not options.yes else options


def ask(question: str, default: str, choices: Sequence[str]) -> str:
    """Ask on the terminal until the reply is one of the choices. Enter takes the default."""
    while True:
        words = f" ({', '.join(choices)})" if choices else ""
        reply = typer.prompt(f"{question}{words}", default=default, show_default=bool(default), err=True)
        if not choices or reply.strip() in choices:
            return str(reply).strip()
        say(f"expected one of {', '.join(choices)}")


def show(report: NewReport, options: NewOptions, seconds: float) -> None:
    say(f"{counted(report.pictures, 'picture')} in {options.folder}")
    for note in report.notes:
        say(note)
    say(f"wrote {report.path}; look at it, then check and train:")
    show_result(f"{report.command} --dry-run")
    show_result(report.command)

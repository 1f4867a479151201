"""Generator of docs/concepts/evidence.md from the texts in texts/ and the values in the results."""

from __future__ import annotations

from pathlib import Path

from experiments.registry import EXPERIMENTS, Experiment

HERE = Path(__file__).resolve().parent
TEXTS = HERE / "texts"
PAGE = HERE.parent / "docs" / "concepts" / "evidence.md"


def text() -> str:
    """Return the page: the introduction, then the text of each finished experiment with its values."""
    written = [it for it in EXPERIMENTS.values() if finished(it) and (TEXTS / f"{it.name}.md").exists()]
    sections = [_text(it.name).format_map(dict(it.values())) for it in written]
    missing = [it.name for it in EXPERIMENTS.values() if it not in written]
    note = [f"Unfinished or without a text: {', '.join(missing)}."] if missing else []
    return "\n\n".join(part.rstrip() for part in [_text("introduction"), *note, *sections]) + "\n"


def finished(experiment: Experiment) -> bool:
    return all(EXPERIMENTS[name].done for name in (*experiment.needs, experiment.name))


def write() -> None:
    PAGE.write_text(text(), encoding="utf-8")
    print(f"wrote {PAGE}")


def _text(name: str) -> str:
    return (TEXTS / f"{name}.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    write()

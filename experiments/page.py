"""Generate docs/concepts/evidence.md from the texts in texts/ and the values in the results."""

from __future__ import annotations

from pathlib import Path

from experiments.registry import EXPERIMENTS, Experiment

HERE = Path(__file__).resolve().parent
TEXTS = HERE / "texts"
PAGE = HERE.parent / "docs" / "concepts" / "evidence.md"


def text() -> str:
    """Return the page: the introduction, then the text of each finished experiment with its values."""
    experiments = EXPERIMENTS.values()
    written = [one for one in experiments if finished(one) and (TEXTS / f"{one.name}.md").exists()]
    sections = [_text(one.name).format_map(dict(one.values())) for one in written]
    missing = [one.name for one in experiments if one not in written]
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

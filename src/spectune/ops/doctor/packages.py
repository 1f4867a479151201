"""The packages that spectune needs or can use, and which of them are installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from spectune.model.device import pip_install

# The extras of pyproject.toml that are of use to users, and what they are for.
PURPOSES = {
    "bnb": "quantized bases (nf4, int8) and the optimizer adamw8bit",
    "heif": "reading .heic pictures",
    "dataset": "near duplicates in `spectune dataset`",
    "dadapt": "the optimizer dadapt_adam",
    "studio": "the page in the browser, `spectune studio`",
}


@dataclass(frozen=True)
class OptionalPackage:
    """A package that only some options need."""

    name: str
    purpose: str
    version: str | None  # None if it is not installed
    install: str  # the command that installs it


def optional_packages() -> tuple[OptionalPackage, ...]:
    """Return the packages of all extras in PURPOSES."""
    return tuple(
        OptionalPackage(
            requirement.name,
            PURPOSES[extra],
            _installed(requirement.name),
            f'{pip_install()} "{requirement.name}{requirement.specifier}"',
        )
        for extra in PURPOSES
        for requirement in _requirements(extra)
    )


def wrong_packages() -> tuple[str, ...]:
    """Return a line for each required package that is missing or not in its range."""
    lines: list[str] = []
    for requirement in _requirements(""):
        found = _installed(requirement.name)
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            continue
        state = "is not installed" if found is None else f"{found} is not in the range"
        needed = f"{requirement.name}{requirement.specifier}"
        lines.append(f'{requirement.name} {state}: spectune needs {needed}: {pip_install()} "{needed}"')
    return tuple(lines)


def _requirements(extra: str) -> Iterator[Requirement]:
    """Yield the requirements of one extra, or with "" those that are always needed."""
    try:
        lines = requires("spectune") or []
    except PackageNotFoundError:  # a source tree that is not installed
        lines = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if (marker is None and not extra) or (
            marker is not None and extra and marker.evaluate({"extra": extra})
        ):
            yield requirement


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

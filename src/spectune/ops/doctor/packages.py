"""The packages that spectune needs or can use, and which of them are installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from spectune.extras import install_line
from spectune.files.provenance import spectune_version
from spectune.model.device import pip_install

# The extras of pyproject.toml that are of use to users, and what they are for.
PURPOSES = {
    "train": "training, pictures, datasets and recipes",
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
    """Return the extras in PURPOSES. An extra of one package has the name of that package."""
    found: list[OptionalPackage] = []
    for extra, purpose in PURPOSES.items():
        versions = {requirement.name: _installed(requirement.name) for requirement in _requirements(extra)}
        if not versions:  # a source tree that is not installed
            continue
        if len(versions) == 1:
            ((name, shown),) = versions.items()
        else:
            name, shown = f"spectune[{extra}]", None if None in versions.values() else spectune_version()
        found.append(OptionalPackage(name, purpose, shown, install_line(extra, pip_install())))
    return tuple(found)


def wrong_packages() -> tuple[str, ...]:
    """Return a line for each required package that is missing or not in its range."""
    lines: list[str] = []
    # the core alone leaves the other packages to other programs, such as ComfyUI
    train = list(_requirements("train"))
    if any(_installed(requirement.name) is None for requirement in train):
        train = []
    for requirement in (*_requirements(""), *train):
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

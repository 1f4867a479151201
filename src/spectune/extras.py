"""The optional parts of spectune: which module belongs to which extra of pyproject.toml.

The core, `pip install spectune`, is enough for the commands on files and for the nodes of ComfyUI.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version

from spectune.errors import InputError

_MODULES = {
    "train": (
        "PIL", "accelerate", "diffusers", "filelock", "huggingface_hub", "lion_pytorch", "matplotlib",
        "prodigyopt", "prodigyplus", "safetensors", "schedulefree", "scipy", "tensorboard", "tomlkit",
        "transformers",
    ),
    "bnb": ("bitsandbytes",),
    "dadapt": ("dadaptation",),
    "dataset": ("imagehash",),
    "heif": ("pillow_heif",),
    "studio": ("fastapi", "jinja2", "python_multipart", "starlette", "uvicorn"),
}  # fmt: skip
EXTRA_OF = {module: extra for extra, modules in _MODULES.items() for module in modules}


def install_line(extra: str, pip_install: str = "pip install") -> str:
    """Return the command that installs an extra into the environment of spectune."""
    return f'{pip_install} "spectune[{extra}]"'


@contextmanager
def extras_named(user: str = "this") -> Iterator[None]:
    """Replace the error about a missing module of an extra by an InputError with the line to install it.

    `user` is what needs the module. It also works as a decorator.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRA_OF:
            raise
        hint = install_line(EXTRA_OF[module])
        raise InputError(f"{user} needs {module}, which is not installed", hint=hint) from error


def check_version(package: str, extra: str) -> None:
    """Raise InputError if the installed version of a package is not in the range of pyproject.toml.

    pip checks the range when it installs the extra. Another program, such as ComfyUI, may have installed the
    package without it.
    """
    from packaging.requirements import Requirement

    try:
        lines, found = requires("spectune") or [], version(package)
    except PackageNotFoundError:  # a source tree that is not installed
        return
    for needed in map(Requirement, lines):
        if needed.name == package and not needed.specifier.contains(found, prereleases=True):
            raise InputError(
                f"{package} {found} is installed: this needs {package}{needed.specifier}",
                hint=f"{install_line(extra)}, in an environment without ComfyUI",
            )

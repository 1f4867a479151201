"""Download one checkpoint of the Hugging Face hub, written as hub:owner/name or hub:owner/name/file.

Only .safetensors files are downloaded, into the cache that all programs of the hub share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from spectune.errors import InputError, SpectuneError, counted, printable, some_of

T = TypeVar("T")

PREFIX = "hub:"
_FORM = re.compile(r"hub:([\w.-]+/[\w.-]+?)(?:/(.+))?")
_EXAMPLE = "for example hub:stabilityai/stable-diffusion-xl-base-1.0/sd_xl_base_1.0.safetensors"


def download(word: str, notify: Callable[[str], None] | None = None) -> Path:
    """Return the path of the downloaded file; `notify` gets its size before the download.

    Raises:
        InputError: There is no such repository or file, or the repository has several checkpoints.
        SpectuneError: The hub cannot be reached.
    """
    match = _FORM.fullmatch(word)
    if match is None or any(part in ("", ".", "..") for part in word.removeprefix(PREFIX).split("/")):
        raise InputError(f"{printable(word)} is not of the form hub:owner/name[/file]", hint=_EXAMPLE)
    repository, file = match.groups()
    if file is not None and not file.lower().endswith(".safetensors"):
        raise InputError(
            f"{printable(word)}: only .safetensors files are downloaded",
            hint="a .ckpt or .bin file may run code when it is opened; choose another file",
        )
    sizes = _explained(word, lambda: list_files(repository))
    chosen = _choose(word, repository, file, sizes)
    if notify is not None:
        notify(
            f"downloading {printable(chosen)} of {repository}, {sizes[chosen] / 1e9:.2f} GB, if not cached"
        )
    return _explained(word, lambda: fetch(repository, chosen))


def _choose(word: str, repository: str, file: str | None, sizes: Mapping[str, int]) -> str:
    """Return the file to download: the named one, or the only checkpoint at the root."""
    if file is not None:
        if file not in sizes:
            raise InputError(f"{repository} has no file {printable(file)}", hint=_listed(sizes))
        return file
    at_root = {name: size for name, size in sizes.items() if "/" not in name}
    if len(at_root) == 1:
        return next(iter(at_root))
    found = counted(len(at_root), ".safetensors file")
    raise InputError(
        f"{printable(word)}: {repository} has {found} at its root: expected 1", hint=_listed(sizes)
    )


def _listed(sizes: Mapping[str, int]) -> str:
    if not sizes:
        return "the repository has no .safetensors file"
    names = [f"{printable(name)} ({size / 1e9:.2f} GB)" for name, size in sizes.items()]
    return f"add the name of a file: {some_of(names, 8)}"


def list_files(repository: str) -> dict[str, int]:
    """Return the .safetensors files of a repository with their sizes in bytes."""
    from huggingface_hub import HfApi

    files = HfApi().model_info(repository, files_metadata=True).siblings or []
    return {
        file.rfilename: file.size or 0 for file in files if file.rfilename.lower().endswith(".safetensors")
    }


def fetch(repository: str, file: str) -> Path:
    """Download a file into the cache of the hub, unless it is there, and return its path."""
    import huggingface_hub

    return Path(cast("Any", huggingface_hub).hf_hub_download(repository, file))


def _explained(word: str, request: Callable[[], T]) -> T:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # the bases include the error of the HTTP library, which depends on the version of the package
    failures = cast("tuple[type[Exception], ...]", (HFValidationError, OSError, *HfHubHTTPError.__bases__))
    try:
        return request()
    except failures as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpectuneError(
            f"cannot download {printable(word)}: {printable(reason)}",
            hint="check the name and the connection; a gated model needs `hf auth login` first",
        ) from error

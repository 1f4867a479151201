"""Encoded pictures on disk, found again by what they show and by the autoencoder that made them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from spectune.errors import InputError, some_of
from spectune.files.provenance import PREFIX, spectune_version
from spectune.files.writer import write_tensors

_FORMAT = "1"  # of what is cached: counted up when pictures are rendered otherwise


class LatentStore:
    """A folder with one safetensors file for each picture and autoencoder, whose tensors are views.

    The name of a file holds the sha256 of the picture's bytes and one of the autoencoder's key: a changed
    picture and another autoencoder have files of their own. A posterior is (2 * channels, h, w) float32, the
    mean and then the standard deviation of scaled latents. Nothing that is read is trusted: a file that holds
    anything else counts as `damaged`, and its views are encoded anew.
    """

    def __init__(self, folder: Path, vae_key: str) -> None:
        """`vae_key` identifies the autoencoder's weights, scale, shift and padding.

        Raises InputError when the folder cannot be made.
        """
        self.folder = folder
        self.damaged: set[Path] = set()
        self._vae_key = vae_key
        self._vae = hashlib.sha256(f"{_FORMAT} {vae_key}".encode()).hexdigest()[:16]
        _make(folder)

    def file_of(self, picture: Path) -> Path:
        """Where the views of a picture lie; reads the picture."""
        with picture.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return self.folder / digest[:2] / f"{digest}-{self._vae}.safetensors"

    def load(self, file: Path, names: Iterable[str], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The sound ones among the named posteriors of a file, which need not exist."""
        found = self._read(file)
        wanted = {name: found[name] for name in names if name in found}
        sound = {name: tensor for name, tensor in wanted.items() if _is_posterior(tensor, shape)}
        if len(sound) < len(wanted):
            self.damaged.add(file)
        return sound

    def add(self, file: Path, views: Mapping[str, Tensor]) -> None:
        """Write posteriors beside those the file holds; it is replaced at once or not at all."""
        _make(file.parent)
        metadata = {PREFIX + "version": spectune_version(), PREFIX + "vae_key": self._vae_key}
        write_tensors(file, {**self._read(file), **views}, metadata=metadata, force=True)

    def warnings(self) -> list[str]:
        """A line on what was damaged, if anything was."""
        if not self.damaged:
            return []
        names = some_of(sorted(file.name for file in self.damaged))
        return [f"{len(self.damaged)} files of the latent cache are damaged and made anew: {names}"]

    def _read(self, file: Path) -> dict[str, Tensor]:
        try:
            # Not mapped: Windows does not replace a file that is.
            return load(file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, SafetensorError, ValueError):
            self.damaged.add(file)
            return {}


def _is_posterior(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        return False
    deviation = tensor[shape[0] // 2 :]
    return bool(torch.isfinite(tensor).all() and (deviation > 0).all())


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"data.cache_folder cannot be made: {folder}: {error.strerror}", hint="name another folder"
        ) from error

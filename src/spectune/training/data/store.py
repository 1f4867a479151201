"""Encoded images on disk, in files named by hashes of the image and of the autoencoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from spectune.errors import InputError, counted, some_of
from spectune.files.provenance import PREFIX, spectune_version
from spectune.files.writer import write_tensors

_FORMAT = "2"  # raise it when a change affects the pixels of a view


class LatentStore:
    """A folder with one safetensors file for each image and autoencoder, with one tensor for each view.

    The file name contains the sha256 of the image file and a hash of the autoencoder's key, so a changed
    image or another autoencoder gets another file. A tensor is a posterior, (2 * channels, h, w) float32: the
    mean and the standard deviation of scaled latents. Every tensor is checked. If one is invalid, its file is
    added to `damaged` and its view is encoded again.
    """

    def __init__(self, folder: Path, vae_key: str, *, has_deviations: bool = True) -> None:
        """Open the store.

        Args:
            folder: The folder, which is created.
            vae_key: Identifies the autoencoder's weights, scale, shift and padding.
            has_deviations: False for an autoencoder that encodes without randomness: its deviations are 0.

        Raises:
            InputError: The folder cannot be created.
        """
        self.folder = folder
        self.damaged: set[Path] = set()
        self._vae_key, self._has_deviations = vae_key, has_deviations
        self._vae = hashlib.sha256(f"{_FORMAT} {vae_key}".encode()).hexdigest()[:16]
        _create(folder)

    def file_of(self, image: Path) -> Path:
        """Return the path of the file with the views of an image. This reads the image file to hash it."""
        with image.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return self.folder / digest[:2] / f"{digest}-{self._vae}.safetensors"

    def load(self, file: Path, names: Iterable[str], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the valid posteriors in a file that are in `names`. The file need not exist."""
        stored = self._read(file)
        present = {name: stored[name] for name in names if name in stored}
        valid = {name: tensor for name, tensor in present.items() if self._is_valid(tensor, shape)}
        if len(valid) < len(present):
            self.damaged.add(file)
        return valid

    def add(self, file: Path, views: Mapping[str, Tensor]) -> None:
        """Add posteriors to a file. The file is replaced atomically."""
        _create(file.parent)
        metadata = {PREFIX + "version": spectune_version(), PREFIX + "vae_key": self._vae_key}
        write_tensors(file, {**self._read(file), **views}, metadata=metadata, force=True)

    def warnings(self) -> list[str]:
        """Return a line about damaged files, if there are any."""
        if not self.damaged:
            return []
        names = some_of(sorted(file.name for file in self.damaged))
        return [f"{counted(len(self.damaged), 'damaged file')} in the latent cache, encoded again: {names}"]

    def _is_valid(self, tensor: Tensor, shape: tuple[int, ...]) -> bool:
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            return False
        deviation = tensor[shape[0] // 2 :]
        is_possible = deviation > 0 if self._has_deviations else deviation == 0
        return bool(torch.isfinite(tensor).all() and is_possible.all())

    def _read(self, file: Path) -> dict[str, Tensor]:
        try:
            # Not memory-mapped: Windows cannot replace a mapped file.
            return load(file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, SafetensorError, ValueError):
            self.damaged.add(file)
            return {}


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"data.cache_folder cannot be created: {folder}: {error.strerror}", hint="choose another folder"
        ) from error

"""The index of a folder of pictures: a safetensors file that all processes of a host map into their memory.

A mapped file takes memory once for all processes, and the system can take it back. A format that is decoded,
such as Parquet, would take memory in each process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray

from spectune.errors import InputError
from spectune.files.reader import SafetensorsFile
from spectune.files.text import load_json
from spectune.files.writer import write_tensors
from spectune.training.data.tables.images import Columns
from spectune.training.data.tables.strings import Strings

INDEX_NAME = "spectune-index.safetensors"
_HEAD = "spectune.index"
_TEXTS = (
    *("names", "captions", "templates", "notes"),
    *("skipped", "reasons", "unread", "unused_masks", "without_image", "shared"),
)
_NUMBERS: dict[str, tuple[type, tuple[int, ...]]] = {
    "sizes": (np.int32, (2,)),
    "masks": (np.bool_, ()),
    "flags": (np.uint8, ()),
    "states": (np.int64, (2,)),
    "text_states": (np.int64, ()),
    "skipped_states": (np.int64, (3,)),
}


class ImageBit:
    """Bits of the flags of an image."""

    FRAMES, CONVERTED, UNUSABLE_PROFILE, ALPHA, OWN_CAPTION, EMPTY_CAPTION, CHECKED = (
        1 << bit for bit in range(7)
    )


@dataclass(frozen=True)
class Head:
    """What an index was made from."""

    settings: str  # of captions and masks
    files: str  # a hash of the names, sizes and times of all files in the folder
    sidecar: str  # the same of the sidecars, which may be in another folder
    findings: str = "[]"  # in sidecars, as JSON


@dataclass(frozen=True)
class Index:
    """The usable images of a folder and what was found there."""

    head: Head
    names: Strings
    captions: Strings
    templates: Strings
    notes: Strings  # findings in the caption of each image, as JSON; usually empty
    skipped: Strings  # names
    reasons: Strings
    unread: Strings
    unused_masks: Strings
    without_image: Strings
    shared: Strings  # names of images that share a caption file or a mask
    sizes: NDArray[np.int32]  # (images, 2) in pixels
    masks: NDArray[np.bool_]  # (images,)
    flags: NDArray[np.uint8]  # (images,)
    states: NDArray[np.int64]  # (images, 2): bytes, and time of the last change in ns
    text_states: NDArray[np.int64]  # (images,): a hash of the states of caption files and masks
    skipped_states: NDArray[np.int64]  # (skipped, 3): bytes, time, whether it was decoded

    @property
    def columns(self) -> Columns:
        """The usable images."""
        return Columns(self.names, self.captions, self.templates, self.sizes, self.masks)

    @classmethod
    def load(cls, path: Path, *, mapped: bool = True) -> Self:
        """Open an index; it is read into memory unless it is mapped.

        Raises:
            InputError: The file is damaged or of another version.
        """
        file = SafetensorsFile(path)
        try:
            if mapped:
                raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
                arrays = {
                    name: raw[file.offset_of(name) : file.offset_of(name) + info.nbytes]
                    for name, info in file.tensors.items()
                }
            else:
                arrays = {
                    name: file.load(name).reshape(-1).view(torch.uint8).numpy() for name in file.tensors
                }
            index = cls._of(arrays, Head(**cast("dict[str, str]", load_json(file.metadata[_HEAD]))))
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path) from error
        finally:
            file.close()
        if not index._is_sound():
            raise damaged(path)
        return index

    def save(self, path: Path) -> None:
        """Write the index; an existing one is replaced when the new one is complete.

        Raises:
            InputError: The folder has no space.
            OSError: The folder is not writable.
        """
        arrays: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in _NUMBERS}
        for name in _TEXTS:
            strings = cast("Strings", getattr(self, name))
            arrays |= {f"{name}.data": strings.data, f"{name}.ends": strings.ends}
        # a copy: the strides of an empty array are not those of an empty tensor
        views = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        tensors = {
            name: torch.empty(view.shape, dtype=view.dtype).copy_(view) for name, view in views.items()
        }
        write_tensors(path, tensors, metadata={_HEAD: json.dumps(vars(self.head))}, force=True)

    @classmethod
    def _of(cls, arrays: dict[str, NDArray[np.uint8]], head: Head) -> Self:
        numbers = {
            name: arrays[name].view(kind).reshape(-1, *shape) for name, (kind, shape) in _NUMBERS.items()
        }
        texts = {
            name: Strings(arrays[f"{name}.data"], arrays[f"{name}.ends"].view(np.int64)) for name in _TEXTS
        }
        return cls(head=head, **texts, **cast("Any", numbers))

    def _is_sound(self) -> bool:
        count, skipped = len(self.names), len(self.skipped)
        lengths = [len(getattr(self, name)) == count for name in ("captions", "templates", "notes")]
        lengths += [
            len(getattr(self, name)) == count for name in ("sizes", "masks", "flags", "states", "text_states")
        ]
        lengths += [len(self.reasons) == skipped, len(self.skipped_states) == skipped]
        texts = [cast("Strings", getattr(self, name)).is_sound() for name in _TEXTS]
        return all(lengths) and all(texts) and bool((self.sizes > 0).all())


@dataclass(frozen=True)
class MappedColumns(Columns):
    """The images of an index file. A worker process that is sent them maps the file itself."""

    path: Path
    head: Head

    @classmethod
    def of_index(cls, path: Path, index: Index) -> MappedColumns:
        """Return the images of an index that was mapped from `path`."""
        return cls(**vars(index.columns), path=path, head=index.head)

    def __reduce__(self) -> tuple[Any, ...]:
        return _map_again, (self.path, self.head)


def _map_again(path: Path, head: Head) -> MappedColumns:
    index = Index.load(path)
    if index.head != head:
        raise InputError(f"{path} was replaced while it was in use", hint="start the training again")
    return MappedColumns.of_index(path, index)


def damaged(path: Path) -> InputError:
    """Return the error about an index that cannot be used."""
    return InputError(
        f"{path} is not an index of this version, or is damaged",
        hint=f"make it again: spectune dataset index {path.parent}, or delete it",
    )

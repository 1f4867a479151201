"""Write a diffusers folder tensor by tensor; tensors have the names of a single file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectune.checkpoints.diffusers_folder.config import SCHEDULER, Schedule, read_config, read_schedule
from spectune.checkpoints.diffusers_folder.default_configs import COMPONENTS
from spectune.checkpoints.diffusers_folder.keys import (
    EXTRAS_FILE,
    MATRICES_KEY,
    STEMS,
    SUBFOLDERS,
    derived_tensors,
    file_key,
)
from spectune.checkpoints.diffusers_folder.small_files import read_template, small_files
from spectune.errors import InputError, some_of
from spectune.files.multi_file_writer import MultiFileWriter, PlannedFile
from spectune.files.provenance import ZERO_SNR_KEY, HasProvenance
from spectune.files.reader import MODEL_INDEX
from spectune.files.rename import old_path, rename
from spectune.files.source import TensorInfo, declared_prediction
from spectune.files.weights_hash import WeightsHasher
from spectune.files.writer import RESERVE_BYTES, check_target
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layout import PARTS, TE2_ROOT, PartName
from spectune.sdxl.state_dicts import Piece, module_tensors, pieces_by_tensor

_SMALL = 4096  # number of values; position_ids has 77
_FORMAT = {"format": "pt"}  # transformers refuses a file without this entry


class FolderWriter(MultiFileWriter):
    """A writer of a folder that StableDiffusionXLPipeline loads, from the tensors of a single file.

    The small files come from the diffusers folder `template` or are new (`small_files`); those in `renewed`
    are always new. The UNet's file gets the metadata. Tensors that belong to no module go into
    `single_file_extras.safetensors`, unless a reader derives the same values. So the folder reads back bit
    for bit. The folder gets its name when it is complete; with `force`, the previous folder is then deleted.
    Raises InputError before any work if the tensors are not those of an SDXL, the template belongs to another
    model, the target exists without `force` or must not be replaced, or the disk has too little space.
    """

    def __init__(
        self,
        path: Path,
        infos: Sequence[TensorInfo],
        *,
        metadata: Mapping[str, str] | None = None,
        reserve_bytes: int = RESERVE_BYTES,
        force: bool = False,
        hold: bool = False,
        template: Path | None = None,
        renewed: Collection[str] = (),
    ) -> None:
        # resolve: the temporary folder is named after the target, and `.` has no name
        super().__init__(Path(path).resolve(), infos, metadata=metadata, hold=hold)
        _check_folder(self.path, sum(info.nbytes for info in infos), force=force)
        self._force = force
        files = {} if template is None else read_template(template)
        self._template = {name: raw for name, raw in files.items() if name not in renewed}
        source = self._announced()
        layout = infer_layout(source)
        self._small_files()  # to raise its errors before any work
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        for part in PARTS:
            if part != "vae" or layout.vae is not None:
                self._pieces |= pieces_by_tensor(part, module_tensors(layout, part, source))
        self._extras = _Extras([info for name, info in self._infos.items() if name not in self._pieces])
        self._open_files(self._plan(), reserve_bytes=max(reserve_bytes, RESERVE_BYTES))

    def _announced(self) -> _Announced:
        return _Announced(self._infos, self.metadata, self.path.name)

    def _small_files(self) -> dict[str, bytes]:
        source = self._announced()
        prediction = declared_prediction(source)
        shift = source.provenance.flow_shift or 1.0
        schedule = Schedule(prediction, shift if prediction == "flow" else None, ZERO_SNR_KEY in self._infos)
        return small_files(infer_layout(source), schedule, self._template)

    def _plan(self) -> dict[str, PlannedFile]:
        infos: dict[str, list[TensorInfo]] = {_UNET_FILE: []}
        for name, pieces in self._pieces.items():
            tensor = torch.empty(self._infos[name].shape, dtype=self._infos[name].dtype, device="meta")
            for piece in pieces:
                block = piece.view.read(tensor)
                key = file_key(piece.part, piece.key)
                infos.setdefault(_weights_file(piece.part), []).append(
                    TensorInfo(key, block.dtype, tuple(block.shape))
                )
        plan = {name: PlannedFile(tensors, _FORMAT) for name, tensors in infos.items()}
        plan[_UNET_FILE] = PlannedFile(infos[_UNET_FILE], self.metadata | _FORMAT)
        return plan | {EXTRAS_FILE: PlannedFile(self._extras.infos, {})}

    def _put(self, name: str, tensor: Tensor) -> None:
        if name not in self._pieces:
            self._extras.add(name, tensor)
            self._files[EXTRAS_FILE].write(name, tensor)
            return
        for piece in self._pieces[name]:
            writer = self._files[_weights_file(piece.part)]
            writer.write(file_key(piece.part, piece.key), piece.view.read(tensor))

    def _add_late_data(self) -> None:
        header = self._files[_UNET_FILE].metadata
        header.clear()
        header.update(self.metadata | _FORMAT)
        self._files[EXTRAS_FILE].metadata.update(self._spelling())
        for name, raw in self._small_files().items():
            path = self._partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)

    def _spelling(self) -> dict[str, str]:
        """Return the metadata of the extras file: unusual shapes in the single file."""
        matrices = [
            name
            for name, pieces in self._pieces.items()
            if pieces[0].view.squeeze and name.endswith(".weight") and len(self._infos[name].shape) == 2
        ]
        return {MATRICES_KEY: json.dumps(matrices)} if matrices else {}

    def commit(self) -> None:
        """Give the finished folder its name and delete the previous folder."""
        if not self._spelling() and self._extras.equal(self._derived()):
            (self._partial / EXTRAS_FILE).unlink(missing_ok=True)
        try:
            if not self._force:  # again: another program may have written it
                _check_folder(self.path, 0, force=False)
            _replace_folder(self.path, self._partial)
        except OSError as error:
            self._keep = True
            raise InputError(
                f"cannot rename the finished folder to {self.path}: {error.strerror}",
                hint=f"{self._partial} is complete: rename it yourself",
            ) from error

    def _derived(self) -> dict[str, Tensor]:
        """Return the tensors that are not stored: a reader computes them from the folder's configuration."""
        schedule = read_schedule(read_config(self._partial / SCHEDULER), SCHEDULER)
        return derived_tensors(
            infer_layout(self._announced()).te1.context,
            self._infos[f"{TE2_ROOT}ln_final.weight"].dtype,
            v_prediction=schedule.prediction == "v",
            zero_snr=schedule.zero_snr,
        )


@dataclass(frozen=True)
class _Announced(HasProvenance):
    """A source with the shapes of the announced tensors, without values."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    label: str

    def load(self, name: str) -> Tensor:
        raise AssertionError(f"{name} is not written yet")


class _Extras:
    """The tensors that belong to no module; keeps copies of small ones, which a reader may derive."""

    def __init__(self, infos: Sequence[TensorInfo]) -> None:
        self.infos = infos
        self._small: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() <= _SMALL:
            self._small[name] = tensor.clone()

    def equal(self, others: Mapping[str, Tensor]) -> bool:
        """Return whether these tensors equal `others` bit for bit."""
        own, theirs = WeightsHasher(), WeightsHasher()
        for hasher, tensors in ((own, self._small), (theirs, others)):
            for name, tensor in tensors.items():
                hasher.add(name, tensor)
        names = {info.name for info in self.infos}
        return names == set(others) and own.hexdigest() == theirs.hexdigest()


def _weights_file(part: PartName) -> str:
    return f"{SUBFOLDERS[part]}/{STEMS[part]}.safetensors"


_UNET_FILE = _weights_file("unet")


def _replace_folder(target: Path, finished: Path) -> None:
    """Rename a finished folder to `target` and delete the previous `target`.

    If renaming fails, keeps both folders and raises OSError. After a crash, the next run restores or deletes
    the previous folder.
    """
    old = old_path(target)
    if target.exists():
        rename(target, old)
    try:
        rename(finished, target)
    except OSError:
        if old.exists():
            rename(old, target)
        raise
    try:
        if old.exists():
            shutil.rmtree(old)
    except OSError as error:
        raise InputError(
            f"{target} is written, but the previous folder cannot be deleted: {error.strerror}",
            hint=f"delete {old} yourself",
        ) from error


def _check_folder(path: Path, nbytes: int, *, force: bool) -> None:
    """Raise InputError for a target that cannot be written, or that contains files of something else."""
    if not path.exists() or not force:
        check_target(path, nbytes, force=force)
        return
    if not path.is_dir():
        raise InputError(
            f"{path} is a file: expected the name of a folder", hint="choose another name in `out`"
        )
    own = {MODEL_INDEX, EXTRAS_FILE, *COMPONENTS}
    names = sorted(entry.name for entry in path.iterdir())
    others = [name for name in names if name not in own and not name.startswith("LICENSE")]
    if others:
        raise InputError(
            f"{path} contains files that do not belong to a diffusers model and would be deleted: "
            f"{some_of(others)}",
            hint="choose another name in `out`",
        )
    check_target(path.with_name(f"{path.name}.new"), nbytes, force=True)

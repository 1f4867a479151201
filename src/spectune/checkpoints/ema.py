"""Moving averages (EMA) of the UNet in checkpoints of older trainers.

The trainers of CompVis and Stability store the average of `model.diffusion_model.input_blocks.0.0.weight` as
`model_ema.diffusion_modelinput_blocks00weight`, without dots, beside `model_ema.decay` and
`model_ema.num_updates`. Names are looked up in a table made from the names of the UNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from spectune.errors import InputError, counted, some_of
from spectune.files.reader import Checkpoint
from spectune.files.source import RenamedFiles, RenamedTensor, TensorInfo
from spectune.sdxl.layout import UNET_ROOT

EMA_ROOT = "model_ema."
_COUNTERS = (f"{EMA_ROOT}decay", f"{EMA_ROOT}num_updates")
_WRAPPER = "model."  # the trainers average `model.diffusion_model`, seen from `model`


def ema_names(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the average of each UNet tensor that has one: UNet name -> EMA name."""
    unet = [name for name in tensors if name.startswith(UNET_ROOT)]
    names = {name: EMA_ROOT + name.removeprefix(_WRAPPER).replace(".", "") for name in unet}
    return {name: average for name, average in names.items() if average in tensors}


def with_ema_as_unet(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the averages as its UNet, and without the tensors `model_ema.*`.

    Raises InputError if the averages are not those of every tensor of the UNet.
    """
    tensors, averages = checkpoint.tensors, ema_names(checkpoint.tensors)
    if not averages:
        raise InputError(
            f"{checkpoint.label} has no moving averages: expected tensors such as "
            f"{EMA_ROOT}diffusion_modelinput_blocks00weight",
            hint="leave out `ema`",
        )
    missing = [name for name in tensors if name.startswith(UNET_ROOT) and name not in averages]
    used = {*averages.values(), *_COUNTERS}
    unknown = [name for name in tensors if name.startswith(EMA_ROOT) and name not in used]
    misfits = [name for name, average in averages.items() if tensors[name].shape != tensors[average].shape]
    problems = {"without a moving average": missing, "with an average of another shape": misfits}
    texts = [f"{counted(len(names), 'UNet tensor')} {what}: {some_of(names)}"
             for what, names in problems.items() if names]  # fmt: skip
    if unknown:
        texts.append(f"{counted(len(unknown), 'average')} of no UNet tensor: {some_of(unknown)}")
    if texts:
        raise InputError(f"{checkpoint.label} cannot be read with its moving averages: {'; '.join(texts)}")
    entries = {
        name: RenamedTensor(
            replace(tensors[averages.get(name, name)], name=name),
            partial(checkpoint.load, averages.get(name, name)),
        )
        for name in tensors
        if not name.startswith(EMA_ROOT)
    }
    files = [RenamedFiles(entries, [checkpoint])]
    return Checkpoint(checkpoint.path, files, checkpoint.metadata, label=checkpoint.label)

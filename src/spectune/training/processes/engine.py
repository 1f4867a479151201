"""The connection of all processes of a run, and what the first lines of a run say about it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)

from spectune.errors import InputError, SpectuneError, counted
from spectune.training.processes.agreement import process_name
from spectune.training.recipe.recipe import Recipe

# Set by `accelerate launch` from its configuration file. They divide the tensors of a model among processes.
REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
LAUNCH = "torchrun --nproc_per_node {count} -m spectune train"


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Connect all processes. Nothing in a user's configuration of accelerate changes the recipe.

    Raises:
        InputError: `accelerate launch` was told to use another engine than DistributedDataParallel.
    """
    for variable, engine in REFUSED.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise InputError(
                f"accelerate is configured for {engine}, which spectune does not train with: a frame leaves "
                "little to divide among processes",
                hint=f"start the training without that configuration: {LAUNCH.format(count='N')} RECIPE",
            )
    # torch 2.13 renames the option; accelerate 1.15 does not know the new names
    warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
    return Accelerator(
        cpu=recipe.run.device == "cpu",
        # The model has the precision of the recipe. Without these three, accelerate's environment decides.
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.run.accumulation),
        dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),
        dataloader_config=DataLoaderConfiguration(even_batches=False),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False,  # the frames: equal on all processes, and never changed
                gradient_as_bucket_view=True,  # no second copy of all gradients
                # The UNet does not use the last layer of the first text encoder: no gradient there.
                find_unused_parameters="te1" in recipe.model.parts,
            ),
            InitProcessGroupKwargs(
                backend=None,  # nccl for GPUs, gloo for CPUs
                timeout=timedelta(minutes=recipe.run.timeout_minutes),
            ),
        ],
    )


def described_processes(accelerator: Accelerator, recipe: Recipe) -> str | None:
    """Return a line about the processes of a run, None if there is one."""
    count = accelerator.num_processes
    if count == 1:
        return None
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or count)
    hosts = max(1, count // here)
    images = recipe.run.batch * recipe.run.accumulation * count
    return (
        f"{count} processes on {counted(hosts, 'host')}, connected by {torch.distributed.get_backend()}: "
        f"{images} images per optimizer step ({recipe.run.batch} per batch, "
        f"{counted(recipe.run.accumulation, 'batch', 'batches')} per process)"
    )


def unused_gpus(accelerator: Accelerator, recipe: Recipe) -> Iterator[str]:
    """Yield a warning if this host has more GPUs than this run uses."""
    if accelerator.device.type != "cuda" or recipe.run.device not in ("auto", "cuda"):
        return
    visible, used = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if visible > used:
        yield (
            f"{visible} GPUs are visible, but this training uses {used}: to use all of them, start it with "
            f"{LAUNCH.format(count=visible)} RECIPE"
        )


@contextmanager
def lost_connection_explained(accelerator: Accelerator, recipe: Recipe) -> Iterator[None]:
    """Turn the error of a collective operation into a SpectuneError; one process of each host prints it.

    The other hosts may be out of reach, so each host has its own message.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not _is_of_connection(error):
            raise
        waited = f"for run.timeout_minutes = {recipe.run.timeout_minutes:g}"
        cause = f"no answer {waited}" if "timed out" in str(error).lower() else "one of them has ended"
        explained = SpectuneError(
            f"{process_name(accelerator)} has lost the other processes: {cause}",
            hint="look at the messages of the other hosts, and at the network; the same command on all hosts "
            "continues from the last save",
        )
        explained.is_reported = os.environ.get("LOCAL_RANK", "0") != "0"
        raise explained from error


def _is_of_connection(error: RuntimeError) -> bool:
    # gloo raises a plain RuntimeError with the place in its source
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)

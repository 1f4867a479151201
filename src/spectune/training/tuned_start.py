"""Start a training from a tuned adapter: its frame, and its deltas instead of zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.core.delta import Delta
from spectune.errors import InputError, counted, some_of
from spectune.files.provenance import Provenance
from spectune.files.weights_hash import weights_hash
from spectune.model.inject import Injection
from spectune.pairs.rules import check_base_hash
from spectune.sdxl.layers import Catalogue
from spectune.training.recipe.sections.model import ModelSection


@dataclass(frozen=True)
class TunedStart:
    """The tuned adapter that a training starts from."""

    name: str
    hash: str
    deltas: Mapping[str, Delta]  # of the parts to train
    provenance: Provenance

    @torch.no_grad()
    def load_into(self, injection: Injection) -> None:
        """Set the trained tensors to the deltas.

        The residual form rounds the frame to the trained dtype; the deltas are added to the rounded frame.
        """
        for name, layer in injection.layers.items():
            layer.load(replace(self.deltas[name], frame=layer.frame))

    def recorded(self, provenance: Provenance) -> Provenance:
        """Return the provenance of the run's files: the frame is that of the start."""
        return replace(
            provenance,
            principal_hash=self.provenance.principal_hash,
            frame=self.provenance.frame,
            start_name=self.name,
            start_hash=self.hash,
        )


def open_start(section: ModelSection, catalogue: Catalogue, base_hash: str, base: str) -> TunedStart:
    """Read the tuned adapter in `model.start`.

    Raises:
        InputError: It is another kind of adapter, or it changes parts that are not trained.
        PairingError: It was trained from another base.
    """
    assert section.start is not None
    with open_adapter(section.start, catalogue) as tuned:
        if not isinstance(tuned, TunedAdapter):
            raise InputError(
                f"model.start: {tuned.label} is not a tuned adapter of spectune",
                hint="`spectune export BASE FILE --form tuned` makes one of a LoRA or a tuned checkpoint; a "
                "principal of `spectune split` belongs into model.principal",
            )
        check_base_hash(base_hash, tuned, base)
        assert tuned.file is not None
        deltas = dict(tuned.layers)
        kept = {name: d for name, d in deltas.items() if catalogue.by_name[name].part.value in section.parts}
        lost = [name for name in deltas if name not in kept and _changes(deltas[name])]
        if lost:
            raise InputError(
                f"{tuned.label} changes {counted(len(lost), 'layer')} outside model.parts: {some_of(lost)}",
                hint="train these parts too (optimizer.part_learning_rates may be 0), or remove the layers "
                "from the file with `spectune slice`",
            )
        return TunedStart(tuned.label, weights_hash(tuned.file), kept, tuned.provenance)


def _changes(delta: Delta) -> bool:
    return bool(delta.down.any() or delta.up.any())

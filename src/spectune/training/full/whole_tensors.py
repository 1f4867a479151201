"""Choose the tensors that full fine-tuning trains, and read their values by the names of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from spectune.adapters.adapter import LazyTensors, tensor_infos
from spectune.errors import InputError
from spectune.files.source import TensorInfo
from spectune.model.network import Sdxl
from spectune.sdxl.layers import Catalogue
from spectune.sdxl.layout import Layout
from spectune.sdxl.selection import select_layers
from spectune.sdxl.state_dicts import Piece, joined, pieces_by_tensor, state_views
from spectune.training.recipe.sections.model import ModelSection, PartName

EVERYTHING = ("default",)  # the value of model.layers for which all tensors of the parts are trained


@dataclass(frozen=True)
class WholeTensors:
    """The trained tensors of a full fine-tuning.

    A tensor of the checkpoint may consist of several parameters: q, k and v of the second encoder are one.
    """

    parameters: Mapping[str, nn.Parameter]  # by part and key of the state dict: "unet.conv_in.weight"
    pieces: Mapping[str, tuple[Piece, ...]]  # by name in the checkpoint

    def values(self, others: Mapping[str, Tensor]) -> LazyTensors:
        """Return the current tensors by their names in the checkpoint, and `others` that are not trained.

        Each access copies one tensor to the CPU.
        """
        kept = {name: tensor for name, tensor in others.items() if name not in self.pieces}
        own = {name: self._info(name) for name in self.pieces}

        def read(name: str) -> Tensor:
            if name in kept:
                return kept[name]
            pieces = self.pieces[name]
            return joined(pieces, [self.parameters[_name(piece)].detach().cpu() for piece in pieces])

        return LazyTensors({**own, **tensor_infos(kept)}, read)

    def _info(self, name: str) -> TensorInfo:
        pieces = self.pieces[name]
        empty = joined(pieces, [self.parameters[_name(piece)].detach().to("meta") for piece in pieces])
        return TensorInfo(name, empty.dtype, tuple(empty.shape))


def _name(piece: Piece) -> str:
    return f"{piece.part}.{piece.key}"


def train_whole(model: Sdxl, names: Collection[str]) -> WholeTensors:
    """Make tensors of a frozen model trainable, by their names in the checkpoint."""
    networks: dict[PartName, nn.Module] = {"unet": model.unet, "te1": model.te1, "te2": model.te2}
    pieces: dict[str, tuple[Piece, ...]] = {}
    parameters: dict[str, nn.Parameter] = {}
    for part, network in networks.items():
        for name, found in pieces_by_tensor(part, state_views(model.layout, part)).items():
            if name in names:
                pieces[name] = found
                parameters |= {_name(piece): network.get_parameter(piece.key) for piece in found}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return WholeTensors(parameters, pieces)


def used_tensors(layout: Layout, parts: Sequence[PartName]) -> list[str]:
    """Return the tensors of the parts that change a picture, by their names in the checkpoint.

    SDXL uses the states before the last layer of the first encoder: its last layer and norm get no gradient.
    """
    unused = (f"encoder.layers.{layout.te1.layers - 1}.", "final_layer_norm.")
    return [
        view.tensor
        for part in parts
        for key, view in state_views(layout, part).items()
        if not (part == "te1" and any(words in key for words in unused))
    ]


def chosen_tensors(section: ModelSection, layout: Layout, catalogue: Catalogue) -> list[str]:
    """Return the tensors that a recipe trains: of all parts, or weights and biases of `layers`.

    Raises InputError if the recipe selects nothing.
    """
    used = used_tensors(layout, section.parts)
    if section.layers == EVERYTHING:
        return used
    weights = [layer.tensor for layer in select_layers(catalogue, section.layers)]
    biases = [f"{name.removesuffix('weight')}bias" for name in weights]
    chosen = {*weights, *biases}
    kept = [name for name in used if name in chosen]
    if not kept:
        raise InputError(
            f"no tensor to train: model.layers = {', '.join(section.layers)} has no layers in "
            f"{', '.join(section.parts)} that change a picture",
            hint="choose other parts in model.parts, or other layers",
        )
    return kept


def without_trained(swapped: Mapping[str, Tensor], whole: WholeTensors | None) -> dict[str, Tensor]:
    """Return the tensors of a warm start that are not trained afterwards."""
    return {name: t for name, t in swapped.items() if whole is None or name not in whole.pieces}

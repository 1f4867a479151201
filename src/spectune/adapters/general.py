"""Read adapters that are more than a product of two factors per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from spectune.adapters.adapter import ALPHA, DOWN, UP, GeneralAdapter, LazyMapping, ParameterDifference
from spectune.adapters.alphas import PeftAlphas, missing_alphas, read_alpha
from spectune.adapters.kinds.change import ChangeKind, Shape, WeightChange
from spectune.adapters.kinds.dora import decomposed, magnitude_fits
from spectune.adapters.kinds.ia3 import ON_INPUT
from spectune.adapters.kinds.pair import read_low_rank
from spectune.adapters.kinds.table import (
    BIAS_DIFFERENCE,
    DECOMPOSABLE,
    DIFFERENCES,
    KINDS,
    MAGNITUDES,
    SHARED,
    kinds_with,
)
from spectune.adapters.spellings import KeyTable
from spectune.core.low_rank import product
from spectune.core.rounding import check_finite
from spectune.errors import InputError, counted, some_of
from spectune.files.dtypes import SAFETENSORS_NAMES
from spectune.files.reader import Checkpoint
from spectune.sdxl.layers import Catalogue, Layer
from spectune.sdxl.names import TensorView

_DIVERGED = "the training may have diverged: use an earlier file of it"


def read_general(
    source: Checkpoint, table: KeyTable, catalogue: Catalogue, peft: PeftAlphas
) -> GeneralAdapter:
    """Return an adapter of any kinds; its layers and differences are read on access.

    Raises InputError for incomplete layers, and for shapes and dtypes that do not fit the model.
    """
    found = [
        _Found(layer, source, table.keys[layer.name])
        for layer in catalogue
        if table.keys.get(layer.name, {}).keys() - {BIAS_DIFFERENCE}
    ]
    _check_keys(found, source.label)
    _check_shapes(found, source.label)
    alphas = {layer.name: layer.alpha(peft) for layer in found}
    by_name = {layer.name: layer for layer in found}
    no_alpha = [layer.name for layer in found if layer.rank is not None and alphas[layer.name] is None]
    return GeneralAdapter(
        layers=LazyMapping(by_name, lambda name: by_name[name].read(alphas[name])),
        metadata=source.metadata,
        label=source.label,
        warnings=missing_alphas(source, no_alpha),
        file=source,
        catalogue=catalogue,
        differences=_differences(source, table, catalogue),
        keys={**table.keys, **table.others},
        kinds={layer.name: layer.kind_name for layer in found},
    )


@dataclass(frozen=True)
class _Found:
    """The tensors of one layer in a file."""

    layer: Layer
    source: Checkpoint
    keys: Mapping[str, str]  # suffix -> key

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def magnitudes(self) -> list[str]:
        return [suffix for suffix in MAGNITUDES if suffix in self.keys]

    @property
    def shapes(self) -> dict[str, Shape]:
        return {suffix: self.source.tensors[key].shape for suffix, key in self.keys.items()}

    @property
    def candidates(self) -> tuple[ChangeKind, ...]:
        """Return the kinds with exactly these keys; empty if keys are missing or belong to two kinds."""
        kinds = kinds_with(frozenset(self.keys) - SHARED)
        if not self.magnitudes:
            return kinds
        return tuple(kind for kind in kinds if kind in DECOMPOSABLE and len(self.magnitudes) == 1)

    @cached_property
    def kind(self) -> ChangeKind | None:
        """Return the kind whose shapes fit the layer."""
        shapes, weight = self.shapes, self.layer.shape
        own = {suffix: shape for suffix, shape in shapes.items() if suffix not in SHARED}
        sized = all(magnitude_fits(suffix, shapes[suffix], weight) for suffix in self.magnitudes)
        if not sized or any(0 in shape for shape in own.values()) or shapes.get(ALPHA, ()) not in ((), (1,)):
            return None
        return next((kind for kind in self.candidates if kind.fits(own, weight)), None)

    @property
    def kind_name(self) -> str:
        assert self.kind is not None
        return f"DoRA of {self.kind.name}" if self.magnitudes else self.kind.name

    @property
    def rank(self) -> int | None:
        assert self.kind is not None
        return self.kind.rank(self.shapes)

    def alpha(self, peft: PeftAlphas) -> float | None:
        return read_alpha(self.source, self.keys.get(ALPHA), peft, self.name, self.rank, self.layer.diffusers)

    def read(self, alpha: float | None) -> WeightChange:
        assert self.kind is not None
        shape = self.layer.shape
        own = self.keys.keys() - SHARED
        change = self.kind.read({suffix: self._load(suffix) for suffix in own}, alpha, shape)
        for suffix in self.magnitudes:
            change = decomposed(change, suffix, self._load(suffix), shape)
        return change

    def _load(self, suffix: str) -> Tensor:
        key = self.keys[suffix]
        tensor = self.source.load(key)
        if suffix == ON_INPUT:
            return tensor
        return _checked(tensor, key, self.source.label, f"the change of {self.name}")


def _checked(tensor: Tensor, key: str, label: str, what: str) -> Tensor:
    """Return a tensor of a change in float32, which holds all values of narrower dtypes."""
    if not tensor.is_floating_point():
        raise InputError(
            f"{key} of {label} is {SAFETENSORS_NAMES[tensor.dtype]}: expected a floating-point dtype",
            hint="use the adapter in fp16, bf16 or fp32",
        )
    check_finite(tensor, what, hint=_DIVERGED)
    return tensor.float()


def _check_keys(found: list[_Found], label: str) -> None:
    wrong = [f"{layer.name} has {', '.join(sorted(layer.keys))}" for layer in found if not layer.candidates]
    if wrong:
        raise InputError(
            f"{counted(len(wrong), 'layer')} of {label} cannot be read: {some_of(wrong)}",
            hint=f"expected all keys of one kind per layer: {', '.join(kind.name for kind in KINDS)}",
        )


def _check_shapes(found: list[_Found], label: str) -> None:
    wrong = [
        f"{layer.name} {layer.layer.shape} has "
        + ", ".join(f"{suffix} {shape}" for suffix, shape in sorted(layer.shapes.items()))
        for layer in found
        if layer.kind is None
    ]
    if wrong:
        raise InputError(
            f"the shapes of {counted(len(wrong), 'layer')} of {label} do not fit the model: {some_of(wrong)}",
            hint="the adapter was probably made for another model: pass that model",
        )


def _differences(source: Checkpoint, table: KeyTable, catalogue: Catalogue) -> dict[str, ParameterDifference]:
    """Return the differences of biases, norms and embeddings, by name of the parameter."""
    views = {module.layer: dict(module.parameters) for module in catalogue.modules}
    biases = {
        name: {BIAS_DIFFERENCE: keys[BIAS_DIFFERENCE]}
        for name, keys in table.keys.items()
        if BIAS_DIFFERENCE in keys
    }
    differences: dict[str, ParameterDifference] = {}
    for module, keys in {**table.others, **biases}.items():
        made = [(DIFFERENCES[suffix], suffix, key) for suffix, key in keys.items() if suffix in DIFFERENCES]
        made += [("weight", suffix, key) for suffix, key in keys.items() if suffix == UP]
        for parameter, suffix, key in made:
            if parameter not in views[module] or f"{module}.{parameter}" in differences:
                problem = "has two changes" if parameter in views[module] else "does not exist"
                raise InputError(
                    f"{key} of {source.label} changes the {parameter} of {module}, which {problem}",
                    hint="`spectune convert --drop PATTERN` removes keys",
                )
            view = views[module][parameter]
            differences[f"{module}.{parameter}"] = (
                _product(source, module, keys, view) if suffix == UP else _difference(source, key, view)
            )
    return differences


def _product(
    source: Checkpoint, module: str, keys: Mapping[str, str], view: TensorView
) -> ParameterDifference:
    """Return the difference of an embedding or projection that the file stores as two factors.

    The node LoraSave of ComfyUI writes such files.
    """
    shapes = {suffix: source.tensors[key].shape for suffix, key in keys.items()}
    down, up = shapes.get(DOWN, ()), shapes.get(UP, ())
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or 0 in (*down, *up):
        raise InputError(
            f"{module} of {source.label} has {DOWN} {down} and {UP} {up}: "
            "expected (rank, in) and (out, rank)",
            hint="the file is incomplete, or was made for another model",
        )
    shape = (up[0], down[1])

    def read() -> Tensor:
        what = f"the change of {module}"
        tensors = {
            suffix: _checked(source.load(keys[suffix]), keys[suffix], source.label, what)
            for suffix in (DOWN, UP)
        }
        alpha = read_alpha(source, keys.get(ALPHA), PeftAlphas({}), module, down[0])
        return product(read_low_rank(tensors, alpha, shape))

    return ParameterDifference(view, shape, read)


def _difference(source: Checkpoint, key: str, view: TensorView) -> ParameterDifference:
    def read() -> Tensor:
        return _checked(source.load(key), key, source.label, f"the difference {key}")

    return ParameterDifference(view, source.tensors[key].shape, read)

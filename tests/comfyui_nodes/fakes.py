"""Fakes of the parts of ComfyUI that the nodes use, with the same interface."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
NODES = "spectune_nodes"  # ComfyUI derives the module name from the path, so only relative imports work


class Interrupted(Exception):
    """The exception that ComfyUI raises in a node when the user stops it."""


class LoRAAdapter:
    """ComfyUI's patch of two factors. `weights` is (up, down, alpha, mid, dora, reshape)."""

    def __init__(self, loaded_keys: set[str], weights: Sequence[Any]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    def added(self, weight: Tensor, strength: float) -> Tensor:
        up, down, alpha, mid, dora, reshape = self.weights
        assert mid is None
        assert dora is None
        assert reshape is None
        product = up.float().flatten(1) @ down.float().flatten(1)
        return weight + strength * (alpha / down.shape[0]) * product.reshape(weight.shape)


class LatentFormat:
    """ComfyUI's base class of latent formats."""

    latent_channels = 4


class Patcher:
    """A ModelPatcher. Clones share the weights, and patches for unknown names are ignored."""

    def __init__(self, state: Mapping[str, Tensor], sampling: object = None) -> None:
        self.model = SimpleNamespace(state_dict=lambda: dict(state), model_config=None)
        self.patches: dict[str, list[tuple[float, LoRAAdapter]]] = {}
        self.object_patches: dict[str, object] = {}
        self._sampling = sampling

    def clone(self) -> Patcher:
        other = copy(self)
        other.patches = {name: list(patches) for name, patches in self.patches.items()}
        other.object_patches = dict(self.object_patches)
        return other

    def add_patches(self, patches: Mapping[str, LoRAAdapter], strength_patch: float = 1.0) -> list[str]:
        known = [name for name in patches if name in self.model.state_dict()]
        for name in known:
            self.patches.setdefault(name, []).append((strength_patch, patches[name]))
        return known

    def add_object_patch(self, name: str, patch: object) -> None:
        self.object_patches[name] = patch

    def get_model_object(self, name: str) -> object:
        assert name == "model_sampling"
        return self.object_patches.get(name, self._sampling)

    def weights(self) -> dict[str, Tensor]:
        """Return the patched weights: patches are added in float32, in order, and rounded once."""
        weights = self.model.state_dict()
        for name, patches in self.patches.items():
            weight = weights[name].float()
            for strength, patch in patches:
                weight = patch.added(weight, strength)
            weights[name] = weight.to(weights[name].dtype)
        return weights


class Clip:
    """A CLIP that passes patches to its patcher."""

    def __init__(self, patcher: Patcher) -> None:
        self.patcher = patcher

    def clone(self) -> Clip:
        return Clip(self.patcher.clone())

    def add_patches(self, patches: Mapping[str, LoRAAdapter], strength_patch: float = 1.0) -> list[str]:
        return self.patcher.add_patches(patches, strength_patch)


class EPS: ...


class V_PREDICTION(EPS): ...


class EDM(V_PREDICTION): ...


class X0(EPS): ...


class CONST: ...


class ModelSamplingDiscrete:
    def __init__(self, model_config: object = None, zsnr: bool | None = None) -> None:
        self.zsnr = bool(zsnr)


class ModelSamplingDiscreteFlow:
    def __init__(self, model_config: object = None) -> None:
        self.set_parameters()

    def set_parameters(self, shift: float = 1.0, timesteps: int = 1000, multiplier: float = 1000) -> None:
        self.shift, self.multiplier = shift, multiplier
        t = torch.arange(1, timesteps + 1) / timesteps
        self.sigmas = shift * t / (1 + (shift - 1) * t)


class SampledEps(ModelSamplingDiscrete, EPS): ...


class SampledV(ModelSamplingDiscrete, V_PREDICTION): ...


_OPENCLIP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
    "transformer.resblocks": "text_model.encoder.layers",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def _clip_g(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs in _OPENCLIP.items():
        name = name.replace(ours, theirs)
    stem, is_fused, kind = name.partition(".attn.in_proj_")
    if is_fused:
        for axis, block in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{stem}.self_attn.{axis}_proj.{kind}", block
    elif name == "text_projection":
        yield "text_projection.weight", tensor.T
    else:
        yield name, tensor


def comfyui_state_dicts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state dicts of MODEL and CLIP for the tensors of a file, in float32 as on a CPU."""
    model: dict[str, Tensor] = {}
    clip: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        number = tensor.float() if tensor.is_floating_point() else tensor
        if key.startswith("model.diffusion_model."):
            model[key.removeprefix("model.")] = number
        elif key.startswith("conditioner.embedders.0."):
            clip["clip_l." + key.removeprefix("conditioner.embedders.0.")] = number
        elif key.startswith("conditioner.embedders.1.model."):
            pieces = _clip_g(key.removeprefix("conditioner.embedders.1.model."), number)
            clip |= {f"clip_g.transformer.{name}": piece for name, piece in pieces}
    return model, clip


def loaded(tensors: Mapping[str, Tensor]) -> tuple[Patcher, Clip, object, None]:
    model, clip = comfyui_state_dicts(tensors)
    return Patcher(model, SampledEps()), Clip(Patcher(clip)), "vae", None


class Comfy:
    """The fake ComfyUI of one test: its folders, its progress bars, and the loaded nodes."""

    def __init__(self, folder: Path) -> None:
        self.folders = {kind: folder / kind for kind in ("checkpoints", "loras", "embeddings")}
        for path in self.folders.values():
            path.mkdir()
        self.bars: list[list[tuple[int, int]]] = []
        self.stop_at: int | None = None  # the step at which the user presses interrupt
        self.steps = 0
        self.loaded_states: list[dict[str, Tensor]] = []
        self.nodes: Any = None

    def interrupt_point(self) -> None:
        self.steps += 1
        if self.stop_at is not None and self.steps >= self.stop_at:
            raise Interrupted

    def files(self, kind: str) -> list[str]:
        root = self.folders[kind]
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def full_path(self, kind: str, name: str) -> str:
        path = self.folders[kind] / name
        if not path.is_file():
            raise FileNotFoundError(f"Model in folder '{kind}' with filename '{name}' not found.")
        return str(path)

    def load_file(self, path: str, **options: object) -> tuple[Patcher, Clip, object, None]:
        assert options["output_vae"]
        assert options["output_clip"]
        return loaded(load_file(path))

    def load_state(self, state: dict[str, Tensor], **options: object) -> tuple[Patcher, Clip, object, None]:
        self.loaded_states.append(dict(state))
        return loaded(state)

    def bar(self, total: int) -> SimpleNamespace:
        shown: list[tuple[int, int]] = []
        self.bars.append(shown)
        return SimpleNamespace(update_absolute=lambda done, total: shown.append((done, total)))

    def modules(self) -> dict[str, ModuleType]:
        return {
            "folder_paths": _module(
                "folder_paths",
                get_filename_list=self.files,
                get_full_path_or_raise=self.full_path,
                get_folder_paths=lambda kind: [str(self.folders[kind]), "elsewhere"],
            ),
            "comfy": _module("comfy", __path__=[]),
            "comfy.utils": _module("comfy.utils", ProgressBar=self.bar),
            "comfy.model_management": _module(
                "comfy.model_management", throw_exception_if_processing_interrupted=self.interrupt_point
            ),
            "comfy.weight_adapter": _module("comfy.weight_adapter", LoRAAdapter=LoRAAdapter),
            "comfy.sd": _module(
                "comfy.sd",
                load_checkpoint_guess_config=self.load_file,
                load_state_dict_guess_config=self.load_state,
            ),
            "comfy.latent_formats": _module(
                "comfy.latent_formats", LatentFormat=LatentFormat, SDXL=type("SDXL", (LatentFormat,), {})
            ),
            "comfy.model_sampling": _module(
                "comfy.model_sampling",
                **{kind.__name__: kind for kind in (EPS, V_PREDICTION, EDM, X0, CONST)},
                ModelSamplingDiscrete=ModelSamplingDiscrete,
                ModelSamplingDiscreteFlow=ModelSamplingDiscreteFlow,
            ),
        }

    def run(self, node: str, **inputs: Any) -> Any:
        """Call a node as ComfyUI does: a new instance, inputs by name, in inference mode."""
        kind = self.nodes.NODE_CLASS_MAPPINGS[node]
        with torch.inference_mode():
            return getattr(kind(), kind.FUNCTION)(**inputs)


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def install(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the fakes importable for the duration of a test."""
    modules = comfy.modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if name.startswith("comfy."):
            setattr(modules["comfy"], name.removeprefix("comfy."), module)


def load_package(folder: Path, name: str) -> ModuleType:
    """Load a folder of custom_nodes as ComfyUI does."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def forget_package(name: str) -> None:
    for loaded_name in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[loaded_name]

"""Spellings of SDXL checkpoints other than the usual names of a single file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from spectune.checkpoints.open import open_checkpoint, open_writer
from spectune.errors import InputError
from spectune.files.source import MemorySource
from spectune.files.weights_hash import weights_hash
from spectune.files.writer import write_tensors
from spectune.model.network import new_vae
from spectune.sdxl.inference import infer_layout, infer_parts, missing_parts
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.layout import TE1_ROOT, TE1_SHORT_ROOT, TE2_ROOT, UNET_ROOT, VAE_ROOT, hints_metadata
from spectune.sdxl.state_dicts import state_views
from tests.layouts import TINY
from tests.pipelines import infos_of

Tensors = dict[str, Tensor]
PROJECTION = f"{TE2_ROOT}text_projection"


def short_te1(tensors: Tensors) -> Tensors:
    return {name.replace(TE1_ROOT, TE1_SHORT_ROOT): tensor for name, tensor in tensors.items()}


def linear_projection(tensors: Tensors) -> Tensors:
    rest = {name: tensor for name, tensor in tensors.items() if name != PROJECTION}
    return rest | {f"{PROJECTION}.weight": tensors[PROJECTION].T.contiguous()}


def saved(tensors: Tensors, path: Path) -> Path:
    write_tensors(path, tensors, metadata=hints_metadata(TINY))
    return path


@pytest.mark.parametrize("spell", [short_te1, linear_projection])
def test_a_checkpoint_in_another_spelling_is_the_same_model(
    spell: Callable[[Tensors], Tensors], source: MemorySource, tmp_path: Path
) -> None:
    path = saved(spell(dict(source.values)), tmp_path / "x.safetensors")
    with open_checkpoint(path) as opened:
        assert weights_hash(opened) == weights_hash(source)
        assert opened.paths == (path,)
        names = {usual: name for usual, name in opened.file_names.items() if usual != name}
        assert len(names) == (36 if spell is short_te1 else 1) + (spell is short_te1)
        with open_writer(tmp_path / "y.safetensors", infos_of(opened)) as writer:
            for name in opened.tensors:
                writer.write(name, opened.load(name))
    with open_checkpoint(tmp_path / "y.safetensors") as again:
        assert not again.file_names
        assert set(again.tensors) == set(source.values)


def unet_of(source: MemorySource) -> Tensors:
    return {name: tensor for name, tensor in source.values.items() if name.startswith(UNET_ROOT)}


@pytest.mark.parametrize("root", [UNET_ROOT, ""])
def test_a_unet_alone_has_its_layers_with_and_without_prefix(
    root: str, source: MemorySource, tmp_path: Path
) -> None:
    tensors = {name.replace(UNET_ROOT, root): tensor for name, tensor in unet_of(source).items()}
    with open_checkpoint(saved(tensors, tmp_path / "unet.safetensors")) as opened:
        layout = infer_parts(opened)
        assert missing_parts(layout) == "text encoders and VAE"
        assert layout.lacks == ("te1", "te2", "vae")
        unet = [layer for layer in build_catalogue(source) if layer.part.value == "unet"]
        assert list(build_catalogue(opened)) == unet
        with pytest.raises(InputError) as caught:
            infer_layout(opened)
    assert caught.value.what == "unet.safetensors is the UNet of an SDXL, without text encoders and VAE"
    assert caught.value.hint is not None
    assert "spectune slice unet.safetensors:unet BASE:te BASE:vae" in caught.value.hint


def test_other_parts_are_named_singly(source: MemorySource) -> None:
    def lacks(*roots: str) -> str:
        rest = {name: t for name, t in source.values.items() if not name.startswith(roots)}
        return missing_parts(infer_parts(MemorySource(rest, source.metadata)))

    assert lacks(VAE_ROOT) == "VAE"
    assert lacks(TE1_ROOT) == "text encoder 1"
    assert lacks(TE2_ROOT, VAE_ROOT) == "text encoder 2 and VAE"
    assert lacks(TE1_ROOT, TE2_ROOT) == "text encoders"
    assert lacks("nothing") == ""


def test_two_spellings_of_one_tensor_are_an_error(source: MemorySource, tmp_path: Path) -> None:
    name = f"{TE1_ROOT}final_layer_norm.bias"
    tensors = dict(source.values) | {name.replace(TE1_ROOT, TE1_SHORT_ROOT): source.values[name]}
    path = saved(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors has a tensor in two spellings"):
        open_checkpoint(path)


def test_a_vae_without_quant_convolutions(source: MemorySource) -> None:
    rest = {name: tensor for name, tensor in source.values.items() if "quant_conv" not in name}
    layout = infer_layout(MemorySource(rest, source.metadata))
    assert layout.vae is not None
    assert TINY.vae is not None
    assert (layout.vae.quant_convs, layout.vae.latent_channels) == (False, TINY.vae.latent_channels)
    module = new_vae(layout.vae)
    assert module.state_dict().keys() == state_views(layout, "vae").keys()
    assert module.quant_conv is None

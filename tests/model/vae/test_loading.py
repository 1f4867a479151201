"""Autoencoders from their own files: every spelling gives the same module; conventions scale and pad."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from spectune.errors import InputError
from spectune.files.provenance import Provenance
from spectune.model.network import build_model
from spectune.model.vae.convention import (
    VaeConvention,
    declare_vae,
    declares_vae,
    known_convention,
    merge_conventions,
    resolve_convention,
)
from spectune.model.vae.loading import choose_vae, load_vae, pad_convolutions, with_convention, with_vae
from spectune.sdxl.layout import VAE_ROOT, hints_metadata
from tests.layouts import TINY

SDXL, ANZHC = known_convention("sdxl"), known_convention("eq-anzhc")
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def model(source):
    return build_model(source)


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(7)) * 2 - 1


def sgm_tensors(source, *, root="", without=()):
    return {
        root + name.removeprefix(VAE_ROOT): tensor.contiguous()
        for name, tensor in source.values.items()
        if name.startswith(VAE_ROOT) and not any(name.startswith(VAE_ROOT + part) for part in without)
    }


def written(path, tensors, metadata=None):
    save_file(tensors, path, hints_metadata(TINY) if metadata is None else metadata)
    return path


def diffusers_folder(model, folder, **config):
    """Save the autoencoder with diffusers and change its config.json."""
    model.vae.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("root", ["", VAE_ROOT])
def test_a_single_file_gives_the_module_of_the_checkpoint(source, model, pixels, tmp_path, root):
    path = written(tmp_path / "vae.safetensors", sgm_tensors(source, root=root))
    vae = load_vae(path, SDXL)
    assert vae.layout == TINY.vae
    assert not vae.module.training
    assert not any(parameter.requires_grad for parameter in vae.module.parameters())
    swapped = with_vae(model, vae)
    assert torch.equal(swapped.encode_images(pixels), model.encode_images(pixels))
    assert torch.equal(
        swapped.decode_latents(torch.ones(1, 4, 8, 8)), model.decode_latents(torch.ones(1, 4, 8, 8))
    )


def test_the_vae_of_a_complete_checkpoint_is_loaded(source, model, tiny_checkpoint):
    vae = load_vae(tiny_checkpoint, SDXL)
    assert all(torch.equal(t, model.vae.state_dict()[key]) for key, t in vae.module.state_dict().items())


@pytest.mark.parametrize("old", [False, True])
def test_a_file_in_diffusers_spelling_is_loaded(model, tmp_path, old):
    state = {key: tensor.contiguous() for key, tensor in model.vae.state_dict().items()}
    for new_name, old_name in OLD_ATTENTION.items() if old else ():
        state = {key.replace(f".{new_name}.", f".{old_name}."): tensor for key, tensor in state.items()}
    assert any(".query." in key for key in state) == old
    vae = load_vae(written(tmp_path / "vae.safetensors", state), SDXL)
    assert all(torch.equal(t, model.vae.state_dict()[key]) for key, t in vae.module.state_dict().items())


def test_a_diffusers_folder_and_its_pipeline_are_loaded(model, pixels, tmp_path):
    folder = diffusers_folder(model, tmp_path / "vae", scaling_factor=0.2, shift_factor=0.1)
    (tmp_path / "model_index.json").write_text("{}")
    oracle = AutoencoderKL.from_pretrained(folder)
    for path in (folder, tmp_path):
        convention = resolve_convention(path)
        assert convention == VaeConvention(0.2, 0.1, "zeros")
        latents = with_vae(model, load_vae(path, convention)).encode_images(pixels)
        torch.testing.assert_close(latents, (oracle.encode(pixels).latent_dist.mode() - 0.1) * 0.2)


def test_dtype(source, tmp_path):
    path = written(tmp_path / "vae.safetensors", sgm_tensors(source))
    assert load_vae(path, SDXL, dtype=torch.bfloat16).module.dtype == torch.bfloat16
    assert load_vae(path, SDXL).module.dtype == torch.float32


# ---------------------------------------------------------------- invalid files


def test_a_missing_encoder_is_an_error(source, tmp_path):
    path = written(tmp_path / "half.safetensors", sgm_tensors(source, without=("encoder", "quant_conv")))
    with pytest.raises(InputError, match=r"half\.safetensors has no encoder"):
        load_vae(path, SDXL)


def test_other_files_are_errors(source, tmp_path):
    unet = written(tmp_path / "unet.safetensors", {"model.diffusion_model.out.2.bias": torch.zeros(4)})
    with pytest.raises(InputError, match=r"contains no VAE: found model\.diffusion_model\.out\.2\.bias"):
        load_vae(unet, SDXL)
    taesd = written(
        tmp_path / "taesd.safetensors", {"encoder.0.bias": torch.zeros(4), "decoder.1.bias": torch.ones(4)}
    )
    with pytest.raises(
        InputError, match=r"taesd\.safetensors is not laid out like SDXL's VAE: neither encoder\.down"
    ):
        load_vae(taesd, SDXL)
    pickle = tmp_path / "vae.pt"
    pickle.write_bytes(b"\x80\x02.")
    with pytest.raises(InputError, match="never opens pickles"):
        load_vae(pickle, SDXL)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(InputError, match="never opens pickles"):
        load_vae(tmp_path / "folder", SDXL)


def test_missing_and_unknown_tensors_are_named(source, tmp_path):
    tensors = sgm_tensors(source)
    del tensors["encoder.mid.attn_1.q.weight"]
    tensors["decoder.extra.weight"] = torch.zeros(1)
    path = written(tmp_path / "vae.safetensors", tensors)
    with pytest.raises(
        InputError, match=r"1 tensor missing and 1 unknown: encoder\.mid_block.*decoder\.extra"
    ):
        load_vae(path, SDXL)


def test_a_wrong_shape_is_named(source, tmp_path):
    tensors = sgm_tensors(source) | {"decoder.conv_out.bias": torch.zeros(5)}
    path = written(tmp_path / "vae.safetensors", tensors)
    with pytest.raises(InputError, match=r"decoder\.conv_out\.bias: expected \(3,\), got \(5,\)"):
        load_vae(path, SDXL)


def test_norm_groups_that_do_not_divide_the_widths_are_an_error(source, tmp_path):
    path = written(tmp_path / "vae.safetensors", sgm_tensors(source), metadata={})
    with pytest.raises(InputError, match=r"widths \(8, 16, 16\) are no multiples of the 32 norm groups"):
        load_vae(path, SDXL)


def test_latents_with_other_channels_are_an_error(model, tmp_path):
    wide = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=16, layers_per_block=1)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="wide makes latents of 16 channels, but the UNet takes 4"):
        with_vae(model, load_vae(tmp_path / "wide", SDXL))


# ---------------------------------------------------------------- conventions


def test_a_name_sets_scale_shift_and_padding():
    assert resolve_convention(None, name="eq-anzhc") == VaeConvention(0.1406, -0.4743, "reflect")
    with pytest.raises(InputError, match="already sets scale, shift and padding"):
        resolve_convention(None, name="eq-anzhc", shift=0.0)
    with pytest.raises(InputError, match="unknown VAE 'eq-anzc'; did you mean `eq-anzhc`"):
        resolve_convention(None, name="eq-anzc")


def test_precedence_is_arguments_then_file_then_checkpoint(model, tmp_path):
    folder = diffusers_folder(model, tmp_path / "vae", scaling_factor=0.2)
    default = VaeConvention(0.5, 0.7, "reflect")
    assert resolve_convention(folder) == VaeConvention(0.2, 0.0, "zeros")
    assert resolve_convention(folder, default=default) == VaeConvention(0.2, 0.7, "reflect")
    assert resolve_convention(folder, scale=0.3, padding="zeros", default=default) == VaeConvention(
        0.3, 0.7, "zeros"
    )
    assert resolve_convention(None, shift=0.4, default=default) == VaeConvention(0.5, 0.4, "reflect")


def test_metadata_of_a_file_is_used_like_a_config(source, tmp_path):
    metadata = hints_metadata(TINY) | Provenance(vae_scale=0.1406, vae_padding="reflect").to_metadata()
    path = written(tmp_path / "vae.safetensors", sgm_tensors(source), metadata)
    assert resolve_convention(path) == VaeConvention(0.1406, 0.0, "reflect")


def test_a_config_value_that_is_not_a_number_is_an_error(model, tmp_path):
    folder = diffusers_folder(model, tmp_path / "vae", scaling_factor="big")
    with pytest.raises(InputError, match="scaling_factor is 'big': expected a number"):
        resolve_convention(folder)


def test_the_convention_of_a_run_round_trips_through_metadata(tmp_path):
    origin = declare_vae(Provenance(base_name="base"), ANZHC, tmp_path / "eq.safetensors")
    back = Provenance.from_metadata(origin.to_metadata())
    assert back == Provenance(
        base_name="base",
        vae_scale=0.1406,
        vae_shift=-0.4743,
        vae_padding="reflect",
        vae_name="eq.safetensors",
    )
    assert merge_conventions(back) == ANZHC
    assert declares_vae(back)
    assert not declares_vae(Provenance(base_name="base"))
    assert declare_vae(back, SDXL, None).vae_name is None


def test_another_convention_shares_the_weights(model, pixels):
    other = with_convention(model, ANZHC)
    raw = model.encode_images(pixels) / 0.13025
    with torch.no_grad():
        conv = model.vae.encoder.conv_in
        assert torch.equal(conv.weight, other.vae.encoder.conv_in.weight)
    assert conv.weight.data_ptr() == other.vae.encoder.conv_in.weight.data_ptr(), "the weights are not copied"
    assert (conv.padding_mode, other.vae.encoder.conv_in.padding_mode) == ("zeros", "reflect")
    unpadded = with_convention(model, VaeConvention(0.1406, -0.4743, "zeros"))
    torch.testing.assert_close(unpadded.encode_images(pixels), (raw + 0.4743) * 0.1406)
    assert not torch.allclose(other.encode_images(pixels), unpadded.encode_images(pixels), atol=1e-3)


def test_choose_vae_prefers_the_given_file(source, model, pixels, tmp_path):
    halved = {name: tensor / 2 for name, tensor in sgm_tensors(source).items()}
    path = written(tmp_path / "vae.safetensors", halved)
    own, other = choose_vae(model, None, SDXL), choose_vae(model, path, SDXL)
    assert torch.equal(own.encode_images(pixels), model.encode_images(pixels))
    weights = (own.vae.encoder.conv_in.weight, other.vae.encoder.conv_in.weight)
    torch.testing.assert_close(weights[0], weights[1] * 2)


# ---------------------------------------------------------------- padding


def test_reflection_changes_only_the_border_pixels_of_convolutions_that_pad(source):
    vae = build_model(source).vae
    generator = torch.Generator().manual_seed(8)
    convolutions = [module for module in vae.modules() if isinstance(module, nn.Conv2d)]
    inputs = [torch.randn(1, conv.in_channels, 9, 9, generator=generator) for conv in convolutions]
    before = [conv(x) for conv, x in zip(convolutions, inputs, strict=True)]
    pad_convolutions(vae, "reflect")
    padded = 0
    for conv, x, old in zip(convolutions, inputs, before, strict=True):
        new = conv(x)
        pads = any(conv.padding)
        padded += pads
        torch.testing.assert_close(new[..., 1:-1, 1:-1], old[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-5)
        changed = (new - old).abs().amax(dim=1)[0] > 1e-4
        assert bool(changed[0].all() and changed[-1].all() and changed[:, 0].all()) == pads, conv
        if pads:
            # by hand: mirror the border, then convolve without padding
            mirrored = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
            by_hand = nn.functional.conv2d(mirrored, conv.weight, conv.bias, conv.stride)
            torch.testing.assert_close(new, by_hand)
    assert padded == 32  # 12 of the encoder, 20 of the decoder
    pad_convolutions(vae, "zeros")
    assert torch.equal(convolutions[0](inputs[0]), before[0])

"""Autoencoders of each kind: encoding and decoding equal those of diffusers."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, Flux2Pipeline
from safetensors.torch import load_file, save_file

from spectune.errors import InputError
from spectune.model.network import build_model
from spectune.model.vae import vae_file
from spectune.model.vae.convention import KNOWN_VAES, VaeConvention, known_convention, resolve_convention
from spectune.model.vae.loading import choose_vae, load_vae
from spectune.model.vae.packing import pack, unpack
from spectune.sdxl.layout import VAE_ROOT, hints_metadata
from tests.layouts import TINY
from tests.model.vae.test_loading import sgm_tensors

KL = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
DEEP = {
    "latent_channels": 32,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 32),
    "decoder_block_out_channels": (8, 16, 32),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
SGM = (  # of diffusers' names of a tiny AutoencoderKL
    (".down_blocks.", ".down."),
    (".resnets.", ".block."),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("mid_block.block.0", "mid.block_1"),
    ("mid_block.block.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("attn_1.group_norm", "attn_1.norm"),
    ("attn_1.to_q", "attn_1.q"),
    ("attn_1.to_k", "attn_1.k"),
    ("attn_1.to_v", "attn_1.v"),
    ("attn_1.to_out.0", "attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)


def seeded(build, **sizes):
    torch.manual_seed(0)
    return build(**sizes).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(7)) * 2 - 1


@pytest.fixture(scope="module")
def flux1(tmp_path_factory):
    vae = seeded(
        AutoencoderKL,
        **KL,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    folder = tmp_path_factory.mktemp("flux1")
    vae.save_pretrained(folder)
    return vae, folder


@pytest.fixture(scope="module")
def flux2(tmp_path_factory):
    vae = seeded(AutoencoderKLFlux2, **KL)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 4)
    folder = tmp_path_factory.mktemp("flux2")
    vae.save_pretrained(folder)
    return vae, folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    vae = seeded(AutoencoderDC, **DEEP)
    folder = tmp_path_factory.mktemp("sana")
    vae.save_pretrained(folder)
    return vae, folder


@pytest.fixture(scope="module")
def models(source):
    """Return a function that gives the tiny model with a UNet that takes so many channels."""
    model = build_model(source)

    def taking(channels):
        unet = replace(model.layout.unet, in_channels=channels, out_channels=channels)
        return replace(model, layout=replace(model.layout, unet=unet))

    return taking


def sgm_file(path, vae, *, inner=False):
    """Write an autoencoder with the key names of single files."""
    tensors = {}
    for key, tensor in vae.state_dict().items():
        name = key
        for old, new in SGM:
            name = name.replace(old, new)
        if name.startswith("decoder.up_blocks."):
            level = int(name.split(".")[2])
            name = name.replace(f"up_blocks.{level}", f"up.{2 - level}")
        if ".attn_1." in name and name.endswith("weight") and ".norm." not in name:
            tensor = tensor[:, :, None, None]
        if inner:
            name = name.replace("post_quant_conv.", "decoder.post_quant_conv.")
            name = f"encoder.{name}" if name.startswith("quant_conv.") else name
        tensors[name] = tensor.contiguous()
    save_file(tensors, path, hints_metadata(TINY))
    return path


# ---------------------------------------------------------------- FLUX.1


@pytest.mark.parametrize("spelling", ["folder", "diffusers", "sgm"])
def test_flux1_without_quant_convolutions(models, flux1, pixels, tmp_path, spelling):
    oracle, folder = flux1
    path = folder
    if spelling == "diffusers":
        path = tmp_path / "ae.safetensors"
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        save_file(tensors, path, hints_metadata(TINY))
    elif spelling == "sgm":
        path = sgm_file(tmp_path / "ae.safetensors", oracle)
    name = None if spelling == "folder" else "flux1"  # config.json declares its values
    model = choose_vae(models(16), path, resolve_convention(path, name=name))
    latents = model.encode_images(pixels)
    assert latents.shape == (2, 16, 16, 8)
    assert torch.equal(latents, (oracle.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611)
    decoded = oracle.decode(latents / 0.3611 + 0.1159).sample.clamp(-1, 1)
    assert torch.equal(model.decode_latents(latents), decoded)


# ---------------------------------------------------------------- FLUX.2


@pytest.mark.parametrize("spelling", ["folder", "sgm", "sgm inner"])
def test_flux2_with_32_channels(models, flux2, pixels, tmp_path, spelling):
    oracle, folder = flux2
    inner = spelling == "sgm inner"
    path = folder if spelling == "folder" else sgm_file(tmp_path / "ae.safetensors", oracle, inner=inner)
    model = choose_vae(models(32), path, known_convention("flux2"))
    assert (model.pixels_per_latent, model.layout.vae.unet_channels) == (4, 32)
    latents = model.encode_images(pixels)
    assert torch.equal(latents, (oracle.encode(pixels).latent_dist.mode() - 0.0760) * 0.6043)
    decoded = oracle.decode(latents / 0.6043 + 0.0760).sample.clamp(-1, 1)
    assert torch.equal(model.decode_latents(latents), decoded)


@pytest.mark.parametrize("spelling", ["folder", "sgm inner"])
def test_flux2_packed_as_in_the_pipeline_of_diffusers(models, flux2, pixels, tmp_path, spelling):
    oracle, folder = flux2
    path = folder if spelling == "folder" else sgm_file(tmp_path / "ae.safetensors", oracle, inner=True)
    model = choose_vae(models(128), path, resolve_convention(path))  # the statistics need no name
    assert (model.pixels_per_latent, model.size_step) == (8, 32)
    mean = oracle.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(oracle.bn.running_var.view(1, -1, 1, 1) + oracle.config["batch_norm_eps"])
    posterior = oracle.encode(pixels).latent_dist
    expected = (Flux2Pipeline._patchify_latents(posterior.mode()) - mean) / std
    found_mean, found_std = model.encode_posteriors(pixels).chunk(2, dim=1)
    assert found_mean.shape == (2, 128, 8, 4)
    assert torch.equal(found_mean, expected)
    assert torch.equal(found_std, Flux2Pipeline._patchify_latents(posterior.std) / std)
    decoded = oracle.decode(Flux2Pipeline._unpatchify_latents(expected * std + mean)).sample
    # convolutions round differently for inputs with other strides
    torch.testing.assert_close(model.decode_latents(found_mean), decoded.clamp(-1, 1), rtol=0, atol=1e-5)


def test_the_statistics_of_flux2_must_fit(models, flux2, tmp_path):
    oracle, _ = flux2
    path = sgm_file(tmp_path / "ae.safetensors", oracle)
    tensors = load_file(path)
    save_file(tensors | {"bn.running_var": torch.zeros(128) - 1}, path, hints_metadata(TINY))
    with pytest.raises(InputError, match="statistics are not finite or have a variance of 0"):
        choose_vae(models(128), path, known_convention("flux2-packed"))
    save_file(tensors | {"bn.running_var": torch.ones(64)}, path, hints_metadata(TINY))
    with pytest.raises(InputError, match=r"bn\.running_var has shape \(64,\), expected \(128,\)"):
        choose_vae(models(128), path, known_convention("flux2-packed"))
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith("bn.")}
    save_file(plain, path, hints_metadata(TINY))
    with pytest.raises(InputError, match="makes latents of 32 channels, but the UNet takes 128"):
        choose_vae(models(128), path, known_convention("flux2-packed"))
    assert choose_vae(models(32), path, known_convention("flux2")).layout.vae.unet_channels == 32


# ---------------------------------------------------------------- Sana


def test_an_autoencoder_of_sana(models, deep, pixels):
    oracle, folder = deep
    convention = resolve_convention(folder)
    assert convention == VaeConvention(0.41407, 0.0, "zeros")
    model = choose_vae(models(32), folder, convention)
    latents = model.encode_images(pixels, torch.Generator().manual_seed(0))  # there is nothing to sample
    assert latents.shape == (2, 32, 16, 8)
    assert torch.equal(latents, oracle.encode(pixels).latent * 0.41407)
    decoded = oracle.decode(latents / 0.41407).sample.clamp(-1, 1)
    assert torch.equal(model.decode_latents(latents), decoded)


def test_a_single_file_of_sana_has_the_published_sizes(models, deep, pixels, tmp_path, monkeypatch):
    oracle, folder = deep
    path = tmp_path / "dc-ae.safetensors"
    save_file(load_file(folder / "diffusion_pytorch_model.safetensors"), path)
    with pytest.raises(InputError, match=r"dc-ae\.safetensors differs from Sana's AutoencoderDC") as caught:
        load_vae(path, known_convention("sana"))
    assert "pass the diffusers folder" in caught.value.hint
    monkeypatch.setattr(vae_file, "SANA_CONFIG", json.loads(json.dumps(DEEP)))
    model = choose_vae(models(32), path, known_convention("sana"))
    assert torch.equal(model.encode_images(pixels), oracle.encode(pixels).latent * 0.41407)


def test_other_spellings_and_classes_are_named(deep, tmp_path):
    original = tmp_path / "original.safetensors"
    tensors = {"encoder.stages.0.op_list.0.main.conv.conv.bias": torch.zeros(8), "decoder.x": torch.zeros(1)}
    save_file(tensors, original)
    with pytest.raises(InputError, match="an AutoencoderDC with the key names of its original code"):
        load_vae(original, known_convention("sana"))
    _, folder = deep
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())

    def refused(changes, match):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=match):
            load_vae(tmp_path / "", known_convention("sana"))

    original.unlink()
    refused({"_class_name": "AutoencoderTiny"}, "is the configuration of 'AutoencoderTiny'")
    refused({"encoder_layers_per_block": [10**9] * 3}, "encoder_layers_per_block is .* expected a list of")
    refused({"encoder_block_out_channels": "wide"}, "encoder_block_out_channels is 'wide'")
    refused({"decoder_act_fns": "unheard"}, "diffusers cannot build the AutoencoderDC")


# ---------------------------------------------------------------- channels and names


def test_channels_and_names_that_do_not_fit_are_errors(models, flux1, flux2, deep):
    with pytest.raises(InputError, match="makes latents of 16 channels, but the UNet takes 4") as caught:
        choose_vae(models(4), flux1[1], known_convention("flux1"))
    assert "--latent-channels 16" in caught.value.hint
    with pytest.raises(InputError, match=r"not the VAE 'flux1': .* with latents of 16 channels"):
        choose_vae(models(32), flux2[1], known_convention("flux1"))
    with pytest.raises(InputError, match="not the VAE 'flux2': that one is an AutoencoderKLFlux2"):
        choose_vae(models(32), deep[1], known_convention("flux2"))
    with pytest.raises(InputError, match="the checkpoint's VAE is not the VAE 'flux1'"):
        choose_vae(models(4), None, known_convention("flux1"))


def test_the_scale_of_other_latents_must_be_declared(models, flux2):
    with pytest.raises(InputError, match=r"declares the scale and shift of .* have 32 channels"):
        choose_vae(models(32), flux2[1], resolve_convention(flux2[1]))
    convention = resolve_convention(flux2[1], scale=0.5)
    assert choose_vae(models(32), flux2[1], convention).layout.vae.scale == 0.5


def test_a_file_of_4_channels_keeps_the_scale_of_sdxl(source, models, tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file(sgm_tensors(source, root=VAE_ROOT), path, hints_metadata(TINY))
    assert choose_vae(models(4), path, resolve_convention(path)).layout.vae.scale == KNOWN_VAES["sdxl"].scale


def test_packing_is_inverted(models, flux2):
    statistics = choose_vae(models(128), flux2[1], resolve_convention(flux2[1])).layout.vae.packed
    z = torch.randn(1, 32, 4, 6)
    latents, deviations = pack(z, torch.ones_like(z), statistics)
    assert latents.shape == (1, 128, 2, 3)
    torch.testing.assert_close(unpack(latents, statistics), z)
    torch.testing.assert_close(deviations[0, :, 0, 0] * torch.tensor(statistics.deviations), torch.ones(128))


# ---------------------------------------------------------------- tiles


def test_tiles_of_packed_latents_are_those_of_z(models, flux2, monkeypatch):
    monkeypatch.setattr("spectune.model.network.TILE_PX", 32)
    path, picture = flux2[1], torch.linspace(-1, 1, 64).expand(1, 3, 48, 64).contiguous()
    packed = replace(choose_vae(models(128), path, known_convention("flux2-packed")), vae_tiles=True)
    plain = replace(choose_vae(models(32), path, VaeConvention(1.0, 0.0, "zeros")), vae_tiles=True)
    z, latents = plain.encode_posteriors(picture), packed.encode_posteriors(picture)
    assert latents.shape == (1, 256, 6, 8)
    expected = torch.cat(pack(*z.chunk(2, dim=1), packed.layout.vae.packed), dim=1)
    torch.testing.assert_close(latents, expected)
    one_piece = replace(packed, vae_tiles=False).encode_posteriors(picture)
    assert not torch.allclose(latents, one_piece)
    torch.testing.assert_close(
        packed.decode_latents(latents.chunk(2, dim=1)[0]), plain.decode_latents(z.chunk(2, dim=1)[0]),
        rtol=0, atol=1e-4,
    )  # fmt: skip


def test_tiles_of_an_autoencoder_of_sana(models, deep, pixels, monkeypatch):
    monkeypatch.setattr("spectune.model.network.TILE_PX", 32)
    model = choose_vae(models(32), deep[1], resolve_convention(deep[1]))
    tiled = replace(model, vae_tiles=True)
    latents = tiled.encode_images(pixels[:1])  # tiles of 32 px that begin at 0, 16 and 32
    assert latents.shape == (1, 32, 16, 8)
    first = model.encode_images(pixels[:1, :, :32])
    torch.testing.assert_close(latents[..., :4, :], first[..., :4, :])
    decoded = tiled.decode_latents(latents)
    assert decoded.shape == (1, 3, 64, 32)
    torch.testing.assert_close(decoded[..., :16, :], model.decode_latents(latents[..., :8, :])[..., :16, :])

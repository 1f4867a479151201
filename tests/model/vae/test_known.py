"""The published values, against the configurations of other programs where they have them."""

import pytest
from diffusers import AutoencoderKLFlux2

from spectune.files.provenance import Provenance
from spectune.model.vae.convention import ASSUMED, VaeConvention, known_convention, merge_conventions
from spectune.model.vae.known import KNOWN_VAES


@pytest.mark.parametrize(
    ("name", "channels", "pixels", "convention"),
    [
        ("sdxl", 4, 8, VaeConvention(0.13025, 0.0, "zeros")),
        ("eq-kblueleaf", 4, 8, VaeConvention(0.13025, 0.0, "zeros")),
        ("eq-anzhc", 4, 8, VaeConvention(0.1406, -0.4743, "reflect")),
        ("eq-bluvoll", 4, 8, VaeConvention(0.1280, 0.1726, "reflect")),
        ("flux1", 16, 8, VaeConvention(0.3611, 0.1159, "zeros")),
        ("flux2", 32, 8, VaeConvention(0.6043, 0.0760, "zeros")),
        ("flux2-packed", 128, 16, VaeConvention(1.0, 0.0, "zeros")),
        ("sana", 32, 32, VaeConvention(0.41407, 0.0, "zeros")),
    ],
)
def test_the_values_of_each_name(name, channels, pixels, convention):
    known = KNOWN_VAES[name]
    assert (known.channels, known.pixels_per_latent) == (channels, pixels)
    assert known_convention(name) == convention
    assert known_convention(name).name == name


def test_flux2_has_the_channels_of_its_class_in_diffusers():
    vae = AutoencoderKLFlux2(block_out_channels=(32,) * 4, layers_per_block=1, norm_num_groups=1)
    assert KNOWN_VAES["flux2"].channels == vae.config["latent_channels"]
    assert KNOWN_VAES["flux2-packed"].channels == vae.bn.num_features


def test_a_scale_is_assumed_until_something_declares_it():
    assert merge_conventions().is_assumed
    assert merge_conventions(Provenance(vae_shift=0.1)).is_assumed
    assert not merge_conventions(Provenance(vae_scale=0.13025)).is_assumed
    assert not merge_conventions(default=VaeConvention(0.2, 0.0, "zeros")).is_assumed
    assert merge_conventions() == ASSUMED

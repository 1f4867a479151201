"""The checkpoint for benchmarks has SDXL's names and shapes, and the expected spectra."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from benchmarks.make_checkpoint import (
    Rotation,
    Spectrum,
    layer_spectrum,
    layout_of_size,
    read_keys,
    tensors_of,
    trained_spectrum,
    weight_with,
    write_checkpoint,
)
from spectune.checkpoints.open import open_checkpoint
from spectune.files.source import TensorInfo
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layers import Catalogue, Kind, build_catalogue, layer_weight
from tests.cli.test_full_layout import NARROW
from tests.layouts import FULL


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: there are thousands of transforms, each shorter than the wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "narrow.safetensors"
    write_checkpoint(path, "narrow", torch.float32, seed=3)
    return path


def test_sizes_are_the_known_layouts() -> None:
    assert layout_of_size("full") == FULL
    assert layout_of_size("narrow") == NARROW


def test_the_full_size_has_the_names_and_shapes_of_sdxl(full_infos: Mapping[str, TensorInfo]) -> None:
    infos = tensors_of(layout_of_size("full"), torch.float16)
    assert {info.name: info for info in infos} == full_infos
    assert len(infos) == len(read_keys()) == 2515


@pytest.mark.slow
def test_every_size_has_the_names_of_sdxl() -> None:
    known = read_keys()
    for size in ("mid", "narrow"):
        infos = {info.name: info.shape for info in tensors_of(layout_of_size(size), torch.float16)}
        assert infos.keys() == known.keys()
        assert {name: len(shape) for name, shape in infos.items()} == {
            name: len(shape) for name, shape in known.items()
        }
        assert (
            len(
                build_catalogue({info.name: info for info in tensors_of(layout_of_size(size), torch.float16)})
            )
            == 1052
        )


def test_its_layout_can_be_read(narrow: Path) -> None:
    with open_checkpoint(narrow) as source:
        assert infer_layout(source) == NARROW
        root = "conditioner.embedders."
        ids = source.load(f"{root}0.transformer.text_model.embeddings.position_ids")
        assert torch.equal(ids, torch.arange(77)[None])
        assert float(source.load(f"{root}1.model.logit_scale")) == pytest.approx(4.6052, abs=1e-4)
        norm = source.load("model.diffusion_model.input_blocks.7.1.norm.weight")
        assert abs(float(norm.mean()) - 1) < 0.1
        assert float(source.load("model.diffusion_model.out.2.bias").abs().max()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4])
def test_the_same_seed_gives_the_same_bytes(narrow: Path, tmp_path: Path, seed: int) -> None:
    again = tmp_path / "again.safetensors"
    write_checkpoint(again, "narrow", torch.float32, seed=seed)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (narrow, again)]
    assert (digests[0] == digests[1]) == (seed == 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "other.safetensors"
    write_checkpoint(path, "narrow", dtype, seed=0)
    with open_checkpoint(path) as source:
        dtypes = {info.dtype for info in source.tensors.values()}
        assert dtypes == {dtype, torch.int64}
        name = "model.diffusion_model.middle_block.1.proj_in.weight"
        assert 0.015 < float(source.load(name).float().std()) < 0.045


def layers_of_all_kinds(catalogue: Catalogue) -> list[str]:
    """Return a linear layer, one of a fused tensor, a tall one, a 1x1 and a 3x3 convolution, an embedding."""
    names = [
        "unet.middle_block.1.proj_in",
        "unet.middle_block.1.transformer_blocks.0.ff.net.0.proj",
        "unet.output_blocks.0.0.skip_connection",
        "unet.output_blocks.0.0.in_layers.2",
        "unet.time_embed.2",
        "te2.text_model.encoder.layers.31.self_attn.k_proj",
    ]
    kinds = {(catalogue.by_name[name].kind, catalogue.by_name[name].rows is None) for name in names}
    assert kinds == {(Kind.LINEAR, True), (Kind.LINEAR, False), (Kind.CONV, True)}
    return names


def test_layers_have_the_expected_spectrum(narrow: Path) -> None:
    """Compare with the exact SVD of the float32 file."""
    with open_checkpoint(narrow) as source:
        catalogue = build_catalogue(source, all_layers=True)
        for name in layers_of_all_kinds(catalogue):
            layer = catalogue.by_name[name]
            found = torch.linalg.svdvals(layer_weight(source, layer).flatten(1).double())
            expected = layer_spectrum(layer, seed=3).values()
            torch.testing.assert_close(found / found[0], expected / expected[0], rtol=1e-5, atol=1e-6)
            std = float(found.norm()) / (layer.out_features * layer.in_features) ** 0.5
            assert 0.02 <= std <= 0.04
            other = layer_spectrum(layer, seed=4).values()
            assert float((found / found[0] - other / other[0]).abs().max()) > 1e-4


@pytest.mark.parametrize("shape", [(96, 96), (160, 75), (30, 2 * 3 * 49)])
def test_singular_vectors_are_dense_and_orthonormal(shape: tuple[int, int]) -> None:
    """Expect entries like Gaussian ones: the fourth moment is 3 times the squared second moment."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(shape)
    small = min(shape)
    spectrum = Spectrum(small, 0.4, 0.0).values()
    weight_with(spectrum, shape, generator, weight)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(s, spectrum, rtol=1e-5, atol=0)
    for vectors in (u.T, vh):
        size = vectors.shape[1]
        assert float(vectors.abs().max()) < 6 / size**0.5
        assert float(vectors.pow(4).mean()) * size**2 == pytest.approx(3, rel=0.15)
        # Neighbors are not shifted copies of each other, as one transform with one set of signs gives.
        shifts = torch.fft.ifft(torch.fft.fft(vectors[0]).conj() * torch.fft.fft(vectors[1])).real
        assert float(shifts.abs().max()) < 6 / size**0.5


@pytest.mark.parametrize("size", [2, 9, 16, 35])
def test_a_rotation_is_orthogonal(size: int) -> None:
    matrix = Rotation.random(size, torch.Generator().manual_seed(1)).apply(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)


def test_the_share_of_energy() -> None:
    """As measured on trained weights: about 0.6 in the first 64 directions of layers of 384 to 1536."""
    for count in (640, 768, 1280):
        for decay, share in ((0.3, 0.55), (0.4, 0.6), (0.5, 0.65)):
            spectrum = trained_spectrum(count, decay)
            assert spectrum.share() == pytest.approx(share, abs=1e-6)
            values = spectrum.values()
            assert bool((values.diff() < 0).all())
            # Around rank 64 the plain power law, after it almost no decay.
            assert float(values[79] / values[63]) == pytest.approx((80 / 64) ** -decay, rel=1e-5)
            assert 0.6 <= float(values[-1] / values[count // 4]) < 1
            assert Spectrum(count, decay, spectrum.gain * 1.01).share() > share

"""Write an untrained checkpoint with the names, shapes and spectra of a trained SDXL.

    python benchmarks/make_checkpoint.py model.safetensors                 6.9 GB in float16
    python benchmarks/make_checkpoint.py small.safetensors --size mid      all 2515 tensors, a quarter as wide

Every layer that can be factored gets singular values like those of trained weights, and random singular
vectors. All other tensors are small noise. The same seed gives the same bytes on the same kind of device. The
script needs less than 1 GB of memory.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from spectune.files.dtypes import WEIGHT_DTYPES_BY_NAME
from spectune.files.source import TensorInfo
from spectune.files.writer import StreamWriter
from spectune.model.network import new_unet, new_vae, text_config
from spectune.sdxl.inference import layout_of
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue
from spectune.sdxl.layout import Layout, hints_metadata
from spectune.sdxl.state_dicts import LOGIT_SCALE, single_file_tensors

KEYS = Path(__file__).resolve().parents[1] / "tests" / "data" / "sdxl_keys.tsv.gz"
Size = Literal["full", "mid", "narrow"]

SLOWEST, FASTEST = 0.3, 0.5  # decay of singular values in trained weights, s_i ~ i^-a
HEAD = 4.0  # number of directions over which the gain of the leading directions falls by a factor e
KNEE = 0.2  # start of the flat tail, as a share of the singular values
TAIL_END = 0.6  # the last singular value relative to the one at the knee
RANK = 64  # the rank for which the share of energy is set
NORM_SPREAD, SMALL = 0.1, 0.02  # deviation of norms from 1; of biases, embeddings and the VAE from 0
CHUNK_VALUES = 1 << 21  # number of values that are rotated at a time


def read_keys(path: Path = KEYS) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of all tensors of the SDXL base checkpoint."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()[1:]
    return {name: _shape(text) for name, text in (line.split("\t") for line in lines)}


def _shape(text: str) -> tuple[int, ...]:
    return () if text == "scalar" else tuple(int(n) for n in text.split("x"))


def layout_of_size(size: Size) -> Layout:
    """Return the layout of SDXL, or a narrower one with SDXL's depth."""
    infos = {name: TensorInfo(name, torch.float16, shape) for name, shape in read_keys().items()}
    full = layout_of(infos)
    assert full.vae is not None
    if size == "full":
        return full
    if size == "mid":
        return Layout(
            unet=replace(
                full.unet,
                channels=(80, 160, 320),
                context=512,
                pooled=320,
                time_id_channels=64,
                norm_groups=16,
            ),
            te1=replace(full.te1, width=192, mlp=768),
            te2=replace(full.te2, width=320, mlp=1280, projection=320),
            vae=replace(full.vae, channels=(32, 64, 128, 128), norm_groups=8),
        )
    return Layout(
        unet=replace(
            full.unet,
            channels=(8, 16, 32),
            heads=(1, 2, 2),
            context=24,
            pooled=16,
            time_id_channels=8,
            norm_groups=8,
        ),
        te1=replace(full.te1, width=8, heads=2, mlp=32, vocab=64),
        te2=replace(full.te2, width=16, heads=2, mlp=64, vocab=64, projection=16),
        vae=replace(full.vae, channels=(8, 16, 32, 32), norm_groups=4),
    )


def tensors_of(layout: Layout, dtype: torch.dtype) -> list[TensorInfo]:
    """Return the tensors of a single file of this layout; diffusers and transformers define the shapes."""
    assert layout.vae is not None
    with torch.device("meta"):
        states = (
            new_unet(layout.unet).state_dict(),
            CLIPTextModel(text_config(layout.te1)).state_dict(),
            CLIPTextModelWithProjection(text_config(layout.te2)).state_dict(),
            new_vae(layout.vae).state_dict(),
        )
    return [
        TensorInfo(name, dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in single_file_tensors(layout, *states).items()
    ]


def generator_of(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for one tensor, so that values do not depend on the order of writing."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Spectrum:
    """Singular values in three sections: amplified leading directions, i^-decay, a flat tail."""

    count: int
    decay: float  # 0.3..0.5
    gain: float  # of the first direction: s_1 = 1 + gain

    def values(self) -> Tensor:
        """Return the singular values in float64, largest first."""
        index = torch.arange(1, self.count + 1, dtype=torch.float64)
        knee = max(int(KNEE * self.count), 1)
        # the value at the knee occurs only once, so no two values are equal
        fall = torch.linspace(1, TAIL_END, self.count - knee + 1, dtype=torch.float64)
        tail = torch.cat([torch.ones(knee - 1, dtype=torch.float64), fall])
        plain = index.clamp(max=knee) ** -self.decay * tail
        return plain * (1 + self.gain * torch.exp(-(index - 1) / HEAD))

    def share(self, rank: int = RANK) -> float:
        """Return the share of the energy in the first `rank` directions, 0..1."""
        energy = self.values().square()
        return float(energy[:rank].sum() / energy.sum())


def trained_spectrum(count: int, decay: float) -> Spectrum:
    """Return the spectrum with about 0.6 of the energy in the first 64 directions.

    The share is 0.55 at i^-0.3 and 0.65 at i^-0.5. With 1280 singular values, decay alone gives 0.25 to 0.55;
    the gain of a few leading directions adds the rest. With a few hundred values, decay alone is enough.
    """
    target = 0.55 + 0.1 * (decay - SLOWEST) / (FASTEST - SLOWEST)
    low, high = 0.0, 100.0
    if Spectrum(count, decay, low).share() >= target:
        return Spectrum(count, decay, low)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if Spectrum(count, decay, middle).share() > target else (middle, high)
    return Spectrum(count, decay, high)


def layer_spectrum(layer: Layer, seed: int) -> Spectrum:
    generator = generator_of(seed, f"{layer.name} spectrum")
    decay = SLOWEST + (FASTEST - SLOWEST) * float(torch.rand((), generator=generator))
    return trained_spectrum(layer.full_rank, decay)


def hartley(rows: Tensor) -> Tensor:
    """Return the Hartley transform of each row, sum_k x_k (cos + sin)(2 pi j k / n) / sqrt(n)."""
    half = torch.fft.rfft(rows, norm="ortho")
    count = rows.shape[-1]
    mirrored = (half.real + half.imag)[:, 1 : (count + 1) // 2].flip(-1)
    return torch.cat([half.real - half.imag, mirrored], dim=-1)


@dataclass(frozen=True)
class Rotation:
    """A random orthogonal matrix: two Hartley transforms with random signs and a random permutation.

    It is as dense and unstructured as the Q of a QR factorization, but a product needs n log n instead of
    n**2 operations per row.
    """

    signs: Tensor  # (3, n), each 1 or -1
    order: Tensor  # (n,)

    @classmethod
    def random(cls, n: int, generator: torch.Generator) -> Self:
        device = generator.device
        signs = torch.randint(0, 2, (3, n), generator=generator, device=device).float() * 2 - 1
        return cls(signs, torch.randperm(n, generator=generator, device=device))

    def apply(self, rows: Tensor) -> Tensor:
        """Return the rotated rows of n values."""
        once = hartley(rows * self.signs[0])
        return hartley(once[:, self.order] * self.signs[1]) * self.signs[2]


def weight_with(spectrum: Tensor, shape: tuple[int, int], generator: torch.Generator, out: Tensor) -> None:
    """Fill `out`, a matrix of `shape`, with U diag(spectrum) V^T; U and V are random and orthonormal."""
    small, large = min(shape), max(shape)
    inner, outer = Rotation.random(small, generator), Rotation.random(large, generator)
    square = inner.apply(torch.diag(spectrum.float().to(out.device))).T
    step = max(CHUNK_VALUES // large, 1)
    target = out if shape[0] <= shape[1] else out.T
    for begin in range(0, small, step):
        rows = square[begin : begin + step]
        wide = torch.nn.functional.pad(rows, (0, large - small))
        target[begin : begin + step] = outer.apply(wide).to(out.dtype)


def layer_matrix(layer: Layer, seed: int, out: Tensor) -> None:
    """Fill `out` (out, in * kh * kw) with the weight of a layer."""
    generator = generator_of(seed, layer.name, out.device)
    # the range of standard deviations in SDXL's layers
    std = 0.02 + 0.02 * float(torch.rand((), generator=generator, device=out.device))
    values = layer_spectrum(layer, seed).values()
    shape = (layer.out_features, layer.in_features)
    scaled = values * (std * math.sqrt(shape[0] * shape[1]) / float(values.norm()))
    weight_with(scaled, shape, generator, out)


def other_tensor(info: TensorInfo, seed: int) -> Tensor:
    """Return a tensor that is not factored: norms near 1, everything else near 0."""
    if info.name.endswith("position_ids"):
        return torch.arange(info.numel, dtype=info.dtype).reshape(info.shape)
    if info.name.endswith("logit_scale"):
        return torch.full(info.shape, LOGIT_SCALE).to(info.dtype)
    noise = torch.randn(info.shape, generator=generator_of(seed, info.name))
    norm = info.name.endswith(".weight") and len(info.shape) == 1
    return noise.mul_(NORM_SPREAD).add_(1).to(info.dtype) if norm else noise.mul_(SMALL).to(info.dtype)


def make_tensor(info: TensorInfo, layers: Sequence[Layer], seed: int, device: str = "cpu") -> Tensor:
    """Return one tensor of the file; `layers` are the layers in it, empty if it is not factored."""
    if not layers:
        return other_tensor(info, seed)
    tensor = torch.empty(info.shape, dtype=info.dtype, device=device)
    for layer in layers:
        layer_matrix(layer, seed, tensor[layer.row_slice].view(layer.out_features, -1))
    return tensor.cpu()


def write_checkpoint(
    path: Path, size: Size, dtype: torch.dtype, seed: int, *, force: bool = False, device: str = "cpu"
) -> Catalogue:
    """Write the checkpoint and return its layers. Layers are computed on `device`."""
    layout = layout_of_size(size)
    infos = tensors_of(layout, dtype)
    catalogue = build_catalogue({info.name: info for info in infos}, all_layers=True)
    started = time.perf_counter()
    with StreamWriter(path, infos, metadata=hints_metadata(layout), force=force) as writer:
        for done, info in enumerate(infos):
            writer.write(info.name, make_tensor(info, catalogue.by_tensor.get(info.name, ()), seed, device))
            if sys.stderr.isatty():
                print(f"\r{done + 1} of {len(infos)} tensors", end="", file=sys.stderr)
    print(f"\n{path}: {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")
    return catalogue


def print_shares(catalogue: Catalogue, seed: int) -> None:
    """Print the energy of the first 64 directions by layer size."""
    sizes = sorted({layer.full_rank for layer in catalogue if layer.full_rank > RANK})
    print(f"| singular values | layers | energy of the first {RANK} | at i^-{SLOWEST} | at i^-{FASTEST} |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for size in sizes:
        spectra = [layer_spectrum(layer, seed) for layer in catalogue if layer.full_rank == size]
        by_decay = sorted(spectra, key=lambda spectrum: spectrum.decay)
        mean = statistics.mean(spectrum.share() for spectrum in spectra)
        print(
            f"| {size} | {len(spectra)} | {mean:.1%} "
            f"| {by_decay[0].share():.1%} | {by_decay[-1].share():.1%} |"
        )


def print_peak_memory() -> None:
    if sys.platform != "win32":
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak memory {used / 2 ** (20 if sys.platform == 'darwin' else 10):.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=WEIGHT_DTYPES_BY_NAME, default="float16")
    parser.add_argument("--size", choices=get_args(Size), default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="device of the arithmetic: cpu or cuda")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    parser.add_argument("--threads", type=int, default=1, help="more than 1 helps only on an idle machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = WEIGHT_DTYPES_BY_NAME[args.dtype]
    catalogue = write_checkpoint(args.out, args.size, dtype, args.seed, force=args.force, device=args.device)
    print_shares(catalogue, args.seed)
    print_peak_memory()


if __name__ == "__main__":
    main()

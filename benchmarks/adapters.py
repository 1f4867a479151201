"""Benchmark of adapter files: export, slice, convert, rebuild, and the difference of two checkpoints.

    python dev.py bench adapters                       on the embedded base, in seconds
    python dev.py bench adapters model.safetensors     on your own checkpoint, at rank 64

The tuned adapter has random deltas, 2 % of the size of the factors, on the model's real principal. Each stage
runs several times, into new files, and stages alternate. The median of a stage is compared with the time to
copy its input: one read and one write with fsync. For one layer of each shape, the script also prints the
error of the exported LoRA, and of a naive LoRA that concatenates the factors without factoring them again.
Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from split import EMBEDDED, Timing, default_rank, move, watched

from spectune.adapters.adapter import Adapter, LazyLayers, TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.adapters.writer import save_tuned
from spectune.cli.allocators import set_allocators
from spectune.core.delta import Delta, added_to_residual, change
from spectune.core.linalg import relative_error
from spectune.core.lora import export_layer
from spectune.core.low_rank import LowRank, product
from spectune.files.provenance import Provenance
from spectune.ops.convert import convert
from spectune.ops.export import export
from spectune.ops.options.values import parse_slice
from spectune.ops.rebuild import rebuild
from spectune.ops.slice import slice
from spectune.ops.split import split

CHANGE = 0.02  # standard deviation of the deltas, relative to the factors


def make_tuned(principal: Path, principal_hash: str, out: Path) -> Path:
    """Write a tuned adapter with random deltas on the frame of a principal."""
    opened = open_adapter(principal)
    assert isinstance(opened, Adapter)
    with opened:
        ranks = {name: opened.rank(name) for name in opened.layers}

        def tuned(name: str) -> Delta:
            frame = opened.layers[name]
            generator = torch.Generator().manual_seed(sum(name.encode()))
            down, up = (
                torch.randn(factor.shape, generator=generator) * (CHANGE * float(factor.float().std()))
                for factor in (frame.down, frame.up)
            )
            return Delta(frame, down, up)

        layers = LazyLayers(ranks, dict.fromkeys(ranks, torch.float32), tuned)
        provenance = replace(Provenance.from_metadata(opened.metadata), principal_hash=principal_hash)
        save_tuned(out, TunedAdapter(layers, opened.metadata, out.name), provenance)
    return out


Stage = tuple[Callable[[Path], object], tuple[Path, ...]]  # (function that writes a file, its input files)


def stages(model: Path, tuned: Path, lora: Path, rebuilt: Path, rank: int) -> dict[str, Stage]:
    """Return the stages by title."""

    def slices(*words: str) -> Callable[[Path], object]:
        return lambda out: slice(tuple(parse_slice(word) for word in words), out)

    return {
        "export, rank 2r": (lambda out: export(tuned, out), (tuned,)),
        "export, cut to r": (lambda out: export(tuned, out, rank=rank), (tuned,)),
        "slice, deltas": (slices(f"{tuned}:te", f"{tuned}:unet"), (tuned,)),
        "slice, LoRA at 0.8": (slices(f"{lora}:te", f"{lora}:unet:0.8"), (lora,)),
        "slice, LoRA summed with itself": (slices(f"{lora}", f"{lora}:unet:0.5"), (lora,)),
        "convert to ComfyUI's keys": (
            lambda out: convert(lora, out, keys="comfyui"),
            (lora,),
        ),
        "rebuild": (lambda out: rebuild(model, tuned, out), (model,)),
        "difference of two checkpoints, rank r": (
            lambda out: export(rebuilt, out, base=model, rank=rank),
            (rebuilt, model),
        ),
    }


def measure(model: Path, rank: int, runs: int, folder: Path) -> dict[str, tuple[Timing, Timing]]:
    """Return, for every stage, its time and the time to copy its input."""
    pair = split(model, folder, rank=rank, with_residual=False)
    tuned = make_tuned(pair.principal, pair.principal_hash, folder / "tuned.safetensors")
    lora = export(tuned, folder / "lora.safetensors").path
    rebuilt = rebuild(model, tuned, folder / "rebuilt.safetensors").path
    print_naive(tuned)
    timings: dict[str, tuple[Timing, Timing]] = {}
    for _ in range(runs):
        for title, (stage, inputs) in stages(model, tuned, lora, rebuilt, rank).items():
            own, copied = timings.setdefault(title, (Timing(), Timing()))
            with tempfile.TemporaryDirectory(dir=folder) as name, watched(own):
                stage(Path(name) / "out.safetensors")
            with tempfile.TemporaryDirectory(dir=folder) as name, watched(copied):
                for index, path in enumerate(inputs):
                    at = Path(name) / str(index)
                    at.mkdir()
                    move(path, at, [path.stat().st_size])
    return timings


def print_naive(tuned: Path) -> None:
    """Print the error of factors that were factored again or concatenated, for one layer of each shape."""
    print("| store | exported | naive concatenation |\n| --- | ---: | ---: |")
    opened = open_adapter(tuned)
    assert isinstance(opened, TunedAdapter)
    assert opened.catalogue is not None
    with opened:
        firsts = {layer.shape: layer.name for layer in reversed(opened.catalogue.layers)}
        for store in (torch.float16, torch.bfloat16):
            exported, naive = [], []
            for name in firsts.values():
                delta = opened.layers[name]
                exact = change(delta)
                exported.append(relative_error(product(export_layer(delta, store=store).low_rank), exact))
                naive.append(relative_error(product(concatenated(delta, store)), exact))
            word = str(store).removeprefix("torch.")
            print(f"| {word} | {max(exported):.3%} | {max(naive):.3%} |")
    print()


def concatenated(delta: Delta, store: torch.dtype) -> LowRank:
    """Return the naive difference of the products: [B0+dB, -B0] [A0+dA; A0]."""
    frame = delta.frame
    tuned = added_to_residual(delta)
    down = torch.cat([tuned.down, frame.down.float()])
    up = torch.cat([tuned.up, -frame.up.float()], dim=1)
    return LowRank(down=down.to(store), up=up.to(store), alpha=2 * frame.alpha)


def main() -> None:
    set_allocators()  # as in the commands
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=EMBEDDED)
    parser.add_argument("--rank", type=int, help="default: 16 for the embedded base, 64 for others")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    rank = args.rank or default_rank(args.model)
    size = args.model.stat().st_size / 1e9
    print(f"{args.model.name}, {size:.2f} GB, rank {rank}, {torch.get_num_threads()} threads\n", flush=True)
    folder = None if args.model == EMBEDDED else args.model.parent
    with tempfile.TemporaryDirectory(dir=folder) as name:
        timings = measure(args.model, rank, args.runs, Path(name))
    print(f"medians of {args.runs}\n")
    print("| stage | seconds | vs. copying its input | peak private memory |\n| --- | ---: | ---: | ---: |")
    for title, (own, copied) in timings.items():
        print(
            f"| {title} | {own.median:.1f} | {own.median / copied.median:.2f} "
            f"| {own.peak_bytes / 1e9:.2f} GB |"
        )


if __name__ == "__main__":
    main()

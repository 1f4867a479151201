"""Compare split, verify and rebuild with a plain copy, and the factors with those of other libraries.

    python dev.py bench split                                  on the embedded base, in seconds
    python dev.py bench split model.safetensors                on your own checkpoint, at rank 64
    python dev.py bench split model.safetensors --peers        also LyCORIS, torch and PEFT, takes minutes

`benchmarks/make_checkpoint.py` writes a full-size checkpoint for this benchmark. Every stage runs several
times, into new files; stages alternate, and medians are compared. "moving the bytes" reads the model and
writes as many bytes as the two files of a split, with fsync and without arithmetic. Other libraries are timed
on one layer of each shape; the time is multiplied by the number of such layers. Run it on an idle machine:
other programs can slow arithmetic down several times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

from spectune.checkpoints.open import open_checkpoint
from spectune.cli.allocators import set_allocators
from spectune.core.low_rank import to_matrix
from spectune.core.svd import top_singular
from spectune.files.reader import Checkpoint
from spectune.ops.options.values import ResidualDtype
from spectune.ops.rebuild import rebuild
from spectune.ops.split import SplitReport, split
from spectune.ops.verify import verify
from spectune.sdxl.layers import Layer, build_catalogue, layer_weight

EMBEDDED = Path(__file__).resolve().parents[1] / "demo" / "base.safetensors"
CHUNK_BYTES = 1 << 24


@dataclass
class Timing:
    """The seconds of all runs of a stage, and its peak memory."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def default_rank(model: Path) -> int:
    return 16 if model == EMBEDDED else 64


def move(model: Path, folder: Path, sizes: list[int]) -> None:
    """Read a file and write new files of given sizes, with fsync; no file system can share their blocks."""
    with model.open("rb") as read:
        for index, size in enumerate(sizes):
            with (folder / f"moved{index}").open("wb") as written:
                while size > 0:
                    chunk = read.read(min(CHUNK_BYTES, size))
                    if not chunk:
                        read.seek(0)
                        continue
                    written.write(chunk)
                    size -= len(chunk)
                written.flush()
                os.fsync(written.fileno())


def private_bytes() -> int:
    """Return the memory of this process in bytes, without the page cache of files."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


@contextmanager
def watched(timing: Timing) -> Iterator[None]:
    """Add the time and the peak memory of the body to `timing`."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            timing.peak_bytes = max(timing.peak_bytes, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    yield
    timing.seconds.append(time.perf_counter() - started)
    ended.set()
    watcher.join()


def stages(
    model: Path, folder: Path, rank: int, dtype: ResidualDtype | None
) -> dict[str, Callable[[], object]]:
    """Return the stages by title; each stage reads the output of earlier stages."""
    principal = folder / f"{model.stem}.principal-r{rank}.safetensors"
    residual = folder / f"{model.stem}.residual.safetensors"
    return {
        "split": lambda: split(model, folder, rank=rank, residual_dtype=dtype, svd="auto"),
        "verify": lambda: verify(model, residual, principal),
        "rebuild": lambda: rebuild(residual, principal, folder / "rebuilt.safetensors"),
    }


def measure(
    model: Path, rank: int, runs: int, dtype: ResidualDtype | None
) -> tuple[dict[str, Timing], SplitReport]:
    timings: dict[str, Timing] = {}
    report: SplitReport | None = None
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir=model.parent) as name:
            folder = Path(name)
            for title, stage in stages(model, folder, rank, dtype).items():
                with watched(timings.setdefault(title, Timing())):
                    result = stage()
                if isinstance(result, SplitReport):
                    report = result
            sizes = [path.stat().st_size for path in folder.glob(f"{model.stem}.*.safetensors")]
        moving = timings.setdefault("moving the bytes", Timing())
        with tempfile.TemporaryDirectory(dir=model.parent) as name, watched(moving):
            move(model, Path(name), sizes)
    assert report is not None
    return timings, report


@dataclass(frozen=True)
class Factored:
    """The time and the error of a rank-r approximation."""

    seconds: float
    energy: float  # share of the squared norm, 0..1
    excess: float  # (norm of the remainder / smallest possible norm) - 1


def lycoris(weight: Tensor, rank: int) -> Tensor:
    from lycoris.utils import extract_conv, extract_linear

    extract = extract_linear if weight.ndim == 2 else extract_conv
    factors, kind = extract(weight, "fixed", rank, device="cpu")
    if kind == "full":  # from half of the full rank on, LyCORIS keeps the whole weight
        return to_matrix(weight)
    down, up, _ = factors
    return to_matrix(up) @ to_matrix(down)


def thin(weight: Tensor, rank: int) -> Tensor:
    matrix = to_matrix(weight)
    u, s, vh = torch.linalg.svd(
        matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T, full_matrices=False
    )
    product = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return product if matrix.shape[0] >= matrix.shape[1] else product.T


def pissa_niter_16(weight: Tensor, rank: int) -> Tensor:
    u, s, v = torch.svd_lowrank(to_matrix(weight), q=rank, niter=16)
    return (u * s) @ v.T


def ours(weight: Tensor, rank: int) -> Tensor:
    triplet = top_singular(to_matrix(weight), rank)
    return (triplet.u * triplet.s) @ triplet.vh


PEERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "spectune, this layer alone": ours,
    "LyCORIS extract_linear, extract_conv": lycoris,
    "torch.linalg.svd, thin, transposed where wide": thin,
    "PEFT pissa_niter_16 (svd_lowrank q=r, niter=16)": pissa_niter_16,
}


def factored(method: Callable[[Tensor, int], Tensor], weight: Tensor, rank: int, runs: int) -> Factored:
    seconds, product = [], weight
    for _ in range(runs):
        started = time.perf_counter()
        product = method(weight, rank)
        seconds.append(time.perf_counter() - started)
    matrix = to_matrix(weight).double()
    energies = torch.linalg.eigvalsh(
        matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    )
    best, total = float(energies[:-rank].clamp(min=0).sum()) ** 0.5, float(energies.sum())
    left = float((matrix - product.double()).norm())
    return Factored(statistics.median(seconds), 1 - left**2 / total, left / best - 1)


def one_of_each_shape(model: Checkpoint) -> list[tuple[Layer, int]]:
    layers = list(build_catalogue(model))
    counts = Counter(layer.shape for layer in layers)
    firsts = {layer.shape: layer for layer in reversed(layers)}
    return [(firsts[shape], count) for shape, count in sorted(counts.items())]


def print_peers(path: Path, rank: int, split_seconds: float, runs: int) -> None:
    with open_checkpoint(path) as model:
        shapes = one_of_each_shape(model)
        print(f"\nfactors only, one layer of each of {len(shapes)} shapes times their number, rank {rank}\n")
        print(
            "| method | seconds | vs. our complete split | energy | worst excess |\n"
            "| --- | ---: | ---: | ---: | ---: |"
        )
        for title, method in PEERS.items():
            results = [
                (factored(method, layer_weight(model, layer).float(), rank, runs), n) for layer, n in shapes
            ]
            seconds = sum(one.seconds * count for one, count in results)
            energy = sum(one.energy * count for one, count in results) / sum(count for _, count in results)
            print(
                f"| {title} | {seconds:.0f} | {seconds / split_seconds:.2f} | {energy:.2%} "
                f"| {max(one.excess for one, _ in results):.1e} |",
                flush=True,
            )


def main() -> None:
    set_allocators()  # as in the commands
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=EMBEDDED)
    parser.add_argument("--rank", type=int, help="default: 16 for the embedded base, 64 for others")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-runs", type=int, default=1)
    parser.add_argument("--exact", action="store_true", help="use a float32 residual")
    parser.add_argument("--peers", action="store_true", help="also time the SVDs of other libraries")
    args = parser.parse_args()
    rank = args.rank or default_rank(args.model)
    dtype: ResidualDtype | None = "float32" if args.exact else None
    timings, report = measure(args.model, rank, args.runs, dtype)
    moved = timings["moving the bytes"].median
    size = args.model.stat().st_size / 1e9
    threads = torch.get_num_threads()
    print(f"{args.model.name}, {size:.2f} GB, rank {rank}, {threads} threads, medians of {args.runs}\n")
    print("| stage | seconds | vs. moving the bytes | peak private memory |\n| --- | ---: | ---: | ---: |")
    for title, timing in timings.items():
        print(
            f"| {title} | {timing.median:.1f} | {timing.median / moved:.2f} "
            f"| {timing.peak_bytes / 1e9:.2f} GB |"
        )
    print(
        f"\n{len(report.layers)} layers, energy {report.energy:.2%}, "
        f"estimated excess at most {report.excess:.1e}, "
        f"{report.share:.4%} of the factored weights bit-equal, {report.exceptions} exceptions"
    )
    if args.peers:
        print_peers(args.model, rank, timings["split"].median, args.peer_runs)


if __name__ == "__main__":
    main()

"""Compare a training step with LyCORIS and PEFT: same network, modules, rank, batch and optimizer.

    python dev.py bench train                       a tiny and a mid-size UNet, with and without checkpointing
    python dev.py bench train --sizes tiny --rounds 1

Every variant runs in a separate process, so that each has its own peak memory. Variants alternate, so that a
slow minute of the machine affects all of them. Seconds are medians over the steps of all rounds. Weights are
random, because only arithmetic is timed. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.full_step import peak_memory
from benchmarks.make_checkpoint import layout_of_size, tensors_of
from spectune.checkpoints.open import open_checkpoint
from spectune.core.low_rank import LowRank, to_factors
from spectune.model.inject import Form, Injection, inject
from spectune.model.network import Sdxl, new_unet, text_config
from spectune.model.prediction import make_prediction
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layers import Layer, build_catalogue
from spectune.sdxl.layout import Layout
from spectune.sdxl.names import Part, module_path

EMBEDDED = Path(__file__).resolve().parents[1] / "demo" / "base.safetensors"


@dataclass(frozen=True)
class Size:
    """A UNet, its batch and its rank."""

    layout: Layout
    latents: int  # edge length of the latents
    batch: int
    rank: int


def tiny() -> Size:
    """Return the size of the embedded base."""
    with open_checkpoint(EMBEDDED) as base:
        return Size(infer_layout(base), latents=16, batch=16, rank=8)


def mid() -> Size:
    """Return SDXL's depth at a quarter of its widths; rank 16 of 320 corresponds to rank 64 of 1280."""
    return Size(layout_of_size("mid"), latents=32, batch=2, rank=16)


SIZES: dict[str, Callable[[], Size]] = {"tiny": tiny, "mid": mid}


def unet_layers(layout: Layout) -> list[Layer]:
    catalogue = build_catalogue({info.name: info for info in tensors_of(layout, torch.float32)})
    return [layer for layer in catalogue if layer.part is Part.UNET]


def frame(layer: Layer, rank: int) -> LowRank:
    true_rank = min(rank, layer.full_rank)
    columns = math.prod(layer.shape[1:])
    up, down = torch.randn(layer.shape[0], true_rank) * 0.05, torch.randn(true_rank, columns) * 0.05
    up, down = to_factors(up, down, layer.shape)
    return LowRank(down=down, up=up, alpha=float(true_rank))


def injected(unet: UNet2DConditionModel, size: Size, layers: list[Layer], form: Form) -> Injection:
    """Inject random frames into a UNet."""
    with torch.device("meta"):
        te1 = CLIPTextModel(text_config(size.layout.te1))
        te2 = CLIPTextModelWithProjection(text_config(size.layout.te2))
    model = Sdxl(unet, te1, te2, None, size.layout, make_prediction("eps"))
    frames = {layer.name: frame(layer, size.rank) for layer in layers}
    return inject(model, frames, form=form)


def ours(form: Form) -> Callable[[UNet2DConditionModel, Size, list[Layer]], list[nn.Parameter]]:
    return lambda unet, size, layers: injected(unet, size, layers, form).parameters()


def peft(unet: UNet2DConditionModel, size: Size, layers: list[Layer]) -> list[nn.Parameter]:
    from peft import LoraConfig, inject_adapter_in_model

    unet.requires_grad_(False)
    config = LoraConfig(
        r=size.rank,
        lora_alpha=size.rank,
        target_modules=[module_path(layer.name, size.layout.unet)[1] for layer in layers],
    )
    inject_adapter_in_model(config, unet)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def lycoris(*, bypass: bool) -> Callable[[UNet2DConditionModel, Size, list[Layer]], list[nn.Parameter]]:
    def put(unet: UNet2DConditionModel, size: Size, layers: list[Layer]) -> list[nn.Parameter]:
        logging.disable(logging.WARNING)
        from lycoris import LycorisNetwork

        unet.requires_grad_(False)
        names = [module_path(layer.name, size.layout.unet)[1] for layer in layers]
        LycorisNetwork.apply_preset({"target_module": [], "target_name": names, "enable_conv": True})
        network = LycorisNetwork(
            unet,
            lora_dim=size.rank,
            alpha=size.rank,
            conv_lora_dim=size.rank,
            conv_alpha=size.rank,
            network_module="locon",
            bypass_mode=bypass,
        )
        assert len(network.loras) == len(layers), f"{len(network.loras)} of {len(layers)} modules"
        network.apply_to()
        unet.lycoris = network
        return list(network.parameters())

    return put


VARIANTS: dict[str, Callable[[UNet2DConditionModel, Size, list[Layer]], list[nn.Parameter]]] = {
    "spectune, delta form": ours("delta"),
    "spectune, residual form": ours("residual"),
    "PEFT LoRA": peft,
    "LyCORIS LoCon": lycoris(bypass=False),
    "LyCORIS LoCon, bypass_mode": lycoris(bypass=True),
}


@dataclass(frozen=True)
class Measured:
    seconds: list[float]
    peak_bytes: int  # of the process
    ready_bytes: int  # before the first step
    trained: int


def measure(variant: str, size: Size, *, checkpointing: bool, steps: int) -> Measured:
    torch.manual_seed(0)
    unet = new_unet(size.layout.unet).train()
    layers = unet_layers(size.layout)
    trained = VARIANTS[variant](unet, size, layers)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    shape = size.layout.unet
    x = torch.randn(size.batch, 4, size.latents, size.latents)
    text, pooled = torch.randn(size.batch, 77, shape.context), torch.randn(size.batch, shape.pooled)
    added = {"text_embeds": pooled, "time_ids": torch.full((size.batch, 6), 512.0)}
    times = torch.randint(0, 1000, (size.batch,))
    ready, seconds = peak_memory(), []
    for _ in range(steps):
        began = time.perf_counter()
        output: Tensor = unet(x, times, text, added_cond_kwargs=added).sample
        (output - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return Measured(seconds[1:], peak_memory(), ready, sum(p.numel() for p in trained))


def in_own_process(variant: str, size: str, *, checkpointing: bool, steps: int) -> Measured:
    command = [sys.executable, __file__, "--variant", variant, "--sizes", size, "--steps", str(steps)]
    done = subprocess.run(
        [*command, *(["--checkpointing"] if checkpointing else [])],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{variant} failed:\n{done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def table(size: str, *, checkpointing: bool, steps: int, rounds: int) -> None:
    results: dict[str, list[Measured]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            result = in_own_process(variant, size, checkpointing=checkpointing, steps=steps)
            results[variant].append(result)
    setup = SIZES[size]()
    mode = f"{'with' if checkpointing else 'without'} gradient checkpointing"
    shape = f"batch {setup.batch}, {setup.latents}x{setup.latents} latents, rank {setup.rank}"
    print(f"\n{size}: {shape}, {mode}, medians of {rounds}x{steps - 1} steps\n")
    print("| variant | trained | s/step | vs. PEFT | peak memory | vs. PEFT |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    seconds = {v: statistics.median([s for one in m for s in one.seconds]) for v, m in results.items()}
    peaks = {v: statistics.median([one.peak_bytes for one in m]) for v, m in results.items()}
    for variant, measured in results.items():
        print(
            f"| {variant} | {measured[0].trained / 1e6:.2f} M | {seconds[variant]:.3f} "
            f"| {seconds[variant] / seconds['PEFT LoRA']:.2f} | {peaks[variant] / 1e9:.2f} GB "
            f"| {peaks[variant] / peaks['PEFT LoRA']:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        size = SIZES[args.sizes[0]]()
        print(
            json.dumps(
                asdict(measure(args.variant, size, checkpointing=args.checkpointing, steps=args.steps))
            )
        )
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for size in args.sizes:
        for checkpointing in (False, True):
            table(size, checkpointing=checkpointing, steps=args.steps, rounds=args.rounds)


if __name__ == "__main__":
    main()

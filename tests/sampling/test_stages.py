"""Drawing in stages: which networks are on the device, that the pictures stay the same, and the memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spectune.files.source import MemorySource, TensorInfo
from spectune.model.network import Sdxl, TextStates, build_model, denoising_bytes
from spectune.model.offload import Network, Offload, StagedModel
from spectune.model.text import TokenIds
from spectune.model.vae.fitting import decoding_bytes
from spectune.ops.drawing import models
from spectune.ops.drawing.models import draw, sample_settings
from spectune.ops.drawing.specs import ModelSpec
from spectune.ops.options.pictures import DrawingOptions
from spectune.sampling.generate import Request, SampleSettings
from spectune.sampling.stages import draw_in_stages, drawing_bytes
from spectune.sdxl.inference import layout_of
from spectune.training.denoiser import encode_captions
from spectune.training.memory.account import CONTEXT_BYTES, FRAGMENTED_SHARE
from spectune.training.memory.live_bytes import LiveBytes, attention_of_gpus
from spectune.training.memory.meta_model import META, empty_model

REQUESTS = [Request("a cat", 1), Request("a dog", 2), Request("a cat", 3)]
SETTINGS = SampleSettings(width=32, height=32, steps=2, cfg=3.0, batch=2)


class Stages(Offload):
    """Networks that only record when they are at work."""

    def __init__(self) -> None:
        super().__init__({"text": (), "unet": (), "vae": ()}, working=torch.device("cpu"))
        self.events: list[tuple[str, Network]] = []
        self.park()
        self.events.clear()

    def _move(self, network: Network, device: torch.device) -> None:
        leaves = self._users[network] == 0
        self.events.append(("leaves" if leaves else "comes", network))


def test_one_network_is_on_the_device_at_a_time(source: MemorySource) -> None:
    model, stages = build_model(source), Stages()
    pictures = draw_in_stages(StagedModel(model, networks=stages), REQUESTS, SETTINGS)
    assert stages.events == [
        (verb, network) for network in ("text", "unet", "vae") for verb in ("comes", "leaves")
    ]
    for picture, other in zip(pictures, draw_in_stages(StagedModel(model), REQUESTS, SETTINGS), strict=True):
        assert picture.tobytes() == other.tobytes()


def test_cached_captions_need_no_text_encoder(source: MemorySource) -> None:
    model, stages = build_model(source), Stages()
    encoded = encode_captions(model, {"a cat", "a dog", ""})
    pictures = draw_in_stages(StagedModel(model, networks=stages, encoded=encoded), REQUESTS, SETTINGS)
    assert {network for _, network in stages.events} == {"unet", "vae"}
    plain = draw_in_stages(StagedModel(model), REQUESTS, SETTINGS)
    for picture, other in zip(pictures, plain, strict=True):
        # other batches of captions are rounded differently
        assert np.abs(np.asarray(picture, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
    stages.events.clear()
    draw_in_stages(StagedModel(model, networks=stages, encoded=encoded), [Request("a bird", 1)], SETTINGS)
    assert ("comes", "text") in stages.events


def test_a_model_that_does_not_fit_stays_in_main_memory(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DrawingOptions(size="32", steps=2, notify=lambda text: None)
    settings, spec = sample_settings(options), ModelSpec(tiny_checkpoint, ())
    (plain,) = draw(spec, ["a cat"], options, settings)
    moved: list[Network] = []
    monkeypatch.setattr(models, "fits", lambda nbytes, device: False)
    monkeypatch.setattr(Offload, "_move", lambda self, network, device: moved.append(network))
    (staged,) = draw(spec, ["a cat"], options, settings)
    assert plain.tobytes() == staged.tobytes()
    # parked when loaded, then each comes and leaves
    assert moved == ["text", "unet", "vae", "text", "text", "unet", "unet", "vae", "vae"]


def peak_bytes(networks: tuple[nn.Module, ...], work: object) -> int:
    """Return the bytes of networks and the peak of what they compute, on the meta device."""
    tensors = [tensor for module in networks for tensor in (*module.parameters(), *module.buffers())]
    assert callable(work)
    with torch.no_grad(), attention_of_gpus(), LiveBytes(tensors) as counter:
        work()
    return sum(tensor.nbytes for tensor in tensors) + counter.peak


@pytest.mark.slow
def test_full_sdxl_draws_at_1024_px_within_8_gb(full_infos: Mapping[str, TensorInfo]) -> None:
    """Count four guided pictures of 1024 px: the default batch of `sample`."""
    model: Sdxl = empty_model(layout_of(full_infos), torch.bfloat16)
    rows = 8
    ids = torch.zeros(rows, 77, dtype=torch.long, device=META)
    context = torch.empty(rows, 77, 2048, dtype=torch.bfloat16, device=META)
    text = TextStates(context, torch.empty(rows, 1280, dtype=torch.bfloat16, device=META))
    latents = torch.empty(rows, 4, 128, 128, dtype=torch.bfloat16, device=META)
    times, sizes = torch.zeros(rows, device=META), torch.zeros(rows, 6, device=META)
    encoding = peak_bytes((model.te1, model.te2), lambda: model.encode_text(TokenIds(ids, ids)))
    sampling = peak_bytes((model.unet,), lambda: model.denoise(latents, times, text, sizes))
    assert model.vae is not None
    assert model.layout.vae is not None
    decoding = sum(tensor.nbytes for tensor in model.vae.parameters())
    decoding += decoding_bytes(model.layout.vae, 1024 * 1024)  # counted in tests/model/vae/test_fitting.py
    assert encoding == pytest.approx(1.70e9, rel=0.01)
    assert sampling == pytest.approx(6.46e9, rel=0.01)
    assert decoding == pytest.approx(3.56e9, rel=0.01)
    required = max(encoding, sampling, decoding) * (1 + FRAGMENTED_SHARE) + CONTEXT_BYTES
    assert required < 8e9

    unet = sum(tensor.nbytes for tensor in (*model.unet.parameters(), *model.unet.buffers()))
    formula = denoising_bytes(model.layout.unet, rows * 128 * 128, itemsize=2)
    assert sampling - unet == pytest.approx(formula, rel=0.05)
    full = MemorySource({i.name: torch.empty(i.shape, device=META) for i in full_infos.values()}, {})
    together = drawing_bytes(full, SampleSettings(), torch.bfloat16)
    assert together == pytest.approx(5.13e9 + 1.64e9 + 0.33e9 + 3.22e9, rel=0.01), "too large for 8 GB"

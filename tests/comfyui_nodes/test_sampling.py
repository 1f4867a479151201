"""Test the node Flow Sampling From File."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune.files.provenance import Provenance
from tests.comfyui_nodes.conftest import BASE
from tests.comfyui_nodes.fakes import CONST, EDM, EPS, V_PREDICTION, Comfy, Patcher, SampledEps, SampledV

NAME = "declaring.safetensors"


def declaring_file(comfy: Comfy, **provenance: Any) -> str:
    """Write a file with this provenance and return its name in the list of both kinds."""
    metadata = Provenance(**provenance).to_metadata()
    save_file({"lora_unet_x.alpha": torch.ones(1)}, comfy.folders["loras"] / NAME, metadata=metadata)
    return f"loras/{NAME}"


def run(comfy: Comfy, file: str, model: Patcher | None = None, **more: Any) -> tuple[Any, str]:
    model = model or Patcher({}, SampledEps())
    patched, text = comfy.run("SpectuneSampling", model=model, file=file, **more)
    assert model.object_patches == {}, "the input model was changed"
    return patched.get_model_object("model_sampling"), text


def test_flow_is_set_with_the_declared_shift(comfy: Comfy) -> None:
    sampling, text = run(comfy, declaring_file(comfy, prediction="flow", flow_shift=2.5))
    assert isinstance(sampling, CONST)
    assert (sampling.shift, sampling.multiplier, text) == (2.5, 1000, "flow, shift 2.5")
    assert float(sampling.sigmas[499]) == pytest.approx(2.5 * 0.5 / 1.75)


def test_a_tuned_adapter_declares_its_prediction(comfy: Comfy, tuned_file: Path) -> None:
    shutil.copy(tuned_file, comfy.folders["loras"] / NAME)
    assert run(comfy, f"loras/{NAME}")[1] == "flow, shift 2.5"


def test_inputs_override_the_file(comfy: Comfy) -> None:
    assert run(comfy, declaring_file(comfy, prediction="flow", flow_shift=2.5), shift=4.0)[0].shift == 4.0
    sampling, text = run(comfy, declaring_file(comfy, prediction="eps"), prediction="flow", shift=3.0)
    assert (sampling.shift, text) == (3.0, "flow, shift 3")
    assert run(comfy, declaring_file(comfy, prediction="flow", flow_shift=2.5), prediction="v")[1] == "v"


@pytest.mark.parametrize(
    ("schedule", "zero", "text"), [("zero_terminal_snr", True, "v, zero terminal SNR"), ("sdxl", False, "v")]
)
def test_v_is_set_with_the_declared_schedule(comfy: Comfy, schedule: Any, zero: bool, text: str) -> None:
    sampling, shown = run(comfy, declaring_file(comfy, prediction="v", noise_schedule=schedule))
    assert isinstance(sampling, V_PREDICTION)
    assert (sampling.zsnr, shown) == (zero, text)


def test_marker_tensors_of_a_checkpoint_are_read(comfy: Comfy) -> None:
    tensors = load_file(comfy.folders["checkpoints"] / BASE)
    marked = tensors | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    save_file(marked, comfy.folders["checkpoints"] / "v.safetensors")
    assert run(comfy, "checkpoints/v.safetensors")[1] == "v, zero terminal SNR"


def test_eps_does_not_change_the_model(comfy: Comfy) -> None:
    model = Patcher({}, SampledEps())
    patched, text = comfy.run("SpectuneSampling", model=model, file=declaring_file(comfy, prediction="eps"))
    assert patched is model
    assert text == "eps (unchanged)"


def test_eps_is_set_on_a_model_sampled_as_v(comfy: Comfy) -> None:
    sampling, text = run(comfy, declaring_file(comfy, prediction="eps"), Patcher({}, SampledV()))
    assert isinstance(sampling, EPS)
    assert not isinstance(sampling, V_PREDICTION)
    assert text == "eps"
    zero = declaring_file(comfy, prediction="eps", noise_schedule="zero_terminal_snr")
    assert run(comfy, zero)[0].zsnr


def test_a_file_without_declaration_is_an_error(comfy: Comfy) -> None:
    with pytest.raises(RuntimeError, match="does not declare its prediction type\nhint: set prediction"):
        run(comfy, f"checkpoints/{BASE}")
    with pytest.raises(RuntimeError, match="does not declare its flow shift\nhint: set shift"):
        run(comfy, f"checkpoints/{BASE}", prediction="flow")


def test_other_sampling_types_are_not_recognized(comfy: Comfy) -> None:
    sampled_as = comfy.nodes.nodes_sampling.sampled_as
    assert sampled_as(Patcher({}, SampledV())) == "v"
    assert sampled_as(Patcher({}, EDM())) is None
    assert sampled_as(Patcher({}, object())) is None


def test_the_latents_of_a_file_are_set(comfy: Comfy) -> None:
    file = declaring_file(comfy, prediction="flow", flow_shift=2.5, vae_scale=0.5, vae_shift=0.1)
    model = Patcher({"diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 16, 3, 3)}, SampledEps())
    patched, text = comfy.run("SpectuneSampling", model=model, file=file)
    assert text == "flow, shift 2.5; 16 latent channels, scale 0.5, shift 0.1"
    latents: Any = patched.object_patches["latent_format"]
    assert (latents.latent_channels, patched.object_patches["concat_keys"]) == (16, ())
    assert latents.process_in(torch.tensor(1.1)).item() == pytest.approx(0.5)
    assert latents.process_out(torch.tensor(0.5)).item() == pytest.approx(1.1)
    usual = declaring_file(comfy, prediction="eps", vae_scale=0.1406, vae_shift=-0.4743)
    patched, text = comfy.run("SpectuneSampling", model=Patcher({}, SampledEps()), file=usual)
    assert text == "eps (unchanged); 4 latent channels, scale 0.1406, shift -0.4743"
    assert patched.object_patches.keys() == {"latent_format"}

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from safetensors import safe_open
from torch import Tensor

from spectune.checkpoints.diffusers_folder.config import Schedule
from spectune.checkpoints.diffusers_folder.small_files import small_files
from spectune.checkpoints.diffusers_folder.writer import FolderWriter
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.source import MemorySource, TensorInfo, WeightSource
from spectune.files.weights_hash import WeightsHasher, weights_hash
from spectune.files.writer import write_tensors
from spectune.sdxl.layout import hints_metadata
from tests.cli.test_full_layout import NARROW
from tests.layouts import FULL, TINY, Modules, build_modules
from tests.pipelines import edit_json, infos_of, loaded, same_bits

EXTRAS = "single_file_extras.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
TE1 = "text_encoder/model.safetensors"
PARTS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2", "vae": "vae"}


def write(source: WeightSource, path: Path, **options: object) -> str:
    """Write all tensors of a source in shuffled order, and return the hash of the writer."""
    with FolderWriter(path, infos_of(source), metadata=source.metadata, **options) as writer:  # type: ignore[arg-type]
        for name in sorted(source.tensors, key=lambda name: name[::-1]):
            writer.write(name, source.load(name))
    return writer.hash


def check_round_trip(source: WeightSource, path: Path) -> None:
    """Check that a written folder has the tensors of the source, by bits and by hash."""
    written = write(source, path)
    with open_checkpoint(path) as again:
        assert set(again.tensors) == set(source.tensors)
        for name in source.tensors:
            assert same_bits(again.load(name), source.load(name)), name
        assert written == weights_hash(source) == weights_hash(again)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_single_file_round_trips_through_a_folder(source: MemorySource, tmp_path: Path) -> None:
    check_round_trip(source, tmp_path / "xl")
    with open_checkpoint(tmp_path / "xl") as folder:
        back = tmp_path / "back.safetensors"
        write_tensors(back, {name: folder.load(name) for name in folder.tensors}, metadata=folder.metadata)
    with open_checkpoint(back) as single:
        assert all(same_bits(single.load(name), source.load(name)) for name in source.tensors)
        assert dict(single.metadata) == {**source.metadata, "spectune.prediction": "eps", "format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "xl"]


def test_a_folder_round_trips_through_a_single_file(tiny_folder: Path, tmp_path: Path) -> None:
    with open_checkpoint(tiny_folder) as folder:
        values = {name: folder.load(name) for name in folder.tensors}
        write(MemorySource(values, folder.metadata), tmp_path / "xl", template=tiny_folder)
    assert files_of(tmp_path / "xl") == files_of(tiny_folder)
    for name in files_of(tiny_folder):
        before, after = tiny_folder / name, tmp_path / "xl" / name
        if not name.endswith(".safetensors"):
            assert after.read_bytes() == before.read_bytes(), name
            continue
        with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
            assert new.metadata()["format"] == "pt"
            # The first encoder's keys have the prefix `text_model.`, which all versions of transformers read.
            assert all("text_model." in key for key in new.keys()) or name != TE1  # noqa: SIM118
            keys = {key.removeprefix("text_model."): key for key in new.keys()}  # noqa: SIM118
            assert {key.removeprefix("text_model.") for key in old.keys()} == keys.keys()  # noqa: SIM118
            for key in old.keys():  # noqa: SIM118
                there = keys[key.removeprefix("text_model.")]
                assert same_bits(old.get_tensor(key), new.get_tensor(there)), key


def test_diffusers_and_transformers_load_the_same_weights(
    source: MemorySource, tiny_modules: Modules, tmp_path: Path
) -> None:
    write(source, tmp_path / "xl")
    for part, state in tiny_modules.states().items():
        module = loaded(tmp_path / "xl", PARTS[part])
        weights = module.state_dict()
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[key].float(), state[key]) for key in state), part


def test_a_pipeline_of_the_written_folder_generates_the_same_image(
    tiny_folder: Path, tiny_modules: Modules, tmp_path: Path
) -> None:
    write(MemorySource(tiny_modules.single_file(), hints_metadata(TINY)), tmp_path / "xl")

    def picture(folder: Path) -> Tensor:
        pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.tokenizer("a cat")["input_ids"] == [49406, 320, 2368, 49407]
        padded = pipeline.tokenizer_2("a cat", padding="max_length", max_length=6)["input_ids"]
        assert padded == [49406, 320, 2368, 49407, 0, 0]
        images = pipeline(
            "a cat",
            num_inference_steps=3,
            height=32,
            width=32,
            output_type="pt",
            generator=torch.Generator().manual_seed(1),
        ).images
        assert isinstance(images, Tensor)
        return images

    edit_ours = tmp_path / "xl/scheduler/scheduler_config.json"
    edit_ours.write_bytes((tiny_folder / SCHEDULER).read_bytes())
    assert torch.equal(picture(tmp_path / "xl"), picture(tiny_folder))


POSITIONS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
TEMPERATURE = "conditioner.embedders.1.model.logit_scale"
MATRIX = "first_stage_model.decoder.mid.attn_1.k.weight"
CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "nothing": lambda t: t,
    "no positions": lambda t: {name: tensor for name, tensor in t.items() if name != POSITIONS},
    "other positions": lambda t: t | {POSITIONS: t[POSITIONS].half()},
    "other temperature": lambda t: t | {TEMPERATURE: torch.tensor(4.5).half()},
    "matrices": lambda t: t | {MATRIX: t[MATRIX].flatten(1)},
    "markers": lambda t: t | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)},
    "unknown": lambda t: t | {"model_ema.decay": torch.tensor(0.999)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_belong_to_no_module_round_trip(
    change: str, source: MemorySource, tmp_path: Path
) -> None:
    tensors = CHANGES[change](dict(source.values))
    check_round_trip(MemorySource(tensors, source.metadata), tmp_path / "xl")
    # The markers follow from the scheduler's configuration.
    assert (tmp_path / "xl" / EXTRAS).exists() == (change not in ("nothing", "markers"))
    loaded(tmp_path / "xl", "text_encoder")
    loaded(tmp_path / "xl", "vae")


def test_a_changed_tensor_is_detected(source: MemorySource, tmp_path: Path) -> None:
    write(source, tmp_path / "xl")
    changed = {**source.values}
    name = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"
    changed[name] = changed[name].clone()
    changed[name][30] += 0.01
    with open_checkpoint(tmp_path / "xl") as folder:
        assert same_bits(folder.load(name), source.values[name])
        assert not same_bits(folder.load(name), changed[name])
    assert weights_hash(source) != weights_hash(MemorySource(changed, {}))


def test_a_model_of_the_full_depth_round_trips(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = build_modules(NARROW)
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in modules.single_file().items()}
    assert len(tensors) == 2515
    check_round_trip(MemorySource(tensors, hints_metadata(NARROW)), tmp_path / "xl")
    for part, state in modules.states().items():
        weights = loaded(tmp_path / "xl", PARTS[part]).state_dict()
        assert all(torch.equal(weights[key], state[key].half()) for key in state), part
    # A vocabulary of 64 words is not CLIP's.
    assert json.loads((tmp_path / "xl/model_index.json").read_text())["tokenizer"] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_other_storage_dtypes_round_trip(dtype: torch.dtype, source: MemorySource, tmp_path: Path) -> None:
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in source.values.items()}
    check_round_trip(MemorySource(tensors, source.metadata), tmp_path / "xl")
    assert not (tmp_path / "xl" / EXTRAS).exists()


def test_a_model_without_a_vae_round_trips(source: MemorySource, tiny_folder: Path, tmp_path: Path) -> None:
    tensors = {n: t for n, t in source.values.items() if not n.startswith("first_stage_model.")}
    metadata = hints_metadata(replace(TINY, vae=None))
    check_round_trip(MemorySource(tensors, metadata), tmp_path / "xl")
    write(MemorySource(tensors, metadata), tmp_path / "of-template", template=tiny_folder)
    for folder in (tmp_path / "xl", tmp_path / "of-template"):
        assert json.loads((folder / "model_index.json").read_text())["vae"] == [None, None]
        assert not (folder / "vae").exists()


def index_and_scheduler(folder: Path) -> tuple[str, dict[str, object]]:
    kind = json.loads((folder / "model_index.json").read_text())["scheduler"][1]
    config = json.loads((folder / SCHEDULER).read_text())
    assert config["_class_name"] == kind
    return kind, config


@pytest.mark.parametrize("with_template", [False, True])
def test_the_prediction_is_written_to_the_scheduler(
    with_template: bool, source: MemorySource, tiny_folder: Path, tmp_path: Path
) -> None:
    template = tiny_folder if with_template else None
    for prediction, word in (("eps", "epsilon"), ("v", "v_prediction")):
        model = MemorySource(source.values, {**source.metadata, "spectune.prediction": prediction})
        write(model, tmp_path / prediction, template=template)
        kind, config = index_and_scheduler(tmp_path / prediction)
        assert (kind, config["prediction_type"]) == ("EulerDiscreteScheduler", word)
        with open_checkpoint(tmp_path / prediction) as folder:
            assert folder.metadata["spectune.prediction"] == prediction


def test_zero_snr_is_taken_from_the_template_or_the_marker(
    source: MemorySource, folder: Path, tmp_path: Path
) -> None:
    edit_json(folder / SCHEDULER, rescale_betas_zero_snr=True)
    write(source, tmp_path / "of-template", template=folder)
    assert (tmp_path / "of-template" / SCHEDULER).read_bytes() == (folder / SCHEDULER).read_bytes()
    with open_checkpoint(tmp_path / "of-template") as again:
        assert weights_hash(again) == weights_hash(source)
    marked = MemorySource({**source.values, "ztsnr": torch.empty(0)}, source.metadata)
    write(marked, tmp_path / "marked")
    config = index_and_scheduler(tmp_path / "marked")[1]
    assert (config["rescale_betas_zero_snr"], config["timestep_spacing"]) == (True, "trailing")


@pytest.mark.parametrize("with_template", [False, True])
def test_the_scheduler_of_a_flow_folder_follows_the_straight_path(
    with_template: bool, source: MemorySource, tiny_folder: Path, tmp_path: Path
) -> None:
    entries = {"spectune.prediction": "flow", "spectune.flow_shift": "2.5"}
    model = MemorySource(source.values, {**source.metadata, **entries})
    write(model, tmp_path / "flow", template=tiny_folder if with_template else None)
    assert index_and_scheduler(tmp_path / "flow")[0] == "DPMSolverMultistepScheduler"
    with open_checkpoint(tmp_path / "flow") as folder:
        assert {key: folder.metadata[key] for key in entries} == entries
    write(model, tmp_path / "again", template=tmp_path / "flow")
    assert index_and_scheduler(tmp_path / "again") == index_and_scheduler(tmp_path / "flow")
    scheduler: Any = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "flow", subfolder="scheduler")
    scheduler.set_timesteps(8)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    assert (scheduler.init_noise_sigma, float(scheduler.sigmas[0])) == (1.0, pytest.approx(0.9996, abs=1e-4))
    latents = noise
    for n, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[n])
        assert float(timestep) == int(1000 * sigma)
        on_path = (1 - sigma) * clean + sigma * noise
        assert torch.allclose(latents, on_path, atol=1e-5 if n else 1e-2)
        latents = scheduler.step(noise - clean, timestep, on_path).prev_sample
    assert torch.allclose(latents, clean, atol=1e-5)


def test_metadata_added_later_reaches_the_configurations(source: MemorySource, tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "xl", infos_of(source), metadata=source.metadata) as writer:
        for name in source.tensors:
            writer.write(name, source.load(name))
        writer.metadata.update({"spectune.vae_scale": "0.1406", "spectune.vae_shift": "-0.4743"})
        writer.metadata["late"] = "1" * 5000
    vae = json.loads((tmp_path / "xl/vae/config.json").read_text())
    assert (vae["scaling_factor"], vae["shift_factor"]) == (0.1406, -0.4743)
    with open_checkpoint(tmp_path / "xl") as folder:
        assert folder.metadata["late"] == "1" * 5000


def test_only_the_small_files_of_a_template_are_copied(
    source: MemorySource, folder: Path, tmp_path: Path
) -> None:
    edit_json(folder / "unet/config.json", sample_size=64)
    edit_json(folder / SCHEDULER, timestep_spacing="trailing")
    (folder / "tokenizer/added.json").write_text("{}")
    (folder / "LICENSE.md").write_text("free")
    (folder / "README.md").write_text("of another model")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_text("weights")
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    model = MemorySource(source.values, {**source.metadata, "spectune.prediction": "v"})
    write(model, tmp_path / "xl", template=folder)
    changed = [
        name
        for name in sorted(files_of(folder) & files_of(tmp_path / "xl"))
        if not name.endswith(".safetensors")
        and (folder / name).read_bytes() != (tmp_path / "xl" / name).read_bytes()
    ]
    assert changed == [SCHEDULER]
    assert index_and_scheduler(tmp_path / "xl")[1]["timestep_spacing"] == "trailing"
    assert files_of(folder) - files_of(tmp_path / "xl") == {
        "README.md",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    }


def test_missing_files_of_a_template_are_created(source: MemorySource, folder: Path, tmp_path: Path) -> None:
    for name in ("vae", "tokenizer_2", "scheduler"):
        shutil.rmtree(folder / name)
    edit_json(folder / "model_index.json", vae=[None, None], tokenizer_2=[None, None])
    write(source, tmp_path / "xl", template=folder)
    index = json.loads((tmp_path / "xl/model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["tokenizer_2"] == ["transformers", "CLIPTokenizer"]
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl").vae.config["scaling_factor"] == 0.13025


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("unet", {"block_out_channels": [16, 16, 64]}, "block_out_channels is [16, 16, 64], expected"),
        ("unet", {"attention_head_dim": 8}, "attention_head_dim is [8, 8], expected [2, 4]"),
        ("unet", {"transformer_layers_per_block": [1, 1, 3]}, "transformer_layers_per_block is [1, 3]"),
        ("text_encoder", {"num_attention_heads": 4}, "num_attention_heads is 4, expected 2"),
        ("text_encoder_2", {"hidden_size": 32}, "hidden_size is 32, expected 24"),
        ("vae", {"latent_channels": 16}, "latent_channels is 16, expected 4"),
    ],
)
def test_a_template_of_another_model_is_refused(
    file: str, changes: dict[str, object], expected: str, source: MemorySource, folder: Path, tmp_path: Path
) -> None:
    edit_json(folder / file / "config.json", **changes)
    with pytest.raises(InputError) as caught:
        write(source, tmp_path / "xl", template=folder)
    assert f"{file}/config.json of the template belongs to another model: {expected}" in caught.value.what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-xl"]


def test_levels_without_transformers_are_not_compared(
    source: MemorySource, folder: Path, tmp_path: Path
) -> None:
    edit_json(
        folder / "unet/config.json", transformer_layers_per_block=[0, 1, 2], attention_head_dim=[7, 2, 4]
    )
    write(source, tmp_path / "xl", template=folder)


def test_folders_that_cannot_be_templates_are_refused(
    source: MemorySource, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"is not a diffusers folder: it has no model_index\.json"):
        write(source, tmp_path / "xl", template=tmp_path)
    edit_json(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    with pytest.raises(InputError, match="has components that SDXL does not have: image_encoder"):
        write(source, tmp_path / "xl", template=folder)


def test_the_configurations_of_the_full_model() -> None:
    files = small_files(FULL, Schedule("eps"))
    unet, vae = json.loads(files["unet/config.json"]), json.loads(files["vae/config.json"])
    # The values of stabilityai/stable-diffusion-xl-base-1.0.
    assert unet["attention_head_dim"] == [5, 10, 20]
    assert unet["transformer_layers_per_block"] == [1, 2, 10]
    assert (unet["projection_class_embeddings_input_dim"], unet["addition_time_embed_dim"]) == (2816, 256)
    assert (unet["sample_size"], unet["cross_attention_dim"]) == (128, 2048)
    assert (vae["scaling_factor"], vae["block_out_channels"]) == (0.13025, [128, 256, 512, 512])
    te1, te2 = json.loads(files["text_encoder/config.json"]), json.loads(files["text_encoder_2/config.json"])
    assert (te1["hidden_act"], te1["num_attention_heads"], te1["projection_dim"]) == ("quick_gelu", 12, 768)
    assert (te2["hidden_act"], te2["num_attention_heads"], te2["projection_dim"]) == ("gelu", 20, 1280)
    scheduler = json.loads(files[SCHEDULER])
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)


def test_a_unet_that_diffusers_cannot_describe_is_refused() -> None:
    uneven = replace(FULL, unet=replace(FULL.unet, mid_depth=4))
    with pytest.raises(InputError, match="its middle has 4 transformer blocks, its deepest level 10"):
        small_files(uneven, Schedule())
    bare = replace(FULL, unet=replace(FULL.unet, depths=(0, 2, 0), mid_depth=4))
    unet = json.loads(small_files(bare, Schedule())["unet/config.json"])
    assert unet["transformer_layers_per_block"] == [1, 2, 4]


def test_other_models_are_refused_before_any_work(source: MemorySource, tmp_path: Path) -> None:
    spare = "model.diffusion_model.adapter.weight"
    infos = [*infos_of(source), TensorInfo(spare, torch.float16, (1,))]
    with pytest.raises(InputError, match=re.escape(f"without a counterpart in the unet: {spare}")):
        FolderWriter(tmp_path / "xl", infos, metadata=source.metadata)
    with pytest.raises(InputError, match="is not an SDXL checkpoint"):
        FolderWriter(tmp_path / "xl", [TensorInfo("a", torch.float16, (1,))])
    huge = [TensorInfo("a", torch.float32, (1 << 60,))]
    with pytest.raises(InputError, match=r"xl needs [\d.,]+ MB: .* MB free"):
        FolderWriter(tmp_path / "xl", huge)
    with pytest.raises(InputError, match="there is no folder"):
        FolderWriter(tmp_path / "none/xl", infos)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_nothing(source: MemorySource, tmp_path: Path) -> None:
    first = next(iter(source.tensors))
    writer = FolderWriter(tmp_path / "xl", infos_of(source), metadata=source.metadata)
    with pytest.raises(KeyboardInterrupt), writer:
        stop_after(writer, first, source.load(first))
    assert writer.waiting == source.tensors.keys() - {first}
    assert list(tmp_path.iterdir()) == []


def stop_after(writer: FolderWriter, name: str, tensor: Tensor) -> None:
    writer.write(name, tensor)
    assert not writer.path.exists()
    raise KeyboardInterrupt


def test_wrong_use_of_the_writer_fails_an_assertion(source: MemorySource, tmp_path: Path) -> None:
    first, second = list(source.tensors)[:2]
    writer = FolderWriter(tmp_path / "xl", infos_of(source), metadata=source.metadata)
    writer.write(first, source.load(first))
    with pytest.raises(AssertionError, match="is written twice"):
        writer.write(first, source.load(first))
    with pytest.raises(AssertionError, match=r"expected torch\.float16 .* got torch\.float32"):
        writer.write(second, source.load(second).float())
    missing = f"{len(source.tensors) - 1} tensors of xl were never written"
    with pytest.raises(AssertionError, match=missing), writer:
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_needs_force_and_must_be_a_model(source: MemorySource, folder: Path) -> None:
    before = files_of(folder)
    with pytest.raises(InputError, match=re.escape(f"{folder} exists")):
        write(source, folder)
    (folder / "sd_xl_base_1.0.safetensors").write_text("precious")
    with pytest.raises(InputError) as caught:
        write(source, folder, force=True)
    assert caught.value.what == (
        f"{folder} contains files that do not belong to a diffusers model and would be deleted: "
        "sd_xl_base_1.0.safetensors"
    )
    (folder / "sd_xl_base_1.0.safetensors").unlink()
    (folder / "unet/old.json").write_text("{}")
    assert write(source, folder, force=True) == weights_hash(source)
    assert files_of(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["tiny-xl"]
    (folder.parent / "file").write_text("")
    with pytest.raises(InputError, match="is a file: expected the name of a folder"):
        write(source, folder.parent / "file", force=True)


def test_a_crash_keeps_the_previous_folder(source: MemorySource, folder: Path) -> None:
    before: Mapping[str, bytes] = {name: (folder / name).read_bytes() for name in files_of(folder)}
    with (
        pytest.raises(ZeroDivisionError),
        FolderWriter(folder, infos_of(source), metadata=source.metadata, force=True),
    ):
        raise ZeroDivisionError
    assert {name: (folder / name).read_bytes() for name in files_of(folder)} == before
    assert [path.name for path in folder.parent.iterdir()] == ["tiny-xl"]


def test_a_finished_folder_is_kept_if_it_cannot_be_renamed(
    source: MemorySource, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if path.is_dir() and path.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(
        InputError, match=r"cannot rename the finished folder .*: Permission denied"
    ) as caught:
        write(source, folder, force=True)
    monkeypatch.undo()
    (left,) = (path for path in folder.parent.iterdir() if path != folder)
    assert caught.value.hint == f"{left} is complete: rename it yourself"
    with open_checkpoint(left) as finished, open_checkpoint(folder) as before:
        assert weights_hash(finished) == weights_hash(source) != weights_hash(before)


def test_a_held_folder_appears_on_commit(source: MemorySource, tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "xl", infos_of(source), metadata=source.metadata, hold=True) as writer:
        for name in source.tensors:
            writer.write(name, source.load(name))
    assert writer.hash == weights_hash(source)
    assert not (tmp_path / "xl").exists()
    writer.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["xl"]
    writer.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["xl"]


def test_differing_tensors_are_counted_by_single_file_names(source: MemorySource, tmp_path: Path) -> None:
    other = WeightsHasher()
    with FolderWriter(tmp_path / "xl", infos_of(source), metadata=source.metadata) as writer:
        for n, name in enumerate(source.tensors):
            writer.write(name, source.load(name))
            other.add(name, source.load(name) + (1 if n < 3 else 0))
    assert writer.differing(other) == 3

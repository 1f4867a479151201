from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spectune.checkpoints.diffusers_folder.keys import state_key
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.source import MemorySource, TensorInfo
from spectune.files.weights_hash import weights_hash
from spectune.model.network import build_model
from spectune.ops.split import split
from spectune.sdxl.inference import infer_layout, layout_of, layout_of_modules
from spectune.sdxl.layout import NOT_SDXL
from tests.layouts import FULL, TINY, Modules, build_modules
from tests.pipelines import edit_json, edit_weights, same_bits

UNET = "unet/diffusion_pytorch_model.safetensors"
TE1 = "text_encoder/model.safetensors"
TE2 = "text_encoder_2/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def message(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    return caught.value.what


def check_same(folder: Path, tensors: dict[str, Tensor]) -> None:
    with open_checkpoint(folder) as source:
        assert set(source.tensors) == set(tensors)
        for name, tensor in tensors.items():
            assert same_bits(source.load(name), tensor), name
            info = source.tensors[name]
            assert (info.name, info.dtype, info.shape) == (name, tensor.dtype, tuple(tensor.shape))


def rename(path: Path, change: Callable[[str], str]) -> None:
    def all_names(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    edit_weights(path, all_names)


def test_a_folder_saved_by_diffusers_equals_the_single_file(folder: Path, tiny_modules: Modules) -> None:
    check_same(folder, tiny_modules.single_file())


def test_one_changed_weight_is_detected(folder: Path, tiny_modules: Modules) -> None:
    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["encoder.layers.1.self_attn.v_proj.bias"][3] += 1e-6

    edit_weights(folder / TE1, nudge)
    with pytest.raises(AssertionError, match=r"layers\.1\.self_attn\.v_proj\.bias"):
        check_same(folder, tiny_modules.single_file())


def test_layout_and_model_equal_those_of_the_single_file(folder: Path, tiny_modules: Modules) -> None:
    with open_checkpoint(folder) as source:
        assert infer_layout(source) == TINY
        model = build_model(source)
    parts = {"unet": model.unet, "te1": model.te1, "te2": model.te2, "vae": model.vae}
    for part, state in tiny_modules.states().items():
        module = parts[part]
        assert module is not None
        built = module.state_dict()
        assert built.keys() == state.keys()
        assert all(same_bits(built[key], state[key]) for key in state)


def test_the_weights_hash_equals_that_of_the_single_file(
    folder: Path, tiny_modules: Modules, tmp_path: Path
) -> None:
    expected = weights_hash(MemorySource(tiny_modules.single_file(), {}))
    with open_checkpoint(folder) as source:
        assert weights_hash(source) == expected
    assert split(folder, tmp_path / "split", with_residual=False).base_hash == expected


def test_label_and_paths_of_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (folder, folder / "model_index.json"):
        with open_checkpoint(path) as source:
            assert (source.path, source.label) == (folder, "tiny-xl")
            assert source.paths == (folder, folder / UNET, folder / TE1, folder / TE2, folder / VAE)
    monkeypatch.chdir(folder)
    with open_checkpoint(Path()) as source:
        assert source.label == "tiny-xl"


def test_files_are_closed_after_an_error(folder: Path) -> None:
    def still_open() -> list[str]:
        return [file.path for file in psutil.Process().open_files() if str(folder) in file.path]

    with open_checkpoint(folder) as source:
        assert len(still_open()) == len(source.paths) - 1
    assert still_open() == []
    (folder / VAE).unlink()
    message(folder)
    assert still_open() == []


def test_every_spelling_of_the_text_encoders_is_read(folder: Path, tiny_modules: Modules) -> None:
    rename(folder / TE1, lambda name: f"text_model.{name}")
    check_same(folder, tiny_modules.single_file())
    rename(folder / TE2, lambda name: name.removeprefix("text_model."))
    check_same(folder, tiny_modules.single_file())


def test_one_tensor_in_two_spellings_is_refused(folder: Path) -> None:
    edit_weights(
        folder / TE1,
        lambda tensors: tensors.update({"text_model.final_layer_norm.bias": torch.zeros(16)}),
    )
    assert "text_encoder/model.safetensors has final_layer_norm.bias twice" in message(folder)


def test_position_ids_of_old_versions_are_checked(folder: Path, tiny_modules: Modules) -> None:
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    edit_weights(folder / TE2, lambda tensors: tensors.update(positions))
    edit_weights(folder / TE1, lambda tensors: tensors.update({"embeddings.position_ids": torch.arange(77)}))
    check_same(folder, tiny_modules.single_file())
    positions["text_model.embeddings.position_ids"][0, 5] = 6
    edit_weights(folder / TE2, lambda tensors: tensors.update(positions))
    assert message(folder) == (
        "text_model.embeddings.position_ids of text_encoder_2/model.safetensors is not 0, 1, 2, ... "
        "as in every SDXL"
    )


def test_unused_tensors_get_their_single_file_names(folder: Path) -> None:
    edit_weights(folder / TE1, lambda tensors: tensors.update({"text_projection.weight": torch.ones(2, 2)}))
    edit_weights(folder / TE2, lambda tensors: tensors.update({"logit_scale": torch.tensor(4.5)}))
    with open_checkpoint(folder) as source:
        unused = source.load("conditioner.embedders.0.transformer.text_projection.weight")
        assert torch.equal(unused, torch.ones(2, 2))
        assert source.load("conditioner.embedders.1.model.logit_scale").item() == 4.5


def test_old_attention_names_of_the_vae_are_read(folder: Path, tiny_modules: Modules) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def spelled(name: str) -> str:
        for new, word in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{word}.")
        return name

    rename(folder / VAE, spelled)
    check_same(folder, tiny_modules.single_file())

    def as_convolutions(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if ".attentions." in name and tensors[name].ndim == 2:
                tensors[name] = tensors[name][:, :, None, None]

    edit_weights(folder / VAE, as_convolutions)
    check_same(folder, tiny_modules.single_file())
    assert state_key("vae", "decoder.mid_block.attentions.0.group_norm.bias").endswith("group_norm.bias")


def as_variant(path: Path, variant: str) -> Path:
    return path.rename(path.with_suffix(f".{variant}.safetensors"))


def test_full_weights_take_precedence_over_a_variant(folder: Path, tiny_modules: Modules) -> None:
    half = folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    half.write_bytes((folder / UNET).read_bytes())
    edit_weights(half, lambda tensors: tensors.update({k: t.half() * 2 for k, t in tensors.items()}))
    check_same(folder, tiny_modules.single_file())


def test_a_single_variant_is_read(folder: Path, tiny_modules: Modules) -> None:
    for name in (UNET, TE1, TE2, VAE):
        as_variant(folder / name, "fp16")
    check_same(folder, tiny_modules.single_file())
    other = folder / "unet/diffusion_pytorch_model.bf16.safetensors"
    other.write_bytes((folder / "unet/diffusion_pytorch_model.fp16.safetensors").read_bytes())
    assert message(folder) == (
        f"{folder / 'unet'} has several variants of its weights, but not the full weights: "
        "diffusion_pytorch_model.bf16.safetensors, diffusion_pytorch_model.fp16.safetensors"
    )


def test_duplicate_weights_are_refused(folder: Path) -> None:
    (folder / "text_encoder/diffusion_pytorch_model.safetensors").write_bytes((folder / TE1).read_bytes())
    assert message(folder) == (
        f"{folder / 'text_encoder'} has its weights twice: diffusion_pytorch_model.safetensors, "
        "model.safetensors"
    )


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_subfolders_are_read(variant: str | None, folder: Path, tiny_modules: Modules) -> None:
    (folder / UNET).unlink()
    (folder / TE2).unlink()
    tiny_modules.unet.save_pretrained(folder / "unet", max_shard_size="200KB", variant=variant)  # type: ignore[operator]
    tiny_modules.te2.save_pretrained(folder / "text_encoder_2", max_shard_size="2MB", variant=variant)  # type: ignore[operator]
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2
    check_same(folder, tiny_modules.single_file())
    if variant is not None:
        for path in (folder / "unet").glob("*.index.fp16.json"):
            path.rename(path.with_name("diffusion_pytorch_model.safetensors.fp16.index.json"))
        check_same(folder, tiny_modules.single_file())


def test_a_missing_shard_of_a_subfolder_is_named(folder: Path, tiny_modules: Modules) -> None:
    (folder / UNET).unlink()
    tiny_modules.unet.save_pretrained(folder / "unet", max_shard_size="200KB")  # type: ignore[operator]
    lost = sorted((folder / "unet").glob("*-of-*.safetensors"))[1]
    lost.unlink()
    assert message(folder).endswith(f"1 of them are not in its folder: {lost.name}")


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / TE1).rename(folder / "text_encoder/pytorch_model.bin")
    assert "spectune never opens pickles: pytorch_model.bin" in message(folder)


def test_a_subfolder_without_weights_is_refused(folder: Path) -> None:
    (folder / VAE).unlink()
    assert message(folder) == f"{folder / 'vae'} has no weights: expected diffusion_pytorch_model.safetensors"


def test_a_folder_without_a_vae_is_read(folder: Path, tiny_modules: Modules) -> None:
    (folder / "vae").rename(folder.parent / "elsewhere")
    tensors = tiny_modules.single_file()
    check_same(folder, {n: t for n, t in tensors.items() if not n.startswith("first_stage_model.")})


def test_a_missing_part_is_named(folder: Path) -> None:
    (folder / "text_encoder_2").rename(folder.parent / "elsewhere")
    edit_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(InputError, match=r"has no text_encoder_2/; .* declares StableDiffusionP") as caught:
        open_checkpoint(folder)
    assert caught.value.hint == NOT_SDXL


@pytest.mark.parametrize("name", [UNET, TE1, TE2, VAE])
def test_a_surplus_tensor_is_named(name: str, folder: Path) -> None:
    edit_weights(folder / name, lambda tensors: tensors.update({"adapter.0.weight": torch.zeros(1)}))
    assert (
        message(folder)
        == f"{name} has 1 tensor without a counterpart in a single-file SDXL: adapter.0.weight"
    )


def test_a_missing_tensor(folder: Path) -> None:
    edit_weights(folder / TE2, lambda tensors: tensors.pop("text_model.encoder.layers.1.mlp.fc2.bias"))
    assert message(folder).endswith(
        "tensors are missing in text_encoder_2/model.safetensors: text_model.encoder.layers.1.mlp.fc2.bias"
    )
    edit_weights(folder / UNET, lambda tensors: tensors.pop("conv_in.weight"))
    assert message(folder) == f"{UNET} is not an SDXL checkpoint: no conv_in.weight"


def test_wrong_shapes_are_refused(folder: Path) -> None:
    name = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    edit_weights(folder / TE2, lambda tensors: tensors.update({name: tensors[name][:23]}))
    assert message(folder) == (
        f"{name} of text_encoder_2/model.safetensors does not fit into "
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight: "
        "expected torch.float32 (24, 24), got torch.float32 (23, 24)"
    )
    edit_weights(folder / UNET, lambda tensors: tensors.update({"conv_in.weight": torch.zeros(16, 4)}))
    assert message(folder).endswith("conv_in.weight has shape (16, 4), expected 4 axes")


def test_mixed_dtypes_of_a_fused_tensor_are_refused(folder: Path) -> None:
    name = "text_model.encoder.layers.0.self_attn.v_proj.bias"
    edit_weights(folder / TE2, lambda tensors: tensors.update({name: tensors[name].half()}))
    assert message(folder).endswith("expected torch.float32 (24,), got torch.float16 (24,)")


def test_uneven_levels_are_refused(folder: Path) -> None:
    extra = "down_blocks.1.resnets.1.conv1.weight"
    edit_weights(folder / UNET, lambda tensors: tensors.update({extra: torch.zeros(16, 16, 3, 3)}))
    assert "its levels have [1, 2, 1] resnets, expected the same number" in message(folder)


def test_quantized_weights_are_refused(folder: Path) -> None:
    absmax = {"conv_in.weight.absmax": torch.zeros(1)}
    edit_weights(folder / UNET, lambda tensors: tensors.update(absmax))
    assert message(folder).startswith(f"{UNET} is quantized by bitsandbytes: 1 tensor with")


def test_fp8_folders_are_read(folder: Path, tiny_modules: Modules) -> None:
    def in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t for name, t in tensors.items()
        }

    for name in (UNET, TE1, TE2, VAE):
        edit_weights(folder / name, lambda tensors: tensors.update(in_fp8(tensors)))
    check_same(folder, in_fp8(tiny_modules.single_file()))


def test_the_full_state_dicts_give_the_full_layout() -> None:
    with torch.device("meta"):
        states = build_modules(FULL).states()
    infos = {
        part: {key: TensorInfo(key, t.dtype, tuple(t.shape)) for key, t in state.items()}
        for part, state in states.items()
    }
    assert layout_of_modules(infos, dict.fromkeys(infos, "full")) == FULL  # type: ignore[arg-type]
    tiny = {
        part: {key: TensorInfo(key, t.dtype, tuple(t.shape)) for key, t in state.items()}
        for part, state in build_modules(TINY).states().items()
    }
    single = {n: TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in build_modules(TINY).single_file().items()}
    assert layout_of_modules(tiny, dict.fromkeys(tiny, "tiny")) == layout_of(single)  # type: ignore[arg-type]


def test_the_pipeline_class_does_not_matter(folder: Path, tiny_modules: Modules) -> None:
    edit_json(folder / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
    check_same(folder, tiny_modules.single_file())


def test_extras_of_another_model_are_refused(folder: Path) -> None:
    extras = folder / "single_file_extras.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, extras)
    assert message(folder) == (
        "single_file_extras.safetensors repeats 1 tensor of a subfolder: model.diffusion_model.out.2.bias"
    )
    save_file({}, extras, metadata={"spectune.matrices": "elsewhere."})
    assert message(folder) == "the metadata of single_file_extras.safetensors is invalid: elsewhere."

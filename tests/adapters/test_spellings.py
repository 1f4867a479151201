"""The table of keys for all programs is a bijection, and files are read and written without loss."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.adapters.reader import open_adapter, sdxl_default_layers
from spectune.adapters.spellings import (
    Spelling,
    adapter_part,
    factor_of,
    parse_spelling,
    sort_keys,
    spelled,
    spelling_of,
    split_adapter_key,
    stems,
)
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.source import MemorySource, TensorInfo
from spectune.ops.convert import convert
from spectune.ops.inspect.summary import describe_adapter
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue
from spectune.sdxl.names import Part
from tests.loras import distance, lora_tensors, products, same_tensors, saved_lora

Keys = Callable[[Layer, str], str]  # of the factor `down` or `up` of a layer


@pytest.fixture(scope="module")
def catalogue(tiny_checkpoint: Path) -> Catalogue:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_catalogue(source, all_layers=True)


@pytest.fixture(scope="module")
def full(full_infos: Mapping[str, TensorInfo]) -> Catalogue:
    return build_catalogue(full_infos, all_layers=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder for all examples of a property test."""
    return tmp_path_factory.mktemp("keys")


@pytest.mark.parametrize("layout", ["catalogue", "full"])
def test_each_stem_belongs_to_one_layer(layout: str, request: pytest.FixtureRequest) -> None:
    layers: Catalogue = request.getfixturevalue(layout)
    found = Counter(stem for layer in layers for stem in set(stems(layer.name, layer.diffusers)))
    assert [stem for stem, count in found.items() if count > 1] == []
    for spelling in Spelling:
        written = {spelled(layer.name, layer.diffusers, spelling) for layer in layers}
        assert len(written) == len(layers)
    if layout == "full":
        assert len(layers) == 1058


def test_a_kohya_key_splits_at_its_first_dot() -> None:
    assert split_adapter_key("lora_te1_x.lora_down.weight") == ("lora_te1_x", "lora_down.weight")


def test_stems_include_those_that_programs_write(full: Catalogue) -> None:
    def all_of(name: str) -> set[str]:
        layer = full.by_name[name]
        return set(stems(layer.name, layer.diffusers))

    assert all_of("unet.output_blocks.5.1.transformer_blocks.1.attn2.to_out.0") == {
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
        "lora_unet_up_blocks_1_attentions_2_transformer_blocks_1_attn2_to_out_0",
        "unet.up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0",
        "diffusion_model.output_blocks.5.1.transformer_blocks.1.attn2.to_out.0",
        # LyCORIS's own wrapper, of a pipeline or of the UNet alone, and sd-scripts's OFT
        "lycoris_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
        "lycoris_unet_up_blocks_1_attentions_2_transformer_blocks_1_attn2_to_out_0",
        "lycoris_up_blocks_1_attentions_2_transformer_blocks_1_attn2_to_out_0",
        "oft_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
    }
    assert all_of("te2.text_model.encoder.layers.31.mlp.fc1") == {
        "lycoris_te2_text_model_encoder_layers_31_mlp_fc1",
        "lora_te2_text_model_encoder_layers_31_mlp_fc1",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
        "text_encoder_2.encoder.layers.31.mlp.fc1",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.31.mlp.fc1",
    }


def test_names_default_to_those_of_sdxl(full: Catalogue, tmp_path: Path) -> None:
    assert set(sdxl_default_layers()) == {layer.name for layer in full if layer.default}
    tensors: dict[str, Tensor] = {}
    for layer in full:  # with small shapes: only names are looked up
        down, up = ((1, 2, *layer.shape[2:]), (3, 1, *(1,) * (len(layer.shape) - 2)))
        tensors[f"{layer.kohya}.lora_down.weight"] = torch.zeros(down)
        tensors[f"{layer.kohya}.lora_up.weight"] = torch.zeros(up)
        tensors[f"{layer.kohya}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    with open_adapter(tmp_path / "a.safetensors") as opened:
        assert set(opened.layers) == set(full.by_name)
        assert opened.catalogue is not None
        for mine, theirs in zip(opened.catalogue, full, strict=True):
            facts = (mine.name, mine.part, mine.kind, mine.tensor, mine.block, mine.default, mine.diffusers)
            assert facts == (
                theirs.name, theirs.part, theirs.kind, theirs.tensor, theirs.block, theirs.default,
                theirs.diffusers,
            )  # fmt: skip
            assert (mine.rows is None) == (theirs.rows is None)
            if mine.rows is not None and theirs.rows is not None:
                assert mine.rows[0] // 3 == theirs.rows[0] // theirs.out_features


def without_text_model(diffusers: str) -> str:
    return diffusers.replace(".text_model.", ".")


def kohya_of_diffusers(layer: Layer, side: str) -> str:
    stem = layer.kohya if layer.part is not Part.UNET else "lora_" + layer.diffusers.replace(".", "_")
    return f"{stem}.lora_{side}.weight"


def peft(root: str = "", *, shorter: bool = False, adapter: str = "") -> Keys:
    def key(layer: Layer, side: str) -> str:
        path = without_text_model(layer.diffusers) if shorter else layer.diffusers
        return f"{root}{path}.lora_{'A' if side == 'down' else 'B'}{adapter}.weight"

    return key


def unet_alone(layer: Layer, side: str) -> str:
    """Return a key of a UNet that PEFT saved alone; such keys do not contain the name of the model."""
    path = layer.diffusers.removeprefix("unet.") if layer.part is Part.UNET else layer.diffusers
    return f"base_model.model.{path}.lora_{'A' if side == 'down' else 'B'}.weight"


def old_diffusers(layer: Layer, side: str) -> str:
    """Return a key of 2023, when attention processors contained the four LoRAs of an attention layer."""
    path, _, last = layer.diffusers.rpartition(".")
    if ".attn" in path and last in ("to_q", "to_k", "to_v"):
        return f"{path}.processor.{last}_lora.{side}.weight"
    if path.endswith(".to_out"):
        return f"{path.removesuffix('.to_out')}.processor.to_out_lora.{side}.weight"
    return f"{layer.diffusers}.lora_linear_layer.{side}.weight"


def comfyui(layer: Layer, side: str) -> str:
    part, _, rest = layer.name.partition(".")
    root = {
        "unet": "diffusion_model",
        "te1": "text_encoders.clip_l.transformer",
        "te2": "text_encoders.clip_g.transformer",
    }
    return f"{root[part]}.{rest}.lora_{side}.weight"


WAYS: Mapping[str, Keys] = {
    "kohya": lambda layer, side: f"{layer.kohya}.lora_{side}.weight",
    "kohya with the names of diffusers": kohya_of_diffusers,
    "PEFT": peft(),
    "PEFT of transformers 5": peft(shorter=True),
    "PEFT in memory": peft(adapter=".default"),
    "PEFT with its own root": peft("base_model.model."),
    "PEFT of a UNet alone": unet_alone,
    "diffusers before PEFT": lambda layer, side: f"{layer.diffusers}.lora.{side}.weight",
    "attention processors": old_diffusers,
    "ComfyUI": comfyui,
}
ROLES = {
    "kohya": ("kohya",),
    "kohya with the names of diffusers": ("kohya",),
    "ComfyUI": ("comfyui",),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_spelling_opens_to_the_same_layers_and_values(
    way: str, catalogue: Catalogue, tmp_path: Path
) -> None:
    plain = lora_tensors(catalogue)
    key = WAYS[way]
    tensors = {
        key(layer, side): plain[f"{layer.kohya}.lora_{side}.weight"]
        for layer in catalogue
        for side in ("down", "up")
    }
    assert len(tensors) == 2 * len(catalogue)
    save_file(tensors, tmp_path / "a.safetensors")
    with open_adapter(tmp_path / "a.safetensors", catalogue) as opened:
        assert isinstance(opened, Adapter)
        assert list(opened.layers) == [layer.name for layer in catalogue]
        for layer in catalogue:
            pair = opened.layers[layer.name]
            assert torch.equal(pair.down, plain[f"{layer.kohya}.lora_down.weight"])
            assert torch.equal(pair.up, plain[f"{layer.kohya}.lora_up.weight"])
            assert pair.scale == 1
    described = describe_adapter(MemorySource(tensors, {}))
    counts = Counter(layer.part.value for layer in catalogue)
    assert described.layers == dict(counts)
    assert described.spelling in ROLES.get(way, ("diffusers", "diffusers and kohya"))


def test_alphas_and_kernels_without_axes_of_size_one_are_read(catalogue: Catalogue, tmp_path: Path) -> None:
    layer = catalogue.by_name["unet.output_blocks.0.0.skip_connection"]
    plain = lora_tensors([layer], alpha=1.0)
    squeezed = {
        key.replace(layer.kohya, layer.diffusers): t.flatten(1) if t.ndim else t for key, t in plain.items()
    }
    save_file(squeezed, tmp_path / "a.safetensors")
    with open_adapter(tmp_path / "a.safetensors", catalogue) as opened:
        assert isinstance(opened, Adapter)
        pair = opened.layers[layer.name]
        assert pair.down.shape == plain[f"{layer.kohya}.lora_down.weight"].shape == (3, 64, 1, 1)
        assert pair.scale == pytest.approx(1 / 3)


def refused(tensors: Mapping[str, Tensor], path: Path, catalogue: Catalogue | None) -> InputError:
    save_file(dict(tensors), path)
    with pytest.raises(InputError) as caught:
        open_adapter(path, catalogue)
    return caught.value


def test_a_layer_in_two_spellings_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    layer = catalogue.by_name["unet.middle_block.1.proj_in"]
    plain = lora_tensors([layer])
    both = plain | {f"{layer.diffusers}.lora_A.weight": plain[f"{layer.kohya}.lora_down.weight"].clone()}
    error = refused(both, tmp_path / "a.safetensors", catalogue)
    one, other = "unet.mid_block.attentions.0.proj_in.lora_A.weight", f"{layer.kohya}.lora_down.weight"
    assert error.what.startswith("a.safetensors has 1 factor twice: ")
    assert {one, other} <= set(error.what.replace(" and ", " ").split())
    assert error.hint is not None
    assert error.hint.startswith("the file has the same layers in two spellings; `spectune convert --drop")


@pytest.mark.parametrize(
    "end",
    ["diff_b", "dora_scale", "lora_magnitude_vector.weight", "hada_w1_a"],
)
@pytest.mark.parametrize("spelling", Spelling)
def test_keys_other_than_factors_are_named(
    end: str, spelling: Spelling, catalogue: Catalogue, tmp_path: Path
) -> None:
    layer = catalogue.by_name["te2.text_model.encoder.layers.1.mlp.fc1"]
    unexpected = f"{spelled(layer.name, layer.diffusers, spelling)}.{end}"
    tensors = lora_tensors(catalogue) | {unexpected: torch.zeros(3)}
    error = refused(tensors, tmp_path / "a.safetensors", catalogue)
    assert error.what.startswith(
        f"a.safetensors has 1 key other than factors: {unexpected}; expected lora_down.weight"
    )
    assert factor_of(unexpected) is None


def test_all_keys_that_cannot_be_read_are_one_error(catalogue: Catalogue, tmp_path: Path) -> None:
    layer = catalogue.by_name["unet.middle_block.1.proj_in"]
    plain = lora_tensors([layer])
    tensors = plain | {
        f"{layer.diffusers}.lora_A.weight": plain[f"{layer.kohya}.lora_down.weight"].clone(),
        "lora_unet_input_blocks_99_1_proj_in.alpha": torch.tensor(1.0),
        f"{layer.kohya}.oft_R.weight": torch.zeros(3),
    }
    error = refused(tensors, tmp_path / "a.safetensors", catalogue)
    assert [part.partition(":")[0] for part in error.what.split("; ")] == [
        "1 of 2 layers of a.safetensors have no counterpart in the model",
        "a.safetensors has 1 key of no known kind of adapter",
        "a.safetensors has 1 factor twice",
    ]


def test_layers_that_sdxl_does_not_have_are_named(catalogue: Catalogue, tmp_path: Path) -> None:
    name = "unet.input_blocks.99.1.proj_in"
    stem = "lora_" + name.replace(".", "_")
    tensors = lora_tensors([catalogue.layers[0]]) | {f"{stem}.alpha": torch.tensor(1.0)}
    error = refused(tensors, tmp_path / "a.safetensors", None)
    # some block names of the tiny model are those of other kinds of blocks in SDXL
    assert error.what.startswith("1 of 2 layers of a.safetensors have no counterpart in SDXL: " + stem)
    assert error.hint is not None
    assert error.hint.startswith("if the model does not have SDXL's size, pass it as `base`")
    error = refused(tensors, tmp_path / "a.safetensors", catalogue)
    assert error.what.startswith("1 of 2 layers of a.safetensors have no counterpart in the model: " + stem)


def test_a_checkpoint_is_recognized(catalogue: Catalogue, tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_adapter(tiny_checkpoint, catalogue)
    assert caught.value.hint == "the file is a checkpoint: expected an adapter"


def test_each_key_is_sorted_into_exactly_one_group(catalogue: Catalogue) -> None:
    layers = {layer.name: layer.diffusers for layer in catalogue}
    name = "te1.text_model.encoder.layers.0.mlp.fc1"
    stem = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    keys = [f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", f"{stem}.alpha", f"{stem}.dora_scale"]
    norm = "te1.text_model.final_layer_norm"
    keys += [f"{stem}.reg_dims", "text_encoder.text_model.final_layer_norm.w_norm", "x.y.z"]
    others = {norm: "text_encoder.text_model.final_layer_norm"}
    names = [*keys, f"{stem}.lora.down.weight", "bundle_emb.nimble.clip_l", "bundle_emb.nimble.clip_g"]
    table = sort_keys(names, layers, others)
    pair = {"lora_down.weight": keys[0], "lora_up.weight": keys[1], "alpha": keys[2]}
    assert table.keys == {name: {**pair, "dora_scale": keys[3]}}
    assert (table.unexpected, table.foreign) == ((keys[4],), ("x.y",))
    assert table.general
    assert table.embeddings == ("nimble",)
    assert table.others == {"te1.text_model.final_layer_norm": {"w_norm": keys[5]}}
    assert table.duplicates == ((keys[0], f"{stem}.lora.down.weight"),)
    assert not table.tuned


def test_part_and_spelling_of_a_key() -> None:
    known = {
        "lora_unet_middle_block_1_proj_in.lora_up.weight": ("unet", "kohya"),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": ("te2", "kohya"),
        "base_model.model.mid_block.attentions.0.proj_in.lora_A.weight": ("unet", "diffusers"),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight": ("te1", "diffusers"),
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight": (
            "te2",
            "comfyui",
        ),
        "diffusion_model.middle_block.1.proj_in.lora_down.weight": ("unet", "comfyui"),
        "model.diffusion_model.middle_block.1.proj_in.weight": (None, "diffusers"),
    }
    assert {key: (adapter_part(key), spelling_of(key)) for key in known} == known


def test_spellings_are_parsed_by_name() -> None:
    assert [parse_spelling(word) for word in ("kohya", "PEFT", "Diffusers", "comfyui")] == [
        Spelling.KOHYA,
        Spelling.DIFFUSERS,
        Spelling.DIFFUSERS,
        Spelling.COMFYUI,
    ]
    with pytest.raises(InputError) as caught:
        parse_spelling("khoya")
    assert caught.value.what == "unknown spelling 'khoya'; did you mean `kohya`?"
    assert caught.value.hint == "expected one of kohya, diffusers, comfyui"


chosen = st.lists(st.integers(0, 10**6), min_size=1, max_size=12, unique=True)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


def some(catalogue: Catalogue, numbers: Sequence[int]) -> list[Layer]:
    places = {number % len(catalogue) for number in numbers}
    return [layer for place, layer in enumerate(catalogue) if place in places]


def there_and_back(path: Path, spelling: Spelling, base: Path) -> tuple[Path, float]:
    """Convert a file to another spelling and back to kohya's; return it and the error."""
    away, back = path.with_name("away.safetensors"), path.with_name("back.safetensors")
    first = convert(path, away, keys=spelling, base=base, force=True)
    assert all(spelling_of(key) == spelling for key in load_file(away))
    second = convert(away, back, base=base, force=True)
    assert second.error == 0
    return back, first.error


@given(
    numbers=chosen,
    rank=st.integers(1, 9),
    dtype=dtypes,
    spelling=st.sampled_from([Spelling.DIFFUSERS, Spelling.COMFYUI]),
)
@settings(deadline=None, max_examples=12)
def test_conversion_keeps_every_byte_if_alpha_is_the_rank(
    numbers: list[int],
    rank: int,
    dtype: torch.dtype,
    spelling: Spelling,
    catalogue: Catalogue,
    folder: Path,
    tiny_checkpoint: Path,
) -> None:
    path = saved_lora(folder / "a.safetensors", some(catalogue, numbers), rank=rank, dtype=dtype)
    back, cost = there_and_back(path, spelling, tiny_checkpoint)
    assert cost == 0
    assert same_tensors(load_file(back), load_file(path))


@given(
    numbers=chosen,
    rank=st.integers(1, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    scale=st.sampled_from([2.0**n for n in range(-6, 4)]),
)
@settings(deadline=None, max_examples=8)
def test_conversion_keeps_the_product_exactly_for_power_of_two_scales(
    numbers: list[int],
    rank: int,
    dtype: torch.dtype,
    scale: float,
    catalogue: Catalogue,
    folder: Path,
    tiny_checkpoint: Path,
) -> None:
    layers = some(catalogue, numbers)
    path = saved_lora(folder / "a.safetensors", layers, rank=rank, alpha=scale * rank, dtype=dtype)
    back, cost = there_and_back(path, Spelling.DIFFUSERS, tiny_checkpoint)
    assert cost == 0
    found, exact, before, after = products(back), products(path), load_file(path), load_file(back)
    for layer in layers:
        # exact products of the same numbers, summed in float64, scaled before or after
        assert distance(found[layer.kohya], exact[layer.kohya]) < 1e-15
        assert torch.equal(
            after[f"{layer.kohya}.lora_up.weight"].double(),
            scale * before[f"{layer.kohya}.lora_up.weight"].double(),
        )
        assert after[f"{layer.kohya}.alpha"].item() == rank


@given(numbers=chosen, rank=st.integers(1, 9), dtype=dtypes, alpha=st.floats(0.3, 30))
@settings(deadline=None, max_examples=8)
def test_conversion_of_other_scales_rounds_once_and_reports_it(
    numbers: list[int],
    rank: int,
    dtype: torch.dtype,
    alpha: float,
    catalogue: Catalogue,
    folder: Path,
    tiny_checkpoint: Path,
) -> None:
    layers = some(catalogue, numbers)
    path = saved_lora(folder / "a.safetensors", layers, rank=rank, alpha=alpha, dtype=dtype)
    back, cost = there_and_back(path, Spelling.DIFFUSERS, tiny_checkpoint)
    found, exact = products(back), products(path)
    total = sum(float(exact[layer.kohya].square().sum()) for layer in layers)
    lost = sum(float((found[layer.kohya] - exact[layer.kohya]).square().sum()) for layer in layers)
    # half an ulp for each number of `up`; in fp16, small numbers have fewer digits
    bound = torch.finfo(dtype).eps * (2 if dtype == torch.float16 else 1)
    assert (lost / total) ** 0.5 < bound
    assert cost == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-12)
    kept, cost = there_and_back(path, Spelling.COMFYUI, tiny_checkpoint)
    assert cost == 0
    assert same_tensors(load_file(kept), load_file(path))


def test_a_converted_file_has_correct_network_metadata(
    catalogue: Catalogue, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    entries = {"ss_network_dim": "64", "ss_network_args": '{"conv_dim": "64"}', "ss_comment": "mine"}
    entries |= {"lora_adapter_metadata": '{"unet.lora_alpha": 99}'}
    path = saved_lora(tmp_path / "a.safetensors", catalogue, rank=4, metadata=entries)
    out = convert(path, tmp_path / "b.safetensors", keys=Spelling.DIFFUSERS, base=tiny_checkpoint).path
    with open_checkpoint(out) as source:
        metadata = dict(source.metadata)
    assert (metadata["ss_network_dim"], metadata["ss_comment"]) == ("4", "mine")
    assert json.loads(metadata["ss_network_args"])["conv_dim"] == "4"
    # otherwise it would be read as the alphas of a file without alphas
    assert "lora_adapter_metadata" not in metadata
    with open_adapter(out, catalogue) as opened:
        assert isinstance(opened, Adapter)
        assert {opened.layers[name].scale for name in opened.layers} == {1.0}

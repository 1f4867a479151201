"""Files of other kinds: what they change, what is refused, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectune.adapters.adapter import Adapter, GeneralAdapter
from spectune.adapters.reader import is_general, open_adapter, open_any_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError, PairingError
from spectune.ops.rebuild import rebuild
from spectune.pairs.merged import merged
from spectune.pairs.rules import AdapterKind
from spectune.sdxl.layers import Catalogue, build_catalogue
from tests.sample_adapters import pair
from tests.split_fixtures import TinySplit

NAME = "unet.middle_block.1.proj_in"
STEM = "lora_unet_middle_block_1_proj_in"
Q_BIAS = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"


@pytest.fixture(scope="module")
def catalogue(tiny_checkpoint: Path) -> Catalogue:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_catalogue(source, all_layers=True)


def refused(tensors: dict[str, Tensor], tmp_path: Path, catalogue: Catalogue | None) -> InputError:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError) as caught:
        open_any_adapter(tmp_path / "a.safetensors", catalogue)
    return caught.value


def loha(shape: tuple[int, ...]) -> dict[str, Tensor]:
    columns = torch.Size(shape[1:]).numel()
    return {
        f"{STEM}.hada_w{half}_{side}": torch.randn((shape[0], 2) if side == "a" else (2, columns))
        for half in (1, 2)
        for side in "ab"
    }


def test_a_mixed_file_keeps_its_pairs_and_a_plain_file_stays_plain(
    catalogue: Catalogue, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = catalogue.by_name["unet.middle_block.0.in_layers.2"]
    shape = catalogue.by_name[NAME].shape
    # small, or the plain one would look like a principal
    plain = {key: 0.1 * tensor for key, tensor in pair(other, alpha=10.0).items()}
    mixed = plain | loha(shape)
    save_file(plain, tmp_path / "plain.safetensors")
    save_file(mixed, tmp_path / "mixed.safetensors")
    with (
        open_checkpoint(tiny_checkpoint) as base,
        open_any_adapter(tmp_path / "plain.safetensors", catalogue) as one,
        open_any_adapter(tmp_path / "mixed.safetensors", catalogue) as two,
    ):
        assert isinstance(one, Adapter)
        assert isinstance(two, GeneralAdapter)
        assert one.file is not None
        assert two.file is not None
        assert (is_general(one.file.tensors), is_general(two.file.tensors)) == (False, True)
        assert two.kinds == {NAME: "LoHa", other.name: "LoRA"}
        assert AdapterKind.of(two) is AdapterKind.OTHER
        assert two.warnings == (f"1 layer of mixed.safetensors without alpha, read as scale 1: {NAME}",)
        one_model, two_model = (merged(base, [(adapter, 0.5)]) for adapter in (one, two))
        # bit for bit the same product
        assert torch.equal(one_model.load(other.tensor), two_model.load(other.tensor))
        changed = catalogue.by_name[NAME].tensor
        assert not torch.equal(base.load(changed), two_model.load(changed))


def test_differences_of_biases_norms_and_embeddings(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = load_file(tiny_checkpoint)
    targets = {
        f"{STEM}.diff_b": "model.diffusion_model.middle_block.1.proj_in.bias",
        "lora_unet_middle_block_1_transformer_blocks_0_norm1.w_norm": (
            "model.diffusion_model.middle_block.1.transformer_blocks.0.norm1.weight"
        ),
        "lora_unet_middle_block_1_transformer_blocks_0_norm1.b_norm": (
            "model.diffusion_model.middle_block.1.transformer_blocks.0.norm1.bias"
        ),
        "diffusion_model.out.0.diff": "model.diffusion_model.out.0.weight",
        "lora_te1_text_model_embeddings_token_embedding.diff": (
            "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
        ),
        "text_encoders.clip_g.transformer.text_projection.diff": (
            "conditioner.embedders.1.model.text_projection"
        ),
    }
    differences = {key: torch.randn(base[tensor].shape) for key, tensor in targets.items()}
    width = len(base[Q_BIAS]) // 3
    rows = torch.randn(width)
    tensors = {**differences, "lora_te2_text_model_encoder_layers_0_self_attn_k_proj.diff_b": rows}
    tensors["text_encoders.clip_g.transformer.text_projection.diff"] = (
        differences["text_encoders.clip_g.transformer.text_projection.diff"].T.contiguous()
    )  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    report = rebuild(
        tiny_checkpoint, tmp_path / "a.safetensors", tmp_path / "b.safetensors", strength="unet=0.5,te=2",
        dtype="float32",
    )  # fmt: skip
    made = load_file(tmp_path / "b.safetensors")
    for key, tensor in targets.items():
        strength = 0.5 if tensor.startswith("model.") else 2.0
        expected = base[tensor].float() + strength * differences[key]
        torch.testing.assert_close(made[tensor], expected, rtol=1e-6, atol=1e-7)
    added = made[Q_BIAS] - base[Q_BIAS].float()
    torch.testing.assert_close(added[width : 2 * width], 2 * rows, rtol=1e-5, atol=1e-5)
    assert not added[:width].any()
    assert not added[2 * width :].any()
    assert report.changed_tensors == len(targets) + 1
    assert set(made) == set(base)


def test_pairs_of_embeddings_and_the_text_projection(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """ComfyUI's LoraSave writes them; its projection is a linear layer, transposed in the checkpoint."""
    base = load_file(tiny_checkpoint)
    root = "text_encoders.clip_g.transformer.text_projection"
    tensor = "conditioner.embedders.1.model.text_projection"
    out, inputs = base[tensor].T.shape
    down, up = torch.randn(2, inputs), torch.randn(out, 2)
    save_file({f"{root}.lora_down.weight": down, f"{root}.lora_up.weight": up}, tmp_path / "a.safetensors")
    rebuild(tiny_checkpoint, tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="float32")
    made = load_file(tmp_path / "b.safetensors")[tensor]
    torch.testing.assert_close(made, base[tensor].float() + (up @ down).T, rtol=1e-5, atol=1e-6)
    save_file({f"{root}.lora_up.weight": up}, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=r"has lora_down.weight \(\) and lora_up.weight"):
        rebuild(tiny_checkpoint, tmp_path / "c.safetensors", tmp_path / "d.safetensors")


def test_wrong_shapes_are_named_at_once_before_any_tensor_is_made(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    # a product of these would have 10^12 values
    huge = {f"{STEM}.lokr_w1": torch.zeros(1000, 1000), f"{STEM}.lokr_w2": torch.zeros(1000, 1000)}
    bad = {"lora_unet_middle_block_1_proj_out.diff": torch.zeros(3, 3)}
    error = refused(huge | bad, tmp_path, catalogue)
    shape = catalogue.by_name[NAME].shape
    assert error.what == (
        f"the shapes of 2 layers of a.safetensors do not fit the model: {NAME} {shape} has "
        f"lokr_w1 (1000, 1000), lokr_w2 (1000, 1000), unet.middle_block.1.proj_out {shape} has diff (3, 3)"
    )


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"hada_w1_a": (32, 2)}, "1 layer of a.safetensors cannot be read: {NAME} has hada_w1_a"),
        (
            {"diff": (32, 32), "lora_down.weight": (2, 32), "lora_up.weight": (32, 2)},
            "{NAME} has diff, lora_down.weight, lora_up.weight",
        ),
        ({"dora_scale": (1, 32)}, "{NAME} has dora_scale"),
        ({"oft_blocks": (4, 8, 7)}, "do not fit the model: {NAME} (32, 32) has oft_blocks (4, 8, 7)"),
        ({"oft_blocks": (8, 4, 8, 8)}, "{NAME} (32, 32) has oft_blocks (8, 4, 8, 8)"),
        ({"diff": (32, 32), "alpha": (2,)}, "has alpha (2,), diff (32, 32)"),
    ],
)
def test_incomplete_and_contradictory_layers(
    tensors: dict[str, tuple[int, ...]], what: str, catalogue: Catalogue, tmp_path: Path
) -> None:
    assert catalogue.by_name[NAME].shape == (32, 32)
    file = {f"{STEM}.{suffix}": torch.ones(shape) for suffix, shape in tensors.items()}
    assert what.replace("{NAME}", NAME) in refused(file, tmp_path, catalogue).what


def test_nan_is_reported_with_the_layer(catalogue: Catalogue, tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = loha(catalogue.by_name[NAME].shape)
    tensors[f"{STEM}.hada_w1_a"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=rf"the change of {NAME}: 1 of 64 values are NaN"):
        rebuild(tiny_checkpoint, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_differences_that_do_not_fit_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_file({f"{STEM}.diff_b": torch.zeros(7)}, tmp_path / "a.safetensors")
    with pytest.raises(
        InputError, match=rf"1 difference of a.safetensors .*{NAME}.bias has shape \(32,\), the diff"
    ):
        rebuild(tiny_checkpoint, tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_embedded_textual_inversions_are_reported(catalogue: Catalogue, tmp_path: Path) -> None:
    words = {f"bundle_emb.nimble.{part}": torch.zeros(2, 8) for part in ("clip_l", "clip_g")}
    save_file(pair(catalogue.by_name[NAME]) | words, tmp_path / "a.safetensors")
    with open_adapter(tmp_path / "a.safetensors", catalogue) as opened:
        assert opened.warnings == (
            "1 embedding of a.safetensors ignored: new words for prompts, which no weight can hold: nimble",
        )
        assert list(opened.layers) == [NAME]


def test_a_residual_and_commands_that_need_factors_refuse_other_kinds(
    catalogue: Catalogue, tiny_split: TinySplit, tmp_path: Path
) -> None:
    path, residual = tmp_path / "a.safetensors", tiny_split(None).residual
    assert residual is not None
    save_file(loha(catalogue.by_name[NAME].shape), path)
    with pytest.raises(PairingError, match=r"requires a complete model: .* is a residual"):
        rebuild(residual, path, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="4 keys other than factors") as caught:
        open_adapter(path, catalogue)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("write it as a plain LoRA first")
    assert "requires its model" in refused(loha((32, 32)), tmp_path, None).what

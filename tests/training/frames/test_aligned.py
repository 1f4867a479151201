"""Frames from the first batches: equal to dense matrices, exact at step 0, the same after a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from spectune.checkpoints.open import open_checkpoint
from spectune.core.frames import plain_frame
from spectune.core.linalg import column_norms, row_norms, thin_svd
from spectune.core.low_rank import to_matrix
from spectune.errors import InputError, SpectuneError
from spectune.model.inject import AdaptedLayer, Injection
from spectune.model.network import build_model
from spectune.ops.inspect.summary import describe_adapter
from spectune.ops.rebuild import rebuild
from spectune.training import base_file, setup, state
from spectune.training.callbacks import Callbacks
from spectune.training.denoiser import Denoiser
from spectune.training.frames.aligned import Gradients, Inputs, align, range_of
from spectune.training.loop import train
from spectune.training.run import Run
from spectune.training.setup import assemble, restore
from tests.training.conftest import MakeRecipe

Kind = Literal["gradient", "data"]
KINDS: tuple[Kind, ...] = ("gradient", "data")
CONV = "unet.input_blocks.1.0.in_layers.2"
FEW = ("unet.*attn2*", "unet.time_embed.0", CONV)  # layers of each kind, for short runs


class Toy:
    """A 3x3 convolution and a linear layer in float64, each with a plain frame, and three batches."""

    def __init__(self, *, rank: int = 2, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        conv, linear = nn.Conv2d(4, 10, 3, stride=2, padding=1), nn.Linear(10, 14)
        self.layers = {
            name: AdaptedLayer(
                base.double().requires_grad_(False),
                plain_frame(tuple(base.weight.shape), rank=rank, generator=torch.Generator().manual_seed(1)),
                "delta",
                torch.float32,
                dropout,
            )
            for name, base in (("conv", conv), ("linear", linear))
        }
        self.batches = [torch.randn(3, 4, 8, 8).double() for _ in range(3)]
        self.passes = 0

    def losses(self) -> Iterator[Tensor]:
        self.passes += 1
        for x in self.batches:
            self.predict_with_the_base(x)  # as for a teacher; its inputs must not count
            yield self.predict(x).square().mean()

    @torch.no_grad()
    def predict_with_the_base(self, x: Tensor) -> Tensor:
        with Injection(self.layers, {}).switched_off():
            return self.predict(x)

    def predict(self, x: Tensor) -> Tensor:
        hidden = self.layers["conv"](x).tanh()  # (3, 10, 4, 4)
        return self.layers["linear"](hidden.flatten(2).transpose(1, 2))

    def dense(self, kind: Kind) -> dict[str, Tensor]:
        """Return the matrix M of each layer, computed directly."""
        bases = {name: layer.base for name, layer in self.layers.items()}
        weights = {name: base.weight.detach().clone().requires_grad_() for name, base in bases.items()}
        total = torch.zeros((), dtype=torch.float64)
        products = {name: torch.zeros(to_matrix(w).shape).double() for name, w in weights.items()}
        for x in self.batches:
            patches = F.unfold(x, 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1)  # (tokens, 36)
            hidden = F.conv2d(x, weights["conv"], bases["conv"].bias, 2, 1).tanh().flatten(2).transpose(1, 2)
            total = total + F.linear(hidden, weights["linear"], bases["linear"].bias).square().mean()
            for name, inputs in (("conv", patches), ("linear", hidden.detach().flatten(0, 1))):
                products[name] += to_matrix(weights[name].detach()) @ inputs.T @ inputs
        if kind == "data":
            return products
        gradients = torch.autograd.grad(total, list(weights.values()))
        return {name: to_matrix(g) for name, g in zip(weights, gradients, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_products_equal_those_of_the_dense_matrix(kind: Kind) -> None:
    toy = Toy()
    dense = toy.dense(kind)
    products = (Gradients if kind == "gradient" else Inputs)(toy.layers, toy.losses)
    omegas = {name: torch.randn(5, matrix.shape[1]).double() for name, matrix in dense.items()}
    bases = {name: torch.randn(matrix.shape[0], 5).double() for name, matrix in dense.items()}
    right, left = products.right(omegas), products.left(bases)
    for name, matrix in dense.items():
        expected = matrix @ omegas[name].T
        assert (right[name] - expected).norm() < 1e-12 * expected.norm()
        assert (right[name] - 1.01 * expected).norm() > 1e-3 * expected.norm()  # the test can fail
        expected = bases[name].T @ matrix
        assert (left[name] - expected).norm() < 1e-12 * expected.norm()
    assert toy.passes == 2
    assert all(p.grad is None for layer in toy.layers.values() for p in layer.parameters())


def test_power_rounds_reduce_the_error_of_the_range() -> None:
    """Use a spectrum that decreases slowly."""

    class Dense:
        def __init__(self, matrix: Tensor) -> None:
            self.matrix = matrix

        def right(self, omegas: Any) -> dict[str, Tensor]:
            return {"a": self.matrix @ omegas["a"].T.to(self.matrix)}

        def left(self, bases: Any) -> dict[str, Tensor]:
            return {"a": bases["a"].T @ self.matrix}

    generator = torch.Generator().manual_seed(0)
    u, _, vh = thin_svd(torch.randn(120, 90, generator=generator).double())
    values = 1 / torch.arange(1, 91).double()
    products: Any = Dense((u * values) @ vh)
    errors: list[float] = []
    for rounds in (0, 1, 2):
        basis, core = range_of(products, {"a": (120, 90)}, {"a": 20}, seed=0, power_rounds=rounds)
        assert torch.allclose(basis["a"].T @ products.matrix, core["a"])
        errors.append(float((u[:, :4] - basis["a"] @ (basis["a"].T @ u[:, :4])).norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[1] < 0.02


@pytest.mark.parametrize("rank", [2, 8])
def test_a_gradient_frame_equals_that_of_the_dense_gradient(rank: int) -> None:
    """Oversampling reaches the full rank here, so the result is exact."""
    toy = Toy(rank=rank, dropout=0.5)
    before = {name: layer.frame_down.clone() for name, layer in toy.layers.items()}
    alignment = align(toy.layers, "gradient", toy.losses, seed=0)
    assert not alignment.unreached
    for name, matrix in toy.dense("gradient").items():
        u, _, vh = thin_svd(matrix)
        frame, layer = alignment.frames[name], toy.layers[name]
        up, down = to_matrix(frame.up).double(), to_matrix(frame.down).double()
        second = slice(rank, 2 * rank) if 2 * rank <= min(matrix.shape) else slice(0, rank)
        for basis, expected in ((up, u[:, :rank]), (down.T, vh[second].T)):
            projector = basis @ basis.T * 3  # the columns have length 1/sqrt(3)
            assert (projector - expected @ expected.T).norm() < 1e-5 * math.sqrt(rank)
        assert frame.alpha == rank
        assert torch.equal(layer.frame_down, before[name])  # frame, dropout and dtype are restored
        assert (layer.dropout, layer.down.dtype, layer.down.grad) == (0.5, torch.float32, None)
        assert layer.down.requires_grad
        assert layer.up.requires_grad


def test_a_data_frame_equals_that_of_corda_without_its_inverse() -> None:
    toy = Toy()
    alignment = align(toy.layers, "data", toy.losses, seed=0)
    for name, matrix in toy.dense("data").items():
        weight = to_matrix(toy.layers[name].base.weight.detach())
        covariance = torch.linalg.lstsq(weight, matrix, driver="gelsd").solution
        u, s, vh = thin_svd(matrix)
        expected = u[:, :2] @ u[:, :2].T @ weight
        frame = alignment.frames[name]
        up, down = to_matrix(frame.up).double(), to_matrix(frame.down).double()
        assert (up @ down - expected).norm() < 1e-6 * expected.norm()
        assert torch.allclose(column_norms(up), row_norms(down), rtol=1e-5)  # balanced
        if weight.shape[0] >= weight.shape[1]:  # then lstsq gives C itself
            with_inverse = torch.linalg.solve(covariance, ((u[:, :2] * s[:2]) @ vh[:2]), left=False)
            assert (up @ down - with_inverse).norm() < 1e-5 * expected.norm()
    one_length = align(toy.layers, "data", toy.losses, seed=0, length=0.5).frames["linear"]
    assert row_norms(one_length.down).tolist() == pytest.approx([0.5, 0.5])


def test_unreached_layers_are_named() -> None:
    toy = Toy()
    unused = AdaptedLayer(
        nn.Linear(6, 5), plain_frame((5, 6), rank=2, generator=torch.Generator()), "delta", torch.float32
    )
    for kind in KINDS:
        alignment = align({**toy.layers, "unused": unused}, kind, toy.losses, seed=0)
        assert alignment.unreached == ("unused",)
        assert alignment.warnings == [
            "the first batches determine no frame for 1 layer; plain frames are used: unused"
        ]
        assert set(alignment.frames) == {"conv", "linear"}


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_stop_the_run(kind: Kind) -> None:
    toy = Toy()
    toy.batches[1][0, 0, 0, 0] = math.inf
    with pytest.raises(SpectuneError, match="values that are not finite in 2 layers: conv"):
        align(toy.layers, kind, toy.losses, seed=0)


def test_a_frame_cannot_change_after_training_has_started() -> None:
    layer = Toy().layers["linear"]
    frame = plain_frame((14, 10), rank=3, generator=torch.Generator())
    layer.reframe(frame)
    assert (layer.down.shape, layer.alpha, layer.scale) == ((3, 10), 3.0, 1.0)
    with torch.no_grad():
        layer.up[0, 0] = 1
    with pytest.raises(InputError, match="after training has started"):
        layer.reframe(frame)
    residual = AdaptedLayer(nn.Linear(10, 14), frame, "residual", torch.float32)
    with pytest.raises(InputError, match="the residual form cannot change its frame"):
        residual.reframe(frame)


# ---------------------------------------------------------------- complete runs


def assembled(make_recipe: MakeRecipe, **sections: dict[str, Any]) -> Run:
    return assemble(make_recipe(**sections), Accelerator(cpu=True), Callbacks())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_aligned_frames_starts_from_its_base(make_recipe: MakeRecipe, kind: Kind) -> None:
    model = {"frame": kind, "frame_batches": 1, "dropout_probability": 0.2, "layers": (*FEW, "te1")}
    first = assembled(make_recipe, model=model)
    framed = predict(first.model.denoiser, first)
    with first.model.injection.switched_off():
        assert torch.equal(framed, predict(first.model.denoiser, first))
    frames = first.frames()
    assert frames is not None
    assert all(frame.rank == 2 and frame.up.any() for name, frame in frames.items() if "te1" not in name)
    # the last layer of the first text encoder is not used, so it gets no gradient
    unreached = [name for name, frame in frames.items() if not frame.up.any()]
    assert all(name.startswith("te1.") for name in unreached)
    warned = any("plain frames are used: te1." in warning for warning in first.warnings.entries)
    assert bool(unreached) == warned == (kind == "gradient")
    assert all(
        parameter.grad is None and not parameter.any() for parameter in first.optimization.parameters.values()
    )
    assert all(layer.dropout == 0.2 for layer in first.model.injection.layers.values())
    again = assembled(make_recipe, model=model)
    assert again.model.trainable.frame_hash == first.model.trainable.frame_hash


def test_bf16_runs_compute_frames(make_recipe: MakeRecipe) -> None:
    first = assembled(
        make_recipe,
        model={"frame": "gradient", "frame_batches": 1, "frame_norm": 1.0, "layers": FEW},
        optimizer={"name": "prodigy_plus_schedule_free", "learning_rate": ...},
        run={"precision": "bf16", "trained_precision": "bf16", "gradient_checkpointing": True},
    )
    layer = first.model.injection.layers[CONV]
    assert layer.down.dtype == torch.bfloat16
    assert row_norms(to_matrix(layer.frame_down)).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    "frame",
    [
        "minor",
        "gradient",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("principal", "plain", "data")),
    ],
)
@pytest.mark.slow
def test_every_frame_trains_and_is_rebuilt_from_its_file(
    make_recipe: MakeRecipe, tiny_checkpoint: Path, tmp_path: Path, frame: str
) -> None:
    few = {"frame_batches": 1} if frame in KINDS else {}
    recipe = make_recipe(model={"frame": frame, "layers": FEW, **few}, run={"steps": 2})
    untrained = assemble(recipe, Accelerator(cpu=True), Callbacks())
    report = train(recipe)
    assert report.steps == 2
    folder = tmp_path / "out" / "t-step00000002.state"
    saved = state.load_state(folder)
    trained = assemble(recipe, Accelerator(cpu=True), Callbacks(), saved)
    restore(trained, saved)
    tuned, whole = tmp_path / "out" / "t.safetensors", tmp_path / "whole.safetensors"
    rebuild(tiny_checkpoint, tuned, whole, dtype="float32")
    with open_checkpoint(whole) as file:
        rebuilt = Denoiser(build_model(file), trains_text=False)
        assert file.provenance.frame is None
    denoisers = (untrained.model.denoiser, trained.model.denoiser, rebuilt)
    base, expected, merged = (predict(denoiser, trained) for denoiser in denoisers)
    assert (expected - base).norm() > 1e-3 * base.norm()
    assert (merged - expected).norm() < 1e-5 * expected.norm()
    provenance = describe_adapter(open_checkpoint(tuned)).provenance
    assert provenance.frame == frame
    assert provenance.principal_hash is None


@torch.no_grad()
def predict(denoiser: Denoiser, like: Run) -> Tensor:
    batch = like.data.pictures.__getitems__(like.data.plan.epoch(0)[0])
    assert batch.latents is not None
    text = like.model.denoiser.text_states(batch.captions)
    denoiser.eval()
    return denoiser.model.denoise(batch.latents, torch.full((len(batch),), 500.0), text, batch.time_ids)


def test_a_resumed_run_takes_its_frames_from_the_state(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"frame": "gradient", "layers": FEW, "frame_batches": 1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_recipe(model=model, run={"output": whole, "steps": 3}))
    train(make_recipe(model=model, run={"output": parts, "steps": 2}))
    for module, name in ((setup, "align"), (base_file, "make_frames")):
        monkeypatch.setattr(module, name, None)  # computing a frame again would fail
    train(make_recipe(model=model, run={"output": parts, "steps": 3}))
    one, two = load_file(whole / "t.safetensors"), load_file(parts / "t.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)
    frames = load_file(parts / "t-step00000003.state" / state.FRAMES)
    assert torch.equal(
        frames[f"{CONV}.down"],
        one["lora_unet_input_blocks_1_0_in_layers_2.frame_down.weight"],
    )

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role
from spectune.files.source import MemorySource, declared_prediction
from spectune.files.weights_hash import WeightsHasher, tensor_bytes, weights_hash

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
shifts = st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@given(
    st.builds(
        Provenance,
        role=st.none() | st.sampled_from(Role),
        version=st.none() | st.just("0.1.0"),
        base_hash=st.none() | st.just("ab" * 32),
        base_name=st.none() | st.text(),
        principal_hash=st.none() | st.just("cd" * 32),
        prediction=st.sampled_from([None, "eps", "v", "flow"]),
        flow_shift=shifts,
        vae_scale=numbers,
        vae_shift=numbers,
        vae_padding=st.sampled_from([None, "zeros", "reflect"]),
        vae_name=st.none() | st.text(),
    )
)
def test_metadata_round_trip(provenance: Provenance) -> None:
    assert Provenance.from_metadata(provenance.to_metadata()) == provenance


def test_metadata_entries_are_strings_with_the_spectune_prefix() -> None:
    assert Provenance(role=Role.PRINCIPAL, vae_shift=-0.4743).to_metadata() == {
        "spectune.role": "principal",
        "spectune.vae_shift": "-0.4743",
    }


def test_files_of_other_programs_have_no_provenance() -> None:
    assert Provenance.from_metadata({"format": "pt", "spectune.layout": "{}"}) == Provenance()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("role", "principl", "metadata spectune.role is `principl`: expected one of model, principal, "
         "residual, tuned, lora; did you mean `principal`?"),
        ("prediction", "x0", "metadata spectune.prediction is `x0`: expected one of eps, v, flow"),
        ("flow_shift", "2,5", "metadata spectune.flow_shift is `2,5`: expected a number"),
        ("flow_shift", "nan", "metadata spectune.flow_shift is `nan`: expected a number"),
        ("vae_scale", "inf", "metadata spectune.vae_scale is `inf`: expected a number"),
        ("vae_padding", "reflct", "metadata spectune.vae_padding is `reflct`: "
            "expected one of zeros, reflect; "
         "did you mean `reflect`?"),
        ("flow_shift", "0.0", "metadata spectune.flow_shift is `0.0`: expected a positive number"),
    ],
)  # fmt: skip
def test_invalid_metadata_values_are_refused(key: str, value: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Provenance.from_metadata({f"spectune.{key}": value})
    assert caught.value.what == message


def test_the_hash_follows_its_documented_definition() -> None:
    values = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(3, dtype=torch.int64)}
    entries = (
        b"a\0I64\0\0" + hashlib.sha256((3).to_bytes(8, "little")).digest(),
        b"b\0F32\x001x2\0" + hashlib.sha256(values["b"].numpy().tobytes()).digest(),
    )
    assert weights_hash(MemorySource(values, {})) == hashlib.sha256(b"".join(entries)).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.tensor([1.0, 2.5])},
        {"x": torch.tensor([1.0, 2.0]).half()},
        {"x": torch.tensor([[1.0, 2.0]])},
        {"y": torch.tensor([1.0, 2.0])},
        {"x": torch.tensor([1.0, 2.0]), "y": torch.empty(0)},
    ],
)
def test_the_hash_depends_on_values_dtypes_shapes_and_names(other: dict[str, torch.Tensor]) -> None:
    assert weights_hash(MemorySource(other, {})) != weights_hash(
        MemorySource({"x": torch.tensor([1.0, 2.0])}, {})
    )


def test_the_hash_is_independent_of_order() -> None:
    one, two = WeightsHasher(), WeightsHasher()
    values = {"x": torch.ones(2), "y": torch.zeros(3)}
    for name in "xy":
        one.add(name, values[name])
    for name in "yx":
        two.add(name, values[name])
    assert one.hexdigest() == two.hexdigest()


def test_tensor_bytes_of_views() -> None:
    square = torch.arange(4, dtype=torch.bfloat16).view(2, 2)
    assert bytes(tensor_bytes(square.T)) == bytes(tensor_bytes(square.T.contiguous()))
    assert len(tensor_bytes(torch.tensor(1.0))) == 4


def test_declared_prediction() -> None:
    def of(metadata: dict[str, str], **values: torch.Tensor) -> str | None:
        return declared_prediction(MemorySource(values, metadata))

    assert of({}) is None
    assert of({}, v_pred=torch.empty(0)) == "v"
    assert of({"modelspec.prediction_type": "epsilon"}) == "eps"
    assert of({"modelspec.prediction_type": "v", "spectune.prediction": "flow"}) == "flow"
    assert of({"modelspec.predict_key": "v"}) == "v"  # ComfyUI
    assert of({"modelspec.predict_key": "epsilon"}) == "eps"
    assert of({"modelspec.prediction_type": " Rectified Flow "}) == "flow"
    assert of({"ss_v_parameterization": "True"}) == "v"
    assert of({"ss_v_parameterization": "False"}) is None
    assert of({"modelspec.predict_key": "nonsense"}, v_pred=torch.empty(0)) == "v"
    assert of({"modelspec.predict_key": "epsilon"}, v_pred=torch.empty(0)) == "v"


def test_a_source_parses_its_provenance_once_and_refuses_damaged_metadata_at_first_use() -> None:
    source = MemorySource({}, Provenance(role=Role.LORA).to_metadata())
    assert source.provenance.role is Role.LORA
    assert source.provenance is source.provenance
    damaged = MemorySource({}, {"spectune.role": "?"})
    with pytest.raises(InputError, match=r"metadata spectune\.role is `\?`"):
        _ = damaged.provenance

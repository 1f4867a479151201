"""Test that node inputs agree with the options records of the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectune.operation import OperationOptions, option_fields
from spectune.ops.options.adapter_files import ExportOptions, SliceOptions
from spectune.ops.options.model_files import SplitOptions
from tests.comfyui_nodes.fakes import Comfy

RECORDS: dict[str, type[OperationOptions]] = {
    "SpectuneSplit": SplitOptions,
    "SpectuneExport": ExportOptions,
    "SpectuneSlice": SliceOptions,
}
# inputs with another name than their option
OPTION_OF = {
    "checkpoint": "model",
    "source": "tuned",
    "overwrite": "force",
}
# settings that only ComfyUI needs: an example text, JSON text instead of a file
OWN_DEFAULT = {("SpectuneSlice", "slices"), ("SpectuneSlice", "traits")}
# files that the nodes choose in another way, and a choice that Spectune Split does not have
NOT_SHOWN = {"out", "principal", "with_residual"}
EMPTY = (0, "", "default")


@pytest.mark.parametrize("name", RECORDS)
def test_every_option_is_an_input_that_agrees_with_it(comfy: Comfy, name: str) -> None:
    fields = {field.name: field for field in option_fields(RECORDS[name])}
    inputs: dict[str, Any] = {}
    for group in comfy.nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES().values():
        inputs |= {OPTION_OF.get(key, key): value for key, value in group.items()}
    assert set(fields) - set(inputs) <= NOT_SHOWN
    for key in set(fields) & set(inputs):
        field, (kind, settings) = fields[key], inputs[key]
        if (name, key) != ("SpectuneSlice", "traits"):
            assert settings["tooltip"].removesuffix(" 0: not set.") == field.help, key
        if field.choices:
            assert tuple(kind) == (("default",) if field.optional else ()) + field.choices, key
        if "default" in settings and (name, key) not in OWN_DEFAULT:
            default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            assert settings["default"] in (EMPTY if default is None else (default,)), key
        if field.minimum is not None:
            assert settings["min"] == (0 if field.optional else field.minimum), key


def test_the_widgets_of_comfyui_mean_the_defaults_of_the_library(comfy: Comfy) -> None:
    """The defaults of all widgets together are valid, and are those of the record."""
    for name, record in RECORDS.items():
        inputs = comfy.nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["optional"]
        shown = {
            key: settings["default"]
            for key, (_, settings) in inputs.items()
            if key not in ("base", "traits")  # files
        }
        read = comfy.nodes.widgets.values(record, shown)
        defaults = {field.name: field.default for field in option_fields(record)}
        assert {"keys", "dtype", "force"} & set(read) >= {"dtype", "force"}
        assert read == {key: defaults[key] for key in read}


def test_an_option_that_only_the_record_has_reaches_the_operation(comfy: Comfy) -> None:
    found = comfy.run(
        "SpectuneSplit",
        checkpoint="tiny.safetensors",
        residual_folder="",
        principal_folder="",
        energy=0.25,
        conv_rank=0,
        layers="te1.*",
        dtype="bfloat16",
    )
    assert found == ("tiny.residual.safetensors", "tiny.principal-e0.25.safetensors")
    tensors = load_file(comfy.folders["loras"] / found[1])
    downs = {key: value for key, value in tensors.items() if key.endswith("lora_down.weight")}
    assert downs
    assert all(key.startswith("lora_te1_") for key in downs)
    assert {value.dtype for value in downs.values()} == {torch.bfloat16}

"""Test that node inputs agree with the options records of the library."""

from __future__ import annotations

import pytest

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
    "residual_type": "residual_dtype",
}
# settings that only ComfyUI needs: an example text, a number instead of None, JSON text instead of a file
OWN_DEFAULT = {("SpectuneSplit", "rank"), ("SpectuneSlice", "slices"), ("SpectuneSlice", "traits")}


@pytest.mark.parametrize("name", RECORDS)
def test_every_input_agrees_with_its_option(comfy: Comfy, name: str) -> None:
    fields = {field.name: field for field in option_fields(RECORDS[name])}
    compared = 0
    for group in comfy.nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES().values():
        for key, (kind, settings) in group.items():
            field = fields.get(OPTION_OF.get(key, key))
            if field is None:
                continue
            compared += 1
            if (name, key) != ("SpectuneSlice", "traits"):
                assert settings["tooltip"].removesuffix(" 0: the default.") == field.help, key
            if field.choices and key != "residual_type":
                assert tuple(kind) == field.choices, key
            if "default" in settings and (name, key) not in OWN_DEFAULT:
                assert settings["default"] == (0 if field.default is None else field.default), key
            if field.minimum is not None and not field.optional:
                assert settings["min"] == field.minimum, key
    assert compared >= 4


def test_the_default_rank_is_that_of_the_library(comfy: Comfy) -> None:
    rank = comfy.nodes.NODE_CLASS_MAPPINGS["SpectuneSplit"].INPUT_TYPES()["required"]["rank"][1]["default"]
    field = next(field for field in option_fields(SplitOptions) if field.name == "rank")
    assert f"Default: {rank}." in field.help

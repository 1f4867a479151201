"""Test how nodes call the library."""

from __future__ import annotations

import pytest
import torch

from spectune.errors import InputError
from tests.comfyui_nodes.fakes import Comfy


def test_the_library_runs_outside_inference_mode(comfy: Comfy) -> None:
    """Test that tensors are not inference tensors, which threads could not write to."""
    with torch.inference_mode():
        assert torch.ones(1).is_inference()
        with comfy.nodes.nodes_split.library():
            made = torch.ones(1)
            assert not made.is_inference()
            assert not torch.is_grad_enabled()


def test_a_hint_is_on_a_separate_line(comfy: Comfy) -> None:
    with pytest.raises(RuntimeError) as caught, comfy.nodes.nodes_split.library():
        raise InputError("wrong", hint="do this")
    assert str(caught.value) == "wrong\nhint: do this"
    with pytest.raises(RuntimeError) as caught, comfy.nodes.nodes_split.library():
        raise InputError("wrong")
    assert str(caught.value) == "wrong"


def test_other_errors_are_not_changed(comfy: Comfy) -> None:
    with pytest.raises(KeyError), comfy.nodes.nodes_split.library():
        raise KeyError("x")

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from spectune.core.low_rank import LowRank
from spectune.errors import InputError, SpectuneError
from spectune.files.rename import remove_leftovers_of
from spectune.training import output, state
from spectune.training.optim.groups import build_optimizer
from spectune.training.optim.kinds import OPTIMIZERS

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
)
NESTED = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(NESTED)
def test_flatten_and_back(value: Any) -> None:
    flat = json.loads(json.dumps(state.flatten(value, {}, "v")))
    assert state.unflatten(flat, {}) == value


def test_tensors_are_moved_out_of_the_structure() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {0: {"step": torch.tensor(3.0), "dims": (1, 0)}}
    flat = json.loads(json.dumps(state.flatten(value, tensors, "o")))
    assert list(tensors) == ["o.0.step"]
    assert state.unflatten(flat, tensors) == {0: {"step": torch.tensor(3.0), "dims": (1, 0)}}


def header(step: int = 3, **changes: Any) -> state.StateHeader:
    values: dict[str, Any] = {
        "step": step,
        "steps": 10,
        "position": 2 * step,
        "base_hash": "b" * 64,
        "recipe": {"run": {"batch": 2, "steps": 10}},
        "frame_hash": "f" * 64,
        "data_hash": "d",
        "validation_before": None,
        "optimizer_package": "torch",
    }
    return state.StateHeader(**{**values, **changes})


def trained_pair(name: str) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    trained = {
        key: torch.nn.Parameter(torch.zeros(shape)) for key, shape in (("a.down", (2, 40)), ("a.up", (40, 2)))
    }
    return trained, build_optimizer(name, [{"params": list(trained.values())}])


def advance(trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for tensor in trained.values():
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        torch.manual_seed(seed)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    trained, optimizer = trained_pair(name)
    advance(trained, optimizer, range(4))
    state.save_state(tmp_path / "t.state", header(), trained, optimizer)
    advance(trained, optimizer, range(4, 9))

    other, other_optimizer = trained_pair(name)
    loaded = state.load_state(tmp_path / "t.state")
    loaded.restore(other, other_optimizer)
    advance(other, other_optimizer, range(4, 9))

    assert loaded.header == header()
    assert all(torch.equal(trained[key], other[key]) for key in trained)
    assert sorted(path.name for path in (tmp_path / "t.state").iterdir()) == [
        "extras.safetensors",
        "optimizer.safetensors",
        "state.json",
        "trained.safetensors",
    ]


def test_old_states_are_removed(tmp_path: Path) -> None:
    trained, optimizer = trained_pair("adamw")
    for step in (1, 2, 10):
        state.save_state(output.state_folder(tmp_path, "n", step), header(step), trained, optimizer)
        output.adapter_file(tmp_path, "n", step).touch()
    output.adapter_file(tmp_path, "n").touch()
    output.adapter_file(tmp_path, "n-step00000001x").touch()  # of another run
    assert output.keep_newest(output.saved_states(tmp_path, "n"), 2) == []

    assert [path.name for path in output.saved_states(tmp_path, "n")] == [
        "n-step00000002.state",
        "n-step00000010.state",
    ]
    assert len(output.step_files(tmp_path, "n")) == 3
    assert output.keep_newest(output.step_files(tmp_path, "n"), 1) == []
    assert [path.name for path in output.step_files(tmp_path, "n")] == ["n-step00000010.safetensors"]
    assert output.adapter_file(tmp_path, "n").exists()
    assert output.adapter_file(tmp_path, "n-step00000001x").exists()


def test_a_failed_save_keeps_the_old_state(tmp_path: Path) -> None:
    trained, optimizer = trained_pair("adamw")
    folder = tmp_path / "t.state"
    state.save_state(folder, header(3), trained, optimizer)
    optimizer.param_groups[0]["invalid"] = object()
    with pytest.raises(AssertionError, match="is not plain data"):
        state.save_state(folder, header(4), trained, optimizer)
    assert state.load_state(folder).header.step == 3
    assert list(tmp_path.iterdir()) == [folder]


def test_a_state_is_replaced_by_one_of_the_same_step(tmp_path: Path) -> None:
    trained, optimizer = trained_pair("adamw")
    folder = tmp_path / "t.state"
    for value in (1.0, 2.0):
        with torch.no_grad():
            next(iter(trained.values())).fill_(value)
        state.save_state(folder, header(), trained, optimizer)
    assert float(next(iter(state.load_state(folder).trained.values())).max()) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["t.state"]


def test_a_killed_replacement_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, optimizer = trained_pair("adamw")
    folder = tmp_path / "t.state"
    state.save_state(folder, header(), trained, optimizer)
    renames: list[Path] = []

    def killed(source: Path, target: Path) -> None:
        if renames:
            raise SystemExit
        renames.append(source.replace(target))

    monkeypatch.setattr(state, "rename", killed)
    with pytest.raises(SystemExit):
        state.save_state(folder, header(), trained, optimizer)
    assert not folder.exists()
    monkeypatch.setattr("psutil.pid_exists", lambda pid: False)
    remove_leftovers_of(tmp_path, r"t\..*")
    assert [path.name for path in tmp_path.iterdir()] == ["t.state"]
    state.load_state(folder)


def test_errors_name_damaged_states(tmp_path: Path) -> None:
    trained, optimizer = trained_pair("adamw")
    folder = tmp_path / "t.state"
    state.save_state(folder, header(), trained, optimizer)
    (folder / state.OPTIMIZER).write_bytes(b"torn")
    with pytest.raises(InputError, match=r"t.state is damaged: optimizer.safetensors differs"):
        state.load_state(folder)


def test_other_trained_tensors_are_refused(tmp_path: Path) -> None:
    trained, optimizer = trained_pair("adamw")
    state.save_state(tmp_path / "t.state", header(), trained, optimizer)
    saved = state.load_state(tmp_path / "t.state")
    with pytest.raises(InputError, match=r"and this run differ in 1 trained tensor, first a\.up"):
        saved.restore({"a.down": trained["a.down"]}, optimizer)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    trained, optimizer = trained_pair("adamw")
    advance(trained, optimizer, range(1))
    folder = tmp_path / "t.state"
    state.save_state(folder, header(), trained, optimizer)
    for name in (state.TRAINED, state.OPTIMIZER, state.EXTRAS):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(state.DamagedState, match=f"t.state is damaged: {name} differs from its checksum"):
            state.load_state(folder)
        (folder / name).write_bytes(content)
    assert state.load_state(folder).header.step == 3


@pytest.mark.parametrize(
    ("key", "value"), [("step", -1), ("step", 1e18), ("step", "3"), ("position", None), ("recipe", [])]
)
def test_an_edited_state_is_an_error(tmp_path: Path, key: str, value: Any) -> None:
    trained, optimizer = trained_pair("adamw")
    state.save_state(tmp_path / "t.state", header(), trained, optimizer)
    file = tmp_path / "t.state" / state.STATE
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(InputError, match=r"state\.json was changed after it was saved") as caught:
        state.load_state(tmp_path / "t.state")
    assert not isinstance(caught.value, state.DamagedState)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"format": 5}'])
def test_state_files_that_are_no_state_are_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / state.STATE).write_text(text)
    with pytest.raises(InputError, match=r"is not a complete training state|was changed after"):
        state.load_state(tmp_path)


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / state.STATE).write_text('{"format": 4}')
    with pytest.raises(InputError, match="has state format 4, but this version reads 5") as caught:
        state.load_state(tmp_path)
    assert "the version of spectune that saved it" in (caught.value.hint or "")


def test_frames_are_restored(tmp_path: Path) -> None:
    trained, optimizer = trained_pair("adamw")
    frames = {"a": LowRank(torch.rand(2, 40), torch.rand(40, 2), alpha=2.0)}
    state.save_state(tmp_path / "t.state", header(), trained, optimizer, frames=frames)
    loaded = state.load_state(tmp_path / "t.state").frames
    assert loaded is not None
    assert list(loaded) == ["a"]
    assert torch.equal(loaded["a"].down, frames["a"].down)
    assert torch.equal(loaded["a"].up, frames["a"].up)
    assert loaded["a"].alpha == 2.0


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("step", -1, "greater than or equal to 0"),
        ("position", "many", "valid integer"),
        ("optimizer", {"$code": "x"}, "`$code` is not a kind of value"),
        ("files", [], "has no attribute"),
    ],
)
def test_a_state_of_another_structure_is_refused(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    """Its checksum is right: another program wrote it."""
    trained, optimizer = trained_pair("adamw")
    folder = tmp_path / "x.state"
    state.save_state(folder, header(), trained, optimizer)
    document = json.loads((folder / state.STATE).read_text()) | {key: value}
    del document["sha256"]
    document["sha256"] = state._text_hash(json.dumps(document))
    (folder / state.STATE).write_text(json.dumps(document))
    with pytest.raises(state.DamagedState) as error:
        state.load_state(folder)
    assert reason in error.value.what


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    trained, optimizer = trained_pair("adamw")
    folder = tmp_path / "x.state"
    state.save_state(folder, header(), trained, build_optimizer("adamw", [{"params": [trained["a.up"]]}]))
    with pytest.raises(InputError, match=r"the optimizer in x\.state is not that of this run: loaded state"):
        state.load_state(folder).restore(trained, optimizer)


def test_a_full_disk_leaves_the_older_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, optimizer = trained_pair("adamw")
    state.save_state(tmp_path / "t.state", header(3), trained, optimizer)

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(SpectuneError, match=r"^cannot write .*t.state: .* MB free$") as caught:
        state.save_state(tmp_path / "t.state", header(4), trained, optimizer)
    assert "make room on the disk" in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == ["t.state"]
    assert state.load_state(tmp_path / "t.state").header.step == 3

"""The table of bases and adapters is complete, equals the documented one, and is the one applied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from string import Formatter

import pytest
import torch

from spectune.adapters.adapter import Adapter, AnyAdapter, GeneralAdapter, TunedAdapter
from spectune.adapters.kinds.pair import Pair
from spectune.core.delta import Delta
from spectune.errors import InputError, PairingError
from spectune.files.provenance import Provenance, Role
from spectune.files.source import MemorySource
from spectune.pairs.overlap import Place, overlap
from spectune.pairs.rules import (
    EXPORT,
    MERGE,
    OTHER_BASE,
    TRAIN,
    Action,
    AdapterKind,
    BaseKind,
    Rule,
    check_base_hash,
    check_exportable,
    check_frame,
    check_whole_model,
    pairing,
    pairing_table,
)
from tests.pairs.test_overlap import Model, drawn

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "adapters.md"
BEGIN, END = "<!-- pairing table: begin -->\n\n", "\n\n<!-- pairing table: end -->"
REFRESH = "python -m tests.pairs.test_rules"

BASE_ROLES = {BaseKind.MODEL: Role.MODEL, BaseKind.RESIDUAL: Role.RESIDUAL, BaseKind.UNDECLARED: None}
ADAPTERS = {
    AdapterKind.PRINCIPAL: Provenance(role=Role.PRINCIPAL),
    AdapterKind.TRAINED: Provenance(role=Role.PRINCIPAL, principal_hash="ab" * 32),
    AdapterKind.DELTAS: Provenance(role=Role.TUNED, principal_hash="ab" * 32),
    AdapterKind.LORA: Provenance(role=Role.LORA),
    AdapterKind.UNDECLARED: Provenance(),
    AdapterKind.OTHER: Provenance(),
}


@pytest.fixture(scope="module")
def model(source: MemorySource) -> Model:
    return drawn(source, 0)


def made(kind: AdapterKind, pairs: Adapter) -> AnyAdapter:
    metadata = ADAPTERS[kind].to_metadata()
    if kind is AdapterKind.OTHER:
        changes = {name: Pair(pair) for name, pair in pairs.layers.items()}
        return GeneralAdapter(changes, metadata, pairs.label)
    if kind is not AdapterKind.DELTAS:
        return replace(pairs, metadata=metadata)
    deltas = {
        name: Delta(pair, torch.zeros_like(pair.down), torch.zeros_like(pair.up))
        for name, pair in pairs.layers.items()
    }
    return TunedAdapter(deltas, metadata, pairs.label)


def in_place(place: Place, model: Model) -> tuple[MemorySource, Adapter]:
    """Return a base, and factors whose product it contains, lacks, or is unrelated to."""
    principal = model.principal(4)
    if place is Place.MISSING:
        return model.residual(4), principal
    if place is Place.UNRELATED:
        small = {name: replace(pair, up=pair.up / 100) for name, pair in principal.layers.items()}
        return model.source, replace(principal, layers=small)
    return model.source, principal


def rules() -> list[Rule]:
    cells = [*MERGE.values(), *EXPORT.values(), *TRAIN.values(), *OTHER_BASE.values()]
    return [rule for cell in cells for rule in ([cell] if isinstance(cell, Rule) else cell.values())]


def test_every_pair_has_a_cell() -> None:
    assert set(MERGE) == {(base, kind) for base in BaseKind for kind in AdapterKind}
    assert set(EXPORT) == set(TRAIN) == set(AdapterKind)
    for cell in (*MERGE.values(), *EXPORT.values()):
        assert isinstance(cell, Rule) or Place.UNRELATED in cell


def test_every_error_has_a_message_and_a_hint() -> None:
    labels = {"adapter", "base", "recorded", "found", "name"}
    for rule in rules():
        assert {name for _, name, _, _ in Formatter().parse(rule.text) if name is not None} <= labels
        assert (rule.action is Action.REFUSE) <= bool(rule.text and rule.hint)
        assert (rule.action is Action.REFUSE) == bool(rule.hint)


def test_the_page_shows_the_current_table() -> None:
    shown = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown == pairing_table(), f"refresh the page: {REFRESH}"


@pytest.mark.parametrize("place", Place)
@pytest.mark.parametrize("base_kind", BaseKind)
@pytest.mark.parametrize("kind", AdapterKind)
def test_pairing_applies_the_table(
    base_kind: BaseKind, kind: AdapterKind, place: Place, model: Model
) -> None:
    base, pairs = in_place(place, model)
    base = replace(base, metadata=base.metadata | Provenance(role=BASE_ROLES[base_kind]).to_metadata())
    adapter = made(kind, pairs)
    assert BaseKind.of(base) is base_kind
    assert AdapterKind.of(adapter) is kind
    if not isinstance(adapter, GeneralAdapter):
        assert overlap(base, adapter).place is place
    cell = MERGE[base_kind, kind]
    rule = cell if isinstance(cell, Rule) else cell.get(place, cell[Place.UNRELATED])
    if rule.action is Action.REFUSE:
        with pytest.raises(PairingError) as caught:
            pairing(base, adapter)
        assert caught.value.what == rule.text.format(adapter="p", base=base.label)
        assert caught.value.hint == rule.hint
    else:
        warning = rule.text.format(adapter="p", base=base.label)
        assert pairing(base, adapter) == (rule.action, warning)


def test_a_negative_strength_does_not_count_twice(model: Model) -> None:
    base = replace(model.source, metadata=model.source.metadata | Provenance(role=Role.MODEL).to_metadata())
    principal = made(AdapterKind.PRINCIPAL, model.principal(4))
    with pytest.raises(PairingError, match="would count twice"):
        pairing(base, principal)
    assert pairing(base, principal, strengthens=False) == (Action.ADD, "")


def test_a_lora_that_records_its_base_is_not_compared_by_values(model: Model) -> None:
    lora = replace(model.principal(4), metadata=Provenance(role=Role.LORA, base_hash="ab" * 32).to_metadata())
    assert pairing(model.source, lora) == (Action.ADD, "")


@pytest.mark.parametrize("kind", AdapterKind)
def test_adapters_for_export_and_training(kind: AdapterKind, model: Model) -> None:
    adapter = made(kind, model.principal(4))
    if kind.is_principal:
        with pytest.raises((PairingError, InputError), match=r"^p is (an untrained|a trained) principal"):
            check_exportable(adapter, None)
    else:
        check_exportable(adapter, None)
    if kind is AdapterKind.OTHER:
        with pytest.raises(InputError, match=r"^p is not a product of two factors per layer$") as caught:
            check_frame(adapter)
        assert caught.value.hint is not None
        assert caught.value.hint.startswith("write it as a plain LoRA first")
        return
    if kind is AdapterKind.UNDECLARED:
        with pytest.raises(InputError, match=r"^p has the values of a principal of model\.safetensors"):
            check_exportable(adapter, model.source)
        check_exportable(adapter, model.residual(4))
    if kind in (AdapterKind.TRAINED, AdapterKind.DELTAS):
        with pytest.raises(InputError, match=r"^p is a (trained principal|tuned adapter)"):
            check_frame(adapter)
    else:
        check_frame(adapter)


@pytest.mark.parametrize("kind", AdapterKind)
def test_a_base_that_differs_from_the_recorded_one(kind: AdapterKind, model: Model) -> None:
    origin = replace(ADAPTERS[kind], base_hash="cd" * 32, base_name="anime.safetensors")
    adapter = replace(made(kind, model.principal(4)), metadata=origin.to_metadata())
    assert check_base_hash("cd" * 32, adapter, "base") == ""
    if kind is AdapterKind.DELTAS:
        with pytest.raises(PairingError) as caught:
            check_base_hash("ef" * 32, adapter, "base")
        assert caught.value.what == f"p was trained from base {'cd' * 8}, base is {'ef' * 8}"
    elif kind.is_principal:
        assert check_base_hash("ef" * 32, adapter, "base") == ""
    else:
        assert check_base_hash("ef" * 32, adapter, "base") == (
            f"p was made for base {'cd' * 8} (anime.safetensors), base is {'ef' * 8}: quality may differ; "
            "check samples"
        )


def test_residuals_and_principals_are_not_complete_models(model: Model) -> None:
    check_whole_model(model.source)
    for role in (Role.RESIDUAL, Role.PRINCIPAL):
        part = replace(model.source, metadata=Provenance(role=role).to_metadata())
        with pytest.raises(InputError, match=rf"^model\.safetensors is a {role}: expected a complete model$"):
            check_whole_model(part)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    PAGE.write_text(before + begin + pairing_table() + END + rest.partition(END)[2], encoding="utf-8")

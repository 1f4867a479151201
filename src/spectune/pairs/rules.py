"""Decide how to combine a base and an adapter: one table, and the checks that apply it.

spectune's files declare their role. If a file does not, a few of its layers are compared with the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from spectune.adapters.adapter import Adapter, AnyAdapter, GeneralAdapter, TunedAdapter
from spectune.adapters.reader import AS_PLAIN_LORA
from spectune.adapters.writer import adapter_hash
from spectune.errors import InputError, PairingError, SpectuneError
from spectune.files.provenance import Role
from spectune.files.source import WeightSource
from spectune.pairs.overlap import Place, overlap
from spectune.pairs.residual_file import LAYER_COUNT_KEY


class BaseKind(StrEnum):
    """Kinds of checkpoints, by the role in their metadata."""

    MODEL = "model written by spectune"
    RESIDUAL = "residual of `split`"
    UNDECLARED = "checkpoint of another program"

    @classmethod
    def of(cls, base: WeightSource) -> BaseKind:
        match base.provenance.role:
            case Role.MODEL:
                return cls.MODEL
            case Role.RESIDUAL:
                return cls.RESIDUAL
            case _:
                return cls.UNDECLARED


class AdapterKind(StrEnum):
    """Kinds of adapters, by their content and the role in their metadata."""

    PRINCIPAL = "principal of `split`"
    TRAINED = "trained principal"  # from `export --form principal`
    DELTAS = "tuned adapter"
    LORA = "LoRA of spectune"
    UNDECLARED = "adapter of another program"
    OTHER = "adapter of another kind (LoHa, LoKr, DoRA, ...)"

    @classmethod
    def of(cls, adapter: AnyAdapter) -> AdapterKind:
        declared = adapter.provenance
        if isinstance(adapter, GeneralAdapter):
            return cls.OTHER
        if isinstance(adapter, TunedAdapter):
            return cls.DELTAS
        if declared.role is Role.PRINCIPAL:
            return cls.PRINCIPAL if declared.principal_hash is None else cls.TRAINED
        return cls.UNDECLARED if declared.role is None else cls.LORA

    @property
    def is_principal(self) -> bool:
        return self in (AdapterKind.PRINCIPAL, AdapterKind.TRAINED)


class Action(StrEnum):
    """What to do with an adapter; the values are cells of the documented table."""

    ADD = "adds its product, W + BA"
    APPLY = "applies its change of every weight, bias and norm"
    ADD_CHANGE = "adds its change, W + dB (A0 + dA) + B0 dA"
    RESTORE = "restores the original, R + B0 A0"
    REPLACE = "builds the tuned model, R + (B0 + dB)(A0 + dA)"
    EXPORT = "writes its change"
    CUT = "writes the adapter at a lower rank"
    FRAME = "uses it as the frame"
    REFUSE = "error"


@dataclass(frozen=True)
class Rule:
    """What to do with a pair; `text` is an error message for REFUSE, otherwise a warning."""

    action: Action
    text: str = ""  # a template with {adapter}, {base}, ... for labels and hashes
    hint: str = ""
    error: type[SpectuneError] = PairingError

    def apply(self, **labels: str) -> str:
        """Raise the error, or return the warning (empty if there is none)."""
        text = self.text.format(**labels)
        if self.action is Action.REFUSE:
            raise self.error(text, hint=self.hint)
        return text


Cell = Rule | Mapping[Place, Rule]  # the mapping: decide by comparing values

_PASS_RESIDUAL = "pass the residual that `spectune split` wrote with the principal as `base`"
_PASS_PRINCIPAL = "pass the principal that `spectune split` wrote as `principal`"
_COUNTS_TWICE = ": {base} is not a residual of spectune, so the principal part would count twice"
_TWICE = Rule(Action.REFUSE, "{adapter} is a principal adapter" + _COUNTS_TWICE, _PASS_RESIDUAL)
_TWICE_BY_VALUES = Rule(
    Action.REFUSE, "{adapter} has the values of a principal adapter" + _COUNTS_TWICE, _PASS_RESIDUAL
)
_NOT_FOR_RESIDUAL = Rule(
    Action.REFUSE,
    "{adapter} requires a complete model: {base} is a residual, which lacks its principal",
    "pass the original model as `base`",
)
_TAKEN_FOR_TRAINED = Rule(
    Action.REPLACE,
    "{adapter} does not declare which principal it was trained from, but its values resemble a principal: "
    "assuming that it was trained from the principal of {base}",
)
_TAKEN_FOR_PAIR = (
    "{base} does not declare that it is a residual, but it lacks the values of {adapter}: assuming that the "
    "two are a pair"
)
_ADD, _ADD_CHANGE, _APPLY = Rule(Action.ADD), Rule(Action.ADD_CHANGE), Rule(Action.APPLY)
_NO_FACTORS = Rule(
    Action.REFUSE,
    "{adapter} is not a product of two factors per layer",
    AS_PLAIN_LORA,
    InputError,
)
_ON_MODEL = {Place.INSIDE: _TWICE_BY_VALUES, Place.UNRELATED: _ADD}
_ON_ANY = {Place.MISSING: Rule(Action.RESTORE, _TAKEN_FOR_PAIR), **_ON_MODEL}

# Rules of `rebuild`, `sample` and the nodes. Without a strength above 0, nothing counts twice: see `pairing`.
MERGE: Mapping[tuple[BaseKind, AdapterKind], Cell] = {
    (BaseKind.MODEL, AdapterKind.PRINCIPAL): _TWICE,
    (BaseKind.MODEL, AdapterKind.TRAINED): _TWICE,
    (BaseKind.MODEL, AdapterKind.DELTAS): _ADD_CHANGE,
    (BaseKind.MODEL, AdapterKind.LORA): _ON_MODEL,
    (BaseKind.MODEL, AdapterKind.UNDECLARED): _ON_MODEL,
    (BaseKind.MODEL, AdapterKind.OTHER): _APPLY,
    (BaseKind.RESIDUAL, AdapterKind.PRINCIPAL): Rule(Action.RESTORE),
    (BaseKind.RESIDUAL, AdapterKind.TRAINED): Rule(Action.REPLACE),
    (BaseKind.RESIDUAL, AdapterKind.DELTAS): Rule(Action.REPLACE),
    (BaseKind.RESIDUAL, AdapterKind.LORA): _NOT_FOR_RESIDUAL,
    (BaseKind.RESIDUAL, AdapterKind.UNDECLARED): {
        Place.MISSING: _TAKEN_FOR_TRAINED,
        Place.UNRELATED: _NOT_FOR_RESIDUAL,
    },
    (BaseKind.RESIDUAL, AdapterKind.OTHER): _NOT_FOR_RESIDUAL,
    (BaseKind.UNDECLARED, AdapterKind.PRINCIPAL): {
        Place.MISSING: Rule(Action.RESTORE, _TAKEN_FOR_PAIR),
        Place.UNRELATED: _TWICE,
    },
    (BaseKind.UNDECLARED, AdapterKind.TRAINED): {
        Place.MISSING: Rule(Action.REPLACE, _TAKEN_FOR_PAIR),
        Place.UNRELATED: _TWICE,
    },
    (BaseKind.UNDECLARED, AdapterKind.DELTAS): {
        Place.MISSING: Rule(Action.REPLACE),
        Place.UNRELATED: _ADD_CHANGE,
    },
    (BaseKind.UNDECLARED, AdapterKind.LORA): _ON_ANY,
    (BaseKind.UNDECLARED, AdapterKind.UNDECLARED): _ON_ANY,
    (BaseKind.UNDECLARED, AdapterKind.OTHER): _APPLY,
}

# Rules for a base whose weights hash differs from the one in the adapter. Principals are not checked: they
# record the hash of the original, not of the residual.
OTHER_BASE: Mapping[AdapterKind, Rule] = {
    AdapterKind.DELTAS: Rule(
        Action.REFUSE,
        "{adapter} was trained from base {recorded}, {base} is {found}",
        "pass the model that the adapter was trained from as `base`; "
        "for another model, write a plain LoRA with `spectune export`",
    ),
    **dict.fromkeys(
        (AdapterKind.LORA, AdapterKind.UNDECLARED, AdapterKind.OTHER),
        Rule(
            Action.ADD,
            "{adapter} was made for base {recorded} ({name}), {base} is {found}: quality may differ; check "
            "samples",
        ),
    ),
}

# Rules of `export`, for any base.
EXPORT: Mapping[AdapterKind, Cell] = {
    AdapterKind.PRINCIPAL: Rule(
        Action.REFUSE,
        "{adapter} is an untrained principal of `split`: it contains no change",
        "pass a trained adapter; added to the original model, this principal would count twice",
    ),
    AdapterKind.TRAINED: Rule(
        Action.REFUSE,
        "{adapter} is a trained principal: computing its change requires the untrained principal",
        _PASS_PRINCIPAL,
        InputError,
    ),
    AdapterKind.DELTAS: Rule(Action.EXPORT),
    AdapterKind.LORA: Rule(Action.CUT),
    AdapterKind.UNDECLARED: {
        Place.INSIDE: Rule(
            Action.REFUSE,
            "{adapter} has the values of a principal of {base}: computing its change requires the untrained "
            "principal",
            _PASS_PRINCIPAL,
            InputError,
        ),
        Place.UNRELATED: Rule(Action.CUT),
    },
    AdapterKind.OTHER: Rule(Action.EXPORT),
}

# Rules for `model.principal` of a recipe, for any base.
TRAIN: Mapping[AdapterKind, Rule] = {
    AdapterKind.PRINCIPAL: Rule(Action.FRAME),
    AdapterKind.TRAINED: Rule(
        Action.REFUSE,
        "{adapter} is a trained principal: its change would be lost",
        "rebuild the tuned model and split that, or continue the run from its state in run.output",
        InputError,
    ),
    AdapterKind.DELTAS: Rule(
        Action.REFUSE,
        "{adapter} is a tuned adapter: expected a principal",
        "to train on from it, set model.start to it, without model.principal and model.rank; to resume an "
        "interrupted run, start it again",
        InputError,
    ),
    AdapterKind.LORA: Rule(Action.FRAME),
    AdapterKind.UNDECLARED: Rule(Action.FRAME),
    AdapterKind.OTHER: _NO_FACTORS,
}


def pairing(base: WeightSource, adapter: AnyAdapter, *, strengthens: bool = True) -> tuple[Action, str]:
    """Return what to do with a base and an adapter, and a warning or an empty string.

    `strengthens` says whether any strength is above 0. Raises PairingError if the two cannot be combined.
    Hashes are not compared: see `check_residual_pair` and `check_base_hash`.
    """
    base_kind, kind = BaseKind.of(base), AdapterKind.of(adapter)
    if not strengthens and base_kind is not BaseKind.RESIDUAL and kind is not AdapterKind.DELTAS:
        return Action.ADD, ""
    rule = _chosen(MERGE[base_kind, kind], base, adapter)
    return rule.action, rule.apply(adapter=adapter.label, base=base.label)


def check_exportable(adapter: AnyAdapter, base: WeightSource | None) -> None:
    """Raise PairingError or InputError if the change of an adapter cannot be computed from it alone."""
    rule = _chosen(EXPORT[AdapterKind.of(adapter)], base, adapter)
    rule.apply(adapter=adapter.label, base="" if base is None else base.label)


def check_frame(adapter: AnyAdapter) -> None:
    """Raise InputError if an adapter cannot be the frame of a training."""
    TRAIN[AdapterKind.of(adapter)].apply(adapter=adapter.label)


def check_whole_model(base: WeightSource, *, hint: str = "pass the original model") -> None:
    """Raise InputError if the metadata declares a residual, or another role than a complete model."""
    role = base.provenance.role
    if role not in (None, Role.MODEL):
        raise InputError(f"{base.label} is a {role}: expected a complete model", hint=hint)


def _chosen(cell: Cell, base: WeightSource | None, adapter: AnyAdapter) -> Rule:
    if isinstance(cell, Rule):
        return cell
    assert not isinstance(adapter, GeneralAdapter)  # its rules compare no values
    declared = adapter.provenance
    # `slice` of other programs' LoRAs writes a LoRA of spectune without a base hash
    known = declared.role is Role.LORA and declared.base_hash is not None
    plain = isinstance(adapter, TunedAdapter) and declared.principal_hash is None
    if base is None or known or plain:
        return cell[Place.UNRELATED]
    return cell.get(overlap(base, adapter).place, cell[Place.UNRELATED])


def check_residual_pair(residual: WeightSource, adapter: Adapter | TunedAdapter) -> bool:
    """Return whether `adapter` is bit for bit the principal that was taken out of `residual`.

    Raises PairingError with both hashes unless `adapter` is this principal or was trained from it. A file of
    another program records no principal, so its values are compared.
    """
    made_from, declared = (file.provenance for file in (residual, adapter))
    if made_from.role is not Role.RESIDUAL:
        raise PairingError(
            f"{residual.label} is not a residual of spectune: its role is {made_from.role or 'unknown'}",
            hint=_PASS_RESIDUAL,
        )
    found, verb = declared.principal_hash, "was trained from"
    if isinstance(adapter, Adapter):
        # a trained principal records the hash of the one it replaces; an untrained one records none and is
        # identified by its own hash
        verb = "is" if found is None else "replaces"
    untouched = verb == "is"
    if untouched:
        assert isinstance(adapter, Adapter)
        found = adapter_hash(adapter)
    foreign = AdapterKind.of(adapter) is AdapterKind.UNDECLARED
    if made_from.principal_hash != found and not (foreign and _is_missing(residual, adapter)):
        raise PairingError(
            f"{residual.label} belongs to principal {short_hash(made_from.principal_hash)}, "
            f"{adapter.label} {verb} principal {short_hash(found)}",
            hint="pass the two files of one `spectune split`",
        )
    count = residual.metadata.get(LAYER_COUNT_KEY)
    if count is not None and count != str(len(adapter.layers)):
        raise PairingError(
            f"{residual.label} lacks the principal of {count} layers, "
            f"{adapter.label} has {len(adapter.layers)}",
            hint="the adapter was trained on some of these layers only: pass the original model as `base`",
        )
    return untouched and made_from.principal_hash == found


def _is_missing(base: WeightSource, adapter: Adapter | TunedAdapter) -> bool:
    return overlap(base, adapter).place is Place.MISSING


def check_base_hash(found: str, adapter: AnyAdapter, label: str) -> str:
    """Return a warning, or an empty string, for a base whose weights hash is `found`.

    Raises PairingError if the adapter works only on the base it was trained from, and this is another one.
    """
    declared = adapter.provenance
    rule = OTHER_BASE.get(AdapterKind.of(adapter))
    same = (None, found, foreign_residual_hash(found, declared.principal_hash))
    if rule is None or declared.base_hash in same:
        return ""
    recorded, name = short_hash(declared.base_hash), declared.base_name or "unnamed"
    return rule.apply(
        adapter=adapter.label, base=label, recorded=recorded, name=name, found=short_hash(found)
    )


def foreign_residual_hash(residual_hash: str, principal_hash: str | None) -> str:
    """Return a substitute for the base hash of a model if only another program's residual of it is known.

    No file has this hash, so no check mistakes the residual for the original.
    """
    return hashlib.sha256(f"{residual_hash}+{principal_hash}".encode()).hexdigest()


def short_hash(digest: str | None) -> str:
    """Return the first 16 digits of a hash, for messages."""
    return "(none recorded)" if digest is None else digest[:16]


def pairing_table() -> str:
    """Return all rules as a Markdown table."""
    uses: Mapping[str, Mapping[AdapterKind, Cell]] = {
        **{f"merge with a {base}": {kind: MERGE[base, kind] for kind in AdapterKind} for base in BaseKind},
        "merge with another base than recorded": OTHER_BASE,
        "`export`": EXPORT,
        "`model.principal`": TRAIN,
    }
    rows = ["| use | adapter | result |", "| --- | --- | --- |"]
    for use, cells in uses.items():
        kinds: dict[str, list[str]] = {}
        for kind, cell in cells.items():
            kinds.setdefault(_shown(cell), []).append(kind)
        rows += [f"| {use} | {', '.join(same)} | {result} |" for result, same in kinds.items()]
    return "\n".join(rows)


def _shown(cell: Cell) -> str:
    if not isinstance(cell, Rule):
        return "; ".join(f"{place}: {_shown(rule)}" for place, rule in cell.items())
    if cell.action is Action.REFUSE:
        return f"error; {cell.hint}"
    return f"{cell.action} (with a warning)" if cell.text else str(cell.action)

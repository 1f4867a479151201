"""All kinds of adapters, and which suffixes of keys identify them."""

from __future__ import annotations

from collections.abc import Mapping

from spectune.adapters.adapter import ALPHA, LOW_RANK_SUFFIXES, MID
from spectune.adapters.kinds.boft import BOFT_KIND
from spectune.adapters.kinds.change import ChangeKind
from spectune.adapters.kinds.difference import FULL_DIFFERENCE
from spectune.adapters.kinds.dora import LYCORIS_MAGNITUDE, PEFT_MAGNITUDE
from spectune.adapters.kinds.glora import GLORA
from spectune.adapters.kinds.ia3 import IA3_KIND
from spectune.adapters.kinds.loha import LOHA
from spectune.adapters.kinds.lokr import LOKR
from spectune.adapters.kinds.oft import OFT_KIND
from spectune.adapters.kinds.pair import PAIR

KINDS: tuple[ChangeKind, ...] = (PAIR, LOHA, LOKR, FULL_DIFFERENCE, OFT_KIND, BOFT_KIND, GLORA, IA3_KIND)
MAGNITUDES = (LYCORIS_MAGNITUDE, PEFT_MAGNITUDE)
DECOMPOSABLE = (PAIR, LOHA, LOKR)  # kinds that can have a magnitude
BIAS_DIFFERENCE = "diff_b"
NORM_DIFFERENCES = ("w_norm", "b_norm")
# Differences of the parameters of norms and embeddings: suffix -> name of the parameter.
DIFFERENCES: Mapping[str, str] = {"w_norm": "weight", "b_norm": "bias", "diff": "weight", "diff_b": "bias"}
# Suffixes that layers of several kinds can have.
SHARED = frozenset({ALPHA, BIAS_DIFFERENCE, *MAGNITUDES})
# Suffixes that no product of two factors has.
OTHER_SUFFIXES: frozenset[str] = frozenset(
    {*MAGNITUDES, *DIFFERENCES}.union(*(names for kind in KINDS for names in kind.suffixes))
) - {*LOW_RANK_SUFFIXES, MID}


def kinds_with(suffixes: frozenset[str]) -> tuple[ChangeKind, ...]:
    """Return the kinds whose layers have exactly these suffixes; several if the shapes decide."""
    return tuple(kind for kind in KINDS if suffixes in kind.suffixes)

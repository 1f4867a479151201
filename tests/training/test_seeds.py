from __future__ import annotations

from spectune.training.seeds import derived_generator, derived_seed


def test_seeds_are_stable_and_distinct() -> None:
    # A change of this value would change every resumed run.
    assert derived_seed(1, "noise", 0) == 1932746039312760511
    seeds = {derived_seed(seed, kind, i) for seed in range(3) for kind in ("a", "b") for i in range(3)}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_generator(1, "x").initial_seed() == derived_seed(1, "x")

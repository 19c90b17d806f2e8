"""A checkpoint of every kind of engine loads into every other kind without the loss of a bit."""

import pytest
from runs import run_module

KINDS = 6  # ZeRO 0, 1, 2, 3, and 2 and 3 with offload


@pytest.mark.parametrize(("ranks", "pairs"), [(1, 2 * KINDS), pytest.param(2, KINDS**2, marks=pytest.mark.soak)])
def test_state_is_bit_identical_across_engine_kinds(ranks, pairs):
    output = run_module("resharding", *["all"] * (ranks > 1), ranks=ranks)
    assert output.count("resharded ") == pairs
    assert ranks > 1 or "EMA as defined" in output

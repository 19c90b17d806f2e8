"""What a checkpoint holds goes from every kind of engine into every other without the loss of a bit."""

import pytest
from runs import printed

KINDS = 6  # ZeRO 0, 1, 2, 3, and 2 and 3 with offload


@pytest.mark.parametrize(
    ("ranks", "pairs"), [(1, 2 * KINDS), pytest.param(2, KINDS**2, marks=pytest.mark.soak)]
)
def test_weights_moments_and_averages_are_carried_between_stages_with_and_without_offload(ranks, pairs):
    said = printed("carried_state", *["all"] * (ranks > 1), ranks=ranks)
    assert said.count("carried ") == pairs
    assert ranks > 1 or "average as defined" in said

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.split import select_split

KEYS = [f"n01440764_{number}" for number in range(20_000)]


@pytest.mark.parametrize(("subset", "holdout"), [(1.0, 0.02), (0.1, 0.0), (0.1, 0.5)])
def test_shares_are_as_requested_and_independent(subset, holdout):
    training, held_out = (select_split(KEYS, split, subset, holdout).mean() for split in ("training", "held_out"))
    assert held_out == pytest.approx(holdout, abs=0.01)
    assert training == pytest.approx(subset * (1 - holdout), abs=0.015)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.99))
def test_subsets_are_nested_and_exclude_the_holdout(one, other, holdout):
    keys = KEYS[:200]
    small, large = (select_split(keys, "training", share, holdout) for share in sorted([one, other]))
    assert not (small & ~large).any()
    assert not (large & select_split(keys, "held_out", one, holdout)).any()
    union = select_split(keys, "training", 1.0, holdout) | select_split(keys, "held_out", one, holdout)
    assert union.all()


@given(st.lists(st.integers(0, 8), min_size=30, max_size=300), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_class_balanced_subsets_are_exact_and_nested(labels, one, other, holdout):
    labels, keys = np.array(labels), KEYS[: len(labels)]
    small, large = (select_split(keys, "training", share, holdout, labels) for share in sorted([one, other]))
    held_out = select_split(keys, "held_out", one, holdout, labels)
    assert not (small & ~large).any() and not (large & held_out).any()
    for label in np.unique(labels[~held_out]):
        of_class = (labels == label) & ~held_out
        assert (large & of_class).sum() == max(1, round(max(one, other) * of_class.sum()))


def test_membership_does_not_depend_on_other_samples():
    shuffled = np.random.default_rng(0).permutation(len(KEYS))
    selected = select_split(KEYS, "training", 0.3, 0.1)
    assert (select_split([KEYS[i] for i in shuffled], "training", 0.3, 0.1) == selected[shuffled]).all()


def test_selection_never_changes_between_versions():
    held_out = np.flatnonzero(select_split(KEYS[:200], "held_out", 1.0, 0.03))
    assert held_out.tolist() == [11, 14, 18, 86, 108, 124, 131, 138]

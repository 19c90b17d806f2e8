"""Accuracy: counts as torch gives them, intervals by Wilson's equation."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from pipeline.evals.accuracy import Accuracy, count_topk_correct, rank_of_label

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


@given(st.integers(1, 5000), st.data())
def test_interval_solves_wilsons_equation(total, data):
    """The limits are the shares from which the observed one is Z standard errors away (Wilson 1927)."""
    accuracy = Accuracy(data.draw(st.integers(0, total)), total)
    low, high = accuracy.interval
    assert 0 <= low <= accuracy.share <= high <= 1
    for limit in (low, high):
        variance = limit * (1 - limit) / total
        assert (accuracy.share - limit) ** 2 == approx(Z**2 * variance, rel=1e-9, abs=1e-12)


def test_topk_counts_match_torch_and_ties_go_to_lower_class():
    scores = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 9
    top5 = (scores.topk(5).indices == labels[:, None]).any(1).sum()
    assert count_topk_correct(scores, labels) == ((scores.argmax(1) == labels).sum(), top5)
    assert rank_of_label(torch.zeros(3, 3), torch.arange(3)).tolist() == [0, 1, 2]


def test_non_finite_score_is_never_correct():
    scores = torch.tensor([[float("nan")] * 6, [float("-inf")] * 6])
    assert count_topk_correct(scores, torch.zeros(2, dtype=torch.int64)) == (0, 0)

"""Counts and intervals, against scipy's."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from scipy.stats import binomtest

from pipeline.evals.accuracy import Accuracy, count_topk_correct, rank_of_label


@given(st.integers(1, 5000), st.data())
def test_the_interval_is_wilsons(total, data):
    correct = data.draw(st.integers(0, total))
    wanted = binomtest(correct, total).proportion_ci(0.95, "wilson")
    assert Accuracy(correct, total).interval == approx((wanted.low, wanted.high), abs=1e-9)


def test_the_first_five_are_topks_and_ties_go_to_the_smaller_class():
    scores = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 9
    five = (scores.topk(5).indices == labels[:, None]).any(1).sum()
    assert count_topk_correct(scores, labels) == ((scores.argmax(1) == labels).sum(), five)
    assert rank_of_label(torch.zeros(3, 3), torch.arange(3)).tolist() == [0, 1, 2]


def test_what_is_not_finite_is_not_right():
    scores = torch.tensor([[float("nan")] * 6, [float("-inf")] * 6])
    assert count_topk_correct(scores, torch.zeros(2, dtype=torch.int64)) == (0, 0)

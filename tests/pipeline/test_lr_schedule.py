"""The learning rate is that of the official MAE code."""

import math

from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from pipeline.train.lr_schedule import learning_rate, warmup_warning


def official_learning_rate(epoch, warmup_epochs, total_epochs, peak, floor):
    """Compute the rate by the formula of util/lr_sched.py in the official MAE code."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (total_epochs - warmup_epochs)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@given(st.integers(0, 799), st.integers(0, 311))
def test_rate_equals_the_official_one_at_every_iteration(epoch, iteration):
    per_epoch = 312
    step = epoch * per_epoch + iteration
    rate = learning_rate(step, 800 * per_epoch, 40 * per_epoch, 2.4e-3, 1e-6)
    assert rate == approx(official_learning_rate(epoch + iteration / per_epoch, 40, 800, 2.4e-3, 1e-6))


def test_run_shorter_than_its_warmup_stays_in_it():
    rates = [learning_rate(step, 10, 100, 1.0) for step in range(10)]
    assert rates == [step / 100 for step in range(10)]


@given(st.integers(1, 50), st.integers(0, 50))
def test_warning_if_the_peak_is_never_reached(total, warmup):
    rates = [learning_rate(step, total, warmup, 1.0) for step in range(total)]
    assert (warmup_warning(total, warmup) is None) == (max(rates) == 1.0)


def test_steps_are_detectron2s():
    total, peak = 184_375, 1e-4  # milestones and factors of ViTDet's configuration
    for step, expected in ((125, peak / 2), (250, peak), (163_888, peak), (163_889, peak / 10), (177_546, peak / 100)):
        rate = learning_rate(step, total, 250, peak, 0.0, "steps", (0.888889, 0.96296))
        assert rate == approx(expected), step


def test_linear_decay_is_mmsegmentations():
    rates = [learning_rate(step, 100, 20, 1.0, 0.0, "linear") for step in (10, 20, 60, 100)]
    assert rates == approx([0.5, 1.0, 0.5, 0.0])

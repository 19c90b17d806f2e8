import math

from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from pipeline.train.lr_schedule import learning_rate, warmup_warning


def official(epoch, warmup, total, peak, floor):
    """util/lr_sched.py of the official MAE code, from its description."""
    if epoch < warmup:
        return peak * epoch / warmup
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (total - warmup)))


@given(st.integers(0, 799), st.integers(0, 311))
def test_the_rate_is_the_official_codes_at_every_iteration(epoch, iteration):
    per_epoch = 312
    step = epoch * per_epoch + iteration
    ours = learning_rate(step, 800 * per_epoch, 40 * per_epoch, 2.4e-3, 1e-6)
    assert ours == approx(official(epoch + iteration / per_epoch, 40, 800, 2.4e-3, 1e-6))


def test_a_run_shorter_than_its_warm_up_stays_in_it():
    rates = [learning_rate(step, 10, 100, 1.0) for step in range(10)]
    assert rates == [step / 100 for step in range(10)]


@given(st.integers(1, 50), st.integers(0, 50))
def test_who_never_reaches_the_peak_is_told(total, warmup):
    rates = [learning_rate(step, total, warmup, 1.0) for step in range(total)]
    assert (warmup_warning(total, warmup) is None) == (max(rates) == 1.0)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.philox import Purpose, permutation, philox, random_bits, uniform

KNOWN_ANSWERS = [  # kat_vectors of the Random123 distribution, philox4x32 10
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_matches_the_published_test_vectors(counter, key, answer):
    low, high = (int(word, 16) for word in key.split())
    words = philox(np.array([int(word, 16) for word in counter.split()], np.uint64), high << 32 | low)
    assert [f"{word:08x}" for word in words] == answer.split()


@given(st.integers(0, 2**63 - 1), st.sampled_from(Purpose), st.integers(0, 2**32 - 1), st.integers(0, 2**56 - 1))
def test_number_does_not_depend_on_the_other_items(seed, purpose, epoch, item):
    alone = random_bits(seed, purpose, epoch, item, 5)
    items = np.array([0, item, 7])
    assert (random_bits(seed, purpose, epoch, items, 9)[1, :5] == alone).all()


@given(st.integers(0, 2**63 - 1))
def test_purposes_epochs_and_items_are_independent(seed):
    rows = [
        tuple(random_bits(seed, purpose, epoch, item, 4))
        for purpose in Purpose
        for epoch in (0, 1, 2**31)
        for item in (0, 1, 2**32, 2**40)
    ]
    assert len(set(rows)) == len(rows)


def test_uniform_numbers_are_uniform():
    numbers = uniform(3, Purpose.MASK, 0, np.arange(1000), 200)
    assert numbers.dtype == np.float32 and numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    chi2 = ((counts - 4000) ** 2 / 4000).sum()
    assert chi2 < 94.6  # 49 degrees of freedom, p = 1e-4


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_permutation_contains_each_index_once(seed, size):
    assert sorted(permutation(seed, Purpose.WINDOW, 1, 2, size)) == list(range(size))

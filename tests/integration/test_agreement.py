"""Ranks agree on stops one micro batch late, without waiting for each other, and gather rows in pieces."""

from runs import run_module


def test_ranks_agree_while_they_train_and_gather_in_pieces():
    assert run_module("agreeing_ranks", ranks=2).count("agreed") == 2

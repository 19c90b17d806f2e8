"""Every method learns under ZeRO 3 with activation checkpointing what it learns in plain PyTorch."""

from runs import printed


def test_every_method_and_combination_learns_under_zero_3_what_it_learns_in_plain_pytorch():
    assert printed("methods_under_zero", ranks=2).count("the same ") == 6

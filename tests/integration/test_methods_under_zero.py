"""Every method has the same losses with ZeRO-3 and activation checkpointing as with plain PyTorch."""

from runs import run_module


def test_methods_train_with_zero_3_as_with_plain_pytorch():
    assert run_module("methods_under_zero", ranks=2).count("equal: ") == 10

"""Batch normalization of one process is torch's; tests/integration/test_ranks_of_batch_norm.py has several ranks."""

import pytest
import torch
from torch import nn

from pipeline.distributed.sync_batch_norm import SyncBatchNorm2d

NOT_SKIPPED, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def pair() -> tuple[SyncBatchNorm2d, nn.BatchNorm2d]:
    theirs = nn.BatchNorm2d(5)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = SyncBatchNorm2d(5)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    return ours, theirs


def images(seed: int = 0, offset: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, 6, 7, generator=generator) * 2 + offset


def test_outputs_gradients_and_statistics_are_torchs():
    ours, theirs = pair()
    for step in range(3):
        inputs = [images(step).requires_grad_() for _ in range(2)]
        weights = torch.randn(4, 5, 6, 7)
        outputs = [norm(each) for norm, each in zip((ours, theirs), inputs, strict=True)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
        for output in outputs:
            (output * weights).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-4)
        ours.update_running_statistics(NOT_SKIPPED)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.running_var, theirs.running_var, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.eval()(images()), theirs.eval()(images()), atol=1e-5, rtol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    ours, _ = pair()
    weights = torch.randn(2, 5, 2, 2)
    inputs = torch.randn(2, 5, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad((ours(inputs) * weights).sum(), inputs)
    direction = torch.randn_like(inputs)
    with torch.no_grad():
        low, high = ((ours(inputs + sign * 1e-2 * direction).double() * weights).sum() for sign in (-1, 1))
    assert float((gradient * direction).sum()) == pytest.approx(float((high - low) / 2e-2), rel=2e-2, abs=1e-2)


def test_micro_batches_update_the_statistics_as_their_union():
    halves, whole = SyncBatchNorm2d(5), SyncBatchNorm2d(5)
    whole(images())
    for half in images().chunk(2):
        halves(half)
    for norm in (halves, whole):
        norm.update_running_statistics(NOT_SKIPPED)
    torch.testing.assert_close(halves.running_mean, whole.running_mean)
    torch.testing.assert_close(halves.running_var, whole.running_var)


def test_a_skipped_step_leaves_the_statistics_unchanged():
    norm = SyncBatchNorm2d(5)
    norm(images() * float("nan"))
    norm.update_running_statistics(SKIPPED)
    assert torch.equal(norm.running_mean, torch.zeros(5)) and torch.equal(norm.running_var, torch.ones(5))
    norm(images())
    norm.update_running_statistics(NOT_SKIPPED)
    assert norm.running_mean.isfinite().all() and not torch.equal(norm.running_mean, torch.zeros(5))


def test_sixteen_bits_keep_statistics_in_fp32():
    norm = SyncBatchNorm2d(5).bfloat16()
    output = norm(images().bfloat16())
    norm.update_running_statistics(NOT_SKIPPED)
    assert output.dtype == torch.bfloat16 and norm.weight.dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    expected = nn.functional.batch_norm(images(), None, None, training=True)
    assert (output.float() - expected).abs().max() < 0.03

"""The guard against divergence: which steps are skipped, when the run goes back, when it stops.

Invariant: a step whose loss or gradient is not finite, or whose loss is a spike, leaves weights and moments
as they were, and is counted and said. All that is decided follows from numbers that are the same on every
rank and from the step they belong to, never from when somebody looked. So all ranks decide alike, and a run
that was killed decides again what it decided before.

Whether to skip is decided on the device, by `verdict`, which the optimiser asks before its step; the host
reads of it a step later, by `read`, and so does not wait for the device.
"""

import math
import time
from typing import NamedTuple

import torch

from pipeline.distributed.collectives import all_reduce_mean
from pipeline.errors import Diverged
from pipeline.recipe.sections import GuardSection

REASONS = (
    None,
    "the loss is not finite",
    "the gradient is not finite",
    "the loss is a spike",
    "an overflow in fp16; the loss scale goes down",
)
LOSS, GRADIENT, SPIKE, OVERFLOW = range(1, 5)
MIN_SPREAD = 0.01
"""Of the median loss: losses that hardly vary don't make a spike of a hundredth more."""
MAX_OVERFLOWS = 40
"""In a row, before they count as trouble. DeepSpeed needs half as many from its first loss scale to 1."""


class SkippedStep(NamedTuple):
    """A skipped step."""

    step: int
    """As in metrics.jsonl: the first is 1."""
    reason: str
    loss: float | None
    """None where it is not finite."""
    grad_norm: float | None

    def message(self) -> str:
        numbers = ", ".join(
            f"{name} {'not finite' if value is None else f'{value:.4g}'}"
            for name, value in {"loss": self.loss, "gradient norm": self.grad_norm}.items()
        )
        return f"step {self.step} is skipped: {self.reason} ({numbers})"


class BadSpan(NamedTuple):
    """Steps skipped in a row, more than the recipe allows."""

    first: int
    last: int
    reason: str


class Guard:
    """Judges every step of one run.

    state: what `state()` gave when the checkpoint was written that the run continues from; None at the
    beginning.
    """

    def __init__(self, options: GuardSection, precision: str, device: torch.device, state: dict | None):
        state = state or {"losses": [], "row": [], "overflows": 0, "skips": [], "offset": 0, "returns": []}
        self.options, self.fp16 = options, precision == "fp16"
        self.offset: int = state["offset"]
        """Stream positions skipped so far."""
        self.rollbacks: list[dict] = list(state["returns"])
        """Every return of the run, as metrics.jsonl has it."""
        self.skips = [SkippedStep(*skip) for skip in state["skips"]]
        """Those since the last logged line."""
        self._row: list[int] = list(state["row"])
        self._overflows: int = state["overflows"]
        known = state["losses"][-options.window :]
        missing = [float("nan")] * (options.window - len(known))  # with one of them nothing is a spike
        self._losses = torch.tensor(missing + known, device=device)
        self._loss = torch.zeros((), device=device)
        self._unread: list[tuple[int, torch.Tensor, torch.cuda.Event | None]] = []

    def observe_loss(self, loss: torch.Tensor) -> None:
        """Take the step's loss, this rank's mean: 0-d. Every rank calls it, before the optimiser's step."""
        self._loss = all_reduce_mean(loss.detach().float().clone())

    def should_skip(self, norm: float | torch.Tensor) -> torch.Tensor:
        """1.0 where the step must be skipped, else 0.0: 0-d, on the device. norm: of the whole gradient."""
        return (self._judge(norm) > 0).float()

    def close(self, step: int, norm: float | torch.Tensor) -> torch.Tensor:
        """After the optimiser's step, the run's `step`-th: remember it. Returns the verdict."""
        judged = self._judge(norm)
        losses = torch.cat([self._losses[1:], self._loss[None]])
        self._losses = torch.where(judged == 0, losses, self._losses)
        record = torch.stack([judged.float(), self._loss, self._as_tensor(norm)])
        seen = None
        if record.is_cuda:
            record = record.to("cpu", non_blocking=True)
            seen = torch.cuda.Event()
            seen.record()
        self._unread.append((step, record, seen))
        return (judged > 0).float()

    def read(self, step: int) -> BadSpan | None:
        """Hear of the steps up to `step`, the newest but one costs no waiting. Trouble: more in a row than
        allowed."""
        while self._unread and self._unread[0][0] <= step:
            at, record, seen = self._unread.pop(0)
            if seen:
                seen.synchronize()
            code, loss, norm = record.tolist()
            if bad_span := self._count(at, int(code), loss, norm):
                self._unread.clear()  # what came after is taken back
                return bad_span
        return None

    def rollback_target(self, bad_span: BadSpan, saved: list[int]) -> tuple[int, int]:
        """Which checkpoint before the trouble to go back to, and how many returns in a row there were.

        saved: their steps, oldest first. The newest, or as many before it as returns did not get the run past
        their trouble to another checkpoint. Raises Diverged where there is none, or returns have been enough.
        """
        last = self.rollbacks[-1] if self.rollbacks else None
        in_a_row = last["in_a_row"] if last and saved and saved[-1] <= last["from_step"] else 0
        if not saved:
            raise Diverged(
                _divergence_message(bad_span, "there is no checkpoint from before that to go back to")
            )
        if in_a_row >= self.options.max_rollbacks:
            raise Diverged(
                _divergence_message(bad_span, f"the run has gone back {in_a_row} times in a row already")
            )
        return saved[max(0, len(saved) - 1 - in_a_row)], in_a_row

    def state_after_rollback(
        self, bad_span: BadSpan, step: int, in_a_row: int, state: dict, global_batch: int
    ) -> dict:
        """The state to continue with, from the checkpoint of `step`, where the guard's state was `state`.

        The stream goes on behind the trouble's last sample.
        """
        skipped = (bad_span.last - step) * global_batch
        event = {
            "step": step,
            "event": "rollback",
            "time": round(time.time(), 3),
            "from_step": bad_span.last,
            "bad_span": [bad_span.first, bad_span.last],
            "reason": bad_span.reason,
            "skipped_samples": skipped,
            "in_a_row": in_a_row + 1,
        }
        return {**state, "offset": self.offset + skipped, "returns": [*self.rollbacks, event]}

    def state(self) -> dict:
        """For the checkpoint; waits for the device."""
        losses = [loss for loss in self._losses.tolist() if loss == loss]
        return {
            "losses": losses,
            "row": self._row,
            "overflows": self._overflows,
            "skips": self.skips,
            "offset": self.offset,
            "returns": self.rollbacks,
        }

    def _judge(self, norm: float | torch.Tensor) -> torch.Tensor:
        loss, norm = self._loss, self._as_tensor(norm)
        code = torch.zeros((), dtype=torch.int64, device=loss.device)
        if self.options.spike_z is not None:
            median = self._losses.median()
            spread = 1.4826 * (self._losses - median).abs().median()
            spread = torch.maximum(spread, MIN_SPREAD * median.abs())
            code = torch.where(loss - median > self.options.spike_z * spread, SPIKE, code)
        broken = ~torch.isfinite(norm) | (norm < 0)  # DeepSpeed marks some that are not finite by -1
        code = torch.where(broken, OVERFLOW if self.fp16 else GRADIENT, code)
        return torch.where(torch.isfinite(loss), code, LOSS)

    def _as_tensor(self, norm: float | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(norm, dtype=torch.float32, device=self._loss.device)

    def _count(self, step: int, code: int, loss: float, norm: float) -> BadSpan | None:
        self._overflows = self._overflows + 1 if code == OVERFLOW else 0
        if not code:
            self._row = []
            return None
        self.skips.append(SkippedStep(step, REASONS[code], _finite(loss), _finite(norm)))
        if code != OVERFLOW or self._overflows > MAX_OVERFLOWS:
            self._row.append(step)
        if len(self._row) < self.options.max_consecutive_skips:
            return None
        return BadSpan(self._row[0], step, REASONS[code])


def _divergence_message(bad_span: BadSpan, why: str) -> str:
    return (
        f"steps {bad_span.first} to {bad_span.last} cannot be trained ({bad_span.reason}), and {why}. Look at "
        "the learning rate (optim.base_lr, optim.warmup_epochs, optim.clip_grad), at engine.precision (bf16 "
        "or fp32, not fp16) in a new --run, and at those steps' images, in this one's offending-samples.txt"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

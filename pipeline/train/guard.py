"""Guard against divergence: decides which steps are skipped, when the run rolls back, and when it stops.

Invariant: a step whose loss or gradient is not finite, or whose loss is a spike, leaves weights and optimizer state
unchanged, and is counted and logged. Every decision is a function of values that are equal on all ranks and of the
step, never of the time at which they are read. So all ranks decide alike, and a resumed run repeats its decisions.

Whether to skip is computed on the device (`should_skip`, called before the optimizer's step). The host reads the
result one step later (`check`), so that it does not wait for the device.
"""

import math
import time
from typing import NamedTuple

import torch

from pipeline.distributed.collectives import all_reduce_mean
from pipeline.errors import Diverged
from pipeline.recipe.sections import GuardSection

REASONS = (
    "",
    "the loss is not finite",
    "the gradient is not finite",
    "the loss is a spike",
    "fp16 overflow; the loss scale is reduced",
)
LOSS, GRADIENT, SPIKE, OVERFLOW = range(1, 5)
MIN_SPREAD = 0.01
"""Smallest spread of the loss, as a share of its median: if losses hardly vary, a rise of 1 % is no spike."""
MAX_OVERFLOWS = 40
"""Consecutive fp16 overflows that are normal. DeepSpeed needs half of them from its initial loss scale down to 1."""
RENAMED = {"row": "consecutive_skips", "skips": "skipped_steps", "returns": "rollbacks"}
"""Keys of the state in checkpoints of earlier versions."""


class SkippedStep(NamedTuple):
    """A step that was skipped."""

    step: int
    """Counted from 1, as in metrics.jsonl."""
    reason: str
    loss: float | None
    """None if it is not finite; likewise grad_norm."""
    grad_norm: float | None

    def message(self) -> str:
        numbers = ", ".join(
            f"{name} {'not finite' if value is None else f'{value:.4g}'}"
            for name, value in {"loss": self.loss, "gradient norm": self.grad_norm}.items()
        )
        return f"step {self.step} skipped: {self.reason} ({numbers})"


class BadSpan(NamedTuple):
    """More consecutive skipped steps than guard.max_consecutive_skips allows."""

    first_step: int
    last_step: int
    reason: str


class Guard:
    """Checks every step of one run.

    Args:
        options: The recipe's guard section.
        precision: fp32, bf16 or fp16.
        device: The device of the losses.
        state: `state_dict()` of the checkpoint that the run resumes from, None for a new run.
    """

    def __init__(self, options: GuardSection, precision: str, device: torch.device, state: dict | None = None):
        state = _upgrade_state(state or {})
        self._options, self._fp16 = options, precision == "fp16"
        self.offset: int = state.get("offset", 0)
        """Stream positions that rollbacks have skipped so far."""
        self.rollbacks: list[dict] = [_upgrade_event(event) for event in state.get("rollbacks", [])]
        """Every rollback of the run, as in metrics.jsonl."""
        self.skipped_steps = [SkippedStep(*skip) for skip in state.get("skipped_steps", [])]
        """Those since the last logged line."""
        self._consecutive_skips: list[int] = list(state.get("consecutive_skips", []))
        self._overflows: int = state.get("overflows", 0)
        losses = state.get("losses", [])[-options.window :]
        missing = [float("nan")] * (options.window - len(losses))  # with one of them nothing is a spike
        self._losses = torch.tensor(missing + losses, device=device)
        self._loss = torch.zeros((), device=device)
        self._unread: list[tuple[int, torch.Tensor, torch.cuda.Event | None]] = []

    def observe_loss(self, loss: torch.Tensor) -> None:
        """Record this rank's mean loss (0-d). Collective; call before the optimizer's step."""
        self._loss = all_reduce_mean(loss.detach().float().clone())

    def should_skip(self, grad_norm: float | torch.Tensor) -> torch.Tensor:
        """Return 1.0 if the step must be skipped, else 0.0; 0-d, on the device.

        Args:
            grad_norm: Norm of the whole gradient.
        """
        return (self._classify(grad_norm) > 0).float()

    def record_step(self, step: int, grad_norm: float | torch.Tensor) -> torch.Tensor:
        """Record the `step`-th step after the optimizer's step. Returns what `should_skip` returned."""
        code = self._classify(grad_norm)
        losses = torch.cat([self._losses[1:], self._loss[None]])
        self._losses = torch.where(code == 0, losses, self._losses)
        record = torch.stack([code.float(), self._loss, self._as_tensor(grad_norm)])
        copied = None
        if record.is_cuda:
            record = record.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._unread.append((step, record, copied))
        return (code > 0).float()

    def check(self, up_to_step: int) -> BadSpan | None:
        """Read the results of the steps up to `up_to_step`. Reading any but the newest does not wait.

        Returns:
            The skipped steps, if there are more consecutive ones than allowed.
        """
        while self._unread and self._unread[0][0] <= up_to_step:
            step, record, copied = self._unread.pop(0)
            if copied:
                copied.synchronize()
            code, loss, grad_norm = record.tolist()
            if bad_span := self._count(step, int(code), loss, grad_norm):
                self._unread.clear()  # the steps after it will be trained again
                return bad_span
        return None

    def rollback_target(self, bad_span: BadSpan, saved_steps: list[int]) -> tuple[int, int]:
        """Choose the checkpoint to roll back to.

        That is the newest one before the bad span; or, if the last n rollbacks did not reach another checkpoint, the
        n-th before it.

        Args:
            saved_steps: Steps of the scheduled checkpoints before the bad span, oldest first.

        Returns:
            The checkpoint's step, and the number of consecutive rollbacks so far.

        Raises:
            Diverged: If there is no checkpoint, or guard.max_rollbacks is reached.
        """
        last = self.rollbacks[-1] if self.rollbacks else None
        consecutive = last["in_a_row"] if last and saved_steps and saved_steps[-1] <= last["from_step"] else 0
        if not saved_steps:
            raise Diverged(_divergence_message(bad_span, "there is no earlier checkpoint"))
        if consecutive >= self._options.max_rollbacks:
            raise Diverged(_divergence_message(bad_span, f"{consecutive} rollbacks in a row did not help"))
        return saved_steps[max(0, len(saved_steps) - 1 - consecutive)], consecutive

    def state_after_rollback(
        self, bad_span: BadSpan, step: int, consecutive: int, state: dict, global_batch: int
    ) -> dict:
        """Return the guard's state after a rollback: training continues with the data after the bad span.

        Args:
            step: Step of the checkpoint.
            consecutive: Rollbacks before this one, from `rollback_target`.
            state: The guard's state in that checkpoint.
        """
        skipped = (bad_span.last_step - step) * global_batch
        event = {
            "step": step,
            "event": "rollback",
            "time": round(time.time(), 3),
            "from_step": bad_span.last_step,
            "bad_span": [bad_span.first_step, bad_span.last_step],
            "reason": bad_span.reason,
            "skipped_samples": skipped,
            "in_a_row": consecutive + 1,
        }
        return {**_upgrade_state(state), "offset": self.offset + skipped, "rollbacks": [*self.rollbacks, event]}

    def state_dict(self) -> dict:
        """Return the state for a checkpoint. Waits for the device."""
        return {
            "losses": [loss for loss in self._losses.tolist() if not math.isnan(loss)],
            "consecutive_skips": self._consecutive_skips,
            "overflows": self._overflows,
            "skipped_steps": self.skipped_steps,
            "offset": self.offset,
            "rollbacks": self.rollbacks,
        }

    def _classify(self, grad_norm: float | torch.Tensor) -> torch.Tensor:
        """Return an index of REASONS: 0-d int64, on the device."""
        loss, grad_norm = self._loss, self._as_tensor(grad_norm)
        code = torch.zeros((), dtype=torch.int64, device=loss.device)
        if self._options.spike_z is not None:
            median = self._losses.median()
            spread = 1.4826 * (self._losses - median).abs().median()
            spread = torch.maximum(spread, MIN_SPREAD * median.abs())
            code = torch.where(loss - median > self._options.spike_z * spread, SPIKE, code)
        not_finite = ~torch.isfinite(grad_norm) | (grad_norm < 0)  # DeepSpeed returns -1 for some of them
        code = torch.where(not_finite, OVERFLOW if self._fp16 else GRADIENT, code)
        return torch.where(torch.isfinite(loss), code, LOSS)

    def _as_tensor(self, value: float | torch.Tensor) -> torch.Tensor:
        device = self._loss.device
        if isinstance(value, torch.Tensor):
            return value.to(device, torch.float32)
        return torch.full((), value, device=device)  # filled on the device: a copy would make the host wait

    def _count(self, step: int, code: int, loss: float, grad_norm: float) -> BadSpan | None:
        self._overflows = self._overflows + 1 if code == OVERFLOW else 0
        if not code:
            self._consecutive_skips = []
            return None
        self.skipped_steps.append(SkippedStep(step, REASONS[code], _finite(loss), _finite(grad_norm)))
        if code != OVERFLOW or self._overflows > MAX_OVERFLOWS:
            self._consecutive_skips.append(step)
        if len(self._consecutive_skips) < self._options.max_consecutive_skips:
            return None
        return BadSpan(self._consecutive_skips[0], step, REASONS[code])


def _upgrade_state(state: dict) -> dict:
    return {RENAMED.get(key, key): value for key, value in state.items()}


def _upgrade_event(event: dict) -> dict:
    """Rename what earlier versions called a return and its trouble."""
    renamed = {"bad_span" if key == "trouble" else key: value for key, value in event.items()}
    return {**renamed, "event": "rollback"}


def _divergence_message(bad_span: BadSpan, why: str) -> str:
    return (
        f"training diverged at steps {bad_span.first_step}-{bad_span.last_step} ({bad_span.reason}); {why}. Check the "
        "learning rate (optim.base_lr, optim.warmup_epochs, optim.clip_grad), engine.precision (use bf16 or fp32), and "
        "these steps' images (offending-samples.txt); start a new --run"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""torch.profiler over chosen steps of a run: train.profile_steps.

Invariant: a trace holds whole steps of rank 0, and a file with its final name is whole. A run that is
continued inside the chosen span traces what is left of it.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class Profiler:
    """Traces the steps `first` to `last`, as metrics.jsonl counts them."""

    def __init__(self, run: Path, first: int, last: int, device: torch.device):
        self.folder, self.first, self.last = run / "profile", first, last
        self.activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """Before the run's `step`-th step."""
        if self._profile is None and self.first <= step <= self.last:
            self.first = step
            self._profile = profile(activities=self.activities)
            self._profile.start()

    def end(self, step: int) -> Path | None:
        """After the run's `step`-th step. After the last one it waits for the device, and returns the trace's
        path: RUN/profile/steps-<first>-<last>.json.gz, for Perfetto or chrome://tracing."""
        if self._profile is None:
            return None
        self._profile.step()
        if step < self.last:
            return None
        self._profile.stop()
        self.folder.mkdir(exist_ok=True)
        whole = self.folder / f"steps-{self.first:08d}-{step:08d}.json.gz"
        partial = whole.with_name("new.json.gz")
        self._profile.export_chrome_trace(str(partial))
        partial.replace(whole)
        self._profile = None
        return whole

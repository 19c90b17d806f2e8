"""torch.profiler over chosen steps of a run (train.profile_steps).

Invariant: a trace has whole steps of rank 0, and a file with its final name is complete. A run that is resumed
between the chosen steps traces the rest of them.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.train.run_directory import RunDirectory


class Profiler:
    """Traces the steps `first` to `last`, counted from 1 as in metrics.jsonl."""

    def __init__(self, run: RunDirectory, first: int, last: int, device: torch.device):
        self.directory, self.first, self.last = run.profile, first, last
        self.activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None

    def start_step(self, step: int) -> None:
        """Start the trace if `step` is one of the chosen steps."""
        if self._profile is None and self.first <= step <= self.last:
            self.first = step
            self._profile = profile(activities=self.activities)
            self._profile.start()

    def end_step(self, step: int) -> Path | None:
        """End a step. After the last chosen one, wait for the device and write the trace.

        Returns:
            The path of the written trace, profile/steps-<first>-<last>.json.gz (for Perfetto or chrome://tracing).
        """
        if self._profile is None:
            return None
        self._profile.step()
        if step < self.last:
            return None
        self._profile.stop()
        self.directory.mkdir(exist_ok=True)
        path = self.directory / f"steps-{self.first:08d}-{step:08d}.json.gz"
        partial = path.with_name("new.json.gz")
        self._profile.export_chrome_trace(str(partial))
        partial.replace(path)
        self._profile = None
        return path

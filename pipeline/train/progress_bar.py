"""What a run says to whoever watches: a progress bar on a terminal, elsewhere a plain line now and then."""

import sys
import time

from tqdm import tqdm


class ProgressBar:
    """Steps done of those to do, with loss, images/s, data wait and the time that is left."""

    INTERVAL = 10.0
    """Seconds between two plain lines."""
    SLOW = 1.25
    """A rank that takes so many times the others' median is named."""

    def __init__(self, step: int, total_steps: int):
        self.start, self.total, self.began, self.said = step, total_steps, time.monotonic(), 0.0
        self.bar = (
            tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(step - self.bar.n)

    def show(self, line: dict) -> None:
        loss = "every step skipped" if line["loss"] is None else f"loss {line['loss']:.4f}"
        text = f"{loss}, {line['images_per_s']:.0f} images/s, data wait {line['data_wait']:.1%}"
        if "slowest_time" in line and line["slowest_time"] > self.SLOW * line["rank_time"]:
            text += (
                f", slowest is rank {line['slowest_rank']} on {line['slowest_host']} "
                f"({line['slowest_time'] / line['rank_time']:.1f} x the median)"
            )
        if self.bar:
            self.bar.set_postfix_str(text)
            return
        now, step = time.monotonic(), line["step"]
        if now - self.said >= self.INTERVAL or step == self.total:
            self.said = now
            left = (now - self.began) / max(step - self.start, 1) * (self.total - step)
            print(f"step {step}/{self.total}: {text}, {_duration(left)} to go", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar:
            self.bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

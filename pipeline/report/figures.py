"""The report's figures.

Invariant: what happened to a run is drawn where it happened: skipped steps, returns and interruptions on the
axis of steps and on that of time. Everything of one run has one colour, in every figure.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from PIL import Image, ImageDraw, ImageFont

from pipeline.pictures.canvas import columns_of
from pipeline.report.history import History

COLOURS = ("#1f5a92", "#c8553d", "#3a7d44", "#8a5a9e", "#b07d12", "#45808a")
INK, FAINT, TROUBLE = "#33383f", "#8b929c", "#b3261e"
SKIPS = {  # by how the guard's reason begins
    "the loss is not finite": ("X", "#b3261e"),
    "the gradient is not finite": ("P", "#d97706"),
    "the loss is a spike": ("^", "#7c3aed"),
    "an overflow in fp16": ("v", "#8b929c"),
}
PARTS = ("#8fb3d9", "#9cc7a2", "#d9b38f", "#c3a6d1")
STYLE = {
    "font.size": 9.5,
    "axes.edgecolor": "#c9ced6",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#eceff3",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.constrained_layout.use": True,
}
WIDTH = 11.0  # inches
POINTS = 1500
"""A curve is drawn with about so many points, and smoothed where it has more than SMOOTHED."""
SMOOTHED = 60
MOST_COLUMNS = 7
"""Of the picture over time."""


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def loss_figure(histories: Sequence[History]) -> Figure:
    """The loss by step; of a single run its parts as well. Skipped steps stand on the upper edge."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 4.6))
        for index, history in enumerate(histories):
            if len(histories) == 1:
                for part, shade in zip(history.losses[1:], PARTS * 9, strict=False):
                    steps, values = history.column(part)
                    axes.plot(*_thinned(steps, _smoothed(values)), color=shade, linewidth=1.3, label=part)
            _curve(axes, *history.column("loss"), colour(index), history.name if index else None)
            axes.lines[-1].set_label(history.name if len(histories) > 1 else "loss")
            _mark_steps(axes, history, colour(index), alone=len(histories) == 1)
        names = histories[0].losses if len(histories) == 1 else ["loss"]
        axes.set_ylim(*_range([history.column(name)[1] for history in histories for name in names]))
        axes.set_title("Loss" if len(names) == 1 else "Loss and its parts")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
        return figure


def accuracy_figure(histories: Sequence[History]) -> Figure | None:
    """What was measured on validation data, with its intervals, by step; None where nothing was."""
    if not any(history.accuracies for history in histories):
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.6))
        for index, history in enumerate(histories):
            for number, name in enumerate(history.accuracies):
                steps, shares = history.column(name)
                low, high = (history.column(f"{name}_{end}")[1] for end in ("low", "high"))
                line = {"color": colour(index), "linestyle": ("-", "--", ":")[number % 3], "marker": "o"}
                axes.plot(steps, shares, label=f"{history.name}: {name}", markersize=4, **line)
                axes.fill_between(steps, low, high, color=colour(index), alpha=0.12, linewidth=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title("Accuracy")
        axes.set_xlabel("step")
        _legend(axes)
        return figure


def details_figure(histories: Sequence[History]) -> Figure:
    """Learning rate, gradient norm, throughput, data wait, the ranks' own time, memory or MFU, by step."""
    knows_mfu = any(history.column("mfu")[1] for history in histories)
    own = "A rank's own work, s a step\n(dotted: the slowest rank)"
    panels = [
        ("Learning rate", ["lr"], 1.0, "linear"),
        ("Gradient norm", ["grad_norm"], 1.0, "log"),
        ("Images/s", ["images_per_s"], 1.0, "linear"),
        ("Data wait, % of the time", ["data_wait"], 100.0, "linear"),
        (own, ["rank_time", "slowest_time"], 1.0, "linear"),
        ("MFU, %", ["mfu"], 100.0, "linear") if knows_mfu else ("Memory, GiB", ["memory"], 1.0, "linear"),
    ]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 3, figsize=(WIDTH, 5.4), sharex=True)
        for axes, (title, names, factor, scale) in zip(grid.flat, panels, strict=True):
            for index, history in enumerate(histories):
                for number, name in enumerate(names):
                    steps, values = history.column(name)
                    line = {"color": colour(index), "linewidth": 1.4, "linestyle": ("-", ":")[number]}
                    axes.plot(*_thinned(steps, [factor * value for value in values]), **line)
                for start in history.starts[1:]:
                    axes.axvline(start.step, color=FAINT, linestyle=(0, (1, 3)), linewidth=1)
            axes.set_title(title)
            most = axes.dataLim.ymax
            empty = not 0 < most < np.inf  # infinite where no run has the column
            if scale == "linear" or empty:
                axes.set_ylim(0, 1 if empty else 1.08 * most)
            else:
                axes.set_yscale(scale)
                axes.yaxis.set_major_locator(_log_ticks(most / axes.dataLim.minposy))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
        for axes in grid[1]:
            axes.set_xlabel("step")
        return figure


def time_figure(histories: Sequence[History]) -> Figure | None:
    """Steps done and images/s against the clock, each run's own; None where a run has no times."""
    if not all(history.timed and history.starts for history in histories):
        return None
    longest = max(history.lines[-1]["time"] - history.starts[0].time for history in histories)
    seconds, unit = next((s, u) for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "s"))
                         if longest >= 2 * s or s == 1)  # fmt: skip
    with plt.rc_context(STYLE):
        figure, (above, below) = plt.subplots(2, 1, figsize=(WIDTH, 5.2), sharex=True, height_ratios=(3, 2))
        for index, history in enumerate(histories):
            began = history.starts[0].time

            def clock(moment: float, began: float = began) -> float:
                return (moment - began) / seconds

            _climb(above, history, clock, colour(index), history.name if len(histories) > 1 else None)
            for piece in _pieces(history):
                below.plot(
                    [clock(line["time"]) for line in piece],
                    [line["images_per_s"] for line in piece],
                    color=colour(index),
                    linewidth=1.3,
                )
        above.yaxis.set_major_locator(MaxNLocator(integer=True))
        above.set_title("Steps done, by the clock")
        below.set_title("Images/s")
        below.set_ylim(bottom=0)
        below.set_xlabel(f"{unit} since the start")
        _legend(above)
        return figure


def reconstruction_strip(history: History) -> Image.Image | None:
    """The photographs, and beside them what the model made of them at some of the checkpoints."""
    shown = history.pictures
    if not shown:
        return None
    if len(shown) > MOST_COLUMNS:
        shown = [shown[round(i * (len(shown) - 1) / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
    size = history.recipe["data"]["image_size"]
    columns = [("original", columns_of(Image.open(shown[-1]), size)[0])]
    columns += [(f"step {_step_of(path):,}", columns_of(Image.open(path), size)[-1]) for path in shown]
    width, height, gap, header = *columns[0][1].size, 6, 24
    strip = Image.new("RGB", (len(columns) * (width + gap) - gap, height + header), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    for number, (title, pixels) in enumerate(columns):
        draw.text((number * (width + gap) + width / 2, header / 2), title, INK, font, anchor="mm")
        strip.paste(pixels, (number * (width + gap), header))
    return strip


def _curve(axes: Axes, steps: list[int], values: list[float], shade: str, label: str | None) -> None:
    """The values, faint where there are many, and in front of them their running mean."""
    if len(values) > SMOOTHED:
        axes.plot(*_thinned(steps, values), color=shade, alpha=0.3, linewidth=0.9)
    axes.plot(*_thinned(steps, _smoothed(values)), color=shade, linewidth=2.0, label=label)


def _smoothed(values: list[float]) -> list[float]:
    """Their running mean, where there are many."""
    if len(values) <= SMOOTHED:
        return values
    window = max(3, len(values) // SMOOTHED)
    padded = np.pad(np.asarray(values), (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.full(window, 1 / window), mode="valid").tolist()


def _mark_steps(axes: Axes, history: History, shade: str, alone: bool) -> None:
    """Interruptions, returns and skipped steps of a run, on an axis of steps."""
    line = FAINT if alone else shade
    for start in history.starts[1:]:
        axes.axvline(start.step, color=line, linestyle=(0, (1, 3)), linewidth=1.2, label="continued")
    for event in history.rollbacks:
        band = {"facecolor": TROUBLE, "alpha": 0.12, "linewidth": 0}
        axes.axvspan(event["step"], event["from_step"], **band, label="taken back by the guard")
    for reason, (marker, tone) in SKIPS.items():
        steps = [skip.step for skip in history.skips if skip.reason.startswith(reason)]
        if steps:
            axes.plot(
                steps,
                np.ones(len(steps)),
                linestyle="none",
                marker=marker,
                markersize=7,
                color=tone,
                clip_on=False,
                transform=axes.get_xaxis_transform(),
                label=f"skipped: {reason}",
                gid="skips",
            )


def _climb(
    axes: Axes, history: History, clock: Callable[[float], float], shade: str, label: str | None
) -> None:
    """Steps against the clock: what was done, what was lost with an interruption, what a return took back."""
    at, step = [], []
    moments = [(start.time, 0, start) for start in history.starts]
    moments += [(line["time"], 1, line) for line in history.lines]
    moments += [(event["time"], 2, event) for event in history.rollbacks if "time" in event]
    for moment, kind, what in sorted(moments, key=lambda entry: entry[:2]):
        if kind == 0:
            if what.away is not None:
                lost = clock(what.before["time"])
                if what.repeated and at:
                    axes.plot(
                        [at[-1], lost], [step[-1], what.before["step"]],
                        color=shade, linestyle=":", linewidth=1.6, label="lost, computed again",
                    )  # fmt: skip
                grey = {"color": "#e3e6eb"} if label is None else {"color": shade, "alpha": 0.1}
                axes.axvspan(lost, clock(moment), linewidth=0, label="not running", **grey)
            at, step = [*at, np.nan, clock(moment)], [*step, np.nan, what.step]
        elif kind == 1:
            at, step = [*at, clock(moment)], [*step, what["step"]]
        else:
            at, step = [*at, clock(moment), clock(moment)], [*step, what["from_step"], what["step"]]
            axes.plot(
                clock(moment), what["from_step"], marker="v", markersize=7, linestyle="none", color=TROUBLE,
                label="return of the guard", gid="returns",
            )  # fmt: skip
    axes.plot(at, step, color=shade, linewidth=2.0, label=label)
    for skip in history.skips:
        line = next(line for line in history.lines if line["step"] >= skip.step)
        marker, tone = next(mark for reason, mark in SKIPS.items() if skip.reason.startswith(reason))
        axes.plot(
            clock(line["time"]), skip.step, marker=marker, markersize=6, color=tone, linestyle="none",
            label=f"skipped: {skip.reason.partition(';')[0]}", gid="skips",
        )  # fmt: skip


def _pieces(history: History) -> list[list[dict]]:
    """The lines, cut where the run was continued."""
    starts = [start.time for start in history.starts[1:]] + [float("inf")]
    pieces: list[list[dict]] = [[] for _ in starts]
    for line in history.lines:
        pieces[next(i for i, start in enumerate(starts) if line["time"] < start)].append(line)
    return pieces


def _range(columns: list[list[float]]) -> tuple[float, float]:
    """From the least to what a hundredth of the values exceeds, with some air; 0 to 1 where there is none."""
    values = np.concatenate([np.asarray(column, float) for column in columns])
    if not values.size:
        return 0.0, 1.0
    low, high = values.min(), np.quantile(values, 0.99)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return max(0.0, low - air) if low >= 0 else low - air, high + air


def _log_ticks(spread: float) -> Locator:
    """A few ticks on a logarithmic axis of values whose greatest is `spread` times the least."""
    if spread < 8:
        return MaxNLocator(4)
    return LogLocator(subs=(1, 2, 5)) if spread < 500 else LogLocator()


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list, list]:
    """Where there are very many points, the least and the greatest of each group of neighbours."""
    group = -(-len(values) // (POINTS // 2))
    if group <= 2:
        return list(steps), list(values)
    kept = []
    for first in range(0, len(values), group):
        part = np.asarray(values[first : first + group])
        kept += sorted({first + int(part.argmin()), first + int(part.argmax())})
    return [steps[i] for i in kept], [values[i] for i in kept]


def _legend(axes: Axes) -> None:
    """Each label once, beside the figure."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        axes.legend(once.values(), once.keys(), loc="upper left", bbox_to_anchor=(1.005, 1.0))


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))

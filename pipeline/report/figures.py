"""Figures of the report.

Invariant: skipped steps, rollbacks and interruptions are marked where they occurred, by step and by time.
A run has the same color in every figure.
"""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from PIL import Image, ImageDraw, ImageFont

from pipeline.pictures.canvas import split_columns
from pipeline.report.history import History, Start

COLORS = ("#1f5a92", "#c8553d", "#3a7d44", "#8a5a9e", "#b07d12", "#45808a")
INK, GRAY, RED = "#33383f", "#8b929c", "#b3261e"
SKIP_MARKERS = {  # by what the guard's reason contains
    "loss is not finite": {"marker": "X", "color": "#b3261e"},
    "gradient is not finite": {"marker": "P", "color": "#d97706"},
    "spike": {"marker": "^", "color": "#7c3aed"},
    "": {"marker": "v", "color": "#8b929c"},  # overflow in fp16
}
TERM_COLORS = ("#8fb3d9", "#9cc7a2", "#d9b38f", "#c3a6d1")
STYLE: dict[Any, Any] = {
    "agg.path.chunksize": 10_000,
    "font.size": 9.5,
    "axes.edgecolor": "#c9ced6",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#eceff3",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.color", "ytick.color"), INK),
    "figure.constrained_layout.use": True,
}
WIDTH = 11.0
"""Inches."""
SMOOTHING_POINTS = 60
"""A curve with more points is drawn with its running mean."""
MAX_RECONSTRUCTIONS = 7
DOTTED = (0, (1, 3))


def color_of(index: int) -> str:
    """Return the color of a run by its position on the page."""
    return COLORS[index % len(COLORS)]


def plot_loss(histories: Sequence[History]) -> Figure:
    """Plot the loss by step, for a single run with its terms; skipped steps are marked at the upper edge."""
    single = len(histories) == 1
    columns = histories[0].loss_columns if single else ["loss"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 4.6))
        for index, history in enumerate(histories):
            color = color_of(index)
            for column, term_color in zip(columns[1:], TERM_COLORS * 9, strict=False):
                steps, values = history.column(column)
                axes.plot(steps, _smooth(values), color=term_color, linewidth=1.3, label=column)
            steps, values = history.column("loss")
            if len(values) > SMOOTHING_POINTS:
                axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.9)
            label = "loss" if single else history.name
            axes.plot(steps, _smooth(values), color=color, linewidth=2.0, label=label)
            _mark_events(axes, history, GRAY if single else color)
        axes.set_ylim(*_value_range([history.column(name)[1] for history in histories for name in columns]))
        axes.set_title("Loss and its terms" if len(columns) > 1 else "Loss")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _add_legend(axes)
        return figure


def plot_accuracy(histories: Sequence[History]) -> Figure | None:
    """Plot accuracies with confidence intervals by step; None if no run has any."""
    if not any(history.accuracy_columns for history in histories):
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.6))
        for index, history in enumerate(histories):
            color = color_of(index)
            for number, name in enumerate(history.accuracy_columns):
                steps, values = history.column(name)
                low, high = (history.column(f"{name}_{end}")[1] for end in ("low", "high"))
                style, label = ("-", "--", ":")[number % 3], f"{history.name}: {name}"
                axes.plot(steps, values, label=label, color=color, linestyle=style, marker="o", markersize=4)
                axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title("Accuracy")
        axes.set_xlabel("step")
        _add_legend(axes)
        return figure


def plot_details(histories: Sequence[History]) -> Figure:
    """Plot learning rate, gradient norm, throughput, data wait, compute time, and MFU or memory, by step."""
    has_mfu = any(history.column("mfu")[1] for history in histories)
    panels = [
        ("Learning rate", ["lr"], 1.0, "linear"),
        ("Gradient norm", ["grad_norm"], 1.0, "log"),
        ("Images/s", ["images_per_s"], 1.0, "linear"),
        ("Data wait, % of the time", ["data_wait"], 100.0, "linear"),
        ("Compute time, s/step\n(dotted: slowest rank)", ["rank_time", "slowest_time"], 1.0, "linear"),
        ("MFU, %", ["mfu"], 100.0, "linear") if has_mfu else ("Memory, GiB", ["memory"], 1.0, "linear"),
    ]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 3, figsize=(WIDTH, 5.4), sharex=True)
        for axes, (title, columns, factor, scale) in zip(grid.flat, panels, strict=True):
            for index, history in enumerate(histories):
                for column, style in zip(columns, "-:", strict=False):
                    steps, values = history.column(column)
                    scaled = [factor * value for value in values]
                    axes.plot(steps, scaled, color=color_of(index), linewidth=1.4, linestyle=style)
                for start in history.starts[1:]:
                    axes.axvline(start.step, color=GRAY, linestyle=DOTTED, linewidth=1)
            axes.set_title(title)
            top = axes.dataLim.ymax
            empty = not 0 < top < np.inf  # infinite if no run has the column
            if scale == "linear" or empty:
                axes.set_ylim(0, 1 if empty else 1.08 * top)
            else:
                axes.set_yscale(scale)
                axes.yaxis.set_major_locator(_log_locator(top / axes.dataLim.minposy))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
        for axes in grid[1]:
            axes.set_xlabel("step")
        return figure


def plot_wall_clock(histories: Sequence[History]) -> Figure | None:
    """Plot steps and images/s by the time since each run's start; None if a run lacks times."""
    if not all(history.has_times and history.starts for history in histories):
        return None
    longest = max(history.lines[-1]["time"] - history.starts[0].time for history in histories)
    units = {"days": 86400, "hours": 3600, "minutes": 60, "s": 1}
    unit = next(name for name, seconds in units.items() if longest >= 2 * seconds or name == "s")
    with plt.rc_context(STYLE):
        figure, (upper, lower) = plt.subplots(2, 1, figsize=(WIDTH, 5.2), sharex=True, height_ratios=(3, 2))
        for index, history in enumerate(histories):
            first_start = history.starts[0].time

            def since_start(time: float, first_start: float = first_start) -> float:
                return (time - first_start) / units[unit]

            name = history.name if len(histories) > 1 else None
            _plot_progress(upper, history, since_start, color_of(index), name)
            resumed = [start.time for start in history.starts[1:]]
            times = np.array([line["time"] for line in history.lines])
            for part in np.split(np.arange(len(times)), np.searchsorted(times, resumed)):
                lines = [history.lines[i] for i in part]
                lower.plot(
                    [since_start(line["time"]) for line in lines],
                    [line["images_per_s"] for line in lines],
                    color=color_of(index),
                    linewidth=1.3,
                )
        upper.yaxis.set_major_locator(MaxNLocator(integer=True))
        upper.set_title("Steps over time")
        lower.set_title("Images/s")
        lower.set_ylim(bottom=0)
        lower.set_xlabel(f"{unit} since the start")
        _add_legend(upper)
        return figure


def render_reconstructions(history: History) -> Image.Image | None:
    """Draw original images and their reconstructions at several checkpoints; None if there are none."""
    shown = history.pictures
    if not shown:
        return None
    if len(shown) > MAX_RECONSTRUCTIONS:
        last = len(shown) - 1
        shown = [shown[round(i * last / (MAX_RECONSTRUCTIONS - 1))] for i in range(MAX_RECONSTRUCTIONS)]
    size = history.recipe["data"]["image_size"]
    columns = [("original", split_columns(Image.open(shown[-1]), size)[0])]
    for path in shown:
        title = f"step {int(path.stem.removeprefix('step-')):,}"
        columns.append((title, split_columns(Image.open(path), size)[-1]))
    width, height, gap, header = *columns[0][1].size, 6, 24
    strip = Image.new("RGB", (len(columns) * (width + gap) - gap, height + header), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    for number, (title, pixels) in enumerate(columns):
        draw.text((number * (width + gap) + width / 2, header / 2), title, INK, font, anchor="mm")
        strip.paste(pixels, (number * (width + gap), header))
    return strip


def _smooth(values: list[float]) -> list[float]:
    """Return the running mean, or the values if they are few."""
    if len(values) <= SMOOTHING_POINTS:
        return values
    window = max(3, len(values) // SMOOTHING_POINTS)
    padded = np.pad(np.asarray(values), (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.full(window, 1 / window), mode="valid").tolist()


def _mark_events(axes: Axes, history: History, color: str) -> None:
    """Mark resumes, rollbacks and skipped steps on an axis of steps."""
    for start in history.starts[1:]:
        axes.axvline(start.step, color=color, linestyle=DOTTED, linewidth=1.2, label="resumed")
    for event in history.rollbacks:
        span = event["step"], event["from_step"]
        axes.axvspan(*span, facecolor=RED, alpha=0.12, linewidth=0, label="rolled back")
    for skip in history.skipped_steps:
        upper_edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        _mark_skip(axes, skip.step, 1.0, skip.reason, markersize=7, **upper_edge)


def _mark_skip(axes: Axes, x: float, y: float, reason: str, **style: Any) -> None:
    marker = next(marker for text, marker in SKIP_MARKERS.items() if text in reason)
    label = f"skipped: {reason.partition(';')[0]}"
    axes.plot([x], [y], linestyle="none", label=label, gid="skips", **marker, **style)


def _plot_progress(
    axes: Axes, history: History, since_start: Callable[[float], float], color: str, name: str | None
) -> None:
    """Plot steps over time, with what interruptions lost and rollbacks discarded."""
    times: list[float] = []
    steps: list[float] = []
    entries: list[tuple[float, int, Start | dict]] = [(start.time, 0, start) for start in history.starts]
    entries += [(line["time"], 1, line) for line in history.lines]
    entries += [(event["time"], 2, event) for event in history.rollbacks if "time" in event]
    for time, _, entry in sorted(entries, key=lambda entry: entry[:2]):
        now = since_start(time)
        if isinstance(entry, Start):
            last = entry.last_logged
            if last and entry.downtime is not None:
                stopped = since_start(last["time"])
                if entry.num_repeated_steps and times:
                    lost = [times[-1], stopped], [steps[-1], last["step"]]
                    axes.plot(*lost, color=color, linestyle=":", linewidth=1.6, label="lost, trained again")
                shade = (color, 0.1) if name else "#e3e6eb"
                axes.axvspan(stopped, now, linewidth=0, label="not running", color=shade)
            times, steps = [*times, np.nan, now], [*steps, np.nan, entry.step]
        elif entry.get("event") == "rollback":
            times, steps = [*times, now, now], [*steps, entry["from_step"], entry["step"]]
            style = {"marker": "v", "markersize": 7, "color": RED, "gid": "rollbacks"}
            axes.plot([now], [entry["from_step"]], linestyle="none", label="rollback", **style)
        else:
            times, steps = [*times, now], [*steps, entry["step"]]
    axes.plot(times, steps, color=color, linewidth=2.0, label=name)
    for skip in history.skipped_steps:
        line = next(line for line in history.lines if line["step"] >= skip.step)
        _mark_skip(axes, since_start(line["time"]), skip.step, skip.reason, markersize=6)


def _value_range(columns: list[list[float]]) -> tuple[float, float]:
    """Return the axis range from the minimum to the 99th percentile, with a margin; 0 to 1 without values."""
    values = np.concatenate([np.asarray(column, float) for column in columns])
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return max(0.0, low - margin) if low >= 0 else low - margin, high + margin


def _log_locator(spread: float) -> Locator:
    """Place a few ticks on a logarithmic axis whose maximum is `spread` times its minimum."""
    if spread < 8:
        return MaxNLocator(4)
    return LogLocator(subs=(1, 2, 5)) if spread < 500 else LogLocator()


def _add_legend(axes: Axes) -> None:
    """Show each label once, beside the axes."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(unique.values(), unique.keys(), loc="upper left", bbox_to_anchor=(1.005, 1.0))

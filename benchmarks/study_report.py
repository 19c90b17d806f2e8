"""The study's verdicts, tables and plots.

Rule: the effect of a claim is the mean over seeds of the difference of rows, paired by seed. Its 95 % interval is
Student's t. The claim is supported if the interval is above zero, not supported if it is below, else undecided; with
fewer than three seeds it is undecided. With several measures it is supported if it is by each, not supported if it is
not by one.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from scipy.stats import t
from study_claims import MEASURES, Claim, Measure, Study

MIN_SEEDS = 3
SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided at this size"
COLORS = {SUPPORTED: "tab:green", NOT_SUPPORTED: "tab:red", UNDECIDED: "tab:gray"}
Results = dict[str, dict[int, dict[str, float]]]
"""Values of a row and seed, by measure."""


class Effect(NamedTuple):
    differences: tuple[float, ...]
    """One for each seed of which all rows have a result."""

    @property
    def mean(self) -> float:
        return statistics.mean(self.differences)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean; infinite for one seed."""
        return half_width(self.differences)

    @property
    def verdict(self) -> str:
        if len(self.differences) < MIN_SEEDS or abs(self.mean) <= self.half_width:
            return UNDECIDED
        return SUPPORTED if self.mean > 0 else NOT_SUPPORTED

    def __str__(self) -> str:
        if len(self.differences) < 2:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.mean - self.half_width:+.1f}, {self.mean + self.half_width:+.1f}]"


def half_width(values: Sequence[float]) -> float:
    """Return half of Student's 95 % interval of the mean."""
    if len(values) < 2:
        return math.inf
    return t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def measure_effect(claim: Claim, measure: Measure, results: Results) -> Effect | None:
    """Return the effect on one measure; None if no seed has all results. A lower disagreement is meant as such."""
    seeds = [set(results.get(row, {})) for row in claim.effect]
    differences = []
    for seed in sorted(set.intersection(*seeds)):
        values = {row: results[row][seed].get(measure) for row in claim.effect}
        if None not in values.values():
            differences.append(sum(factor * values[row] for row, factor in claim.effect.items()))
    return Effect(tuple(differences)) if differences else None


def judge(claim: Claim, results: Results) -> str:
    """Return the claim's verdict."""
    effects = [measure_effect(claim, measure, results) for measure in claim.measures]
    verdicts = {effect.verdict if effect else UNDECIDED for effect in effects}
    for verdict in (NOT_SUPPORTED, UNDECIDED):
        if verdict in verdicts:
            return verdict
    return SUPPORTED


def format_study(name: str, study: Study, results: Results, compute: dict[str, float], images: dict[str, int]) -> str:
    """Return the table of claims and the table of rows as Markdown.

    Args:
        compute: Operations of each row's pre-training, in 10^15.
        images: Images of each row's pre-training.
    """
    lines = [f"### {name}. {study.title}", "", study.design, ""]
    lines += [_row("claim", "source", "verdict", "measure", "effect [95 % interval]", "seeds", "compute, PFLOP")]
    lines += [_row(*["---"] * 7)]
    for claim in study.claims:
        cost = " / ".join(f"{compute[row]:.2g}" for row in claim.effect)
        for number, measure in enumerate(claim.measures):
            effect = measure_effect(claim, measure, results)
            head = [claim.text, claim.source, judge(claim, results)] if not number else ["", "", ""]
            cells = [str(effect), str(len(effect.differences))] if effect else ["", "0"]
            lines.append(_row(*head, MEASURES[measure], *cells, cost if not number else ""))
    rows = [row for row in study.rows if results.get(row)]
    lines += ["", f"![Effects of the claims of {name}]({name}.png)", ""]
    seeds = [values for row in rows for values in results[row].values()]
    measures = [measure for measure in MEASURES if any(measure in values for values in seeds)]
    lines += [_row("weights", *(MEASURES[measure] for measure in measures), "seeds", "images", "PFLOP")]
    lines += [_row(*["---"] * (len(measures) + 4))]
    for row in rows:
        values = [[seed[measure] for seed in results[row].values() if measure in seed] for measure in measures]
        cells = [_format_mean(column) for column in values]
        lines.append(_row(row, *cells, str(len(results[row])), f"{images[row]:,}", f"{compute[row]:.2g}"))
    return "\n".join(lines) + "\n"


def format_speed(measured: dict[int, dict]) -> str:
    """Return the table of a step's time with MAE and LoMaR, by image size, as benchmarks/step_448.py measures it."""
    head = ("image size, ViT-B", "MAE, s/step", "LoMaR, s/step", "ratio [95 % interval]", "ratio of operations")
    lines = [_row(*head, "LoMaR is faster"), _row(*["---"] * 6)]
    for size, result in measured.items():
        seconds, gmacs, ratio = result["seconds"], result["gmacs"], result["ratio"]
        interval = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        verdict = SUPPORTED if ratio["low"] > 1 else NOT_SUPPORTED if ratio["high"] < 1 else UNDECIDED
        cells = [f"{seconds['mae']:.2f}", f"{seconds['lomar']:.2f}", interval]
        lines.append(_row(f"{size} px", *cells, f"{gmacs['mae'] / gmacs['lomar']:.2f}", verdict))
    return "\n".join(lines) + "\n"


def plot_study(study: Study, results: Results, path: Path) -> None:
    """Draw a panel for each claim: the effect on every measure with its interval, and a dot for each seed."""
    columns = 3
    height = -(-len(study.claims) // columns)
    figure = Figure(figsize=(15, 2.1 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).flat
    for claim, panel in zip(study.claims, panels, strict=False):
        measured = {measure: measure_effect(claim, measure, results) for measure in MEASURES}
        shown = {measure: effect for measure, effect in measured.items() if effect}
        for y, (measure, effect) in enumerate(shown.items()):
            color = COLORS[effect.verdict] if measure in claim.measures else "lightgray"
            error = effect.half_width if math.isfinite(effect.half_width) else 0
            panel.errorbar(effect.mean, y, xerr=error, fmt="D", color=color, capsize=4)
            panel.plot(effect.differences, [y + 0.25] * len(effect.differences), ".", color=color)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(shown)), [MEASURES[measure].split(",")[0] for measure in shown])
        panel.set_ylim(len(shown) - 0.4, -0.6)
        panel.set_title(f"{claim.text}: {judge(claim, results)}", fontsize=8)
    for panel in list(panels):
        panel.axis("off")
    figure.savefig(path, dpi=110)


def _format_mean(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {half_width(values):.1f}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"

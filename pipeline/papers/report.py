"""The table of an experiment: published and measured values, as Markdown, JSON and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.io.atomic import atomic_path, atomic_write, write_json
from pipeline.papers.commands import RowPlan
from pipeline.papers.experiment import COLUMNS, ColumnName, Experiment


class Measured(NamedTuple):
    value: float
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval (Wilson), over validation images."""


def write(
    experiment: Experiment,
    directory: Path,
    plans: Sequence[RowPlan],
    results: Sequence[dict[ColumnName, Measured]],
    overrides: Sequence[str],
) -> Path:
    """Write DIR/NAME.json and NAME.md, and NAME.png if the experiment has a plot. Returns the Markdown file."""
    rows = [
        {
            "name": plan.row.name,
            "published": plan.row.published,
            "measured": {column: measured._asdict() for column, measured in result.items()},
            "commands": [command.words(".", "DATA", "VAL") for command in plan.commands],
        }
        for plan, result in zip(plans, results, strict=True)
    ]
    head = {"experiment": experiment.name, "title": experiment.title, "source": experiment.source}
    head |= {"notes": experiment.notes, "overrides": list(overrides)}
    write_json(directory / f"{experiment.name}.json", {**head, "rows": rows})
    path = directory / f"{experiment.name}.md"
    atomic_write(path, format_table(experiment, plans, results, overrides))
    if experiment.plot:
        _plot_cost(experiment, plans, results, directory / f"{experiment.name}.png")
    return path


def format_table(
    experiment: Experiment,
    plans: Sequence[RowPlan],
    results: Sequence[dict[ColumnName, Measured]],
    overrides: Sequence[str] = (),
) -> str:
    """Return the table as Markdown. Values that are not published or not measured yet are empty."""
    titles = []
    for column in (COLUMNS[name] for name in experiment.columns):
        titles += [f"{column.title}: published", "measured" if column.step else "computed"]
    cells = [
        [
            plan.row.name,
            *(cell for column in experiment.columns for cell in (_published(plan, column), _measured(result, column))),
        ]
        for plan, result in zip(plans, results, strict=True)
    ]
    lines = [f"# {experiment.name}: {experiment.title}", "", f"Published: {experiment.source}.", ""]
    lines += [markdown_row(["row", *titles]), markdown_row(["---"] * (1 + len(titles))), *map(markdown_row, cells)]
    return "\n".join([*lines, *format_notes(experiment, overrides)]) + "\n"


def format_notes(experiment: Experiment, overrides: Sequence[str]) -> list[str]:
    """Return the lines below a table: the settings that differ from the paper's, and the experiment's notes."""
    changed = [f"Changed settings: `{' '.join(overrides)}`."] if overrides else []
    notes = [f"- {note}" for note in (*changed, *experiment.notes)]
    return ["", *notes] if notes else []


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _published(plan: RowPlan, column: ColumnName) -> str:
    value = plan.row.published.get(column)
    return "" if value is None else f"{value:.{COLUMNS[column].digits}f}"


def _measured(result: dict[ColumnName, Measured], column: ColumnName) -> str:
    measured, digits = result.get(column), COLUMNS[column].digits
    if measured is None:
        return ""
    text = f"{measured.value:.{digits}f}"
    return text if measured.low is None else f"{text} [{measured.low:.{digits}f}, {measured.high:.{digits}f}]"


def _plot_cost(
    experiment: Experiment, plans: Sequence[RowPlan], results: Sequence[dict[ColumnName, Measured]], path: Path
) -> None:
    """Draw published and our values of every row side by side, a panel for each computed column."""
    from matplotlib.figure import Figure

    names = [plan.row.name for plan in plans]
    columns: list[ColumnName] = [column for column in experiment.columns if COLUMNS[column].step is None]
    figure = Figure(figsize=(4.5 * len(columns) + 1, 0.4 * len(names) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns, strict=True):
        for offset, label, values in (
            (-0.2, "published", [plan.row.published[column] for plan in plans]),
            (0.2, "ours", [result[column].value for result in results]),
        ):
            panel.barh([number + offset for number in range(len(names))], values, height=0.38, label=label)
        panel.set_xlabel(COLUMNS[column].title)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[-1].legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")

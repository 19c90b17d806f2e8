"""All experiments by name."""

import difflib

from pipeline.errors import UserError
from pipeline.papers import efficient_mae, emae, lomar, mae
from pipeline.papers.experiment import COLUMNS, Experiment

EXPERIMENTS = {
    experiment.name: experiment for paper in (mae, efficient_mae, lomar, emae) for experiment in paper.EXPERIMENTS
}


def find_experiment(name: str) -> Experiment:
    """Return an experiment. Raises UserError if there is none of this name."""
    if name not in EXPERIMENTS:
        same_table = [full for full in EXPERIMENTS if full.endswith(f".{name}")]
        close = same_table or difflib.get_close_matches(name.lower(), EXPERIMENTS, n=1)
        suggestion = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UserError(f"paper {name}: no such experiment{suggestion}; `paper list` shows all")
    return EXPERIMENTS[name]


def list_experiments() -> str:
    """Return a line for each experiment: its name, title and columns."""
    width = max(map(len, EXPERIMENTS))
    lines = []
    for experiment in EXPERIMENTS.values():
        columns = "; ".join(COLUMNS[column].title for column in experiment.columns)
        lines.append(f"{experiment.name:{width}}  {experiment.title}{f' ({columns})' if columns else ''}")
    return "\n".join(lines)

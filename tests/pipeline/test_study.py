"""The rule of the study's verdicts, its tables and plots, from synthetic results."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from study_claims import METHODS, ROWS, STUDIES, Claim, Study
from study_report import NOT_SUPPORTED, SUPPORTED, UNDECIDED, format_study, judge, measure_effect, plot_study

CLAIM = Claim("A exceeds B", "ours", {"MAE 0.75": 1, "MAE 0.9": -1}, ("knn",))


def results(*pairs: tuple[float, float], measure: str = "knn") -> dict:
    rows = zip(CLAIM.effect, zip(*pairs, strict=True), strict=True)
    return {row: {seed: {measure: value} for seed, value in enumerate(values)} for row, values in rows}


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        ([(40, 38), (50, 48.1), (45, 42.9)], SUPPORTED),  # paired: the seeds differ more than the rows
        ([(38, 40), (48.1, 50), (42.9, 45)], NOT_SUPPORTED),
        ([(40, 38), (50, 51), (45, 42)], UNDECIDED),
        ([(40, 38), (50, 48.1)], UNDECIDED),  # two seeds
    ],
)
def test_verdict_follows_the_interval_of_paired_differences(pairs, verdict):
    assert judge(CLAIM, results(*pairs)) == verdict


def test_interval_is_students_t():
    effect = measure_effect(CLAIM, "knn", results((1, 0), (2, 0), (3, 0)))
    assert effect.mean == 2 and effect.half_width == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_only_seeds_with_all_rows_are_compared():
    some = results((40, 38), (50, 48.1), (45, 42.9))
    del some["MAE 0.9"][1]
    assert measure_effect(CLAIM, "knn", some).differences == (2, pytest.approx(2.1))
    assert measure_effect(CLAIM, "finetune", some) is None


def test_a_claim_needs_every_measure():
    values = results((40, 38), (50, 48.1), (45, 42.9))
    both = CLAIM._replace(measures=("knn", "linprobe"))
    assert judge(both, values) == UNDECIDED
    for row, other in zip(CLAIM.effect, reversed(CLAIM.effect), strict=True):
        for seed in range(3):
            values[row][seed]["linprobe"] = values[other][seed]["knn"]
    assert judge(both, values) == NOT_SUPPORTED


def test_tables_and_plots_show_each_claim(tmp_path):
    study = Study("Title", "Design.", (CLAIM,))
    compute = dict.fromkeys(CLAIM.effect, 1.0)
    table = format_study("E", study, results((40, 38), (50, 48.1), (45, 42.9)), compute, dict.fromkeys(compute, 64000))
    assert "| A exceeds B | ours | supported | k-NN, % | +2.0 [+1.8, +2.2] | 3 | 1 / 1 |" in table
    assert "| MAE 0.75 | 45.0 ± 12.4 | 3 | 64,000 | 1 |" in table
    plot_study(study, results((40, 38)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_claims_and_methods_name_existing_rows():
    named = {row for study in STUDIES.values() for row in study.rows} | set(METHODS.values())
    assert named | {row.compute_of for row in ROWS.values() if row.compute_of} <= set(ROWS) == named

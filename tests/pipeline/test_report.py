"""The report: every event of a run is on its page and marked in its figures."""

import json
import shutil

import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.report.figures import plot_details, plot_loss, plot_wall_clock, render_reconstructions
from pipeline.report.history import differences, read_history
from pipeline.report.page import report

START_TIME = 1_750_000_000.0
REASONS = {3: "the loss is not finite", 6: "the gradient is not finite", 12: "the loss is a spike"}


def write_run(run, overrides=(), last=20):
    """Write a run at one step per second: a kill loses steps 15 and 16, the guard rolls back from 18 to 16."""
    run.mkdir()
    (run / "recipe.yaml").write_text(load_recipe("demo_emae", ["train.steps=20", *overrides]).to_yaml())
    delay = {step: 0 if step <= 14 else 60 if step <= 16 else 70 for step in range(1, last + 1)}
    lines = [line(step, START_TIME + step + delay[step]) for step in range(1, last + 1)]
    lines.insert(16, {
        "step": 16, "event": "rollback", "time": START_TIME + 85, "from_step": 18, "bad_span": [17, 18],
        "reason": "the loss is not finite", "skipped_samples": 32, "in_a_row": 1,
    })  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    starts = [
        start("2025-06-15T15:06:40+0000", 0, None),
        start("2025-06-15T15:07:52+0000", 14, {"step": 16, "time": START_TIME + 16}),
    ]
    (run / "environment.json").write_text(json.dumps({**starts[-1], "starts": starts}))
    return run


def line(step, time):
    skip = {"step": step, "reason": REASONS.get(step), "loss": 1e3 if step == 12 else None, "grad_norm": None}
    return {
        "step": step, "time": time, "epoch": step / 5, "samples": 16 * step, "loss": 1 / step,
        "reconstruction": 0.9 / step, "consistency": 0.1 / step, "grad_norm": 1.0, "undecodable": 0.0,
        "skipped": int(step in REASONS), **({"skipped_steps": [skip]} if step in REASONS else {}), "lr": 1e-3,
        "images_per_s": 16.0, "images_per_s_rank": 8.0, "data_wait": 0.01, "mfu": None, "memory": 1.0,
        "rank_time": 0.5, "slowest_time": 0.6, "slowest_rank": 1, "slowest_host": "n1",
    }  # fmt: skip


def start(time, step, before):
    return {
        "time": time, "step": step, "before": before, "command": ["pretrain"], "world_size": 2,
        "zero_stage": 1, "device": "cpu", "host": "n1", "python": "3.11", "versions": {"torch": "2"},
        "commit": None,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def markers(axes, gid):
    """Map the steps of markers to their labels."""
    return {
        x: artist.get_label()
        for artist in axes.lines
        if artist.get_gid() == gid
        for x in (artist.get_ydata() if axes.get_xlabel() != "step" else artist.get_xdata())
    }


def test_loss_figure_marks_skipped_steps_by_reason(run):
    (axes,) = plot_loss([read_history(run)]).axes
    assert markers(axes, "skips") == {step: f"skipped: {reason}" for step, reason in REASONS.items()}


def test_loss_figure_marks_resumes_and_rollbacks(run):
    (axes,) = plot_loss([read_history(run)]).axes
    resumes = [artist.get_xdata()[0] for artist in axes.lines if artist.get_label() == "resumed"]
    bands = [patch.get_xbounds() if hasattr(patch, "get_xbounds") else patch.get_x() for patch in axes.patches]
    assert resumes == [14] and bands == [16]


def test_wall_clock_figure_marks_all_events(run):
    upper, _ = plot_wall_clock([read_history(run)]).axes
    assert markers(upper, "skips") == {step: f"skipped: {reason}" for step, reason in REASONS.items()}
    assert markers(upper, "rollbacks") == {18: "rollback"}
    labels = upper.get_legend_handles_labels()[1]
    assert "not running" in labels and "lost, trained again" in labels


def test_run_with_only_skipped_steps_has_a_report(run):
    path = run / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    null = dict.fromkeys(("loss", "reconstruction", "consistency", "grad_norm"))
    path.write_text("".join(json.dumps(entry | null) + "\n" for entry in lines if "event" not in entry))
    assert "<h2>Loss" in report([run]).read_text()
    assert plot_loss([read_history(run)]).axes[0].get_ylim() == (0, 1)


@pytest.mark.parametrize(("least", "spread"), [(0.7, 2), (9, 2), (2.1, 4.9), (0.3, 9), (3, 200), (0.01, 1e6)])
def test_gradient_norm_axis_has_3_to_9_ticks(run, least, spread):
    path = run / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for number, entry in enumerate(lines):
        entry["grad_norm"] = least * spread ** (number / (len(lines) - 1))
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    axes = plot_details([read_history(run)]).axes[1]
    low, high = axes.get_ylim()
    assert axes.get_title("left") == "Gradient norm" and axes.get_yscale() == "log"
    assert 3 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 9


def test_page_lists_all_events_and_is_self_contained(run):
    page = report([run]).read_text()
    for text in (
        "resumed; steps 15 to 16 were lost and trained again; downtime 56 s",
        "rolled back by the guard from step 18: steps 17 to 18 were skipped (the loss is not finite)",
        *(f"<td>{step}</td><td>{reason}</td>" for step, reason in REASONS.items()),
    ):
        assert text in page
    assert "://" not in page and page.count("src=") == page.count("src='data:image/png;base64,") == 3
    assert {path.name for path in (run / "report").iterdir()} == {"loss.png", "time.png", "details.png"}


def test_page_of_several_runs_lists_differing_recipe_keys(run, tmp_path):
    other = write_run(tmp_path / "other", ["optim.base_lr=1e-3", "guard.window=16"], last=12)
    histories = [read_history(run), read_history(other)]
    assert differences(histories) == {"optim.base_lr": [2.4e-2, 1e-3], "guard.window": [128, 16]}
    page = report([run, other], tmp_path / "both.html").read_text()
    assert "<td>optim.base_lr</td><td>0.024</td><td>0.001</td>" in page
    (axes,) = plot_loss(histories).axes
    assert {"run", "other"} <= set(axes.get_legend_handles_labels()[1])


def test_accuracies_have_a_figure_and_a_key_figure(run):
    path = run / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines[-1] |= {"top1": 0.5, "top1_low": 0.4, "top1_high": 0.6}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    history = read_history(run)
    assert history.accuracy_columns == ["top1"] and history.loss_columns == ["loss", "consistency", "reconstruction"]
    page = report([run]).read_text()
    assert "<h2>Accuracy</h2>" in page and "<b>50.00%</b><span>last top1</span>" in page


def test_reconstructions_are_in_the_order_of_steps(run):
    folder = run / "reconstructions"
    folder.mkdir()
    for step in range(1, 12):  # the last column of a picture is the prediction; here its gray level encodes the step
        grid = Image.new("RGB", (2 * (192 + 6) + 6, 26 + 192 + 6 + 26), "white")
        grid.paste((20 * step,) * 3, (204, 26, 204 + 192, 26 + 192))
        grid.save(folder / f"step-{step:08d}.png")
    strip = render_reconstructions(read_history(run))
    shades = [strip.getpixel((number * 198 + 96, 120))[0] for number in range(1, strip.width // 192)]
    assert shades[0] == 20 and shades[-1] == 220 and shades == sorted(set(shades))


def test_run_without_metrics_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match=r"not a run directory .*metrics\.jsonl"):
        read_history(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "environment.json").write_text('{"starts": []}')
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(UserError, match="no metrics yet"):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("environment.json", "[]"), ("environment.json", '{"starts": 3}'), ("recipe.yaml", ""), ("recipe.yaml", "3")],
)
def test_damaged_file_of_a_run_is_a_one_line_error(run, name, content):
    (run / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: "):
        read_history(run)


def test_runs_of_earlier_versions_are_readable(run, tmp_path):
    """Metrics columns and recipe keys were renamed: `skips`, `replaced`, `trouble`, `return`, `data.threads`."""
    old = shutil.copytree(run, tmp_path / "old")
    text = (run / "metrics.jsonl").read_text()
    for new_name, old_name in {
        "skipped_steps": "skips",
        "undecodable": "replaced",
        "bad_span": "trouble",
        "rollback": "return",
    }.items():
        text = text.replace(f'"{new_name}"', f'"{old_name}"')
    (old / "metrics.jsonl").write_text(text)
    recipe = (run / "recipe.yaml").read_text()
    (old / "recipe.yaml").write_text(recipe.replace("decode_threads:", "threads:"))
    histories = read_history(run), read_history(old)
    assert histories[0].lines == histories[1].lines and histories[0].rollbacks == histories[1].rollbacks
    assert "threads:" in histories[1].recipe_text and not differences(list(histories))

"""The report: what happened to a run is on its page, and where it happened in its figures."""

import json

import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.report.figures import details_figure, loss_figure, reconstruction_strip, time_figure
from pipeline.report.history import differences, read_history
from pipeline.report.page import report

BEGAN = 1_750_000_000.0
REASONS = {
    3: "the loss is not finite",
    6: "the gradient is not finite",
    12: "the loss is a spike",
}


def write_run(run, overrides=(), last=20):
    """A run of a step a second: steps 15 and 16 lost to a kill, then a return of the guard from 18 to 16."""
    run.mkdir()
    (run / "recipe.yaml").write_text(load_recipe("demo_emae", ["train.steps=20", *overrides]).to_yaml())
    late = {step: 0 if step <= 14 else 60 if step <= 16 else 70 for step in range(1, last + 1)}
    lines = [line(step, BEGAN + step + late[step]) for step in range(1, last + 1)]
    lines.insert(16, {
        "step": 16, "event": "rollback", "time": BEGAN + 85, "from_step": 18, "bad_span": [17, 18],
        "reason": "the loss is not finite", "skipped_samples": 32, "in_a_row": 1,
    })  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    starts = [
        start("2025-06-15T15:06:40+0000", 0, None),
        start("2025-06-15T15:07:52+0000", 14, {"step": 16, "time": BEGAN + 16}),
    ]
    (run / "environment.json").write_text(json.dumps({**starts[-1], "starts": starts}))
    return run


def line(step, moment):
    skip = {"step": step, "reason": REASONS.get(step), "loss": 1e3 if step == 12 else None, "grad_norm": None}
    return {
        "step": step, "time": moment, "epoch": step / 5, "samples": 16 * step, "loss": 1 / step,
        "reconstruction": 0.9 / step, "consistency": 0.1 / step, "grad_norm": 1.0, "undecodable": 0.0,
        "skipped": int(step in REASONS), **({"skipped_steps": [skip]} if step in REASONS else {}), "lr": 1e-3,
        "images_per_s": 16.0, "images_per_s_rank": 8.0, "data_wait": 0.01, "mfu": None, "memory": 1.0,
        "rank_time": 0.5, "slowest_time": 0.6, "slowest_rank": 1, "slowest_host": "n1",
    }  # fmt: skip


def start(moment, step, before):
    return {
        "time": moment, "step": step, "before": before, "command": ["pretrain"], "world_size": 2,
        "zero_stage": 1, "device": "cpu", "host": "n1", "python": "3.11", "versions": {"torch": "2"},
        "commit": None,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def marked(axes, gid):
    return {
        x: artist.get_label()
        for artist in axes.lines
        if artist.get_gid() == gid
        for x in (artist.get_ydata() if axes.get_xlabel() != "step" else artist.get_xdata())
    }


def test_skipped_steps_stand_in_the_loss_figure_at_their_steps_by_reason(run):
    (axes,) = loss_figure([read_history(run)]).axes
    assert marked(axes, "skips") == {step: f"skipped: {reason}" for step, reason in REASONS.items()}


def test_interruptions_and_returns_stand_in_the_loss_figure_at_their_steps(run):
    (axes,) = loss_figure([read_history(run)]).axes
    vertical = [artist.get_xdata()[0] for artist in axes.lines if artist.get_label() == "continued"]
    bands = [
        patch.get_xbounds() if hasattr(patch, "get_xbounds") else patch.get_x() for patch in axes.patches
    ]
    assert vertical == [14] and bands == [16]


def test_interruptions_returns_and_skipped_steps_stand_by_the_clock(run):
    above, _ = time_figure([read_history(run)]).axes
    assert marked(above, "skips") == {step: f"skipped: {reason}" for step, reason in REASONS.items()}
    assert marked(above, "returns") == {18: "return of the guard"}
    labels = above.get_legend_handles_labels()[1]
    assert "not running" in labels and "lost, computed again" in labels


def test_a_run_of_which_every_logged_step_was_skipped_has_a_report(run):
    path = run / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    nothing = dict.fromkeys(("loss", "reconstruction", "consistency", "grad_norm"))
    path.write_text("".join(json.dumps(entry | nothing) + "\n" for entry in lines if "event" not in entry))
    assert "<h2>Loss" in report([run]).read_text()
    assert loss_figure([read_history(run)]).axes[0].get_ylim() == (0, 1)


@pytest.mark.parametrize(("least", "spread"), [(0.7, 2), (9, 2), (2.1, 4.9), (0.3, 9), (3, 200), (0.01, 1e6)])
def test_the_axis_of_gradient_norms_has_some_ticks_and_not_too_many(run, least, spread):
    path = run / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for number, entry in enumerate(lines):
        entry["grad_norm"] = least * spread ** (number / (len(lines) - 1))
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    axes = details_figure([read_history(run)]).axes[1]
    low, high = axes.get_ylim()
    assert axes.get_title("left") == "Gradient norm" and axes.get_yscale() == "log"
    assert 3 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 9


def test_the_page_says_what_happened_and_needs_nothing_beside_it(run):
    page = report([run]).read_text()
    for text in (
        "continued; steps 15 to 16 were lost and computed again, away for 56 s",
        "the guard went back from step 18: steps 17 to 18 were skipped in a row, the loss is not finite",
        *(f"<td>{step}</td><td>{reason}</td>" for step, reason in REASONS.items()),
    ):
        assert text in page
    assert "://" not in page and page.count("src=") == page.count("src='data:image/png;base64,") == 3
    assert {path.name for path in (run / "report").iterdir()} == {"loss.png", "time.png", "details.png"}


def test_several_runs_share_a_page_that_names_the_keys_in_which_they_differ(run, tmp_path):
    other = write_run(tmp_path / "other", ["optim.base_lr=1e-3", "guard.window=16"], last=12)
    both = [read_history(run), read_history(other)]
    assert differences(both) == {"optim.base_lr": [2.4e-2, 1e-3], "guard.window": [128, 16]}
    page = report([run, other], tmp_path / "both.html").read_text()
    assert "<td>optim.base_lr</td><td>0.024</td><td>0.001</td>" in page
    (axes,) = loss_figure(both).axes
    assert {"run", "other"} <= set(axes.get_legend_handles_labels()[1])


def test_accuracies_have_a_figure_of_their_own_with_their_intervals(run):
    path = run / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines[-1] |= {"top1": 0.5, "top1_low": 0.4, "top1_high": 0.6}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    history = read_history(run)
    assert history.accuracies == ["top1"] and history.losses == ["loss", "consistency", "reconstruction"]
    page = report([run]).read_text()
    assert "<h2>Accuracy</h2>" in page and "<b>50.00%</b><span>top1, the last</span>" in page


def test_reconstructions_stand_side_by_side_in_the_order_of_steps(run):
    folder = run / "reconstructions"
    folder.mkdir()
    for step in range(1, 12):  # a picture's last column is what was predicted: here in a grey of its step
        grid = Image.new("RGB", (2 * (192 + 6) + 6, 26 + 192 + 6 + 26), "white")
        grid.paste((20 * step,) * 3, (204, 26, 204 + 192, 26 + 192))
        grid.save(folder / f"step-{step:08d}.png")
    strip = reconstruction_strip(read_history(run))
    shades = [strip.getpixel((number * 198 + 96, 120))[0] for number in range(1, strip.width // 192)]
    assert shades[0] == 20 and shades[-1] == 220 and shades == sorted(set(shades))


def test_a_run_that_has_logged_nothing_is_an_error_in_a_line(tmp_path):
    with pytest.raises(UserError, match=r"no run directory \(no metrics\.jsonl\)"):
        read_history(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "environment.json").write_text('{"starts": []}')
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(UserError, match="nothing is logged yet"):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("environment.json", "[]"),
        ("environment.json", '{"starts": 3}'),
        ("recipe.yaml", ""),
        ("recipe.yaml", "3"),
    ],
)
def test_a_damaged_file_of_a_run_is_an_error_in_a_line(run, name, content):
    (run / name).write_text(content)
    with pytest.raises(UserError, match=r"cannot be read as a run directory|recipe\.yaml"):
        read_history(run)

"""`paper`: every command is valid, computed columns match the papers, overrides, results and errors."""

import hashlib
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from small_run import small_run

from pipeline.__main__ import build_parser, main
from pipeline.errors import Diverged, StoppedEarly, UserError
from pipeline.methods import build_method
from pipeline.papers.commands import plan_experiment
from pipeline.papers.difficulty_profile import compute_profile
from pipeline.papers.experiment import COLUMNS, Features, Row
from pipeline.papers.measures import compute
from pipeline.papers.registry import EXPERIMENTS, find_experiment
from pipeline.papers.report import Measured, format_table
from pipeline.papers.runner import run_experiment
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.linear_probe import load_probe_recipe
from pipeline.recipe.loading import flatten, mutable_keys
from pipeline.recipe.tasks import load_finetune_recipe

NAMES = sorted(EXPERIMENTS)
LAUNCHER = "python -m"


def computed(name: str, column: str) -> list[tuple[str, float, float]]:
    """Return (row, published, computed) of the rows with a published value."""
    plans = plan_experiment(find_experiment(name))
    rows = [(plan.row.name, plan.row.published.get(column), compute(column, plan.row, plan.recipe)) for plan in plans]
    return [row for row in rows if row[1] is not None]


def test_the_papers_tables_are_experiments(capsys):
    assert main(["paper", "list"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    expected = {f"efficient_mae.table{number}" for number in range(1, 10)} | {"efficient_mae.figure2"}
    expected |= {f"mae.table1{part}" for part in "abcdef"} | {"mae.figure9", "lomar.figure4", "emae.consistency"}
    assert expected <= listed == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_printed_command_parses_and_builds_its_model(name, capsys):
    assert main(["paper", name, "--print"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python -m pipeline ")]
    assert len(printed) == len(EXPERIMENTS[name].rows) * len(EXPERIMENTS[name].steps) or len(printed) == 1
    models = {}
    for line in dict.fromkeys(printed):
        args = build_parser().parse_args(shlex.split(line)[3:])
        command = line.split()[3]
        if command == "pretrain":
            recipe = load_recipe(args.recipe, args.overrides)
            with torch.device("meta"):  # one block, of the model's width
                build_method(load_recipe(args.recipe, [*args.overrides, "model.depth=1"]))
            assert recipe.images_per_rank(4) >= 1
            models[str(args.run)] = recipe.model
        elif command == "finetune":
            options = load_finetune_recipe(args.recipe, args.weights, args.overrides).classifier
            model = models[args.weights]
            assert options.encoder == model.name and (options.trained_blocks or 0) <= model.size.depth
        elif command == "linprobe":
            load_probe_recipe({"probe": {"weights": args.weights, "base_lrs": args.lr}}, args.overrides)


@pytest.mark.parametrize("name", NAMES)
def test_rows_have_distinct_names_and_settings(name):
    plans = plan_experiment(EXPERIMENTS[name])
    assert len({plan.row.name for plan in plans}) == len(plans)
    keys = {(plan.recipe.to_yaml(), plan.commands, plan.row.encoder_only) for plan in plans}
    assert len(keys) == len(plans)
    for plan in plans:
        assert plan.row.published.keys() <= set(EXPERIMENTS[name].columns)


def test_equal_commands_of_several_tables_share_a_run():
    def runs(name: str) -> list[list[str]]:
        return [[command.run for command in plan.commands] for plan in plan_experiment(find_experiment(name))]

    depth, sampling, gamma, metric = map(
        runs, ("mae.table1a", "mae.table1f", "efficient_mae.table7", "efficient_mae.table5")
    )
    assert depth[3] == sampling[0] and gamma[2] == metric[-1]  # the defaults
    assert len({run for row in (*depth, *sampling) for run in row}) == 3 * (5 + 4 - 1)
    plans = plan_experiment(find_experiment("efficient_mae.table4"), ["engine.micro_batch=256"])
    cost, loss = [[command.run for command in plan.commands] for plan in plans], runs("efficient_mae.table2")
    assert cost[0] == loss[0]  # although the micro batches differ


def test_a_renamed_key_keeps_the_run_directories():
    table, key = find_experiment("efficient_mae.table7"), "method.efficient_mae.num_nearest"
    recipe = plan_experiment(table)[0].recipe
    keys = flatten(recipe.model_dump(mode="json"))
    keys["method.efficient_mae.k"] = keys.pop(key)
    for name in mutable_keys(Recipe) - {"train.steps", "train.epochs"}:
        del keys[name]
    digest = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()
    assert plan_experiment(table)[0].commands[0].run == f"pretrain-{digest[:8]}"
    assert plan_experiment(table, ["method.efficient_mae.k=4"]) == plan_experiment(table, [f"{key}=4"])


def test_gmacs_of_table_4_are_within_0_3_of_the_paper():
    rows = computed("efficient_mae.table4", "gmacs")
    assert len(rows) == 9
    for name, published, ours in rows:
        assert published - 0.3 <= ours <= published, name


@pytest.mark.parametrize("table", ["table5", "table8"])
def test_numbers_of_patches_are_the_papers(table):
    for name, published, ours in computed(f"efficient_mae.{table}", "patches"):
        assert abs(ours - (78 if "beta 9" in name else published)) <= 1, name


def test_shares_with_a_visible_neighbor_are_the_papers():
    for name, published, ours in computed("efficient_mae.section3", "neighbors"):
        assert abs(ours - published) <= 1, name


def test_cost_by_mask_ratio_follows_table_1(tmp_path, capsys):
    assert main(["paper", "efficient_mae.table1", "--run", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (tmp_path / "efficient_mae.table1.md").read_text()
    tree = json.loads((tmp_path / "efficient_mae.table1.json").read_text())
    gmacs = [(row["published"]["gmacs"], row["measured"]["gmacs"]["value"]) for row in tree["rows"]]
    assert gmacs[0][0] == pytest.approx(gmacs[0][1], abs=0.1)  # the encoder alone
    assert all(0.96 * published <= ours <= published + 0.1 for published, ours in gmacs)
    memory = [row["measured"]["memory"]["value"] for row in tree["rows"]]
    assert memory[1] > memory[0] > memory[2] > memory[3] > memory[4]  # the order of the published values
    assert (tmp_path / "efficient_mae.table1.png").stat().st_size > 10_000


def test_emaes_compute_is_the_abstracts_share():
    compute_of = {name: ours for name, _, ours in all_computed("emae.abstract", "compute")}
    assert compute_of["EMAE, ViT-L, 50 epochs"] / compute_of["MAE, ViT-L, 1600 epochs"] == pytest.approx(0.13, abs=0.01)


def all_computed(name: str, column: str) -> list[tuple[str, None, float]]:
    plans = plan_experiment(find_experiment(name))
    return [(plan.row.name, None, compute(column, plan.row, plan.recipe)) for plan in plans]


def test_profile_of_figure_2_adds_up():
    recipe = load_recipe("vitl16_mae", ["method.mae.mask_ratio=0.9"])
    profile = compute_profile(recipe, (0.75, 0.9))
    assert sum(profile.patches[0.75]) == pytest.approx(147) and sum(profile.patches[0.9]) == pytest.approx(177)
    far = len([low for low in profile.low if low < 32])
    assert sum(profile.patches[0.9][far:]) > 5 * sum(profile.patches[0.75][far:])  # more hard targets
    for shares in (profile.loss_share, profile.flattened_share):
        assert sum(shares) == pytest.approx(100)
    assert sum(profile.flattened_share[far:]) < sum(profile.loss_share[far:])
    assert not profile.has_errors


def test_figure_2_uses_the_errors_of_a_trained_run(tmp_path, shards):
    run = small_run(tmp_path / "run", "vitb16_mae", "method.mae.mask_ratio=0.9")
    recipe = load_recipe(run / "recipe.yaml")
    profile = compute_profile(recipe, (0.9,), run, str(shards))
    assumed = compute_profile(recipe, (0.9,))
    assert profile.has_errors and profile.patches == assumed.patches
    assert profile.loss_share != assumed.loss_share and sum(profile.loss_share) == pytest.approx(100)


def test_overrides_go_to_the_commands_that_have_the_key():
    table = find_experiment("mae.table1c")
    overrides = ["engine.micro_batch=8", "model.depth=2", "finetune.train.epochs=3", "classifier.encoder=null"]
    for plan in plan_experiment(table, overrides):
        options = {command.step: " ".join(command.options) for command in plan.commands}
        assert all("engine.micro_batch=8" in text for text in options.values())
        assert [step for step, text in options.items() if "model.depth=2" in text] == ["pretrain"]
        assert [step for step, text in options.items() if "train.epochs=3" in text] == ["finetune"]
        assert [step for step, text in options.items() if "classifier.encoder" in text] == ["finetune"]
        assert plan.recipe.train.epochs == 800
    steps = plan_experiment(table, ["pretrain.train.steps=7"])[0]
    assert steps.recipe.train.steps == 7 and steps.recipe.train.epochs is None
    for plan in plan_experiment(find_experiment("mae.figure7"), ["finetune.train.epochs=3", "linprobe.train.epochs=2"]):
        tuning, probe = (" ".join(command.options) for command in plan.commands[1:])
        assert "train.epochs=3" in tuning and "train.epochs=2" in probe


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("efficient_mae.table7", ["method.efficient_mae.gamma=1"], "gamma=1: distinguishes the rows"),
        ("efficient_mae.table7", ["data.image_sze=32"], "data.image_sze=32: no command .* has this key"),
        ("efficient_mae.table7", ["finetune.model.depth=2"], "model.depth=2: no command"),
        ("efficient_mae.table7", ["weights=run"], "weights=run: no command"),
        ("efficient_mae.table7", ["probe.pool=mean"], "probe.pool=mean: no command"),
        ("mae.figure7", ["train.epochs=3"], "train.epochs=3: distinguishes the rows"),
        ("mae.figure7", ["pretrain.train.steps=3"], "train.steps=3: distinguishes the rows"),  # would replace epochs
        ("mae.figure9", ["classifier.trained_blocks=3"], "trained_blocks=3: distinguishes the rows"),
        ("efficient_mae.table7", ["data.image_size=30"], "data.image_size: 30 is not a multiple"),
        ("efficient_mae.tabl7", [], r"efficient_mae.tabl7: no such experiment \(did you mean efficient_mae.table7\?\)"),
        ("table3", [], r"table3: no such experiment \(did you mean mae.table3 or efficient_mae.table3\?\)"),
    ],
)
def test_impossible_arguments_are_one_line_errors(name, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_experiment(find_experiment(name), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("directory", "data", "val", "launcher", "message"),
    [
        ("new", None, None, LAUNCHER, r"--data: efficient_mae\.table7 trains models"),
        ("new", None, "val", LAUNCHER, "--val: is used only with --data"),
        ("new", "", "val", LAUNCHER, "--data: is empty"),
        ("file", "data", "val", LAUNCHER, "--run .*file: cannot be created"),
        ("new", "data", "val", "deepspeed '", "--launcher deepspeed ': .*; fix the quotes"),
        ("new", "data", "val", "nosuchlauncher", "--launcher: nosuchlauncher cannot be started"),
    ],
)
def test_impossible_arguments_of_run_are_user_errors(tmp_path, directory, data, val, launcher, message):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        run_experiment(find_experiment("efficient_mae.table7"), tmp_path / directory, data, val, [], launcher)


@pytest.mark.parametrize(("code", "error"), [(75, StoppedEarly), (143, StoppedEarly), (2, UserError), (1, UserError)])
def test_a_failed_command_ends_the_table_and_leaves_no_result(tmp_path, code, error):
    launcher = shlex.join([sys.executable, "-c", f"import sys; sys.exit({code})"])
    with pytest.raises(error, match="pretrain"):
        run_experiment(find_experiment("efficient_mae.table7"), tmp_path, "data", None, [], launcher)
    assert not list(tmp_path.glob("*.done.json")) and (tmp_path / "efficient_mae.table7.md").exists()


def fake_launcher(directory: Path, body: str) -> str:
    """Return a launcher that runs `body` with the command as `step` and its run directory as `run`."""
    program = "import json, os, pathlib, signal, sys, time; step = sys.argv[2]\n"
    program += f"run = pathlib.Path(sys.argv[sys.argv.index('--run') + 1]); run.mkdir(exist_ok=True)\n{body}\n"
    (directory / "fake.py").write_text(program)
    return shlex.join([sys.executable, "-S", str(directory / "fake.py")])


FINISH = """
if step == "pretrain":
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\\n')
else:
    top1 = {"accuracy": 0.5, "low": 0.4, "high": 0.6}
    results = {"knn": [{"k": 20, "top1": top1}]} if step == "knn" else {"top1": top1}
    (run / "results.json").write_text(json.dumps(results))
"""


def test_a_row_that_diverges_does_not_stop_the_others(tmp_path):
    experiment, out = find_experiment("efficient_mae.table9"), tmp_path / "out"
    bad = plan_experiment(experiment)[0].commands[0].run
    launcher = fake_launcher(tmp_path, f"if run.name == {bad!r}: sys.exit(4)\n{FINISH}")
    with pytest.raises(Diverged, match=f"8 blocks.*{bad}"):
        run_experiment(experiment, out, "train", "val", [], launcher)
    rows = {row["name"]: row["measured"] for row in json.loads((out / f"{experiment.name}.json").read_text())["rows"]}
    assert rows["8 blocks"] == {} and all(rows[name]["finetune"]["value"] == 50 for name in ("4 blocks", "1 blocks"))
    assert not (out / plan_experiment(experiment)[0].commands[1].run).exists()  # not fine-tuned


def test_a_signal_stops_the_table_even_if_the_command_finishes(tmp_path):
    experiment, out = find_experiment("efficient_mae.table9"), tmp_path / "out"
    parent = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.kill(os.getppid(), signal.SIGTERM)\n"
    with pytest.raises(StoppedEarly):
        run_experiment(experiment, out, "train", "val", [], fake_launcher(tmp_path, parent + FINISH))
    assert len(list(out.glob("*.done.json"))) == 1


def test_results_are_kept_and_those_of_other_shard_sets_rejected(tmp_path):
    experiment, out = find_experiment("efficient_mae.table5"), tmp_path / "out"
    run_experiment(experiment, out, "train/", "val", ["seed=1"], fake_launcher(tmp_path, FINISH))
    for data, val in (("train", "val/"), ("train", None), (None, None)):
        table = run_experiment(experiment, out, data, val, ["seed=1"], "false").read_text()
        assert table.count("50.0 [40.0, 60.0]") == 5 and "Changed settings: `seed=1`" in table
    assert "50.0" not in run_experiment(experiment, out, None, None, [], "false").read_text()  # other settings
    with pytest.raises(UserError, match="was made with other shard sets"):
        run_experiment(experiment, out, "train", "other", ["seed=1"], "false")


def test_options_of_frozen_features_reach_probe_and_knn(tmp_path):
    row = Row("pixels", {}, weights="pixels:32")
    experiment = find_experiment("efficient_mae.table2")._replace(
        name="baseline", columns=("linprobe", "knn"), rows=(row,), center_crops=True, probe_lrs=(0.1, 1.0)
    )
    experiment = experiment._replace(features=Features(pool="mean", labels=0.1, resize=32))
    probe, knn = (command.words(".", "train", "val") for command in plan_experiment(experiment)[0].commands)
    for words in (probe, knn):
        args = build_parser().parse_args(words)
        assert (args.weights, args.pool, args.labels, args.resize) == ("pixels:32", "mean", 0.1, 32)
    assert (
        build_parser().parse_args(probe).lr == [0.1, 1.0] and "--center-crops" in probe and "--center-crops" not in knn
    )
    table = run_experiment(experiment, tmp_path / "out", "train", "val", [], fake_launcher(tmp_path, FINISH))
    assert table.read_text().count("50.0 [40.0, 60.0]") == 2


def test_a_table_has_published_and_measured_values():
    experiment = find_experiment("efficient_mae.table2")
    plans = plan_experiment(experiment)
    table = format_table(experiment, plans, [{"loss": Measured(0.5), "finetune": Measured(80.0, 79.0, 81.0)}, {}, {}])
    rows = [line for line in table.splitlines() if line.startswith("| mask ratio")]
    assert rows[0] == "| mask ratio 0.75 | 0.407 | 0.500 | 84.6 | 80.0 [79.0, 81.0] |"
    assert rows[1] == "| mask ratio 0.85 | 0.486 |  | 84.1 |  |"
    assert all(COLUMNS[column].title in table for column in experiment.columns)

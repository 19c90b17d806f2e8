"""The command paper, which runs the papers' tables."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import add_command, add_override_argument

PAPER = """\
List the papers' tables and figures, show the commands of one, or run them. A table has the published and the
measured values of every row. Cost is computed from the recipes and needs no data. --run continues an interrupted
run, and does not repeat what has finished.
"""
EXAMPLES = """\
examples:
  python -m pipeline paper list
  python -m pipeline paper efficient_mae.table7 --print
  python -m pipeline paper efficient_mae.table4 --run papers
  python -m pipeline paper efficient_mae.table7 --run papers --data shards/train --val shards/val \\
    --launcher "deepspeed --module"
  with smaller settings; a key applies to every command that has it, or to one kind with its name before the key:
    python -m pipeline paper efficient_mae.table7 --run papers --data D --val V \\
      --set engine.micro_batch=32 --set pretrain.train.epochs=10
"""


def add_to(commands) -> None:
    command = add_command(commands, "paper", _paper, "reproduce a table of a paper", PAPER, EXAMPLES)
    add = command.add_argument
    add("name", metavar="NAME", help="table or figure, for example efficient_mae.table7; list: all of them")
    action = command.add_mutually_exclusive_group()
    action.add_argument("--print", action="store_true", help="show each row's commands and published values (default)")
    action.add_argument("--run", type=Path, metavar="DIR", help="run the commands in this directory")
    add("--data", metavar="TRAIN", help="labeled shard set to train on; without it, only cost is computed")
    add("--val", metavar="VAL", help="labeled shard set to evaluate on; without it, only pre-training is run")
    add("--launcher", default="python -m", metavar="WORDS", help="before `pipeline` (default: python -m)")
    add_override_argument(command)


def _paper(args: argparse.Namespace) -> None:
    from pipeline.papers.commands import format_commands, plan_experiment
    from pipeline.papers.registry import find_experiment, list_experiments

    if args.name == "list":
        print(list_experiments())
        return
    experiment = find_experiment(args.name)
    if args.run is None:
        plans = plan_experiment(experiment, args.overrides)
        print(format_commands(experiment, plans, args.launcher, args.data, args.val))
        return
    from pipeline.papers.runner import run_experiment

    print(run_experiment(experiment, args.run, args.data, args.val, args.overrides, args.launcher).read_text(), end="")

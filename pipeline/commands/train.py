"""Commands that train, and the look before it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.arguments import (
    add_command,
    deepspeed_argument,
    labelled_sets,
    recipe_arguments,
    run_argument,
    training_arguments,
)
from pipeline.commands.exit_codes import rank
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.train.task import Task

PRETRAIN = """\
Pre-train a recipe on a shard set. The same command under `deepspeed --module pipeline`, `torchrun -m --
pipeline` or `srun python -m pipeline` trains on many GPUs. Started again on a run directory that holds a
checkpoint, it continues there: nothing is lost, read twice or trained twice.
"""


PRETRAIN_EXAMPLES = """\
examples:
  on all GPUs of this machine:
    deepspeed --module pipeline pretrain vitl16_emae --data shards/imagenet-train --run runs/l16
  on two processes without a GPU:
    deepspeed --num_accelerators 2 --module pipeline pretrain demo_emae --data shards/demo --run runs/demo
  with keys of the recipe replaced:
    python -m pipeline pretrain vitb16_mae --data D --run R --set train.epochs=100 --set engine.zero_stage=2

exit codes: 0 done; 2 something for you to mend, said in one line; 3 a rank hung, see RUN/stacks; 4 the run
diverges, and what to look at; 75 stopped early by a signal with everything saved, the same command continues.
docs/running.md has the rest
"""


FINETUNE = """\
Fine-tune an encoder with a head on a labelled shard set, and measure its accuracy on another. Launched,
stopped and continued like `pretrain`; the accuracy is in RUN/accuracy.json and RUN/metrics.jsonl.
"""


FINETUNE_EXAMPLES = """\
examples:
  a pre-trained ViT-L, on all GPUs of this machine:
    deepspeed --module pipeline finetune finetune_vitl16 --weights runs/l16 \\
      --data shards/train --val shards/val --run runs/l16-tuned
  with 1 % of the labels:
    python -m pipeline finetune ... --set data.subset=0.01 --set data.subset_by_class=true
  from scratch, to compare with:
    python -m pipeline finetune ... --weights random:vitl16_mae
exit codes as of pretrain
"""


def add_to(commands) -> None:
    command = add_command(
        commands, "pretrain", _pretrain, "train a recipe on a shard set", PRETRAIN, PRETRAIN_EXAMPLES
    )
    training_arguments(command)

    command = add_command(
        commands, "finetune", _finetune, "train a classifier on labels", FINETUNE, FINETUNE_EXAMPLES
    )
    recipe_arguments(command)
    command.add_argument(
        "--weights",
        required=True,
        metavar="WEIGHTS",
        help="run directory, ema:RUN, exported .safetensors, the official MAE's .pth, or random:RECIPE",
    )
    labelled_sets(command)
    run_argument(command)
    deepspeed_argument(command)

    command = add_command(
        commands,
        "preflight",
        _preflight,
        "look whether a run can begin",
        "Look at paths, data, disk, versions, devices, decoder and network on every node; writes nothing.",
        "example:\n  srun python -m pipeline preflight vitl16_emae --data shards/in1k --run runs/l16\n",
    )
    training_arguments(command)
    command.add_argument("--weights", metavar="WEIGHTS", help="of `finetune`")
    command.add_argument("--val", metavar="VAL", help="of `finetune`")


def _pretrain(args: argparse.Namespace) -> None:
    from pipeline.recipe import load_recipe

    recipe = load_recipe(args.recipe, _overrides(args))
    _check_at_once(recipe, args.data, args.run)
    from pipeline.tasks.pretraining import pretrain

    pretrain(recipe, args.data, args.run, deepspeed_config=args.deepspeed_config)


def _finetune(args: argparse.Namespace) -> None:
    from pipeline.recipe.finetune import load_finetune_recipe

    recipe = load_finetune_recipe(args.recipe, args.weights, _overrides(args))
    _check_at_once(recipe, [args.data], args.run)
    from pipeline.tasks.classification import finetune

    finetune(recipe, args.data, args.val, args.run, args.deepspeed_config)


def _preflight(args: argparse.Namespace) -> None:
    from pipeline.train.preflight import preflight

    findings = preflight(lambda: _task(args), args.data, args.run, args.deepspeed_config)
    if not rank():
        print(findings)


def _task(args: argparse.Namespace) -> "Task":
    """Of `preflight`: that of `finetune` where its arguments are given."""
    if (args.weights is None) != (args.val is None):
        raise UserError("--weights, --val: give both, of `finetune`, or neither")
    if args.weights is not None:
        from pipeline.recipe.finetune import load_finetune_recipe
        from pipeline.tasks.classification import Finetuning

        return Finetuning(load_finetune_recipe(args.recipe, args.weights, _overrides(args)), args.val)
    from pipeline.recipe import load_recipe
    from pipeline.tasks.pretraining import Pretraining

    return Pretraining(load_recipe(args.recipe, _overrides(args)))


def _overrides(args: argparse.Namespace) -> list[str]:
    """Of the recipe: --set, and ZeRO's stage and offload as --deepspeed_config has them."""
    from pipeline.train.engine_config import engine_overrides

    path = args.deepspeed_config
    return [*args.overrides, *(engine_overrides(path, args.overrides) if path else [])]


def _check_at_once(recipe, data: list[str], run: Path) -> None:
    """Say what is wrong, where that is cheap to find out, before the seconds in which torch is imported."""
    from pipeline.data.reader import check_sources
    from pipeline.train import run_directory, wandb_logger

    wandb_logger.check_installed(recipe)
    run_directory.check(run, recipe)
    check_sources(recipe.sources(data))

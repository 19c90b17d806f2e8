"""The commands pretrain, finetune and preflight."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.arguments import (
    add_command,
    add_deepspeed_argument,
    add_labeled_set_arguments,
    add_pretraining_arguments,
    add_recipe_arguments,
    add_run_argument,
)
from pipeline.distributed.logging import env_rank
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.recipe.training import TrainingRecipe
    from pipeline.train.task import Task

PRETRAIN = """\
Pre-train a recipe on shard sets. To use several GPUs, start the same command by `deepspeed --module
pipeline`, `torchrun -m -- pipeline` or `srun python -m pipeline`. If the run directory has a checkpoint, the
run resumes from it.
"""
PRETRAIN_EXAMPLES = """\
examples:
  on all GPUs of this machine:
    deepspeed --module pipeline pretrain vitl16_emae --data shards/imagenet-train --run runs/l16
  on two processes without a GPU:
    deepspeed --num_accelerators 2 --module pipeline pretrain demo_emae --data shards/demo --run runs/demo
  with recipe keys overridden:
    python -m pipeline pretrain vitb16_mae --data D --run R --set train.epochs=100 --set engine.zero_stage=2

exit codes:
  0   done
  2   user error (one-line message)
  3   a rank hung; its stack traces are in RUN/stacks
  4   training diverged; the message says what to check
  75  stopped early by a signal with everything saved; the same command resumes
"""
FINETUNE = """\
Fine-tune an encoder for the recipe's task (classification, detection or segmentation) on an annotated shard
set and evaluate it on another. Launch, stop and resume it like pretrain. The results are written to
RUN/results.json and RUN/metrics.jsonl.
"""
FINETUNE_EXAMPLES = """\
examples:
  a pre-trained ViT-L, on all GPUs of this machine:
    deepspeed --module pipeline finetune finetune_vitl16 --weights runs/l16 \\
      --data shards/train --val shards/val --run runs/l16-tuned
  a detector with masks:
    deepspeed --module pipeline finetune detect_vitb16 --weights runs/b16 \
      --data shards/coco-train --val shards/coco-val --run runs/b16-detection
  with 1 % of the labels:
    python -m pipeline finetune ... --set data.subset=0.01 --set data.subset_by_class=true
  from scratch, as a baseline:
    python -m pipeline finetune ... --weights random:vitl16_mae

exit codes: as for pretrain
"""


def add_to(commands) -> None:
    summary = "pre-train a recipe on shard sets"
    add_pretraining_arguments(add_command(commands, "pretrain", _pretrain, summary, PRETRAIN, PRETRAIN_EXAMPLES))

    summary = "train a classifier, detector or segmentation model"
    command = add_command(commands, "finetune", _finetune, summary, FINETUNE, FINETUNE_EXAMPLES)
    add_recipe_arguments(command)
    command.add_argument(
        "--weights",
        required=True,
        metavar="WEIGHTS",
        help="run directory, ema:RUN, exported .safetensors, the official MAE's .pth, a folder of transformers' ViT or "
        "ViTMAE, or random:RECIPE",
    )
    add_labeled_set_arguments(command)
    add_run_argument(command)
    add_deepspeed_argument(command)

    command = add_command(
        commands,
        "preflight",
        _preflight,
        "check that a run can start",
        "Check paths, data, disk, versions, devices, decoder and network on every node; write nothing.",
        "example:\n  srun python -m pipeline preflight vitl16_emae --data shards/in1k --run runs/l16\n",
    )
    add_pretraining_arguments(command)
    command.add_argument("--weights", metavar="WEIGHTS", help="for a finetune run: its --weights")
    command.add_argument("--val", metavar="VAL", help="for a finetune run: its --val")


def _pretrain(args: argparse.Namespace) -> None:
    from pipeline.recipe import load_recipe

    recipe = load_recipe(args.recipe, _overrides(args))
    _check_early(recipe, args.data, args.run)
    from pipeline.tasks.pretraining import pretrain

    pretrain(recipe, args.data, args.run, deepspeed_config=args.deepspeed_config)


def _finetune(args: argparse.Namespace) -> None:
    from pipeline.recipe.tasks import load_finetune_recipe

    recipe = load_finetune_recipe(args.recipe, args.weights, _overrides(args))
    _check_early(recipe, [args.data], args.run)
    from pipeline.tasks.registry import finetune

    finetune(recipe, args.data, args.val, args.run, args.deepspeed_config)


def _preflight(args: argparse.Namespace) -> None:
    from pipeline.train.preflight import preflight
    from pipeline.train.run_directory import RunDirectory

    run = RunDirectory(args.run)
    findings = preflight(lambda: _make_task(args), args.data, run, args.deepspeed_config)
    if not env_rank():
        print(findings)


def _make_task(args: argparse.Namespace) -> "Task":
    """Create the task of `finetune` if its arguments are given, else that of `pretrain`."""
    if (args.weights is None) != (args.val is None):
        raise UserError("--weights, --val: give both, as for finetune, or neither")
    if args.weights is not None:
        from pipeline.recipe.tasks import load_finetune_recipe
        from pipeline.tasks.registry import make_task

        return make_task(load_finetune_recipe(args.recipe, args.weights, _overrides(args)), args.val)
    from pipeline.recipe import load_recipe
    from pipeline.tasks.pretraining import Pretraining

    return Pretraining(load_recipe(args.recipe, _overrides(args)))


def _overrides(args: argparse.Namespace) -> list[str]:
    """Combine --set with the ZeRO stage and offload of --deepspeed_config."""
    from pipeline.train.engine_config import engine_overrides

    path = args.deepspeed_config
    return [*args.overrides, *(engine_overrides(path, args.overrides) if path else [])]


def _check_early(recipe: "TrainingRecipe", data: list[str], run: Path) -> None:
    """On rank 0, check what is cheap to check before the seconds that importing torch takes."""
    if env_rank():
        return
    from pipeline.data.reader import check_sources
    from pipeline.train.run_directory import RunDirectory
    from pipeline.train.wandb_logger import check_installed

    check_installed(recipe)
    RunDirectory(run).check(recipe)
    check_sources(recipe.resolve_sources(data))

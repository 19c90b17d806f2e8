"""The command line of `python -m pipeline`. Arguments are parsed here and nowhere else.

Heavy imports wait until a command runs, so that --help answers at once.
"""

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import AgreedError, Diverged, StoppedEarly, UserError

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, and start the same command again"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "ask for access, or name a place where you may write"
    ),
}
EXAMPLES = """\
examples:
  python -m pipeline pretrain vitl16_emae --data shards/imagenet-train --run runs/l16
  deepspeed --module pipeline pretrain vitl16_emae --data shards/imagenet-train --run runs/l16
  python -m pipeline reconstruct runs/l16 --images photos/ --out reconstruction.png
"""
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
PICTURES = """\
Draw what trained models make of photographs:
  grid        what of each the model saw, and what it predicted for the rest
  agreement   the same behind several masks, and how much the predictions agree, as a number too
  difficulty  how far each masked patch is from what was seen, and the error against that
  attention   where the class token looks: the last layer's heads, and rollout
  features    the main directions of the patch features, as colours
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(arguments)
    return exit_code_of(lambda: args.command(args))


def exit_code_of(command: Callable[[], None]) -> int:
    """Run a command; what it raises for the user becomes a line on stderr and an exit code."""
    try:
        command()
    except AgreedError as error:
        if not _rank():
            print(f"pipeline: error: {error}", file=sys.stderr, flush=True)
        return 2
    except UserError as error:
        _let_rank_0_speak()
        print(f"pipeline: error: {error}", file=sys.stderr, flush=True)
        return 2
    except StoppedEarly as stop:
        if not _rank():
            print(f"pipeline: {stop}", file=sys.stderr, flush=True)
        return 75
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        _let_rank_0_speak()
        where = f"{error.filename}: " if error.filename else ""
        print(f"pipeline: error: {where}{error.strerror}; {REMEDIES[error.errno]}", file=sys.stderr)
        return 2
    except Diverged as error:
        if not _rank():
            print(f"pipeline: stopped: {error}", file=sys.stderr, flush=True)
        return 4
    except KeyboardInterrupt:
        print("pipeline: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Pre-train vision transformers by masked image modelling, and look at what they learned.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # DeepSpeed's launcher puts this before the command; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(
        commands, "pretrain", _pretrain, "train a recipe on a shard set", PRETRAIN, PRETRAIN_EXAMPLES
    )
    _run_arguments(command)

    command = _command(
        commands, "finetune", _finetune, "train a classifier on labels", FINETUNE, FINETUNE_EXAMPLES
    )
    _recipe_arguments(command)
    command.add_argument(
        "--weights",
        required=True,
        metavar="WEIGHTS",
        help="run directory, ema:RUN, exported .safetensors, the official MAE's .pth, or random:RECIPE",
    )
    command.add_argument("--data", required=True, metavar="TRAIN", help="labelled shard set to learn from")
    command.add_argument("--val", required=True, metavar="VAL", help="labelled shard set to be judged on")
    command.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="run directory: new, or continued"
    )

    command = _command(
        commands,
        "preflight",
        _preflight,
        "look whether a run can begin",
        "Look at paths, data, disk, versions, devices, decoder and network on every node; writes nothing.",
        "example:\n  srun python -m pipeline preflight vitl16_emae --data shards/in1k --run runs/l16\n",
    )
    _run_arguments(command)
    command.add_argument("--weights", metavar="WEIGHTS", help="of `finetune`")
    command.add_argument("--val", metavar="VAL", help="of `finetune`")

    command = _command(
        commands,
        "reconstruct",
        _reconstruct,
        "picture what a run reconstructs and sees",
        PICTURES,
        "examples:\n  python -m pipeline reconstruct runs/demo --images photos/ --out reconstruction.png\n"
        "  python -m pipeline reconstruct runs/mae runs/emae --images photos/ --out pics --kind agreement\n"
        "  python -m pipeline reconstruct runs/l16 --images cat.jpg --out cat --kind attention features\n",
    )
    command.add_argument("run", type=Path, nargs="+", metavar="RUN", help="run directory with a checkpoint")
    command.add_argument(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="photographs, or folders",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="a .png, or a folder for RUN-KIND.png"
    )
    command.add_argument(
        "--kind",
        nargs="+",
        default=["grid"],
        choices=["grid", "agreement", "difficulty", "attention", "features"],
        help="which pictures (default: grid)",
    )
    command.add_argument("--count", type=_positive, default=8, metavar="N", help="photographs (default: 8)")
    command.add_argument(
        "--tiles",
        type=_positive,
        default=1,
        metavar="N",
        help="show each photograph as N x N squares of the model's image size; attention and features see it "
        "whole at that size (default: 1)",
    )
    command.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the masks (default: 0)")
    command.add_argument(
        "--seeds", type=_positive, default=3, metavar="N", help="masks that agreement compares (default: 3)"
    )

    command = _command(
        commands,
        "knn",
        _knn,
        "judge an encoder by nearest neighbours",
        "Classify a labelled shard set by its nearest neighbours in another, on frozen features: nothing is "
        "trained and nothing chosen. Under a launcher the ranks share the work.",
        "examples:\n"
        "  python -m pipeline knn --weights runs/l16 --data shards/train --val shards/val\n"
        "  python -m pipeline knn --weights random:vitl16_mae --data shards/train --val shards/val\n"
        "  python -m pipeline knn --weights pixels:32 --data shards/train --val shards/val --labels 0.1\n",
    )
    _encoder_arguments(command)
    command.add_argument(
        "--k",
        type=_positive,
        nargs="+",
        metavar="N",
        help="neighbours that vote (default: 5 10 20 50 100 200, as far as there are)",
    )
    command.add_argument("--json", action="store_true", help="print JSON")

    command = _command(
        commands,
        "export",
        _export,
        "give a run's weights to another library",
        "Write the newest checkpoint's weights as a folder for timm, Hugging Face transformers (hf: encoder, "
        "hf-mae: with decoder), the official MAE code or ONNX, with a model card. It is loaded again by the "
        "library it is for, and kept only if the features are the same.",
        "examples:\n  python -m pipeline export runs/l16 exports/l16-timm --format timm\n"
        "  python -m pipeline knn --weights runs/l16 --data D --val V --json > knn.json\n"
        "  python -m pipeline export runs/l16 exports/l16-mae --format hf-mae --results knn.json\n",
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory with a checkpoint")
    command.add_argument("out", type=Path, metavar="OUT", help="folder to be made")
    command.add_argument(
        "--format", required=True, choices=["timm", "hf", "hf-mae", "official", "onnx"], help="for whom"
    )
    command.add_argument(
        "--encoder-only", action="store_true", help="official: without the decoder, which it has by itself"
    )
    command.add_argument("--ema", action="store_true", help="the moving average of the weights")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    command.add_argument(
        "--results", type=Path, action="append", default=[], metavar="JSON", help="quote it on the model card"
    )

    command = _command(
        commands,
        "linprobe",
        _linprobe,
        "judge an encoder by linear classifiers",
        "Train linear classifiers on a frozen encoder by MAE's protocol, at several learning rates at once; "
        "one is chosen on held-out training samples. Launched, stopped and continued like pretrain.",
        "examples:\n"
        "  deepspeed --module pipeline linprobe --weights runs/l16 --data shards/train --val shards/val \\\n"
        "    --run runs/l16-probe --precision bf16 --set train.epochs=50\n"
        "  python -m pipeline linprobe --weights runs/small --data shards/train --val shards/val \\\n"
        "    --run runs/small-probe --center-crops --set data.global_batch=1024\n",
    )
    _encoder_arguments(command)
    command.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="run directory: new, or continued"
    )
    command.add_argument(
        "--lr",
        type=float,
        nargs="+",
        metavar="F",
        help="base learning rates (default: 0.01 0.03 0.1 0.3 1 3)",
    )
    command.add_argument(
        "--center-crops",
        action="store_true",
        help="learn from the centre crops' features, extracted once: quick, and no augmentation",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    _override_argument(command)

    command = _command(
        commands,
        "report",
        _report,
        "make a page of one or several runs",
        "Write one HTML file: curves, speed, interruptions, skipped steps, reconstructions, recipe and\n"
        "environment; of several runs side by side. The figures also go into a folder beside it, as PNG.",
        "examples:\n  python -m pipeline report runs/demo\n"
        "  python -m pipeline report runs/mae runs/emae --out comparison.html\n",
    )
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    command.add_argument(
        "--out",
        type=Path,
        metavar="HTML",
        help="default: RUN/report.html, of several report.html",
    )

    command = _command(
        commands,
        "plan",
        _plan,
        "what a recipe costs",
        "Count a recipe's parameters, operations and memory, and estimate its hours, without running it.",
        "examples:\n  python -m pipeline plan vitl16_emae --gpus 8 --nodes 4 --gpu h100\n"
        "  python -m pipeline plan vith14_mae --mfu 0.5 --json\n"
        "  python -m pipeline plan vith14_emae --nodes 64 --link 200\n",
    )
    _recipe_arguments(command)
    command.add_argument("--gpus", type=_positive, default=8, metavar="N", help="GPUs a node (default: 8)")
    command.add_argument("--nodes", type=_positive, default=1, metavar="N", help="nodes (default: 1)")
    command.add_argument("--gpu", default="h100", metavar="NAME", help="which card (default: h100)")
    command.add_argument(
        "--mfu", type=float, default=0.4, metavar="F", help="share of its peak (default: 0.4)"
    )
    command.add_argument(
        "--data", action="append", default=[], metavar="DIR", help="shard set (default: ImageNet's size)"
    )
    command.add_argument(
        "--link", type=float, default=400, metavar="GBIT", help="a node's link, in Gbit/s (default: 400)"
    )
    command.add_argument(
        "--storage", type=float, default=2, metavar="GB", help="the file system, in GB/s (default: 2)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")

    command = _command(
        commands,
        "bench-loader",
        _bench_loader,
        "how fast a shard set is read and decoded",
        "Measure the loader alone, by stage and threads, and set it against what a model would take.",
        "examples:\n  python -m pipeline bench-loader shards/imagenet-train\n"
        "  python -m pipeline bench-loader shards/photos --recipe vith14_mae --threads 4 8 --gpu a100\n",
    )
    command.add_argument(
        "data", nargs="+", metavar="DATA", help="shard set, made by data_prep; several as one"
    )
    _recipe_arguments(command, default="vitl16_mae")
    command.add_argument(
        "--threads",
        type=_positive,
        nargs="+",
        metavar="N",
        help="decoding threads (default: 1, 2, 4, ... up to the cores)",
    )
    command.add_argument(
        "--seconds", type=_positive, default=20, metavar="N", help="for each number (default: 20)"
    )
    command.add_argument("--gpu", default="h100", metavar="NAME", help="which card (default: h100)")
    command.add_argument(
        "--mfu", type=float, default=0.4, metavar="F", help="share of its peak (default: 0.4)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _run_arguments(command: argparse.ArgumentParser) -> None:
    _recipe_arguments(command)
    command.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DIR",
        help="shard set, made by data_prep: a directory or a URL; several --data are read as one. "
        "Left out where the recipe has data.sources",
    )
    command.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="run directory: new, or continued"
    )
    command.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="FILE",
        help="DeepSpeed's JSON in place of one of ds_configs/: ZeRO stage, offload, buckets (docs/engine.md)",
    )


def _encoder_arguments(command: argparse.ArgumentParser) -> None:
    """What is judged, on what, and how its features are computed."""
    command.add_argument(
        "--weights",
        required=True,
        metavar="WEIGHTS",
        help="run directory, ema:RUN, exported .safetensors, the official MAE's .pth, random:RECIPE, or "
        "pixels[:SIZE]",
    )
    command.add_argument("--data", required=True, metavar="TRAIN", help="labelled shard set to learn from")
    command.add_argument("--val", required=True, metavar="VAL", help="labelled shard set to be judged on")
    command.add_argument(
        "--labels",
        type=_share,
        metavar="SHARE",
        help="learn from this share of the labels only, class-balanced, by hash; for example 0.01",
    )
    command.add_argument(
        "--pool",
        choices=["class_token", "mean"],
        default="class_token",
        help="of the encoder's tokens: its class token, or the mean of its patches (default: class_token)",
    )
    command.add_argument("--image-size", type=_positive, metavar="PX", help="default: as trained")
    command.add_argument(
        "--resize",
        type=_positive,
        metavar="PX",
        help="shorter side before the centre is cut out (default: as MAE, 256/224 of sizes up to 224)",
    )
    command.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of the encoder (default: fp32)"
    )
    command.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep features here (default: RUN/features for a run)"
    )


def _recipe_arguments(command: argparse.ArgumentParser, default: str | None = None) -> None:
    """An argument of its own, or, where there is a default, an option."""
    what = "a YAML file, or the name of a recipe that ships"
    if default:
        command.add_argument(
            "--recipe", default=default, metavar="RECIPE", help=f"{what} (default: {default})"
        )
    else:
        command.add_argument("recipe", metavar="RECIPE", help=what)
    _override_argument(command)


def _override_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a recipe's key",
    )


def _command(
    commands, name: str, run, summary: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=run)
    return command


def _pretrain(args: argparse.Namespace) -> None:
    recipe = _recipe_and_engine(args)
    _check_at_once(recipe, args.data, args.run)
    from pipeline.pretraining import pretrain

    pretrain(recipe, args.data, args.run, deepspeed_config=args.deepspeed_config)


def _recipe_and_engine(args: argparse.Namespace):
    """The recipe, with ZeRO's stage and offload as --deepspeed_config has them."""
    from pipeline.recipe import load_recipe
    from pipeline.train.engine_config import engine_overrides

    path = args.deepspeed_config
    of_file = engine_overrides(path, args.overrides) if path else []
    return load_recipe(args.recipe, [*args.overrides, *of_file])


def _finetune(args: argparse.Namespace) -> None:
    from pipeline.finetune.recipe import load_finetune_recipe

    recipe = load_finetune_recipe(args.recipe, args.weights, args.overrides)
    _check_at_once(recipe, [args.data], args.run)
    from pipeline.finetune.task import finetune

    finetune(recipe, args.data, args.val, args.run)


def _check_at_once(recipe, data: list[str], run: Path) -> None:
    """Say what is wrong, where that is cheap to find out, before the seconds in which torch is imported."""
    from pipeline.data.reader import check_sources
    from pipeline.train import run_directory, wandb_run

    wandb_run.check(recipe)
    run_directory.check(run, recipe)
    check_sources(recipe.sources(data))


def _preflight(args: argparse.Namespace) -> None:
    from pipeline.train.preflight import preflight

    if (args.weights is None) != (args.val is None):
        raise UserError("--weights, --val: give both, of `finetune`, or neither")
    if args.weights is not None:
        from pipeline.finetune.recipe import load_finetune_recipe
        from pipeline.finetune.task import Finetuning

        task = Finetuning(load_finetune_recipe(args.recipe, args.weights, args.overrides), args.val)
    else:
        from pipeline.pretraining import Pretraining

        task = Pretraining(_recipe_and_engine(args))
    findings = preflight(task, args.data, args.run, args.deepspeed_config)
    if os.environ["RANK"] == "0":
        print(findings)


def _reconstruct(args: argparse.Namespace) -> None:
    from pipeline.evals.reconstruct import Options, reconstruct

    options = Options(args.count, args.tiles, args.seed, args.seeds)
    print(reconstruct(args.run, args.images, args.out, args.kind, options))


def _knn(args: argparse.Namespace) -> None:
    import json

    from pipeline.evals.knn import format_knn, knn

    result = knn(
        args.weights,
        args.data,
        args.val,
        ks=args.k,
        labels=args.labels,
        image_size=args.image_size,
        pool=args.pool,
        resize=args.resize,
        precision=args.precision,
        cache=_cache(args),
    )
    if not _rank():
        print(json.dumps(result, indent=1) if args.json else format_knn(result))


def _linprobe(args: argparse.Namespace) -> None:
    import json

    from pipeline.evals.linprobe import format_probe, linprobe
    from pipeline.evals.probe_recipe import load_probe_recipe

    probe = {"weights": args.weights, "pool": args.pool, "center_crops": args.center_crops}
    probe |= {"resize": args.resize} | ({"base_lrs": args.lr} if args.lr else {})
    data = {"subset": args.labels, "subset_by_class": True} if args.labels else {}
    given = {"probe": probe, "data": data, "engine": {"precision": args.precision}}
    recipe = load_probe_recipe(given, args.overrides)
    result = linprobe(recipe, args.data, args.val, args.run, args.image_size, _cache(args))
    if not _rank():
        print(json.dumps(result, indent=1) if args.json else format_probe(result))


def _cache(args: argparse.Namespace) -> Path | None:
    run = Path(args.weights.removeprefix("ema:"))
    return args.cache or (run / "features" if run.is_dir() else None)


def _export(args: argparse.Namespace) -> None:
    from pipeline.export.command import export

    options = {name: getattr(args, name) for name in ("encoder_only", "ema", "overwrite", "results")}
    print(export(args.run, args.out, args.format, **options))


def _report(args: argparse.Namespace) -> None:
    from pipeline.report.page import report

    print(report(args.runs, args.out))


def _plan(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from pipeline.data.reader import ShardReader
    from pipeline.plan import format_plan, plan
    from pipeline.recipe import load_recipe
    from pipeline.scaling import format_scaling, scaling

    recipe = load_recipe(args.recipe, args.overrides)
    sizes = {}
    if args.data or recipe.data.sources:
        reader = ShardReader(recipe.sources(args.data), recipe.data)
        sizes = {"samples": reader.num_samples, "shards": len(reader.shard_sizes)}
    hardware = {"gpus": args.gpus, "nodes": args.nodes, "gpu": args.gpu, "mfu": args.mfu}
    costs = plan(recipe, **hardware, **sizes)
    scale = scaling(recipe, **hardware, link_gbit=args.link, storage_gb=args.storage)
    if args.json:
        print(json.dumps(asdict(costs) | {"scaling": asdict(scale)}, indent=1))
    else:
        print(format_plan(costs) + ("\n\n" + format_scaling(scale) if args.nodes > 1 else ""))


def _bench_loader(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from pipeline.bench_loader import bench_loader, format_bench
    from pipeline.recipe import load_recipe
    from pipeline.train.distributed import find_world

    recipe = load_recipe(args.recipe, args.overrides)
    world = find_world()
    threads = args.threads or [2**n for n in range(world.cores.bit_length())]
    result = bench_loader(
        recipe.sources(args.data), recipe, world.device, threads, args.seconds, args.gpu, args.mfu
    )
    print(json.dumps(asdict(result), indent=1) if args.json else format_bench(result))


def _natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2^63 - 1")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, over 0 and up to 1")
    return share


def _let_rank_0_speak() -> None:
    # All ranks usually find the same fault: rank 0 says it, and the launcher ends the others while they wait.
    if _rank():
        time.sleep(10)


def _rank() -> int:
    text = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return int(text) if text.isdecimal() else 0


if __name__ == "__main__":
    sys.exit(main())

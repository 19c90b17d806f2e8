"""Commands that judge an encoder on labels."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import (
    add_command,
    fraction,
    json_argument,
    labelled_sets,
    override_argument,
    positive,
    run_argument,
    side,
)
from pipeline.commands.exit_codes import rank


def add_to(commands) -> None:
    command = add_command(
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
        type=positive,
        nargs="+",
        metavar="N",
        help="neighbours that vote (default: 5 10 20 50 100 200, as far as there are)",
    )
    json_argument(command)

    command = add_command(
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
    run_argument(command)
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
    json_argument(command)
    override_argument(command)


def _encoder_arguments(command: argparse.ArgumentParser) -> None:
    """What is judged, on what, and how its features are computed."""
    command.add_argument(
        "--weights",
        required=True,
        metavar="WEIGHTS",
        help="run directory, ema:RUN, exported .safetensors, the official MAE's .pth, random:RECIPE, or "
        "pixels[:SIZE]",
    )
    labelled_sets(command)
    command.add_argument(
        "--labels",
        type=fraction,
        metavar="SHARE",
        help="learn from this share of the labels only, class-balanced, by hash; for example 0.01",
    )
    command.add_argument(
        "--pool",
        choices=["class_token", "mean"],
        default="class_token",
        help="of the encoder's tokens: its class token, or the mean of its patches (default: class_token)",
    )
    command.add_argument("--image-size", type=side, metavar="PX", help="default: as trained")
    command.add_argument(
        "--resize",
        type=side,
        metavar="PX",
        help="shorter side before the centre is cut out (default: as MAE, 256/224 of sizes up to 224)",
    )
    command.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of the encoder (default: fp32)"
    )
    command.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep features here (default: RUN/features for a run)"
    )


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
    if not rank():
        print(json.dumps(result, indent=1) if args.json else format_knn(result))


def _linprobe(args: argparse.Namespace) -> None:
    import json

    from pipeline.evals.linprobe import format_probe, linprobe
    from pipeline.recipe.linear_probe import load_probe_recipe

    probe = {"weights": args.weights, "pool": args.pool, "center_crops": args.center_crops}
    probe |= {"resize": args.resize} | ({"base_lrs": args.lr} if args.lr else {})
    data = {"subset": args.labels, "subset_by_class": True} if args.labels else {}
    given = {"probe": probe, "data": data, "engine": {"precision": args.precision}}
    recipe = load_probe_recipe(given, args.overrides)
    result = linprobe(recipe, args.data, args.val, args.run, args.image_size, _cache(args))
    if not rank():
        print(json.dumps(result, indent=1) if args.json else format_probe(result))


def _cache(args: argparse.Namespace) -> Path | None:
    run = Path(args.weights.removeprefix("ema:"))
    return args.cache or (run / "features" if (run / "recipe.yaml").is_file() else None)

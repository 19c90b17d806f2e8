"""Commands that evaluate a frozen encoder or a fine-tuned model on annotated shard sets."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import (
    add_command,
    add_json_argument,
    add_labeled_set_arguments,
    add_override_argument,
    add_run_argument,
    fraction,
    image_side,
    positive_int,
)
from pipeline.distributed.logging import env_rank


def add_to(commands) -> None:
    command = add_command(
        commands,
        "knn",
        _knn,
        "evaluate an encoder by k-NN",
        "Classify a labeled shard set by its nearest neighbors in another, on frozen features. Nothing is "
        "trained or tuned. Under a launcher the ranks share the work.",
        "examples:\n"
        "  python -m pipeline knn --weights runs/l16 --data shards/train --val shards/val\n"
        "  python -m pipeline knn --weights random:vitl16_mae --data shards/train --val shards/val\n"
        "  python -m pipeline knn --weights pixels:32 --data shards/train --val shards/val --labels 0.1\n",
    )
    add = command.add_argument
    _add_encoder_arguments(command)
    add("--k", type=positive_int, nargs="+", metavar="N", help="numbers of neighbors (default: 5 10 20 50 100 200)")
    add("--run", type=Path, metavar="DIR", help="also write the result to DIR/results.json")
    add_json_argument(command)

    command = add_command(
        commands,
        "linprobe",
        _linprobe,
        "evaluate an encoder by a linear probe",
        "Train linear classifiers on a frozen encoder by MAE's protocol, at several learning rates at once; the "
        "best is selected on held-out training samples. Launched, stopped and resumed like pretrain.",
        "examples:\n"
        "  deepspeed --module pipeline linprobe --weights runs/l16 --data shards/train --val shards/val \\\n"
        "    --run runs/l16-probe --precision bf16 --set train.epochs=50\n"
        "  python -m pipeline linprobe --weights runs/small --data shards/train --val shards/val \\\n"
        "    --run runs/small-probe --center-crops --set data.global_batch=1024\n",
    )
    add = command.add_argument
    _add_encoder_arguments(command)
    add_run_argument(command)
    add("--lr", type=float, nargs="+", metavar="F", help="base learning rates (default: 0.01 0.03 0.1 0.3 1 3)")
    add("--center-crops", action="store_true", help="train on features of center crops, extracted once, not augmented")
    add_json_argument(command)
    add_override_argument(command)

    command = add_command(
        commands,
        "evaluate",
        _evaluate,
        "evaluate a fine-tuned model",
        "Evaluate a run of finetune on a shard set, without training: accuracy of a classifier, COCO's average\n"
        "precision of a detector, mean IoU of a segmentation model. Under a launcher the ranks share the work.",
        "examples:\n"
        "  python -m pipeline evaluate runs/l16-tuned --val shards/val\n"
        "  deepspeed --module pipeline evaluate ema:runs/b16-detection --val shards/coco-val --json\n",
    )
    add = command.add_argument
    add("run", metavar="RUN", help="run directory of finetune, or ema:RUN for the moving average of its weights")
    add("--val", required=True, metavar="VAL", help="annotated shard set to evaluate on")
    text = "write detections.json, or a label map KEY.png per sample, to this folder"
    add("--save-predictions", type=Path, metavar="DIR", help=text)
    add_json_argument(command)

    command = add_command(
        commands,
        "predict",
        _predict,
        "draw what a fine-tuned model predicts",
        "Write a PNG for each image: a classifier's likeliest classes, a detector's boxes and masks with class\n"
        "names, or the classes of all pixels with a legend.",
        "example:\n  python -m pipeline predict runs/b16-detection --images photos/ --out predictions/\n",
    )
    add = command.add_argument
    add("run", metavar="RUN", help="run directory of finetune, or ema:RUN for the moving average of its weights")
    add("--images", type=Path, nargs="+", required=True, metavar="PATH", help="image files, or folders")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures")


def _add_encoder_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--weights",
        required=True,
        metavar="WEIGHTS",
        help="run directory, ema:RUN, exported .safetensors, official MAE .pth, folder of transformers' ViT or ViTMAE, "
        "random:RECIPE, or pixels[:SIZE]",
    )
    add_labeled_set_arguments(command)
    add("--labels", type=fraction, metavar="SHARE", help="train on this class-balanced share of the labels, e.g. 0.01")
    pools = ["class_token", "mean"]
    add("--pool", choices=pools, default="class_token", help="class token (default), or mean of the patch tokens")
    add("--image-size", type=image_side, metavar="PX", help="default: as trained")
    add("--resize", type=image_side, metavar="PX", help="shorter side before the center crop (default: as MAE)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the encoder (default: fp32)")
    add("--cache", type=Path, metavar="DIR", help="directory for features (default: RUN/features for a run)")


def _knn(args: argparse.Namespace) -> None:
    import json

    from pipeline.evals.knn import format_knn, knn
    from pipeline.io.atomic import write_json

    options = {name: getattr(args, name) for name in ("labels", "image_size", "pool", "resize", "precision")}
    result = knn(args.weights, args.data, args.val, ks=args.k, cache=_cache_directory(args), **options)
    if not env_rank():
        if args.run:
            args.run.mkdir(parents=True, exist_ok=True)
            write_json(args.run / "results.json", result)
        print(json.dumps(result, indent=1) if args.json else format_knn(result))


def _linprobe(args: argparse.Namespace) -> None:
    import json

    from pipeline.evals.linprobe import format_probe, linprobe
    from pipeline.recipe.linear_probe import load_probe_recipe

    probe = {"weights": args.weights, "pool": args.pool, "center_crops": args.center_crops}
    probe |= {"resize": args.resize} | ({"base_lrs": args.lr} if args.lr else {})
    data = {"subset": args.labels, "subset_by_class": True} if args.labels else {}
    sections = {"probe": probe, "data": data, "engine": {"precision": args.precision}}
    recipe = load_probe_recipe(sections, args.overrides)
    result = linprobe(recipe, args.data, args.val, args.run, args.image_size, _cache_directory(args))
    if not env_rank():
        print(json.dumps(result, indent=1) if args.json else format_probe(result))


def _evaluate(args: argparse.Namespace) -> None:
    import json

    from pipeline.tasks.registry import evaluate, format_results

    result = evaluate(args.run, args.val, args.save_predictions)
    if not env_rank():
        print(json.dumps(result, indent=1) if args.json else format_results(result))


def _predict(args: argparse.Namespace) -> None:
    from pipeline.tasks.registry import predict

    print(predict(args.run, args.images, args.out))


def _cache_directory(args: argparse.Namespace) -> Path | None:
    """Return --cache, by default a folder of the run directory if the weights are a run's."""
    run = Path(args.weights.removeprefix("ema:"))
    return args.cache or (run / "features" if (run / "recipe.yaml").is_file() else None)

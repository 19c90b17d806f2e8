"""The command that exports a run's weights to other libraries."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import add_command


def add_to(commands) -> None:
    command = add_command(
        commands,
        "export",
        _export,
        "convert a run's weights for another library",
        "Write the newest checkpoint's weights as a folder for timm, Hugging Face transformers (hf: encoder, "
        "hf-mae: with decoder), the official MAE code or ONNX, with a model card; of a fine-tuned run the "
        "classifier, for timm, the official code or ONNX. The target library loads the export again, and it is "
        "kept only if the outputs are the same.",
        "examples:\n  python -m pipeline export runs/l16 exports/l16-timm --format timm\n"
        "  python -m pipeline export runs/l16-tuned exports/l16-tuned --format onnx\n"
        "  python -m pipeline knn --weights runs/l16 --data D --val V --json > knn.json\n"
        "  python -m pipeline export runs/l16 exports/l16-mae --format hf-mae --results knn.json\n",
    )
    add = command.add_argument
    add("run", type=Path, metavar="RUN", help="run directory with a checkpoint")
    add("out", type=Path, metavar="OUT", help="folder to create")
    add("--format", required=True, choices=["timm", "hf", "hf-mae", "official", "onnx"], help="target library")
    add("--encoder-only", action="store_true", help="official: omit the decoder, which is included by default")
    add("--ema", action="store_true", help="export the EMA of the weights")
    add("--overwrite", action="store_true", help="replace an earlier export")
    add(
        "--results",
        type=Path,
        action="append",
        default=[],
        metavar="JSON",
        help="result of an evaluation, to be quoted on the model card",
    )


def _export(args: argparse.Namespace) -> None:
    from pipeline.export.command import export

    options = {name: getattr(args, name) for name in ("encoder_only", "ema", "overwrite", "results")}
    print(export(args.run, args.out, args.format, **options))

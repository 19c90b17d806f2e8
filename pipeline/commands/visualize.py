"""Commands that show what a run has learned, and hand it on."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import add_command, natural, positive

PICTURES = """\
Draw what trained models make of photographs:
  grid        what of each the model saw, and what it predicted for the rest
  agreement   the same behind several masks, and how much the predictions agree, as a number too
  difficulty  how far each masked patch is from what was seen, and the error against that
  attention   where the class token looks: the last layer's heads, and rollout
  features    the main directions of the patch features, as colours
"""


def add_to(commands) -> None:
    command = add_command(
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
    command.add_argument("--count", type=positive, default=8, metavar="N", help="photographs (default: 8)")
    command.add_argument(
        "--tiles",
        type=positive,
        default=1,
        metavar="N",
        help="show each photograph as N x N squares of the model's image size; attention and features see it "
        "whole at that size (default: 1)",
    )
    command.add_argument("--seed", type=natural, default=0, metavar="N", help="of the masks (default: 0)")
    command.add_argument(
        "--seeds", type=positive, default=3, metavar="N", help="masks that agreement compares (default: 3)"
    )

    command = add_command(
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

    command = add_command(
        commands,
        "export",
        _export,
        "give a run's weights to another library",
        "Write the newest checkpoint's weights as a folder for timm, Hugging Face transformers (hf: encoder, "
        "hf-mae: with decoder), the official MAE code or ONNX, with a model card; of a fine-tuned run the "
        "classifier, for timm, the official code or ONNX. It is loaded again by the library it is for, and "
        "kept only if what comes out is the same.",
        "examples:\n  python -m pipeline export runs/l16 exports/l16-timm --format timm\n"
        "  python -m pipeline export runs/l16-tuned exports/l16-tuned --format onnx\n"
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


def _reconstruct(args: argparse.Namespace) -> None:
    from pipeline.pictures.reconstruct import Options, reconstruct

    options = Options(args.count, args.tiles, args.seed, args.seeds)
    print(reconstruct(args.run, args.images, args.out, args.kind, options))


def _report(args: argparse.Namespace) -> None:
    from pipeline.report.page import report

    print(report(args.runs, args.out))


def _export(args: argparse.Namespace) -> None:
    from pipeline.export.command import export

    options = {name: getattr(args, name) for name in ("encoder_only", "ema", "overwrite", "results")}
    print(export(args.run, args.out, args.format, **options))

"""Commands that draw pictures and reports of runs."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import add_command, non_negative_int, positive_int

KINDS = """\
Draw what trained models make of images:
  grid        visible patches of each image, and the prediction of the others
  agreement   predictions behind several masks, and how much they agree, also as a number
  difficulty  distance of each masked patch to the visible ones, and the error by distance
  attention   attention of the class token: the last layer's heads, and rollout
  features    principal components of the patch features, as colors
"""


def add_to(commands) -> None:
    command = add_command(
        commands,
        "reconstruct",
        _reconstruct,
        "draw reconstructions, attention and features",
        KINDS,
        "examples:\n  python -m pipeline reconstruct runs/demo --images photos/ --out reconstruction.png\n"
        "  python -m pipeline reconstruct runs/mae runs/emae --images photos/ --out pics --kind agreement\n"
        "  python -m pipeline reconstruct runs/l16 --images cat.jpg --out cat --kind attention features\n",
    )
    add = command.add_argument
    add("run", type=Path, nargs="+", metavar="RUN", help="run directory with a checkpoint")
    add("--images", type=Path, nargs="+", required=True, metavar="PATH", help="image files, or folders")
    add("--out", type=Path, required=True, metavar="PATH", help="a .png, or a folder for RUN-KIND.png")
    add(
        "--kind",
        nargs="+",
        default=["grid"],
        choices=["grid", "agreement", "difficulty", "attention", "features"],
        help="pictures to draw (default: grid)",
    )
    add("--count", type=positive_int, default=8, metavar="N", help="maximum number of images (default: 8)")
    add(
        "--tiles",
        type=positive_int,
        default=1,
        metavar="N",
        help="divide each image into N x N tiles of the model's image size; attention and features use the "
        "whole image at that size (default: 1)",
    )
    add("--seed", type=non_negative_int, default=0, metavar="N", help="seed of the masks (default: 0)")
    add("--seeds", type=positive_int, default=3, metavar="N", help="masks that agreement compares (default: 3)")

    command = add_command(
        commands,
        "report",
        _report,
        "write an HTML report of one or several runs",
        "Write one HTML file: curves, throughput, interruptions, skipped steps, reconstructions, recipe and\n"
        "environment, of several runs side by side. A folder beside it has the figures as PNG.",
        "examples:\n  python -m pipeline report runs/demo\n"
        "  python -m pipeline report runs/mae runs/emae --out comparison.html\n",
    )
    add = command.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    add("--out", type=Path, metavar="HTML", help="default: RUN/report.html, or report.html for several runs")


def _reconstruct(args: argparse.Namespace) -> None:
    from pipeline.pictures.reconstruct import reconstruct

    options = {name: getattr(args, name) for name in ("count", "tiles", "seed", "seeds")}
    print(reconstruct(args.run, args.images, args.out, args.kind, **options))


def _report(args: argparse.Namespace) -> None:
    from pipeline.report.page import report

    print(report(args.runs, args.out))

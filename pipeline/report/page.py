"""The report: one self-contained HTML page of one or several runs, and its figures as PNG files.

Invariant: every interruption, rollback and skipped step of a run is on the page.
"""

import base64
import html
import io
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template

from matplotlib import pyplot as plt

from pipeline.errors import UserError
from pipeline.io.atomic import atomic_write
from pipeline.report.figures import plot_accuracy, plot_details, plot_loss, plot_wall_clock, render_reconstructions
from pipeline.report.history import History, differences, read_history
from pipeline.report.tables import (
    environment_section,
    events_section,
    format_duration,
    format_number,
    run_heading,
    skipped_steps_section,
    table,
)

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title><style>
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #23272e;
  max-width: 1140px; margin: 0 auto; padding: 2.2em 1.6em 5em; background: #fff }
h1 { font-size: 1.75em; line-height: 1.2; margin: 0 }
h2 { font-size: 1.15em; margin: 2.6em 0 .7em; padding-top: .8em; border-top: 1px solid #e3e6eb }
p.subtitle { color: #5c6470; margin: .35em 0 1.6em }
p.note { color: #5c6470; font-size: .9em; margin: .3em 0 .8em; max-width: 62em }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)); gap: 1px;
  padding: 1px }
.cards div { box-shadow: 0 0 0 1px #e3e6eb; padding: .65em .9em }
.cards b { display: block; font-size: 1.22em; font-weight: 600; font-variant-numeric: tabular-nums }
.cards span { color: #5c6470; font-size: .82em }
img { display: block; max-width: 100%; height: auto; margin: .2em 0 }
table { border-collapse: collapse; font-size: .92em; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; color: #5c6470 }
td, th { padding: .32em 1.5em .32em 0; vertical-align: top; border-bottom: 1px solid #eceff3 }
td:first-child { white-space: nowrap }
p.stop { color: #b3261e; font-weight: 600 }
tr.red td { color: #b3261e }
i.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em }
details { margin: .6em 0 } summary { cursor: pointer; color: #1f5a92 }
pre { background: #f6f7f9; border-radius: 6px; padding: 1em 1.2em; overflow: auto; font-size: 12.5px;
  line-height: 1.5 }
@media print { body { padding: 0; max-width: none } details { display: none } }
</style></head><body>
<h1>$title</h1><p class="subtitle">$subtitle</p>
$body
</body></html>
""")
FIGURES = {
    "loss": ("Loss", plot_loss, ""),
    "accuracy": ("Accuracy", plot_accuracy, ""),
    "time": (
        "Wall-clock time",
        plot_wall_clock,
        "Shaded: not running, from the last logged line to the next start. Dotted: steps that were lost and "
        "trained again.",
    ),
    "details": (
        "Learning rate, gradient norm, throughput",
        plot_details,
        "Compute time is a rank's time for its data and forward passes, without waiting for other ranks. A "
        "slowest rank far above the median (a straggler) delays all ranks.",
    ),
}
"""Heading, function and note of each figure, in the order of the page."""


def report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page, and its figures to a folder of the same name beside it.

    Args:
        runs: Run directories.
        out: File name that ends in .html; None: RUN/report.html of a single run, else ./report.html.

    Returns:
        The path of the page.

    Raises:
        UserError: If a run has no metrics yet.
    """
    if out is not None and out.suffix != ".html":
        raise UserError(f"--out {out}: not an .html file; choose a name that ends in .html")
    histories = [read_history(run) for run in runs]
    out = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    body = [_overview(histories)]
    for name, (heading, plot, note) in FIGURES.items():
        figure = plot(histories)
        if figure:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=160)
            plt.close(figure)
            body.append(f"<h2>{heading}</h2>{_image(path.read_bytes(), heading)}")
            body.append(f"<p class='note'>{note}</p>" if note else "")
    body += [
        events_section(histories),
        skipped_steps_section(histories),
        _reconstructions_section(histories, folder),
        _recipe_section(histories),
        environment_section(histories),
    ]
    names = ", ".join(history.name for history in histories)
    page = PAGE.substitute(
        title=html.escape(f"Run {names}" if len(histories) == 1 else f"Runs {names}"),
        subtitle=html.escape(_subtitle(histories)),
        body="\n".join(body),
    )
    atomic_write(out, page)
    return out


def _subtitle(histories: list[History]) -> str:
    generated = f"report of {time.strftime('%d %B %Y, %H:%M')}"
    if len(histories) > 1:
        return f"{len(histories)} runs; {generated}"
    recipe, facts = histories[0].recipe, histories[0].starts[-1].environment
    method, model, data = (recipe.get(name) or {} for name in ("method", "model", "data"))
    ranks = f"{facts['world_size']} rank{'s' if facts['world_size'] > 1 else ''}"
    return (
        f"{method.get('name', 'training')} on {model.get('name', 'a model')}, {data.get('image_size')} px, "
        f"global batch {data.get('global_batch')}; {ranks} on {facts['device']}, "
        f"ZeRO {facts['zero_stage']}, {recipe['engine']['precision']}; {generated}"
    )


def _facts(history: History) -> dict[str, str]:
    last, total = history.lines[-1], history.recipe["train"].get("steps")
    losses, rank_speed = history.column("loss")[1], _median(history, "images_per_s_rank")
    mfu = _median(history, "mfu")
    facts = {
        "progress": f"{last['step']:,} steps" if total is None else f"{last['step']:,} of {total:,} steps",
        "images": f"{last['samples']:,} ({last['epoch']:.1f} epochs)",
        "last loss": format_number(losses[-1] if losses else None),
        "lowest loss": format_number(min(losses, default=None)),
        **{f"last {name}": f"{history.column(name)[1][-1]:.2%}" for name in history.accuracy_columns},
        "median images/s": f"{_median(history, 'images_per_s'):,.0f}",
        "median images/s per rank": f"{rank_speed:,.1f}" if rank_speed else "not recorded",
        "median data wait": f"{_median(history, 'data_wait'):.1%}",
        "median MFU": f"{mfu:.1%}" if mfu else "unknown",
        "peak memory": f"{max(history.column('memory')[1]):.1f} GiB",
        "interruptions": f"{len(history.starts) - 1}",
        "skipped steps": f"{sum(line['skipped'] for line in history.lines)}",
        "rollbacks": f"{len(history.rollbacks)}",
    }
    if history.has_times:
        facts["elapsed time"] = format_duration(last["time"] - history.starts[0].time)
    return facts


def _overview(histories: list[History]) -> str:
    """Show the key figures: as cards for a single run, else as a table."""
    facts = [_facts(history) for history in histories]
    if len(histories) == 1:
        pairs = [(html.escape(value), html.escape(label)) for label, value in facts[0].items()]
        cards = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in pairs)
        overview = f"<div class='cards'>{cards}</div>"
    else:
        labels = dict.fromkeys(label for known in facts for label in known)
        rows = [[label, *(known.get(label, "") for known in facts)] for label in labels]
        overview = table(["", *(history.name for history in histories)], rows)
    for history in histories:
        if history.stop:
            text = f"stopped by the guard at step {history.stop['step']}: {history.stop['reason']}"
            overview += f"<p class='stop'>{html.escape(f'{history.name}: {text}')}</p>"
    return overview


def _reconstructions_section(histories: list[History], folder: Path) -> str:
    parts = []
    for index, history in enumerate(histories):
        strip = render_reconstructions(history)
        if strip:
            name = "reconstructions.png" if len(histories) == 1 else f"reconstructions-{index + 1}.png"
            buffer = io.BytesIO()
            strip.save(buffer, "PNG", optimize=True)
            (folder / name).write_bytes(buffer.getvalue())
            last = history.pictures[-1]
            parts.append(run_heading(history, histories) + _image(buffer.getvalue(), "reconstructions by step"))
            parts.append("<details><summary>All views at the last checkpoint</summary>")
            parts.append(f"{_image(last.read_bytes(), last.stem)}</details>")
    return "<h2>Reconstructions</h2>" + "".join(parts) if parts else ""


def _recipe_section(histories: list[History]) -> str:
    parts = ["<h2>Recipe</h2>"]
    if len(histories) > 1:
        rows = [
            [key, *("" if value is None else str(value) for value in values)]
            for key, values in differences(histories).items()
        ]
        names = [history.name for history in histories]
        parts.append(table(["differing key", *names], rows) if rows else "<p>The recipes are equal.</p>")
    for history in histories:
        text = f"<pre>{html.escape(history.recipe_text)}</pre>"
        parts.append(f"<details><summary>{html.escape(history.name)}: recipe.yaml</summary>{text}</details>")
    return "".join(parts)


def _image(png: bytes, alt: str) -> str:
    return f"<img alt='{alt}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _median(history: History, name: str) -> float:
    values = sorted(history.column(name)[1])
    return values[len(values) // 2] if values else 0.0

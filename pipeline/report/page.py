"""One or several runs as one page, which needs nothing beside it; and its figures as PNG files.

Invariant: nothing that interrupted a run or was skipped in it is left out of the page.
"""

import base64
import html
import io
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from pipeline.errors import UserError
from pipeline.io.atomic import atomic_write
from pipeline.report.figures import (
    accuracy_figure,
    details_figure,
    loss_figure,
    reconstruction_strip,
    time_figure,
)
from pipeline.report.history import History, differences, read_history
from pipeline.report.tables import (
    duration,
    environments,
    heading,
    names_of,
    number,
    skipped,
    table,
    what_happened,
)

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title><style>
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #23272e;
  max-width: 1140px; margin: 0 auto; padding: 2.2em 1.6em 5em; background: #fff }
h1 { font-size: 1.75em; line-height: 1.2; margin: 0 }
h2 { font-size: 1.15em; margin: 2.6em 0 .7em; padding-top: .8em; border-top: 1px solid #e3e6eb }
p.under { color: #5c6470; margin: .35em 0 1.6em }
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
tr.trouble td { color: #b3261e }
i.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em }
details { margin: .6em 0 } summary { cursor: pointer; color: #1f5a92 }
pre { background: #f6f7f9; border-radius: 6px; padding: 1em 1.2em; overflow: auto; font-size: 12.5px;
  line-height: 1.5 }
@media print { body { padding: 0; max-width: none } details { display: none } }
</style></head><body>
<h1>$title</h1><p class="under">$under</p>
$body
</body></html>
""")


def report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one or several runs and return its path; the figures go beside it, into a folder of
    its name.

    out: a name that ends in .html; None: RUN/report.html of a single run, report.html here of several.
    UserError where a run has logged nothing yet.
    """
    if out is not None and out.suffix != ".html":
        raise UserError(f"--out {out}: give a name that ends in .html")
    histories = [read_history(run) for run in runs]
    out = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "loss": loss_figure,
        "accuracy": accuracy_figure,
        "time": time_figure,
        "details": details_figure,
    }
    drawn = {name: draw(histories) for name, draw in figures.items()}
    shown = {name: _figure(figure, folder / f"{name}.png") for name, figure in drawn.items() if figure}
    body = [
        _cards(histories[0]) if len(histories) == 1 else _comparison(histories),
        f"<h2>Loss</h2>{_image(shown['loss'], 'loss by step, skipped and repeated steps marked')}",
        f"<h2>Accuracy</h2>{_image(shown['accuracy'], 'accuracy by step')}" if "accuracy" in shown else "",
        _by_the_clock(shown.get("time")),
        f"<h2>Learning rate, gradient, speed</h2>{_image(shown['details'], 'six curves by step')}"
        f"<p class='note'>{OWN_WORK}</p>",
        what_happened(histories),
        skipped(histories),
        _reconstructions(histories, folder),
        _recipes(histories),
        environments(histories),
    ]
    names = ", ".join(history.name for history in histories)
    page = PAGE.substitute(
        title=html.escape(f"Run {names}" if len(histories) == 1 else f"Runs {names}"),
        under=html.escape(_under(histories)),
        body="\n".join(body),
    )
    atomic_write(out, page)
    return out


OWN_WORK = (
    "A rank's own work is what it does without waiting for the others: its data and its forward passes. "
    "A slowest rank far above the median holds all of them up."
)
CLOCK = (
    "Shaded: not running, from the last logged line to the next start. Dotted: steps that were lost with an "
    "interruption and computed again."
)


def _under(histories: list[History]) -> str:
    made = time.strftime("%d %B %Y, %H:%M")
    if len(histories) > 1:
        return f"{len(histories)} runs; page made on {made}"
    history = histories[0]
    recipe, facts = history.recipe, history.starts[-1].facts
    method, model, data = (recipe.get(name) or {} for name in ("method", "model", "data"))
    ranks = f"{facts['world_size']} rank{'s' if facts['world_size'] > 1 else ''}"
    return (
        f"{method.get('name', 'training')} on {model.get('name', 'a model')}, {data.get('image_size')} px, "
        f"global batch {data.get('global_batch')}; {ranks} on {facts['device']}, "
        f"ZeRO {facts['zero_stage']}, {recipe['engine']['precision']}; page made on {made}"
    )


def _facts(history: History) -> dict[str, str]:
    last, wanted = history.lines[-1], history.recipe["train"].get("steps")
    losses = history.column("loss")[1]
    speed, own = [_median(history, name) for name in ("images_per_s", "images_per_s_rank")]
    facts = {
        "steps" if wanted is None else f"of {wanted:,} steps": f"{last['step']:,}",
        f"images, {last['epoch']:.1f} epochs": f"{last['samples']:,}",
        "loss, the last": number(losses[-1] if losses else None),
        "loss, the lowest": number(min(losses, default=None)),
        **{f"{name}, the last": f"{history.column(name)[1][-1]:.2%}" for name in history.accuracies},
        "images/s, median": f"{speed:,.0f}",
        "images/s a rank": f"{own:,.1f}" if own else "not recorded",
        "data wait, median": f"{_median(history, 'data_wait'):.1%}",
        "MFU, median": f"{mfu:.1%}" if (mfu := _median(history, "mfu")) else "unknown",
        "memory, the most": f"{max(history.column('memory')[1]):.1f} GiB",
        "interruptions": f"{len(history.starts) - 1}",
        "steps skipped": f"{sum(line['skipped'] for line in history.lines)}",
        "returns of the guard": f"{len(history.rollbacks)}",
    }
    if history.timed:
        facts["from start to last line"] = duration(last["time"] - history.starts[0].time)
    return facts


def _cards(history: History) -> str:
    pairs = _facts(history).items()
    cards = "".join(f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in pairs)
    return f"<div class='cards'>{cards}</div>" + (_stop(history) if history.stop else "")


def _stop(history: History) -> str:
    text = f"Stopped by the guard at step {history.stop['step']}: {history.stop['reason']}"
    return f"<p><b style='color:#b3261e'>{html.escape(text)}</b></p>"


def _comparison(histories: list[History]) -> str:
    facts = [{_plain(name): text for name, text in _facts(history).items()} for history in histories]
    names = dict.fromkeys(name for known in facts for name in known)
    rows = [[name, *(known.get(name, "") for known in facts)] for name in names]
    stops = "".join(_stop(history) for history in histories if history.stop)
    return table(["", *names_of(histories)], rows) + stops


def _plain(name: str) -> str:
    """A card's caption without the numbers of its run."""
    return "steps" if name.endswith(" steps") else "images" if name.startswith("images, ") else name


def _by_the_clock(image: bytes | None) -> str:
    if image is None:
        return ""
    shown = _image(image, "steps done and images/s by time, interruptions and returns marked")
    return f"<h2>By the clock</h2>{shown}<p class='note'>{CLOCK}</p>"


def _reconstructions(histories: list[History], folder: Path) -> str:
    parts = []
    for index, history in enumerate(histories):
        strip = reconstruction_strip(history)
        if strip:
            name = "reconstructions.png" if len(histories) == 1 else f"reconstructions-{index + 1}.png"
            parts.append(heading(history, histories) + _image(_picture(strip, folder / name), "over time"))
            whole = _image(history.pictures[-1].read_bytes(), history.pictures[-1].stem)
            parts.append(f"<details><summary>Every view at the newest checkpoint</summary>{whole}</details>")
    return "<h2>Reconstructions over time</h2>" + "".join(parts) if parts else ""


def _recipes(histories: list[History]) -> str:
    parts = []
    if len(histories) > 1:
        rows = [[key, *map(_value, values)] for key, values in differences(histories).items()]
        parts.append(table(["key", *names_of(histories)], rows) if rows else "<p>The same recipe.</p>")
    for history in histories:
        text = f"<pre>{html.escape(history.recipe_text)}</pre>"
        parts.append(f"<details><summary>{html.escape(history.name)}: recipe.yaml</summary>{text}</details>")
    return f"<h2>Recipe{', and how they differ' if len(histories) > 1 else ''}</h2>" + "".join(parts)


def _figure(figure: Figure, path: Path) -> bytes:
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path.read_bytes()


def _picture(picture: Image.Image, path: Path) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def _image(png: bytes, alt: str) -> str:
    return f"<img alt='{alt}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _median(history: History, name: str) -> float:
    values = sorted(history.column(name)[1])
    return values[len(values) // 2] if values else 0.0


def _value(value: object) -> str:
    return "" if value is None else str(value)

"""A run as one page: report.html, which needs nothing beside it.

Curves of loss, learning rate, throughput and data wait; reconstructions at some of the checkpoints; when the
run was started and interrupted; recipe and environment.
"""

import base64
import html
import io
import json
from pathlib import Path
from string import Template

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from pipeline.errors import UserError

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
img { max-width: 100% } pre { background: #f5f5f5; padding: 1em; overflow: auto; font-size: 13px }
td, th { padding: .2em 1em .2em 0; text-align: left }
h2 { margin-top: 2em }
</style></head><body>
<h1>$title</h1><table>$facts</table>
<h2>Curves</h2><img alt="loss, throughput, learning rate and data wait by step" src="$curves">
$pictures
<h2>Starts</h2><table><tr><th>time</th><th>after step</th><th>ranks</th><th>device</th></tr>$starts</table>
<h2>Recipe</h2><pre>$recipe</pre>
<h2>Environment</h2><pre>$environment</pre>
</body></html>
""")


def report(run: Path) -> Path:
    """Write RUN/report.html and return its path. UserError where the run has logged nothing yet."""
    lines = _metrics(run)
    environment = json.loads((run / "environment.json").read_text())
    last = lines[-1]
    facts = {
        "steps": f"{last['step']:,}",
        "images seen": f"{last['samples']:,} ({last['epoch']:.1f} epochs)",
        "loss": f"from {lines[0]['loss']:.4f} to {last['loss']:.4f}",
        "images/s": f"{_median([line['images_per_s'] for line in lines]):,.0f} (median)",
        "data wait": f"{_median([line['data_wait'] for line in lines]):.1%} of the time (median)",
        "memory": f"{last['memory']:.1f} GiB",
    }
    starts = environment.pop("starts")
    page = PAGE.substitute(
        title=html.escape(f"Run {run.resolve().name}"),
        facts="".join(
            f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items()
        ),
        curves=_embedded(_curves(lines, [start["step"] for start in starts[1:]])),
        pictures=_pictures(run / "reconstructions"),
        starts="".join(
            f"<tr><td>{s['time']}</td><td>{s['step']}</td><td>{s['world_size']}</td><td>{s['device']}</td></tr>"
            for s in starts
        ),
        recipe=html.escape((run / "recipe.yaml").read_text()),
        environment=html.escape(json.dumps(environment, indent=1)),
    )
    out = run / "report.html"
    out.write_text(page)
    return out


def _metrics(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"{run}: no run directory (no metrics.jsonl); `python -m pipeline pretrain` makes one"
        )
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if not lines:
        raise UserError(f"{run}: nothing is logged yet; a line comes every train.log_every steps")
    return lines


def _curves(lines: list[dict], continued: list[int]) -> bytes:
    steps = [line["step"] for line in lines]
    known = {
        "step",
        "epoch",
        "samples",
        "loss",
        "lr",
        "grad_norm",
        "images_per_s",
        "data_wait",
        "mfu",
        "memory",
    }
    known.add("decoded_patches")  # of Efficient MAE: a count, no part of the loss
    losses = ["loss", *sorted(lines[0].keys() - known)]
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharex=True, layout="constrained")
    panels = [
        ("loss", losses),
        ("images/s", ["images_per_s"]),
        ("learning rate", ["lr"]),
        ("data wait, share of the time", ["data_wait"]),
    ]
    for axis, (title, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            axis.plot(
                steps, [line[name] for line in lines], label=name, linewidth=2 if name == "loss" else 1.2
            )
        for step in continued:
            axis.axvline(step, color="0.6", linestyle=":", linewidth=1)
        axis.set_title(title, loc="left", fontsize=11)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        if len(names) > 1:
            axis.legend(frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("step" + (" (dotted: continued after an interruption)" if continued else ""))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _pictures(folder: Path) -> str:
    shown = sorted(folder.glob("step-*.png"))
    if len(shown) > 4:  # the first, the last and two between tell the story
        shown = [shown[round(i * (len(shown) - 1) / 3)] for i in range(4)]
    parts = [
        f"<h3>{path.stem}</h3><img alt='{path.stem}' src='{_embedded(path.read_bytes())}'>" for path in shown
    ]
    return "<h2>Reconstructions</h2>" + "".join(reversed(parts)) if parts else ""


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]

"""The report's tables, as HTML: what happened to the runs, what was skipped, where they ran.

Invariant: every text that comes from a run is escaped.
"""

import html
import time

from pipeline.report.figures import colour
from pipeline.report.history import History, Start

MOST_SKIPS = 40
"""Rows of the table of skipped steps, a run."""


def what_happened(histories: list[History]) -> str:
    """Starts, returns and stops, in their order."""
    parts = []
    for history in histories:
        rows = [(start.time, "", _start_row(start, history)) for start in history.starts]
        for event in [*history.rollbacks, *([history.stop] if history.stop else [])]:
            rows.append((event.get("time") or 0.0, " class='trouble'", _event_row(event)))
        rows.sort(key=lambda row: row[0])
        lines = "".join(
            f"<tr{style}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
            for _, style, cells in rows
        )
        head = "".join(
            f"<th>{name}</th>" for name in ("time", "step", "what", "ranks", "ZeRO", "device", "host")
        )
        parts.append(f"{heading(history, histories)}<table><tr>{head}</tr>{lines}</table>")
    return "<h2>What happened</h2>" + "".join(parts)


def _start_row(start: Start, history: History) -> list[str]:
    if start is history.starts[0]:
        what = "begun"
    elif start.repeated:
        what = f"continued; steps {start.step + 1} to {start.before['step']} were lost and computed again"
    else:
        what = "continued; nothing was lost"
    if start.away is not None:
        what += f", away for {duration(start.away)}"
    facts = start.facts
    return [
        _clock(start.time), f"{start.step:,}", what, str(facts["world_size"]), str(facts["zero_stage"]),
        facts["device"], facts["host"],
    ]  # fmt: skip


def _event_row(event: dict) -> list[str]:
    when = _clock(event["time"]) if "time" in event else ""
    if event["event"] == "stop":
        return [when, f"{event['step']:,}", f"the guard stopped the run: {event['reason']}", "", "", "", ""]
    first, last = event["bad_span"]
    what = (
        f"the guard went back from step {event['from_step']}: steps {first} to {last} were skipped in a row, "
        f"{event['reason']}; on behind {event['skipped_samples']:,} samples"
    )
    return [when, f"{event['step']:,}", what, "", "", "", ""]


def skipped(histories: list[History]) -> str:
    parts = []
    for history in histories:
        skips = history.skips
        if skips:
            rows = [
                [f"{skip.step:,}", skip.reason, number(skip.loss), number(skip.grad_norm)]
                for skip in skips[:MOST_SKIPS]
            ]
            shown = table(["step", "why", "loss", "gradient norm"], rows)
            more = f"<p class='note'>and {len(skips) - MOST_SKIPS} more, in metrics.jsonl</p>"
            parts.append(heading(history, histories) + shown + (more if len(skips) > MOST_SKIPS else ""))
    return "<h2>Skipped steps</h2>" + ("".join(parts) or "<p class='note'>None.</p>")


def environments(histories: list[History]) -> str:
    """Of each run's newest start."""
    newest = [history.starts[-1].facts for history in histories]
    rows = [
        [name, *(str(facts.get(key)) for facts in newest)]
        for name, key in {"Python": "python", "commit": "commit", "host": "host", "device": "device"}.items()
    ]
    packages = dict.fromkeys(name for facts in newest for name in facts["versions"])
    rows += [[name, *(facts["versions"].get(name, "") for facts in newest)] for name in packages]
    rows.append(["command", *(" ".join(facts["command"]) for facts in newest)])
    return "<h2>Environment</h2>" + table(["", *names_of(histories)], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def heading(history: History, histories: list[History]) -> str:
    if len(histories) == 1:
        return ""
    shade = colour(histories.index(history))
    return f"<h3><i class='key' style='background:{shade}'></i>{html.escape(history.name)}</h3>"


def names_of(histories: list[History]) -> list[str]:
    return [history.name for history in histories]


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _clock(moment: float) -> str:
    return time.strftime("%d %b %H:%M:%S", time.localtime(moment))


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"

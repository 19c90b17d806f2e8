"""HTML tables of the report: events, skipped steps, environments.

Invariant: all text that comes from a run is escaped.
"""

import html
import time
from collections.abc import Collection, Sequence

from pipeline.report.figures import color_of
from pipeline.report.history import History, Start

MAX_SKIPPED_STEPS = 40
"""Rows per run."""


def events_section(histories: Sequence[History]) -> str:
    """List starts, rollbacks and the guard's stop in their order."""
    head = ["time", "step", "event", "ranks", "ZeRO", "device", "host"]
    parts = []
    for history in histories:
        rows = [(start.time, _start_row(start)) for start in history.starts]
        for event in [*history.rollbacks, *([history.stop] if history.stop else [])]:
            rows.append((event.get("time") or 0.0, _event_row(event)))
        rows.sort(key=lambda row: row[0])
        red = {number for number, (_, row) in enumerate(rows) if "guard" in row[2]}
        parts.append(run_heading(history, histories) + table(head, [row for _, row in rows], red))
    return "<h2>Events</h2>" + "".join(parts)


def _start_row(start: Start) -> list[str]:
    last, facts = start.last_logged, start.environment
    if last is None:
        event = "started"
    elif start.num_repeated_steps:
        event = f"resumed; steps {start.step + 1} to {last['step']} were lost and trained again"
    else:
        event = "resumed; no steps lost"
    if start.downtime is not None:
        event += f"; downtime {format_duration(start.downtime)}"
    columns = [str(facts[key]) for key in ("world_size", "zero_stage", "device", "host")]
    return [_format_time(start.time), f"{start.step:,}", event, *columns]


def _event_row(event: dict) -> list[str]:
    if event["event"] == "stop":
        text = f"stopped by the guard: {event['reason']}"
    else:
        first, last = event["bad_span"]
        text = (
            f"rolled back by the guard from step {event['from_step']}: steps {first} to {last} were skipped "
            f"({event['reason']}); {event['skipped_samples']:,} samples skipped"
        )
    when = _format_time(event["time"]) if "time" in event else ""
    return [when, f"{event['step']:,}", text, "", "", "", ""]


def skipped_steps_section(histories: Sequence[History]) -> str:
    parts = []
    for history in histories:
        skips = history.skipped_steps
        if skips:
            rows = [
                [f"{skip.step:,}", skip.reason, format_number(skip.loss), format_number(skip.grad_norm)]
                for skip in skips[:MAX_SKIPPED_STEPS]
            ]
            parts.append(run_heading(history, histories) + table(["step", "reason", "loss", "grad norm"], rows))
            if len(skips) > MAX_SKIPPED_STEPS:
                more = len(skips) - MAX_SKIPPED_STEPS
                parts.append(f"<p class='note'>and {more} more in metrics.jsonl</p>")
    return "<h2>Skipped steps</h2>" + ("".join(parts) or "<p class='note'>None.</p>")


def environment_section(histories: Sequence[History]) -> str:
    """Compare the environments of each run's last start."""
    environments = [history.starts[-1].environment for history in histories]
    labels = {"Python": "python", "commit": "commit", "host": "host", "device": "device"}
    rows = [[label, *(str(facts.get(key)) for facts in environments)] for label, key in labels.items()]
    packages = dict.fromkeys(name for facts in environments for name in facts["versions"])
    rows += [[name, *(facts["versions"].get(name, "") for facts in environments)] for name in packages]
    rows.append(["command", *(" ".join(facts["command"]) for facts in environments)])
    return "<h2>Environment</h2>" + table(["", *(history.name for history in histories)], rows)


def table(head: list[str], rows: list[list[str]], red: Collection[int] = ()) -> str:
    """Return an HTML table of plain text; `red` has the indices of rows in red."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body += f"<tr class='red'>{cells}</tr>" if number in red else f"<tr>{cells}</tr>"
    return f"<table><tr>{top}</tr>{body}</table>"


def run_heading(history: History, histories: Sequence[History]) -> str:
    """Return a heading with the run's name and color; empty on the page of a single run."""
    if len(histories) == 1:
        return ""
    color = color_of(histories.index(history))
    return f"<h3><i class='key' style='background:{color}'></i>{html.escape(history.name)}</h3>"


def format_number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _format_time(timestamp: float) -> str:
    return time.strftime("%d %b %H:%M:%S", time.localtime(timestamp))

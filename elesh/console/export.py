"""Runs and decisions as files: one HTML file (``elesh report``), CSV and JSON.

Promises: in the file a summary of one page comes first, every decision is in the table after it,
and the largest cuts follow whole; it needs nothing else, and the run is found wherever in the
streams it stands. In CSV every row has every column; a text that a spreadsheet would take for a
formula is quoted; times are UTC in ISO 8601.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from elesh.bus import Bus
from elesh.observe.logs import iso
from elesh.operate.run_history import Decided, Run
from elesh.settings import Settings
from leyline import IdempotencyKey, InvalidField

from .decision import decision_view
from .lists import Wanted, decisions_of
from .pages import asset, render
from .reading import Reader
from .runs import RunView, decision_row, run_view

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def decision_rows(decisions: Iterable[tuple[Run, Decided]]) -> list[dict[str, Any]]:
    """One row a decision."""
    rows = []
    for run, decided in decisions:
        row = decision_row(run, decided)
        rows.append(
            {
                "run": row.run_id,
                "epoch": row.epoch,
                "key": row.key,
                "level": row.level,
                "phase": row.phase,
                "result": row.result,
                "units_removed": row.units,
                "parameters_before": decided.parameters_before,
                "parameters_after": decided.parameters_after,
                "macs_before": decided.macs_before,
                "macs_after": decided.macs_after,
                "accuracy_before": row.accuracy_before,
                "accuracy_after": row.accuracy_after,
                "measured_by_worker": row.measured,
                "failed_gates": " ".join(decided.failed_gates),
                "fallbacks": " ".join(decided.fallbacks),
                "reason": row.reason,
            }
        )
    return rows


def checkpoint_rows(run: Run) -> list[dict[str, Any]]:
    """One row a checkpoint, by epoch, with the units left of every group."""
    points = [run.checkpoints[epoch] for epoch in sorted(run.checkpoints)]
    names = dict.fromkeys(width.name for point in points for width in point.shape.widths)
    rows = []
    for point in points:
        sizes = {width.name: width.size for width in point.shape.widths}
        rows.append(
            {
                "epoch": point.epoch,
                "accuracy": point.accuracy,
                "loss": point.loss,
                "parameters": point.shape.parameters,
                "macs": point.shape.macs,
            }
            | {f"units {name}": sizes.get(name, 0) for name in names}
        )
    return rows


def run_facts(run: Run) -> dict[str, Any]:
    """Everything of a run."""
    view = run_view(run)
    decided = sorted(run.decisions.values(), key=lambda each: (each.order, each.key))
    return {
        "run": run.run_id,
        "heard_of": iso(run.at),
        "epoch": view.epoch,
        "phase": view.phase,
        "gain": asdict(view.gain) if view.gain else None,
        "results": dict(view.results),
        "groups": [asdict(width) for width in view.widths],
        "held_back": [asdict(each) for each in view.held_back],
        "checkpoints": checkpoint_rows(run),
        "decisions": decision_rows((run, each) for each in decided),
    }


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with a header; empty text for none."""
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\r\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _plain(value) for name, value in row.items()})
    return file.getvalue()


def comparison(a: RunView, b: RunView) -> list[tuple[str, str, str]]:
    """Figures of two runs side by side: what they are, of the one, of the other."""
    left, right = _figures(a), _figures(b)
    return [(name, left.get(name, ""), right.get(name, "")) for name in left | right]


def _figures(run: RunView) -> dict[str, str]:
    gain = run.gain
    facts = {"epoch": f"{run.epoch:,}", "phase": run.phase}
    if gain is not None:
        for name, (before, now) in (("parameters", gain.parameters), ("MACs", gain.macs)):
            share = f" ({now / before:.1%} left)" if before else ""
            facts[name] = f"{before:,} → {now:,}{share}"
        for level, before, now in gain.units:
            facts[f"{level}s"] = f"{before:,} → {now:,}"
        if gain.latency is not None:
            facts["a call"] = gain.latency.said
        facts["cuts that stayed"] = f"{gain.cuts:,}"
        for name, value in zip(("at the first cut", "now"), gain.accuracy, strict=True):
            if value is not None:
                facts[f"accuracy {name}"] = f"{value:.2%}"
    facts |= {name.replace("_", " "): f"{count:,}" for name, count in run.results}
    return facts


def _plain(value: object) -> object:
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value


_WHOLE = 12
"""Cuts that are shown whole, the largest; every decision is in the table."""


async def write_report(bus: Bus, settings: Settings, run_id: str, path: Path) -> int:
    """Write the report of a run; the number of decisions in it.

    Raises:
        InvalidField: if the run is not in the streams.
    """
    text, decisions = await report_html(bus, settings, run_id)
    path.write_text(text, encoding="utf-8")
    return decisions


async def report_html(bus: Bus, settings: Settings, run_id: str) -> tuple[str, int]:
    """The report and the number of decisions in it; see :func:`write_report`."""
    reader = Reader(bus, settings)
    run = await reader.search(run_id)
    if run is None:
        known = ", ".join(each.run_id for each in (await reader.refresh()).recent()[:5]) or "none"
        raise InvalidField("run", f"a run in the streams: {known}", run_id)
    view, now = run_view(run), datetime.now(UTC)
    applied = [mark for mark in view.marks if mark.result in ("applied", "rolled_back")]
    largest = sorted(applied, key=lambda mark: -run.decisions[mark.key].units)[:_WHOLE]
    decisions = []
    for mark in sorted(largest, key=lambda mark: mark.epoch):
        context = await reader.context(IdempotencyKey.parse(mark.key))
        if context is not None:
            decisions.append(decision_view(context, run.outcomes.get(mark.key, [])))
    shown = {str(each.key) for each in decisions}
    rows = [decision_row(*each) for each in decisions_of([run], Wanted())]
    script = asset("console.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = render(
        "report.html",
        link=lambda key: f"#d-{key}" if key in shown else f"#r-{key}",
        run=view,
        at=now,
        decisions=decisions,
        rows=rows,
        applied=len(applied),
        # Both are files of this package, no user's text.
        style=Markup(asset("console.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        version=version("elesh"),
    )
    return page.text, len(rows)

"""``elesh report``: a run as one HTML file that needs nothing else, to keep, send and print.

Promises: a summary of one page comes first; every decision is in the table after it, and the
largest cuts follow whole. The run is found wherever in the streams it stands.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from markupsafe import Markup

from elesh.bus import Bus
from elesh.settings import Settings
from leyline import IdempotencyKey, InvalidField

from .decision import decision_view
from .lists import Wanted, decisions_of
from .pages import asset, render
from .reading import Reader
from .runs import decision_row, run_view

__all__ = ["report_html", "write_report"]

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

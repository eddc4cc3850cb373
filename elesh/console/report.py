"""``elesh report``: a run as one HTML file that needs nothing else, to keep, send and print."""

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
from .overview import run_view
from .pages import asset, render
from .reading import Reader

__all__ = ["report_html", "write_report"]


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
    history = await reader.refresh()
    run = history.runs.get(run_id)
    if run is None:
        known = ", ".join(each.run_id for each in history.recent()[:5]) or "none"
        raise InvalidField("run", f"a run in the streams: {known}", run_id)
    view, now = run_view(run, datetime.now(UTC)), datetime.now(UTC)
    decisions = []
    for mark in view.marks:
        context = await reader.context(IdempotencyKey.parse(mark.key))
        if context is not None:
            told = decision_view(context, run.outcomes.get(mark.key, []))
            decisions.append((told, context.spans))
    script = asset("console.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = render(
        "report.html",
        link=lambda key: f"#d-{key}",
        run=view,
        at=now,
        decisions=decisions,
        # Both are files of this package, nobody else's text.
        style=Markup(asset("console.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        version=version("elesh"),
    )
    return text, len(decisions)

"""A trace as a waterfall in the terminal: who did what, when, and for how long."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .printable import printable
from .spanfile import RecordedSpan
from .terminal import escape

__all__ = ["print_trace", "tree_rows"]

_COLOURS = ("cyan", "green", "magenta", "yellow", "blue")
_BAR_SHARE = 0.3
_SHOWN = ("elesh.run", "elesh.epoch", "elesh.key", "elesh.outcome")
_EIGHTHS: tuple[str, ...] = ("", *"▏▎▍▌▋▊▉")


def tree_rows(spans: Sequence[RecordedSpan]) -> Iterator[tuple[str, RecordedSpan]]:
    """The spans in order of the tree, each with the guides that lead to it.

    A span whose parent is not among them stands at the left, as another first one.
    """
    known = {span.span for span in spans}
    children: dict[str, list[RecordedSpan]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        children[span.parent if span.parent in known else ""].append(span)

    def below(span: RecordedSpan, guide: str) -> Iterator[tuple[str, RecordedSpan]]:
        own = children[span.span]
        for child in own:
            last = child is own[-1]
            yield guide + ("└─ " if last else "├─ "), child
            yield from below(child, guide + ("   " if last else "│  "))

    for root in children[""]:
        yield "", root
        yield from below(root, "")


def print_trace(console: Console, spans: Sequence[RecordedSpan]) -> None:
    """Print the waterfall of one trace's spans, of which there is at least one."""
    begun, ended = min(s.start for s in spans), max(s.end for s in spans)
    speakers = dict.fromkeys((s.service, s.instance) for s in spans)
    colours = dict(zip(speakers, itertools.cycle(_COLOURS), strict=False))
    _print_head(console, spans, (ended - begun) / 1e9)
    width = max(10, int(console.width * _BAR_SHARE))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("span", no_wrap=True)
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("", width=width, no_wrap=True)
    for guide, span in tree_rows(spans):
        colour = "red" if span.failed else colours[span.service, span.instance]
        table.add_row(
            Text.assemble((guide, "dim"), (printable(span.name), colour)),
            _time((span.start - begun) / 1e9),
            _time(span.seconds),
            Text(_bar(span, begun, ended, width), style=colour),
        )
        inside = guide.replace("├─ ", "│  ").replace("└─ ", "   ")
        for note in _notes(span):
            table.add_row(Text.assemble((inside, "dim"), (f"   {printable(note)}", "red")))
    console.print(table)
    for (service, instance), colour in colours.items():
        console.print(Text.assemble(("■ ", colour), printable(f"{service} {instance}")))


def _print_head(console: Console, spans: Sequence[RecordedSpan], seconds: float) -> None:
    console.print(f"trace {spans[0].trace}: {len(spans)} spans in {_time(seconds)}")
    for name in _SHOWN:
        values = {escape(s.attributes[name]) for s in spans if name in s.attributes}
        if values:
            console.print(f"{name.removeprefix('elesh.')} {', '.join(sorted(values))}", style="dim")


def _notes(span: RecordedSpan) -> list[str]:
    """What a reader should not miss: failures, fallbacks, redeliveries."""
    notes = [span.failed] if span.failed else []
    for event in span.events:
        attributes = ", ".join(f"{name} {value}" for name, value in event["attributes"].items())
        if event["name"] != "exception":
            notes.append(f"{event['name']}: {attributes}")
    if int(span.attributes.get("elesh.deliveries", 1)) > 1:
        notes.append(f"delivery {span.attributes['elesh.deliveries']}")
    return notes


def _bar(span: RecordedSpan, begun: int, ended: int, width: int) -> str:
    """The span's place in the whole, in eighths of a cell; at least one eighth."""
    scale = width * 8 / max(1, ended - begun)
    left = min(round((span.start - begun) * scale), width * 8 - 1)
    length = max(1, round((span.end - span.start) * scale))
    lead, offset = divmod(left, 8)
    # A cell is filled from the left only: a bar that begins inside one takes the whole of it.
    full, rest = divmod(length + offset, 8)
    return (" " * lead + "█" * full + _EIGHTHS[rest])[:width]


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"

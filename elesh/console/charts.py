"""Charts as inline SVG, made on the server: no script; the page's style sheet sets colours for dark
and light by class. All text is escaped.

State is never shown by colour alone: marks differ in shape, removed units are crossed out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

from elesh.observe.spanfile import RecordedSpan, tree_rows
from elesh.operate.run_history import Width

from .decision import Comparison, Strip, UnitRow
from .runs import Band, Mark, RunView

_Scale = Callable[[float], float]


def tag(name: str, *content: str, **attributes: object) -> Markup:
    """An element; ``class_`` and ``stroke_width`` are spelt as Python can, None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_figure(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(escape(part) for part in content)
    return Markup(f"<{name}{written}>{inside}</{name}>")


def _figure(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _svg(
    width: int, height: int, label: str, parts: Iterable[Markup], class_: str, role: str = "img"
) -> Markup:
    box = f"0 0 {width} {height}"
    return tag("svg", *parts, class_=class_, viewBox=box, role=role, aria_label=label)


# The time line of a run

_LEFT, _RIGHT, _TOP = 52, 14, 26
_PANEL = 104
_LANE = 34


def timeline(run: RunView, width: int, link: Callable[[str], str]) -> Markup:
    """Phases, accuracy, decisions and the share pruned over the epochs of a run.

    ``link`` gives the address of a decision's page from its key.
    """
    last = max(1, run.epoch)
    height = _TOP + _PANEL + _LANE + _PANEL + 26

    def x(epoch: float) -> float:
        return _LEFT + (width - _LEFT - _RIGHT) * epoch / last

    lower = _TOP + _PANEL + _LANE
    parts = [
        *_phases(run.bands, x, height - 24),
        *_accuracy(run.accuracies, run.settled, x, width),
        *_marks(run.marks, x, _TOP + _PANEL + _LANE / 2 + 2, link),
        *_shares(run, x, lower, width),
        *_epochs(last, x, height, width),
    ]
    # A group, not an image: the marks in it are links.
    return _svg(width, height, _label(run), parts, "timeline", "group")


def _label(run: RunView) -> str:
    parts = [f"Run {run.run_id} up to epoch {run.epoch}"]
    if run.accuracy is not None:
        parts.append(f"accuracy {run.accuracy:.2%}")
    parts += [f"{share:.1%} of {level}s removed" for level, share in run.pruned]
    return ", ".join(parts + [f"{count} decisions {name}" for name, count in run.results])


def _phases(bands: Sequence[Band], x: _Scale, bottom: float) -> Iterable[Markup]:
    for index, band in enumerate(bands):
        start, end = x(band.start), x(band.end)
        yield tag("rect", class_=f"band b{index % 2}", x=start, y=0, width=max(1.0, end - start),
                  height=bottom)  # fmt: skip
        capacity = int((end - start - 8) / 6.6)
        if capacity >= 4:
            name = band.phase if len(band.phase) <= capacity else band.phase[: capacity - 1] + "…"
            yield tag("text", name, class_="phase", x=start + 5, y=15)


def _accuracy(
    points: Sequence[tuple[int, float]], settled: int, x: _Scale, width: int
) -> Iterable[Markup]:
    """Accuracy on the range that it has from ``settled`` on: the first rise would flatten what a
    cut does. What is lower stands on the ground of the panel."""
    if not points:
        yield tag("text", "no accuracy was published", class_="muted", x=_LEFT + 6, y=_TOP + 40)
        return
    floor, ceiling = _range([value for epoch, value in points if epoch >= settled - 1])

    def y(value: float) -> float:
        share = (min(max(value, floor), ceiling) - floor) / (ceiling - floor)
        return _TOP + 8 + (_PANEL - 16) * (1 - share)

    digits = 0 if ceiling - floor > 0.045 else 1
    for value in (floor, (ceiling + floor) / 2, ceiling):
        yield tag("line", class_="grid", x1=_LEFT, x2=width - _RIGHT, y1=y(value), y2=y(value))
        yield tag("text", f"{value:.{digits}%}", class_="tick", x=_LEFT - 6, y=y(value) + 4)
    path = " ".join(f"{x(epoch):.1f},{y(value):.1f}" for epoch, value in points)
    yield tag("polyline", class_="accuracy", points=path)
    for epoch, value in points:
        title = tag("title", f"epoch {epoch}: accuracy {value:.2%}")
        below = value < floor
        yield tag("circle", title, class_="point below" if below else "point", cx=x(epoch),
                  cy=y(value), r=2.6)  # fmt: skip
    epoch, value = points[-1]
    yield tag("text", f"accuracy {value:.2%}", class_="value", x=width - _RIGHT - 2, y=y(floor) - 6)
    if points[0][1] < floor:
        yield tag("text", f"from {points[0][1]:.0%}", class_="muted", x=x(points[0][0]) + 8,
                  y=y(floor) - 6)  # fmt: skip


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Round ends around values, two points apart at least."""
    values = values or (0.0, 1.0)
    low, high = min(values), max(values)
    step = 0.01 if high - low < 0.08 else 0.05 if high - low < 0.3 else 0.1
    floor, ceiling = math.floor(low / step) * step, math.ceil(high / step) * step
    if ceiling - floor < 0.02:
        floor, ceiling = floor - 0.01, ceiling + 0.01
    return max(0.0, floor), min(1.0, ceiling)


def _marks(
    marks: Sequence[Mark], x: _Scale, y: float, link: Callable[[str], str]
) -> Iterable[Markup]:
    for mark in marks:
        shape = tag("path", class_=f"mark {mark.result}", d=_SHAPES[mark.result])
        moved = tag("g", tag("title", mark.title), tag("circle", class_="target", r=8), shape,
                    transform=f"translate({x(mark.epoch):.1f} {y:.1f})")  # fmt: skip
        yield tag("a", moved, href=link(mark.key), aria_label=mark.title)


_SHAPES = {
    "applied": "M-5 -5H5V5H-5Z",
    "rolled_back": "M-5 -5L5 5M5 -5L-5 5",
    "refused": "M0 -6L6 5H-6Z",
    "approved": "M0 -6L6 0L0 6L-6 0Z",
    "rejected": "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1 -4 0",
}
"""A filled square was cut; a cross was taken back; the rest are outlines."""


def _shares(run: RunView, x: _Scale, top: float, width: int) -> Iterable[Markup]:
    limits = [band.limit for band in run.bands]
    highest = max([0.05, *limits, *(share for _, share in run.shares)]) * 1.15

    def y(value: float) -> float:
        return top + 8 + (_PANEL - 12) * (1 - value / highest)

    for value in (0.0, highest / 1.15):
        yield tag("line", class_="grid", x1=_LEFT, x2=width - _RIGHT, y1=y(value), y2=y(value))
        yield tag("text", f"{value:.0%}", class_="tick", x=_LEFT - 6, y=y(value) + 4)
    for band in run.bands:
        if band.limit > 0:
            yield tag("line", tag("title", f"{band.phase}: at most {band.limit:.0%}"),
                      class_="limit", x1=x(band.start), x2=x(band.end), y1=y(band.limit),
                      y2=y(band.limit))  # fmt: skip
    if run.shares:
        yield tag("path", class_="area", d=_steps(run.shares, x, y, closed=y(0.0)))
        yield tag("path", class_="share", d=_steps(run.shares, x, y))
        share = run.shares[-1][1]
        # At the foot of the area where that is high enough: clear of the steps and the limits.
        below = y(0.0) - 7 if y(0.0) - y(share) > 24 else y(share) - 8
        yield tag("text", f"removed {share:.1%}", class_="value", x=width - _RIGHT - 4, y=below)


def width_bar(width: Width, among: Sequence[Width]) -> Markup:
    """A group as a bar: its outline as wide as it was, filled as it is; on the scale of all."""
    tallest = max(each.original for each in among)
    # By the square root: narrow groups beside wide ones are still seen.
    was, now = (64 * math.sqrt(size / tallest) for size in (width.original, width.size))
    parts = [
        tag("rect", class_="was", x=7, width=22, y=66 - was, height=was, rx=2),
        tag("rect", class_="now", x=7, width=22, y=66 - now, height=now, rx=2),
    ]
    label = f"{width.name}: {width.size} of {width.original} {width.level}s"
    return tag("svg", tag("title", label), *parts, class_="width", viewBox="0 0 36 68", width=36,
               height=68, role="img", aria_label=label)  # fmt: skip


def _steps(
    points: Sequence[tuple[int, float]], x: _Scale, y: _Scale, closed: float | None = None
) -> str:
    """Level up to the next checkpoint: what was cut stays cut."""
    path = [f"M{x(points[0][0]):.1f} {y(points[0][1]):.1f}"]
    path += [f"H{x(epoch):.1f}V{y(value):.1f}" for epoch, value in points[1:]]
    if closed is not None:
        path.append(f"V{closed:.1f}H{x(points[0][0]):.1f}Z")
    return "".join(path)


def _epochs(last: int, x: _Scale, height: int, width: int) -> Iterable[Markup]:
    step = _round_step(last / (width / 110))
    for epoch in range(step, last + 1, step):
        yield tag("text", str(epoch), class_="tick middle", x=x(epoch), y=height - 8)
    yield tag("text", "epoch", class_="tick", x=_LEFT - 6, y=height - 8)


def _round_step(least: float) -> int:
    for step in (1, 2, 5, 10, 20, 30, 50, 100, 200, 500, 1000):
        if step >= least:
            return step
    return max(1, round(least))


# A decision

_CELL, _GAP = 13, 2


def strip(item: Strip, width: int) -> Markup:
    """The units of a group, least important first, in rows; removed ones are crossed out."""
    columns = max(1, (width + _GAP) // (_CELL + _GAP))
    rows = math.ceil(len(item.cells) / columns)
    parts = []
    for place, cell in enumerate(item.cells):
        left, top = (place % columns) * (_CELL + _GAP), (place // columns) * (_CELL + _GAP)
        shapes = [tag("rect", class_=f"h{cell.heat}", width=_CELL, height=_CELL, rx=2)]
        if cell.state == "removed":
            shapes.append(tag("path", class_="cross", d="M3 3L10 10M10 3L3 10"))
        if cell.state == "spared":
            shapes.append(tag("rect", class_="spared", x=0.75, y=0.75, width=11.5, height=11.5))
        place_at = f"translate({left} {top})"
        parts.append(tag("g", tag("title", cell.title), *shapes, transform=place_at))
    label = f"{item.group}: {item.removed} of {len(item.cells)} {item.level}s removed"
    used = min(columns, len(item.cells)) * (_CELL + _GAP)
    box = f"0 0 {max(used, 1)} {rows * (_CELL + _GAP)}"
    return tag("svg", *parts, class_="strip", viewBox=box, width=used,
               height=rows * (_CELL + _GAP), role="img", aria_label=label)  # fmt: skip


def intervals(item: Comparison, width: int) -> Markup:
    """Estimates of one quantity under each other, with their intervals, on one scale about zero."""
    row = 30
    ends = [end for e in item.estimates for end in (e.value, e.low, e.high) if end is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    capacity = (high - low) * 0.08 or 1e-9
    low, high = low - capacity, high + capacity
    name_width, value_width = 118, 76

    def x(value: float) -> float:
        return name_width + (width - name_width - value_width) * (value - low) / (high - low)

    height = row * len(item.estimates) + 6
    parts = [tag("line", class_="zero", x1=x(0), x2=x(0), y1=0, y2=height)]
    for place, estimate in enumerate(item.estimates):
        y = row * place + row / 2 + 3
        parts.append(tag("text", estimate.who, class_="who", x=0, y=y + 4))
        if estimate.low is not None and estimate.high is not None:
            a, b = x(estimate.low), x(estimate.high)
            bars = f"M{a:.1f} {y - 5:.1f}v10M{a:.1f} {y:.1f}H{b:.1f}M{b:.1f} {y - 5:.1f}v10"
            parts.append(tag("path", class_="whisker", d=bars))
        kind = "measured" if estimate.who != "predicted" else "predicted"
        parts.append(tag("circle", class_=f"dot {kind}", cx=x(estimate.value), cy=y, r=5))
        shown = f"{estimate.value * 100:+.2f}" if item.percent else f"{estimate.value:+.4g}"
        parts.append(tag("text", shown, class_="value", x=width, y=y + 4))
    label = f"{item.quantity}: " + "; ".join(
        f"{estimate.who} {estimate.value:.4g}" for estimate in item.estimates
    )
    return _svg(width, height, label, parts, "intervals")


def dots(rows: Sequence[UnitRow]) -> list[Markup]:
    """For each row a dot with its error bar, all on one logarithmic scale."""
    ends = [
        end
        for row in rows
        if row.alone
        for end in (row.alone, row.alone - (row.error or 0), row.alone + (row.error or 0))
        if end > 0
    ]
    if not ends:
        return [Markup("")] * len(rows)
    low, high = math.log(min(ends)), math.log(max(ends))
    return [_dot(row, low, max(high - low, 1e-9)) for row in rows]


def _dot(row: UnitRow, low: float, width: float) -> Markup:
    if not row.alone:
        return Markup("")

    def x(value: float) -> float:
        return 8 + 144 * min(1.0, max(0.0, (math.log(max(value, 1e-300)) - low) / width))

    parts = [tag("line", class_="grid", x1=0, x2=160, y1=9, y2=9)]
    if row.error is not None:
        a, b = x(row.alone - row.error), x(row.alone + row.error)
        parts.append(tag("path", class_="whisker", d=f"M{a:.1f} 5v8M{a:.1f} 9H{b:.1f}M{b:.1f} 5v8"))
    parts.append(tag("circle", class_=f"dot {row.explanation.verdict}", cx=x(row.alone), cy=9, r=4))
    error = f" ± {row.error:.2g}" if row.error is not None else ""
    label = f"alone {row.alone:.3g}{error}"
    return tag("svg", *parts, class_="dots", viewBox="0 0 160 18", width=160, height=18,
               role="img", aria_label=label)  # fmt: skip


def gate_bar(measured: float | None, limit: float | None, passed: bool) -> Markup:
    """How much of an upper limit was used; empty where there is none, or it is a lower one."""
    if measured is None or limit is None or limit <= 0 or measured < 0:
        return Markup("")
    if passed != (measured <= limit):
        return Markup("")
    share = measured / limit
    used = min(1.0, share / 1.25) * 120
    parts = [
        tag("rect", class_="track", width=120, height=8, rx=2),
        tag("rect", class_="used" if share <= 1 else "used over", width=used, height=8, rx=2),
        tag("line", class_="mark-limit", x1=96, x2=96, y1=-2, y2=10),
    ]
    label = f"{share:.0%} of the limit"
    return tag("svg", *parts, class_="gate-bar", viewBox="0 -2 120 12", width=120, height=12,
               role="img", aria_label=label)  # fmt: skip


# A trace


def waterfall(spans: Sequence[RecordedSpan]) -> list[tuple[int, RecordedSpan, str, Markup]]:
    """Rows of a trace: depth, span, how long it took, and its bar on the trace's scale."""
    if not spans:
        return []
    begun, ended = min(s.start for s in spans), max(s.end for s in spans)
    scale = 240 / max(1, ended - begun)
    rows = []
    for guide, span in tree_rows(spans):
        left, width = (span.start - begun) * scale, max(1.5, (span.end - span.start) * scale)
        bar = tag("rect", class_="bar failed" if span.failed else "bar", x=left, y=3,
                  width=width, height=10, rx=2)  # fmt: skip
        took = f"{span.seconds * 1000:.1f} ms" if span.seconds < 1 else f"{span.seconds:.2f} s"
        at = (span.start - begun) / 1e9
        picture = tag("svg", bar, class_="span", viewBox="0 0 240 16", width=240, height=16,
                      role="img", aria_label=f"begins after {at:.3f} s, takes {took}")  # fmt: skip
        rows.append((len(guide) // 3, span, took, picture))
    return rows

"""Boxes, words and lines of the pictures in docs, as SVG that is legible on light and dark pages.

Lengths are in pixels of the picture, y goes down. All text is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["arrow", "box", "label", "line", "svg", "wrapped"]

_STYLE = """<style>
 text { font: 13px Helvetica, Arial, sans-serif; fill: #0f172a; }
 .title { font-weight: 600; font-size: 15px; }
 .note { fill: #475569; font-size: 12px; }
 .page { fill: #f8fafc; }
 .floor { fill: #ffffff; stroke: #94a3b8; }
 .room { fill: #dbeafe; stroke: #64748b; }
 .trainer { fill: #dbeafe; } .bus { fill: #fee2e2; } .worker { fill: #dcfce7; }
 .child { fill: #fef9c3; }
 .arrow { stroke: #475569; fill: none; marker-end: url(#head); }
 .back { stroke: #b91c1c; fill: none; marker-end: url(#head); stroke-dasharray: 5 4; }
 .axis { stroke: #94a3b8; fill: none; }
 .gone { fill: none; stroke: #94a3b8; stroke-dasharray: 4 3; }
 .plus { fill: #2563eb; } .minus { fill: #d97706; } .first { stroke: #2563eb; }
 .second { stroke: #0d9488; } .third { stroke: #d97706; } .fourth { stroke: #b91c1c; }
 .curve { fill: none; stroke-width: 2.5; }
 @media (prefers-color-scheme: dark) {
  text { fill: #e2e8f0; } .note { fill: #94a3b8; } .page { fill: #0f172a; }
  .floor { fill: #1e293b; } .room, .trainer { fill: #1e3a5f; } .bus { fill: #5b2333; }
  .worker { fill: #14432a; } .child { fill: #4a3f12; } .arrow { stroke: #94a3b8; }
  .back { stroke: #f87171; } .plus { fill: #60a5fa; } .minus { fill: #fbbf24; }
  .first { stroke: #60a5fa; } .second { stroke: #2dd4bf; } .third { stroke: #fbbf24; }
  .fourth { stroke: #f87171; }
 }
</style>
<defs><marker id="head" markerWidth="9" markerHeight="9" refX="8" refY="4" orient="auto">
<path d="M0 0 L8 4 L0 8 z" fill="#64748b"/></marker></defs>"""


def wrapped(text: str, width: int) -> list[str]:
    """Lines of less than ``width`` characters, broken between words."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) >= width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle with round corners; ``kind`` is a class of the style."""
    return (
        f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" rx="6"/>\n'
    )


def label(x: float, y: float, text: str, kind: str = "") -> str:
    """One line of text; (x, y) is where its baseline begins."""
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}">{escape(text)}</text>\n'


def arrow(points: Sequence[tuple[float, float]], kind: str = "arrow") -> str:
    """A line through points that ends in an arrow head."""
    return line(points, kind)


def line(points: Sequence[tuple[float, float]], kind: str) -> str:
    """A line through points."""
    way = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{way}"/>\n'


def svg(width: float, height: float, body: str, label: str) -> str:
    """A whole picture; ``label`` is what a screen reader says of it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{label}">\n{_STYLE}\n'
        f'<rect class="page" width="{width:.0f}" height="{height:.0f}"/>\n{body}</svg>\n'
    )

"""Renders view models as HTML: the templates, and how words and figures are written.

Promises: autoescaping is on everywhere; only :mod:`.charts` makes markup. A page is made of named
parts with digests, so that an open page asks for those that changed and gets no more.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, pass_context
from jinja2.runtime import Context
from markupsafe import Markup

from elesh.observe.logs import iso, moment, printable

from . import charts

_NONE = "\N{EN DASH}"
_HEX_ROWS = 16


def asset(name: str) -> str:
    """The text of a file of ``static/``."""
    return (files(__package__) / "static" / name).read_text()


@dataclass(frozen=True)
class Rendered:
    """A page as HTML, and its live parts."""

    text: str
    parts: dict[str, tuple[str, str]]
    """Digest and HTML of each part, by its id."""


def render(template: str, *, link: Callable[[str], str] | None = None, **values: Any) -> Rendered:
    """The page; ``link`` gives the address of a decision from its key."""
    page = _environment.get_template(template)
    parts: dict[str, tuple[str, str]] = {}
    known = {"live": "", "until": None, "now": None} | values
    text = page.render(link=link or (lambda key: f"/decisions/{key}"), _parts=parts, **known)
    return Rendered(text, parts)


@pass_context
def part(context: Context, name: str, caller: Callable[[], str]) -> Markup:
    """A part of a page that is renewed by itself."""
    html = caller().strip()
    digest = hashlib.sha256(html.encode()).hexdigest()[:16]
    context["_parts"][f"part-{name}"] = digest, html
    # What is in it was escaped as it was rendered.
    return Markup(f'<div class="part" id="part-{name}" data-hash="{digest}">{html}</div>')


def change(pair: tuple[float, float]) -> str:
    """From a first to a second amount, in percent of the first."""
    before, now = pair
    if not before:
        return _NONE
    return f"{100 * (now / before - 1):+.1f}%".replace("-", "\N{MINUS SIGN}")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return _NONE if value is None or not math.isfinite(value) else f"{value:.{digits}%}"


def points(value: float | None) -> str:
    """A difference of shares, in points of a percent."""
    if value is None or not math.isfinite(value):
        return _NONE
    return f"{100 * value:+.2f}".replace("-", "\N{MINUS SIGN}")


def figure(value: float | None) -> str:
    """Four significant digits."""
    return _NONE if value is None or not math.isfinite(value) else f"{value:.4g}"


def signed(value: float | None) -> str:
    """Three significant digits with the sign."""
    if value is None or not math.isfinite(value):
        return _NONE
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}")


def number(value: int | None) -> str:
    """A count with thousands apart."""
    return _NONE if value is None else f"{value:,}"


def ago(seconds: float | None) -> str:
    """A time span in its largest unit."""
    if seconds is None:
        return _NONE
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def clock(value: datetime | float | None) -> str:
    """A time in UTC, to the second."""
    if value is None or value == 0:
        return _NONE
    at = datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else value
    return moment(at)


def mebibytes(value: int) -> str:
    """Bytes in MiB."""
    return f"{value / 2**20:,.0f} MiB" if value else _NONE


def words(value: object) -> str:
    """A name of the contracts as words."""
    return str(value).replace("_", " ")


def measure(value: float | None, unit: str) -> str:
    """A gate's figure in its unit."""
    if value is None or not math.isfinite(value):
        return ""
    if unit == "%":
        return f"{value:.2%}" if abs(value) >= 0.001 or value == 0 else f"{100 * value:.2g}%"
    return f"{value:.4g} {unit}".strip()


def hexdump(data: bytes) -> str:
    """The first bytes, sixteen a row, in hex and as text."""
    rows = []
    for start in range(0, min(len(data), 16 * _HEX_ROWS), 16):
        row = data[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        rows.append(f"{start:04x}  {row.hex(' '):47}  {text}")
    if len(data) > 16 * _HEX_ROWS:
        rows.append(f"and {len(data) - 16 * _HEX_ROWS:,} bytes more")
    return "\n".join(rows)


def _shown(value: object) -> object:
    """A value of a page; control characters of a text are shown as their numbers."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, lines=True)
    return value


_environment = Environment(
    loader=PackageLoader(__package__, "templates"),
    autoescape=True,
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters.update(
    ago=ago, change=change, clock=clock, figure=figure, hexdump=hexdump, iso=iso, measure=measure,
    mebibytes=mebibytes, number=number, percent=percent, points=points, signed=signed, words=words,
)  # fmt: skip
_environment.globals.update(
    dots=charts.dots, gate_bar=charts.gate_bar, intervals=charts.intervals, part=part,
    strip=charts.strip, timeline=charts.timeline, waterfall=charts.waterfall,
    width_bar=charts.width_bar,
)  # fmt: skip

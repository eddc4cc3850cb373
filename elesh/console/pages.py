"""View models to HTML: the templates and the words and figures in them.

Promises: autoescaping is on everywhere; only :mod:`.charts` makes markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from elesh.observe.printable import printable

from . import charts

__all__ = ["asset", "render"]

_NONE = "\N{EN DASH}"
_HEX_ROWS = 16


def asset(name: str) -> str:
    """The text of a file of ``static/``."""
    return (files(__package__) / "static" / name).read_text()


def render(template: str, *, link: Callable[[str], str] | None = None, **values: Any) -> str:
    """The page; ``link`` gives the address of a decision from its key."""
    page = _environment.get_template(template)
    return page.render(link=link or (lambda key: f"/decisions/{key}"), **values)


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
    moment = datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else value
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def mebibytes(value: int) -> str:
    """Bytes in MiB."""
    return f"{value / 2**20:,.0f} MiB" if value else _NONE


def words(value: object) -> str:
    """A name of the contracts as words."""
    return str(value).replace("_", " ")


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
    ago=ago, clock=clock, figure=figure, hexdump=hexdump, mebibytes=mebibytes, number=number,
    percent=percent, points=points, signed=signed, words=words,
)  # fmt: skip
_environment.globals.update(
    dots=charts.dots, gate_bar=charts.gate_bar, intervals=charts.intervals, strip=charts.strip,
    timeline=charts.timeline, waterfall=charts.waterfall,
)  # fmt: skip

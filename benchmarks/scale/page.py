"""The curves and the table of docs/scaling.md: ``python -m benchmarks.scale.page``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from docs.drawing import label, line, svg
from elesh.operate.sizing import Costs, Load, costs, server_cores, size

from .model import knee, simulate

__all__ = ["curves", "table"]

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_KINDS = ("first", "second", "third", "fourth")
_LOADS = (
    Load(10, 120, 1, 2), Load(100, 600, 10, 10), Load(1000, 600, 10, 10),
    Load(10_000, 600, 10, 10), Load(10_000, 3600, 100, 60),
)  # fmt: skip
Point = tuple[float, float]


class Axes:
    """One plot with two logarithmic axes."""

    def __init__(
        self, left: float, title: str, across: tuple[float, float], up: tuple[float, float]
    ) -> None:
        self._left, self._across, self._up = left, across, up
        self.parts = [label(left, 28, title, "title")]
        self.parts.append(line([(left, 50), (left, 290), (left + 360, 290)], "axis"))
        for value in _decades(*across):
            self.parts.append(label(self._x(value) - 10, 308, f"{value:g}", "note"))
        for value in _decades(*up):
            self.parts.append(label(left - 46, self._y(value) + 4, f"{value:g}", "note"))

    def curve(self, points: Sequence[Point], kind: str, name: str) -> None:
        """A line through points within the axes, named at its end."""
        inside = [(self._x(a), self._y(max(b, self._up[0]))) for a, b in points if b <= self._up[1]]
        if inside:
            self.parts.append(line(inside, f"curve {kind}"))
            x, y = inside[-1]
            self.parts.append(label(min(x + 6, self._left + 290), max(y - 6, 46), name, "note"))

    def _x(self, value: float) -> float:
        return self._left + 350 * _share(value, self._across)

    def _y(self, value: float) -> float:
        return 290 - 235 * _share(value, self._up)


def curves(of: Costs) -> str:
    """Delay and busy cores by the number of runs, as SVG."""
    delays = Axes(
        70, "seconds that the bus adds, 99th percentile, one partition", (10, 1e4), (1e-3, 10)
    )
    cores = Axes(
        530, "busy server cores (a checkpoint of 10 MB each 600 s)", (10, 1e4), (1e-2, 100)
    )
    runs = [round(10 ** (1 + step / 5)) for step in range(16)]
    for kind, (interval, megabytes) in zip(_KINDS, ((60, 1), (600, 1), (600, 10)), strict=False):
        most = knee(of, interval, megabytes)
        points = [
            (n, simulate(Load(n, interval, megabytes, 1), of, events=200).p99)
            for n in runs
            if n < 0.97 * most
        ]
        delays.curve(points, kind, f"each {interval} s, {megabytes} MB: full at {most}")
    for kind, partitions in zip(_KINDS, (1, 10, 100), strict=False):
        busy = [(n, server_cores(Load(n), partitions, partitions, of)) for n in runs]
        cores.curve(busy, kind, f"{partitions} partition{'s' if partitions > 1 else ''}")
    body = "".join((*delays.parts, *cores.parts, label(180, 328, "runs"), label(640, 328, "runs")))
    return svg(940, 340, body, "How delay and busy cores grow with the number of runs")


def table(of: Costs) -> str:
    """What some loads need."""
    rows = [
        "| runs | a checkpoint each | blobs | analysis | workers | partitions | servers "
        "| busy cores | memory | network |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for load in _LOADS:
        made = size(load, of=of)
        rows.append(
            f"| {load.runs} | {load.interval:g} s | {load.megabytes:g} MB | {load.analysis:g} s "
            f"| {made.workers} | {made.partitions} | {made.servers} | {made.cores:.2g} "
            f"| {_short(made.memory / 2**30)} GB | {_short(made.network / 2**20)} MB/s |"
        )
    return "\n".join(rows)


def main() -> None:
    """Write picture and table."""
    of = costs()
    (_DOCS / "scaling.svg").write_text(curves(of))
    page = _DOCS / "scaling.md"
    figures = "\n".join(
        f"| {name.replace('_', ' ')} | {value:g} |"
        for name, value in vars(of).items()
        if name != "machine"
    )
    blocks = {"sizes": table(of), "costs": f"| cost ({of.machine}) | |\n|---|---|\n{figures}"}
    text = page.read_text()
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, b=block: f"{m[1]}\n{b}\n\n{m[2]}", text, flags=re.DOTALL)
    page.write_text(text)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _decades(low: float, high: float) -> list[float]:
    first, last = round(math.log10(low)), round(math.log10(high))
    return [10.0**exponent for exponent in range(first, last + 1)]


def _share(value: float, ends: tuple[float, float]) -> float:
    low, high = map(math.log10, ends)
    return (math.log10(value) - low) / (high - low)


if __name__ == "__main__":
    main()

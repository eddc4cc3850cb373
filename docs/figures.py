"""The figures of docs/concepts.md, drawn by ``python -m docs.generate``.

Numbers in them are computed here (``measured``) or those of docs/benchmarks-orders.md (``orders``).
"""

from __future__ import annotations

import numpy as np

from docs.drawing import arrow, box, label, line, svg

__all__ = ["decision", "measured", "orders", "steps"]

SHARES = (5, 10, 20, 30, 40)
"""Percent of all channels removed."""
ORDERS = (
    ("ours, refitted", "first", (0.986, 0.985, 0.985, 0.985, 0.983)),
    ("ours, masked only", "second", (0.986, 0.986, 0.983, 0.967, 0.872)),
    ("one by one: Molchanov 2019", "third", (0.987, 0.983, 0.929, 0.731, 0.532)),
    ("one by one: magnitude", "fourth", (0.971, 0.928, 0.629, 0.232, 0.152)),
)
"""Test accuracy, residual network on 8 x 8 digits, five seeds (docs/benchmarks-orders.md)."""
WHOLE = 0.987
"""Of the same networks before anything is removed."""


def measured() -> str:
    """Output projections: what is measured, and what a set costs by it."""
    columns = _example()
    parts = [
        label(20, 28, "One calibration pass measures how each unit moves the outputs", "title")
    ]
    stages = (
        ("samples", "about 500, of", "training data"),
        ("units", "each times a gate", "that is 1"),
        ("the rest of", "the network", ""),
        ("outputs", "along a random", "direction a sample"),
    )
    for n, (name, first, second) in enumerate(stages):
        x = 20 + 150 * n
        parts.append(box(x, 60, 126, 74, "trainer"))
        parts += [label(x + 10, 82, name, "title"), label(x + 10, 102, first, "note")]
        parts.append(label(x + 10, 118, second, "note"))
        if n:
            parts.append(arrow([(x - 24, 97), (x - 2, 97)]))
    parts.append(arrow([(533, 136), (533, 160), (233, 160), (233, 138)], "back"))
    parts.append(
        label(250, 180, "backward: the derivative of each output with respect to each gate")
    )
    left, top, side = 670, 60, 26
    parts.append(label(left, 48, "G: a row a sample, a column a unit", "note"))
    for (row, column), value in np.ndenumerate(columns):
        share = min(1.0, abs(value) / 1.6) ** 0.5
        size = (side - 4) * share
        x, y = left + column * side + (side - size) / 2, top + row * side + (side - size) / 2
        parts.append(box(x, y, size, size, "plus" if value > 0 else "minus"))
    bottom = top + len(columns) * side + 18
    for column, name in enumerate("abcdef"):
        parts.append(label(left + column * side + 9, bottom, name, "note"))
    parts.append(
        label(20, 222, "What a set costs is the mean square of its columns added up:", "title")
    )
    sets = (
        ("b", "alone"),
        ("e", "alone"),
        ("be", "move alike"),
        ("ad", "cancel"),
        ("cf", "unrelated"),
    )
    for n, (names, said) in enumerate(sets):
        chosen = ["abcdef".index(name) for name in names]
        cost = float((columns[:, chosen].sum(1) ** 2).mean())
        y = 248 + 22 * n
        parts.append(label(30, y, f"{' and '.join(names)}: {cost:.1f}"))
        parts.append(box(140, y - 12, max(2.0, 90 * cost), 14, "plus"))
        parts.append(label(152 + 90 * cost, y, said, "note"))
    return svg(860, 360, "".join(parts), "Output projections and what a set of units costs")


def _example() -> np.ndarray:
    """[8, 6]: columns b and e move outputs alike, a and d against each other."""
    rng = np.random.default_rng(3)
    g = rng.standard_normal((8, 6))
    g /= np.sqrt((g**2).mean(0))
    g[:, 4] = g[:, 1]
    g[:, 3] = -g[:, 0]
    return g


def orders() -> str:
    """Accuracy against the share removed, by order."""
    left, top, width, height = 60, 50, 460, 250

    def at(share: float, accuracy: float) -> tuple[float, float]:
        return left + width * share / 40, top + height * (1 - accuracy)

    parts = [label(20, 28, "Test accuracy as channels go, without any training", "title")]
    for tenths in range(0, 11, 2):
        x, y = at(0, tenths / 10)
        parts += [
            line([(x, y), (x + width, y)], "axis"),
            label(x - 32, y + 4, f"{tenths / 10:.1f}"),
        ]
    for share in (0, *SHARES[1:]):
        parts.append(label(at(share, 0)[0] - 10, top + height + 20, f"{share}%"))
    places = (58, 108, 188, 284)
    for (name, kind, found), y in zip(ORDERS, places, strict=True):
        points = [at(0, WHOLE), *(at(*each) for each in zip(SHARES, found, strict=True))]
        parts.append(line(points, f"curve {kind}"))
        parts += [line([(540, y), (566, y)], f"curve {kind}"), label(576, y + 4, name)]
    parts.append(
        label(
            20, top + height + 44, "Residual network on 8 x 8 digits, means of five seeds", "note"
        )
    )
    return svg(800, top + height + 60, "".join(parts), "Accuracy by removal order")


def decision() -> str:
    """A removal order and what shortens it."""
    parts = [label(20, 28, "A removal order, cheapest first, and what shortens it", "title")]
    lengths = (
        ("budget or phase", 15, "as many as are asked for, and no group below its minimum"),
        (
            "predicted gates",
            12,
            "predicted shift inside its limit, and every unit outside the noise",
        ),
        ("measured gates", 9, "loss, accuracy, classes, gradient flow on held-out data: bisection"),
        ("trainer's check", 9, "its own evaluation, under the mask; all of it or nothing"),
    )
    for row, (name, count, said) in enumerate(lengths):
        y = 50 + 62 * row
        parts += [label(20, y + 17, name, "title"), label(180, y + 42, said, "note")]
        for n in range(18):
            kind = "plus" if n < count else "gone"
            parts.append(box(180 + 30 * n, y, 24, 24, kind))
    return svg(760, 310, "".join(parts), "What shortens a removal order")


def steps() -> str:
    """Mask, check, cut, monitor, and the way back."""
    stages = (
        ("restore point", "all state kept;", "evaluate()"),
        ("mask", "units off, readers", "refitted"),
        ("check", "your evaluate():", "drop within limit?"),
        ("cut", "tensors shrink,", "same outputs"),
        ("check", "evaluate() again", ""),
        ("monitor", "three more", "evaluations"),
    )
    parts = [label(20, 28, "What the trainer does with a decision", "title")]
    for n, (name, first, second) in enumerate(stages):
        x = 20 + 148 * n
        parts.append(box(x, 50, 128, 74, "trainer"))
        parts += [label(x + 10, 72, name, "title"), label(x + 10, 92, first, "note")]
        parts.append(label(x + 10, 108, second, "note"))
        if n:
            parts.append(arrow([(x - 20, 87), (x - 2, 87)]))
        if name in ("check", "monitor"):
            parts.append(arrow([(x + 64, 126), (x + 64, 178)], "back"))
    parts.append(box(20, 180, 868, 50, "bus"))
    parts.append(
        label(
            34, 201, "otherwise back: weights, optimizer and buffers bit for bit as before", "title"
        )
    )
    parts.append(
        label(
            34,
            219,
            "the outcome says why; workers do not propose the same set again on the same evidence",
            "note",
        )
    )
    return svg(908, 246, "".join(parts), "Mask, check, cut, roll back")

"""The table of docs/architectures.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["table", "write"]

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
_ENOUGH, _TOLD = 0.98, 0.32
_COSTS = Path(__file__).with_name("costs.jsonl")
"""As :mod:`.costs` wrote them."""
_BEGIN = "<!-- measured by python -m benchmarks.zoo; do not edit below -->\n"


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Put the table at the end of the page."""
    lines = _COSTS.read_text().splitlines() if _COSTS.exists() else []
    costs: dict[str, dict[str, Any]] = {}
    for row in map(json.loads, lines):  # Some rows are of passes alone.
        costs.setdefault(row["name"], {}).update(row)
    told = ("passes", "memory", "measure")
    rows = [
        row | {k: v for k, v in costs.get(row["name"], {}).items() if k in told} for row in rows
    ]
    text = _PAGE.read_text()
    _PAGE.write_text(text[: text.index(_BEGIN)] + _BEGIN + "\n" + table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Summary and one line for each network."""
    good = [row for row in rows if "error" not in row]
    right = [row for row in good if _right(row)]
    prunable, every = (sum(row[name] for row in good) for name in ("rows", "all_rows"))
    heads, attentions = (sum(row["heads"][i] for row in good) for i in (0, 1))
    passes = sorted(row["passes"] for row in good)
    newest = max(row.get("measured", "") for row in rows)
    compared = [row for row in good if "peer" in row]
    lines = [
        f"{len(rows)} networks: {len(good)} recorded, {len(right)} cut and verified (mask against "
        f"cut within 1e-5, exact counts, undo bit for bit, one training step after each kind of "
        "cut)." + (_peer(compared) if compared else ""),
        f"Rows prunable: {prunable / every:.0%} of {every}; attentions: {heads} of {attentions}. "
        f"Making the recorder takes {statistics.median(passes):.0f} forward and backward passes "
        f"of the example in the median, {passes[-1]:.0f} at most."
        + _median(
            good, "memory", " It holds {:.1f} times the parameters' memory in the median of {}."
        )
        + _median(good, "measure", " `measure` takes {:.0f} passes in the median of {}.")
        + (
            f" Rows with a star are of an earlier state of the tree than those of {newest}."
            if newest
            else ""
        ),
        "",
        "| network | rows | heads | layers | removed | mask - cut | verified | passes "
        "| memory | measure | torch-pruning removed | of a layer | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ordered = sorted(rows, key=lambda row: row["name"])
    return "\n".join([*lines, *(_line(row, newest) for row in ordered)]) + "\n"


def _median(rows: Sequence[dict[str, Any]], figure: str, text: str) -> str:
    known = [row[figure] for row in rows if row.get(figure) is not None]
    return text.format(statistics.median(known), len(known)) if known else ""


def _peer(rows: Sequence[dict[str, Any]]) -> str:
    working = [row for row in rows if row["peer"]["verdict"] == "works"]
    less = [r for r in working if r.get("removed", 0) < _ENOUGH * r["peer"]["removed"]]
    more = sum(row["peer"].get("most", 0) > _TOLD for row in less)
    told = f"; in {more} of the {len(less)} others it took more than {_TOLD:.0%} of some layer"
    return (
        f" torch-pruning was tried on {len(rows)} of them, and works on {len(working)}; in "
        f"{len(working) - len(less)} of these we remove at least {_ENOUGH} of what it does"
        + (told if any("most" in row["peer"] for row in less) else "")
        + "."
    )


def _right(row: dict[str, Any]) -> bool:
    trains = all(found in ("yes", "none") for found in row["trains"].values())
    cut = row.get("difference", float("inf")) < 1e-5 and row.get("exact", False)
    return cut and row["undo"] and trains


def _line(row: dict[str, Any], newest: str) -> str:
    star = " *" if row.get("measured", "") != newest else ""
    if "error" in row:
        return f"| {row['name']}{star} | {row['error']} | | | | | | | | | | | |"
    peer, every = row.get("peer", {"verdict": "not tried"}), max(1, row["all_rows"])
    cells = [
        f"{row['name']}{star}",
        f"{row['rows'] / every:.0%}",
        "{}/{}".format(*row["heads"]),
        "{}/{}".format(*row["layers"]),
        f"{row.get('removed', 0):.3f}",
        f"{row['difference']:.1e}" if "difference" in row else "",
        "yes" if _right(row) else "no",
        f"{row['passes']:.0f}",
        f"{row['memory']:.1f}" if "memory" in row else "",
        f"{row['measure']:.0f}" if row.get("measure") is not None else "",
        f"{peer['removed']:.3f}" if "removed" in peer else "",
        f"{peer['most']:.0%}" if "most" in peer else "",
        peer["verdict"],
    ]
    return f"| {' | '.join(cells)} |"

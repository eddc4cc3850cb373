"""Tables with error bars over seeds, and the same as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["arguments", "bars", "show", "write"]


def arguments(description: str, nets: Sequence[str]) -> argparse.ArgumentParser:
    """The options that all benchmarks on trained networks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--nets", type=lambda text: text.split(","), default=list(nets), help="comma-separated"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "elesh-benchmarks",
        help="folder for trained networks",
    )
    parser.add_argument("--json", type=Path, help="write all figures of all seeds to this file")
    return parser


def bars(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, for more than one value, the standard error of the mean."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ±{statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 120).print(table)


def write(path: Path | None, figures: Any) -> None:
    """Write the figures where a path was given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")

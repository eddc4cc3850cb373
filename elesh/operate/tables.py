"""Tables for people, in one style.

Promises: nothing is cut off at 80 columns: texts fold, figures and short names stay on one line.
What people copy (keys, letters) and long reasons belong in lines of their own, not in cells.
"""

from __future__ import annotations

from collections.abc import Collection

from rich.table import Table


def compact(
    *columns: str, figures: Collection[str] = (), whole: Collection[str] = (), title: str = ""
) -> Table:
    """An empty table with these columns.

    Args:
        figures: columns that stand to the right, on one line.
        whole: columns of short names, which stay on one line, too.
    """
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for name in columns:
        if name in figures:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold", no_wrap=name in whole)
    return table

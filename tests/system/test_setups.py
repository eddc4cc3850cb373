"""The table of setups is what happens: every cell is run for real, in processes that are killed.

CI runs every third row, `make soak` all; ``UPDATE=1 pytest tests/system/test_setups.py`` writes
docs/setups.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import setups

PAGE = Path(__file__).parents[2] / "docs" / "setups.md"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(setups.SAMPLE, id="sample", marks=pytest.mark.slow),
        pytest.param(setups.ROWS, id="all", marks=pytest.mark.soak),
    ],
)
def test_every_cell_of_the_table_of_setups_is_what_happens(names: tuple[str, ...]) -> None:
    """In a process of its own, which forks the lives: this one may have threads."""
    script = Path(setups.__file__)
    paths = os.pathsep.join([*sys.path, str(script.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *names],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["setup"]: row["cells"] for row in map(json.loads, done.stdout.splitlines())}
    raised = {n: said for n, row in rows.items() for said in row.values() if "raises" in said}
    assert not raised, done.stderr[-4000:]
    assert tuple(rows) == names
    page = setups.table(rows)
    if os.environ.get("UPDATE") and names == setups.ROWS:
        PAGE.write_text(page)
    written = PAGE.read_text().splitlines()
    assert [line for line in page.splitlines() if line not in written] == []
    assert names != setups.ROWS or written == page.splitlines(), "UPDATE=1 writes it anew"


def test_the_table_of_setups_has_a_row_for_each_and_no_cell_that_raises() -> None:
    page = PAGE.read_text()
    assert [name for name in setups.ROWS if f"| {name} |" not in page] == []
    assert "raises" not in page

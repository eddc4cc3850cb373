"""The table of setups is what happens: every cell is run for real, in processes that are killed.

``UPDATE=1 pytest tests/system/test_setups.py`` writes docs/setups.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import setups

PAGE = Path(__file__).parents[2] / "docs" / "setups.md"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_cell_of_the_table_of_setups_is_what_happens() -> None:
    rows = {name: setups.run(name) for name in setups.SETUPS}
    raised = {n: said for n, row in rows.items() for said in row.values() if "raises" in said}
    assert not raised
    page = setups.table(rows)
    if os.environ.get("UPDATE"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "UPDATE=1 writes it anew"


def test_the_table_of_setups_has_a_row_for_each_and_no_cell_that_raises() -> None:
    page = PAGE.read_text()
    assert [name for name in setups.SETUPS if f"| {name} |" not in page] == []
    assert "raises" not in page


@pytest.mark.soak
def test_a_setup_of_everyday_training_works_in_every_cell() -> None:
    assert set(setups.run("average of the weights (EMA), named").values()) == {setups.WORKS}

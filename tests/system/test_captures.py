"""Cases captured with earlier versions replay bit for bit, with the settings that decided then.

Which processor decided them is not known (the capture did not say so then): where another one adds
up in another order, the rounding of figures may differ, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import elesh

CAPTURES = sorted((Path(__file__).parents[1] / "data" / "captures").glob("*.zip"))


@pytest.mark.parametrize("case", CAPTURES, ids=lambda path: path.stem)
@pytest.mark.sampled
def test_a_case_of_an_earlier_version_replays_bit_for_bit(case: Path) -> None:
    answer = elesh("replay", "--from", str(case), "--json", environment={})
    assert answer.returncode == 0, answer.stderr
    (replayed,) = map(json.loads, answer.stdout.splitlines())
    assert replayed["identical"] or replayed["rounding"], replayed

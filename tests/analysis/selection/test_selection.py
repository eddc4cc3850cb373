"""Selection: quota, minimum and multiples always hold; redundant units go first, at a price."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elesh.analysis.candidates import Candidates
from elesh.analysis.importance.scores import Pair
from elesh.analysis.selection.choose import Selection, select
from elesh.analysis.selection.removal_order import JointOrder, StaticOrder


def static(candidates: Candidates, costs: list[float], quota: int, *pairs: Pair) -> Selection:
    return select(lambda: StaticOrder(candidates, np.array(costs, dtype=float)), quota, pairs)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Candidates, int, int, bool]:
    sizes = draw(st.lists(st.integers(1, 24), min_size=1, max_size=5))
    multiples = tuple(draw(st.sampled_from([1, 1, 2, 4, 8])) for _ in sizes)
    minimum = draw(st.integers(1, 12))
    capacities = tuple(
        max(0, size - -(-minimum // m) * m) for size, m in zip(sizes, multiples, strict=True)
    )
    names = tuple(f"g{i}" for i in range(len(sizes)))
    candidates = Candidates(names, tuple(sizes), capacities, multiples)
    return candidates, draw(st.integers(0, 60)), draw(st.integers(0, 10**6)), draw(st.booleans())


@given(cases())
def test_quota_minimum_and_multiples_hold(case: tuple[Candidates, int, int, bool]) -> None:
    candidates, quota, seed, joint = case
    rng = np.random.default_rng(seed)
    columns = rng.standard_normal((candidates.count, 16)).astype(np.float32)
    pairs, used = [], set()
    for kept, removed in rng.integers(0, candidates.count, (6, 2)).tolist():
        if kept != removed and not {kept, removed} & used:
            used |= {kept, removed}
            pairs.append(Pair(kept, removed, 0.99))

    def order() -> JointOrder | StaticOrder:
        if joint:
            return JointOrder(candidates, columns)
        return StaticOrder(candidates, (columns[:, 0] ** 2).astype(np.float64))

    selection = select(order, quota, pairs)
    assert len(selection.units) <= quota
    assert sorted(set(selection.units)) == list(selection.units)
    assert set(selection.marginal_costs) == set(selection.units)
    assert not set(selection.kept) & set(selection.units)
    lost = np.bincount(candidates.group_of[list(selection.units)], minlength=len(candidates.sizes))
    for size, capacity, multiple, gone in zip(
        candidates.sizes, candidates.capacities, candidates.multiples, lost, strict=True
    ):
        assert gone <= capacity
        assert not gone or (size - gone) % multiple == 0
    if max(candidates.multiples) == 1 and not pairs:
        assert len(selection.units) == min(quota, sum(candidates.capacities))


def test_redundant_units_go_before_cheaper_ones_and_their_partners_stay() -> None:
    candidates = Candidates(("g",), (6,), (6,), (1,))
    costs = [0.1, 0.2, 0.3, 0.9, 0.8, 0.15]
    selection = static(candidates, costs, 3, Pair(0, 3, 0.99), Pair(5, 4, 0.97))
    assert selection.units == (1, 3, 4)  # 0 and 5 are cheapest, but 3 and 4 went in their favour
    assert selection.kept == {0, 5}
    assert [(p.kept, p.removed) for p in selection.pairs] == [(0, 3), (5, 4)]


def test_a_redundant_unit_dearer_than_the_plain_orders_last_is_spared() -> None:
    candidates = Candidates(("g",), (6,), (6,), (1,))
    columns = np.diag([1, 2, 3, 10, 2.5, 20]).astype(np.float32)
    pairs = (Pair(5, 3, 0.99), Pair(0, 4, 0.99))
    selection = select(lambda: JointOrder(candidates, columns), 3, pairs)
    # Plain: 0, 1, 4 at up to 2.5^2; 3 costs 10^2. 4 goes for 0, which stays for it.
    assert selection.units == (1, 2, 4)
    assert selection.too_expensive == {3}
    assert selection.kept == {0}


def test_a_group_ends_at_its_multiple_and_the_quota_is_spent_elsewhere() -> None:
    candidates = Candidates(("a", "b"), (16, 16), (8, 8), (4, 1))
    costs = [0.1, 0.1, 0.1] + [5.0] * 13 + [1.0] * 16
    selection = static(candidates, costs, 5)
    assert candidates.by_group(selection.units) == {"b": (0, 1, 2, 3, 4)}
    assert selection.kept_for_multiple == {0, 1, 2}


def test_a_group_that_is_no_multiple_loses_the_odd_ones_first() -> None:
    candidates = Candidates(("a",), (19,), (11,), (8,))
    assert len(static(candidates, list(range(19)), 10).units) == 3
    assert len(static(candidates, list(range(19)), 11).units) == 11
    assert static(candidates, list(range(19)), 2).units == ()


@pytest.mark.parametrize("quota", [0, 3])
def test_without_room_nothing_goes(quota: int) -> None:
    assert static(Candidates(("a",), (4,), (0,), (1,)), [1.0] * 4, quota).units == ()

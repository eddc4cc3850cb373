"""The orders: exact where they say so, close where they do not, the same for every thread count."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elesh.analysis.candidates import Candidates
from elesh.analysis.importance.output_projections import damage
from elesh.analysis.selection import removal_order as orders
from elesh.analysis.selection.removal_order import JointOrder, Picks, StaticOrder, rounded

Columns = npt.NDArray[np.float32]


def candidates(sizes: tuple[int, ...], rooms: tuple[int, ...] | None = None) -> Candidates:
    names = tuple(f"g{i}" for i in range(len(sizes)))
    return Candidates(names, sizes, rooms or sizes, (1,) * len(sizes))


def everything(count: int) -> npt.NDArray[np.bool_]:
    return np.ones(count, dtype=np.bool_)


def lognormal_columns(count: int, samples: int, seed: int) -> Columns:
    """A few shared directions, log-normal sizes: like the projections of trained networks."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((count, 32)) @ rng.standard_normal((32, samples)) / 6
    size = np.exp(1.5 * rng.standard_normal((count, 1)))
    return ((shared + 0.5 * rng.standard_normal((count, samples))) * size).astype(np.float32)


def exact_greedy(columns: Columns, count: int, groups: Candidates) -> list[int]:
    """One unit at a time, everything in float64, from the definition of the damage."""
    g = columns.astype(np.float64)
    left, room, picks = np.zeros(g.shape[1]), list(groups.rooms), []
    for _ in range(count):
        costs = np.mean((left - g) ** 2, axis=1) - np.mean(left**2)
        costs[picks] = math.inf
        costs[[room[group] == 0 for group in groups.group_of]] = math.inf
        best = int(costs.argmin())
        if costs[best] == math.inf:
            break
        picks.append(best)
        room[groups.group_of[best]] -= 1
        left -= g[best]
    return picks


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    samples=st.integers(8, 40),
    share=st.floats(0, 1),
)
def test_a_small_net_is_resolved_exactly(
    seed: int, sizes: list[int], samples: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    rooms = tuple(int(rng.integers(0, size + 1)) for size in sizes)
    groups = candidates(tuple(sizes), rooms)
    columns = lognormal_columns(groups.count, samples, seed)
    count = int(share * groups.count)
    picks = JointOrder(groups, columns, trust=1.0).pick(count, everything(groups.count))
    wanted = exact_greedy(columns, count, groups)
    assert len(picks.units) == len(wanted)
    if picks.units.tolist() != wanted:  # only where costs are alike to 16 bits
        ours, theirs = damage(columns, picks.units), damage(columns, wanted)
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_large_net_with_sizes_like_a_trained_one_comes_within_two_percent_of_exact(
    seed: int,
) -> None:
    columns = lognormal_columns(3000, 128, seed)
    groups = candidates((500,) * 6)
    ours = JointOrder(groups, columns, trust=1.0).pick(500, everything(3000)).units
    assert damage(columns, ours) <= 1.02 * damage(columns, exact_greedy(columns, 500, groups))


def test_a_large_net_of_pure_noise_comes_within_a_hundredth_of_the_additive_damage() -> None:
    columns = np.random.default_rng(0).standard_normal((3000, 128)).astype(np.float32)
    groups = candidates((500,) * 6)
    ours = damage(columns, JointOrder(groups, columns, trust=1.0).pick(500, everything(3000)).units)
    exact = damage(columns, exact_greedy(columns, 500, groups))
    additive = float(np.sort((columns.astype(np.float64) ** 2).mean(axis=1))[:500].sum())
    assert ours - exact <= 0.01 * additive


def test_prices_add_up_to_the_damage() -> None:
    columns = lognormal_columns(2000, 64, 3)
    picks = JointOrder(candidates((1000, 1000)), columns, trust=1.0).pick(400, everything(2000))
    assert sum(picks.prices) == pytest.approx(damage(columns, picks.units), rel=1e-4)


def test_the_same_picks_and_prices_for_one_and_four_threads() -> None:
    columns = lognormal_columns(9000, 64, 4)
    groups = candidates((3000,) * 3)
    one, four = (JointOrder(groups, columns, threads=n).pick(300, everything(9000)) for n in (1, 4))
    assert one.units.tolist() == four.units.tolist()
    assert one.prices.tobytes() == four.prices.tobytes()


def test_scaling_all_outputs_changes_no_pick() -> None:
    columns = lognormal_columns(1500, 64, 5)
    groups = candidates((1500,))
    picks = JointOrder(groups, columns).pick(200, everything(1500))
    scaled = JointOrder(groups, columns * np.float32(2**-9)).pick(200, everything(1500))
    assert scaled.units.tolist() == picks.units.tolist()
    assert scaled.prices.tolist() == (picks.prices * 2.0**-18).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_renumbering_the_units_renumbers_the_picks(seed: int) -> None:
    columns = lognormal_columns(300, 64, seed)
    shuffle = np.random.default_rng(seed).permutation(300)
    groups = candidates((300,))
    picks = JointOrder(groups, columns).pick(60, everything(300)).units
    again = JointOrder(groups, columns[shuffle]).pick(60, everything(300)).units
    assert set(shuffle[again].tolist()) == set(picks)


def test_units_that_make_up_for_each_other_go_together() -> None:
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((6, 50)).astype(np.float32)
    columns[4] = -columns[1] * np.float32(0.9)
    columns[1] *= np.float32(0.8)
    picks = JointOrder(candidates((6,)), columns, trust=1.0).pick(2, everything(6))
    assert sorted(picks.units) == [1, 4]
    assert picks.prices[1] < 0


def test_what_earlier_cuts_moved_counts() -> None:
    columns = np.eye(3, 8, dtype=np.float32)
    moved = -2.0 * np.eye(3, 8)[1]
    start = JointOrder(candidates((3,)), columns, moved=moved, trust=1.0)
    assert start.costs == pytest.approx([1 / 8, 5 / 8, 1 / 8])
    helped = JointOrder(candidates((3,)), columns, moved=-moved)
    assert helped.pick(1, everything(3)).units == [1]


def test_cross_terms_count_as_much_as_they_are_trusted() -> None:
    columns = lognormal_columns(60, 64, 9)
    for trust in (0.0, 0.25, 1.0):
        picks = JointOrder(candidates((60,)), columns, trust=trust).pick(20, everything(60))
        alone = float((columns[picks.units].astype(np.float64) ** 2).mean(axis=1).sum())
        joint = damage(columns, picks.units)
        assert sum(picks.prices) == pytest.approx(trust * joint + (1 - trust) * alone, rel=1e-4)


def test_putting_units_back_restores_the_costs() -> None:
    order = JointOrder(candidates((40,)), lognormal_columns(40, 32, 6))
    before = order.costs.copy()
    picks = order.pick(10, everything(40))
    assert not np.allclose(order.costs, before, rtol=1e-3)
    order.put_back(picks.units)
    np.testing.assert_allclose(order.costs, before, rtol=1e-4, atol=1e-4)
    assert not order.taken.any()
    assert order.room.tolist() == [40]


def test_no_pick_is_dearer_than_the_ceiling() -> None:
    columns = lognormal_columns(50, 32, 7)
    free = JointOrder(candidates((50,)), columns).pick(30, everything(50))
    ceiling = sorted(free.prices)[len(free.prices) // 2]
    under = JointOrder(candidates((50,)), columns).pick(30, everything(50), ceiling)
    assert 0 < len(under.units) < 30
    assert under.dearest <= ceiling


def test_units_outside_the_pool_go_first_once_they_are_cheaper_than_all_that_it_began_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(orders, "_POOL", 4)
    monkeypatch.setattr(orders, "_STEP", 3)
    alike = np.tile(np.eye(8)[0], (4, 1))
    columns = np.concatenate([alike, 1.02 * np.eye(8)[1:4]]).astype(np.float32)
    order = JointOrder(candidates((7,)), columns, trust=1.0)
    assert order.pick(4, everything(7)).units.tolist() == [0, 4, 5, 6]


def test_a_unit_outside_the_pool_that_others_make_up_for_is_found_after_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(orders, "_POOL", 4)
    monkeypatch.setattr(orders, "_STEP", 2)
    opposite = -0.8 * (np.eye(8)[:1] + np.eye(8)[1:2])
    columns = np.concatenate([np.eye(8)[:4], opposite]).astype(np.float32)
    order = JointOrder(candidates((5,)), columns, trust=1.0)
    assert order.pick(3, everything(5)).units.tolist() == [0, 1, 4]


def test_pools_smaller_than_the_net_still_respect_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "_POOL", 16)
    monkeypatch.setattr(orders, "_STEP", 4)
    groups = candidates((20, 20, 20), (3, 0, 20))
    picks = JointOrder(groups, lognormal_columns(60, 32, 8)).pick(60, everything(60))
    assert np.bincount(groups.group_of[picks.units], minlength=3).tolist() == [3, 0, 20]
    assert len(set(picks.units)) == 23


@given(
    costs=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    rooms=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    count=st.integers(-1, 30),
)
def test_a_static_order_takes_the_cheapest_with_room_ties_by_index(
    costs: list[int], rooms: list[int], count: int
) -> None:
    third = len(costs) // 3
    sizes = (third, third, len(costs) - 2 * third)
    groups = candidates(sizes, tuple(min(r, s) for r, s in zip(rooms, sizes, strict=True)))
    picks = StaticOrder(groups, np.array(costs, dtype=np.float64)).pick(
        count, everything(len(costs))
    )
    room, wanted = list(groups.rooms), []
    for unit in sorted(range(len(costs)), key=lambda u: (costs[u], u)):
        if len(wanted) < count and room[groups.group_of[unit]]:
            room[groups.group_of[unit]] -= 1
            wanted.append(unit)
    assert picks.units.tolist() == wanted


def test_costs_alike_to_sixteen_bits_tie() -> None:
    keys = rounded(np.array([1.0, 1.0 + 2**-18, 1.0 + 2**-14, -1.0, math.inf]))
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] == -1
    assert keys[4] == math.inf


def test_the_price_of_no_picks_is_below_every_ceiling() -> None:
    assert Picks().dearest == -math.inf

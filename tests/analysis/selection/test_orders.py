"""The orders: exact where they say so, close where they do not, the same for every thread count."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elesh.analysis.candidates import Candidates
from elesh.analysis.importance.scores import output_error
from elesh.analysis.selection import removal_order as orders
from elesh.analysis.selection.removal_order import JointOrder, RemovalOrder, StaticOrder, rounded

Columns = npt.NDArray[np.float32]


def candidates(sizes: tuple[int, ...], capacities: tuple[int, ...] | None = None) -> Candidates:
    names = tuple(f"g{i}" for i in range(len(sizes)))
    return Candidates(names, sizes, capacities or sizes, (1,) * len(sizes))


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
    left, capacity, removal_order = np.zeros(g.shape[1]), list(groups.capacities), []
    for _ in range(count):
        costs = np.mean((left - g) ** 2, axis=1) - np.mean(left**2)
        costs[removal_order] = math.inf
        costs[[capacity[group] == 0 for group in groups.group_of]] = math.inf
        best = int(costs.argmin())
        if costs[best] == math.inf:
            break
        removal_order.append(best)
        capacity[groups.group_of[best]] -= 1
        left -= g[best]
    return removal_order


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
    capacities = tuple(int(rng.integers(0, size + 1)) for size in sizes)
    groups = candidates(tuple(sizes), capacities)
    columns = lognormal_columns(groups.count, samples, seed)
    count = int(share * groups.count)
    removal_order = JointOrder(groups, columns, shrinkage=1.0).pick(count, everything(groups.count))
    wanted = exact_greedy(columns, count, groups)
    assert len(removal_order.units) == len(wanted)
    if removal_order.units.tolist() != wanted:  # only where costs are alike to 16 bits
        ours, theirs = output_error(columns, removal_order.units), output_error(columns, wanted)
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.sampled
def test_a_large_net_with_sizes_like_a_trained_one_comes_within_two_percent_of_exact(
    seed: int,
) -> None:
    columns = lognormal_columns(3000, 128, seed)
    groups = candidates((500,) * 6)
    ours = JointOrder(groups, columns, shrinkage=1.0).pick(500, everything(3000)).units
    assert output_error(columns, ours) <= 1.02 * output_error(
        columns, exact_greedy(columns, 500, groups)
    )


@pytest.mark.slow
def test_a_large_net_of_pure_noise_comes_within_a_hundredth_of_the_additive_damage() -> None:
    columns = np.random.default_rng(0).standard_normal((3000, 128)).astype(np.float32)
    groups = candidates((500,) * 6)
    ours = output_error(
        columns, JointOrder(groups, columns, shrinkage=1.0).pick(500, everything(3000)).units
    )
    exact = output_error(columns, exact_greedy(columns, 500, groups))
    additive = float(np.sort((columns.astype(np.float64) ** 2).mean(axis=1))[:500].sum())
    assert ours - exact <= 0.01 * additive


def test_prices_add_up_to_the_damage() -> None:
    columns = lognormal_columns(2000, 64, 3)
    removal_order = JointOrder(candidates((1000, 1000)), columns, shrinkage=1.0).pick(
        400, everything(2000)
    )
    assert sum(removal_order.marginal_costs) == pytest.approx(
        output_error(columns, removal_order.units), rel=1e-4
    )


def test_the_same_picks_and_prices_for_one_and_four_threads() -> None:
    columns = lognormal_columns(9000, 64, 4)
    groups = candidates((3000,) * 3)
    one, four = (JointOrder(groups, columns, threads=n).pick(300, everything(9000)) for n in (1, 4))
    assert one.units.tolist() == four.units.tolist()
    assert one.marginal_costs.tobytes() == four.marginal_costs.tobytes()


def test_scaling_all_outputs_changes_no_pick() -> None:
    columns = lognormal_columns(1500, 64, 5)
    groups = candidates((1500,))
    removal_order = JointOrder(groups, columns).pick(200, everything(1500))
    scaled = JointOrder(groups, columns * np.float32(2**-9)).pick(200, everything(1500))
    assert scaled.units.tolist() == removal_order.units.tolist()
    assert scaled.marginal_costs.tolist() == (removal_order.marginal_costs * 2.0**-18).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_renumbering_the_units_renumbers_the_picks(seed: int) -> None:
    columns = lognormal_columns(300, 64, seed)
    shuffle = np.random.default_rng(seed).permutation(300)
    groups = candidates((300,))
    removal_order = JointOrder(groups, columns).pick(60, everything(300)).units
    again = JointOrder(groups, columns[shuffle]).pick(60, everything(300)).units
    assert set(shuffle[again].tolist()) == set(removal_order)


def test_units_that_make_up_for_each_other_go_together() -> None:
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((6, 50)).astype(np.float32)
    columns[4] = -columns[1] * np.float32(0.9)
    columns[1] *= np.float32(0.8)
    removal_order = JointOrder(candidates((6,)), columns, shrinkage=1.0).pick(2, everything(6))
    assert sorted(removal_order.units) == [1, 4]
    assert removal_order.marginal_costs[1] < 0


def test_what_earlier_cuts_moved_counts() -> None:
    columns = np.eye(3, 8, dtype=np.float32)
    moved = -2.0 * np.eye(3, 8)[1]
    start = JointOrder(candidates((3,)), columns, moved=moved, shrinkage=1.0)
    assert start.costs == pytest.approx([1 / 8, 5 / 8, 1 / 8])
    helped = JointOrder(candidates((3,)), columns, moved=-moved)
    assert helped.pick(1, everything(3)).units == [1]


def test_cross_terms_count_as_much_as_they_are_trusted() -> None:
    columns = lognormal_columns(60, 64, 9)
    for shrinkage in (0.0, 0.25, 1.0):
        removal_order = JointOrder(candidates((60,)), columns, shrinkage=shrinkage).pick(
            20, everything(60)
        )
        alone = float((columns[removal_order.units].astype(np.float64) ** 2).mean(axis=1).sum())
        joint = output_error(columns, removal_order.units)
        assert sum(removal_order.marginal_costs) == pytest.approx(
            shrinkage * joint + (1 - shrinkage) * alone, rel=1e-4
        )


def test_putting_units_back_restores_the_costs() -> None:
    order = JointOrder(candidates((40,)), lognormal_columns(40, 32, 6))
    before = order.costs.copy()
    removal_order = order.pick(10, everything(40))
    assert not np.allclose(order.costs, before, rtol=1e-3)
    order.put_back(removal_order.units)
    np.testing.assert_allclose(order.costs, before, rtol=1e-4, atol=1e-4)
    assert not order.taken.any()
    assert order.capacity.tolist() == [40]


def test_no_pick_is_dearer_than_the_ceiling() -> None:
    columns = lognormal_columns(50, 32, 7)
    free = JointOrder(candidates((50,)), columns).pick(30, everything(50))
    ceiling = sorted(free.marginal_costs)[len(free.marginal_costs) // 2]
    under = JointOrder(candidates((50,)), columns).pick(30, everything(50), ceiling)
    assert 0 < len(under.units) < 30
    assert under.max_cost <= ceiling


def test_units_outside_the_pool_go_first_once_they_are_cheaper_than_all_that_it_began_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(orders, "_POOL", 4)
    monkeypatch.setattr(orders, "_STEP", 3)
    alike = np.tile(np.eye(8)[0], (4, 1))
    columns = np.concatenate([alike, 1.02 * np.eye(8)[1:4]]).astype(np.float32)
    order = JointOrder(candidates((7,)), columns, shrinkage=1.0)
    assert order.pick(4, everything(7)).units.tolist() == [0, 4, 5, 6]


def test_a_unit_outside_the_pool_that_others_make_up_for_is_found_after_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(orders, "_POOL", 4)
    monkeypatch.setattr(orders, "_STEP", 2)
    opposite = -0.8 * (np.eye(8)[:1] + np.eye(8)[1:2])
    columns = np.concatenate([np.eye(8)[:4], opposite]).astype(np.float32)
    order = JointOrder(candidates((5,)), columns, shrinkage=1.0)
    assert order.pick(3, everything(5)).units.tolist() == [0, 1, 4]


def test_pools_smaller_than_the_net_still_respect_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "_POOL", 16)
    monkeypatch.setattr(orders, "_STEP", 4)
    groups = candidates((20, 20, 20), (3, 0, 20))
    removal_order = JointOrder(groups, lognormal_columns(60, 32, 8)).pick(60, everything(60))
    assert np.bincount(groups.group_of[removal_order.units], minlength=3).tolist() == [3, 0, 20]
    assert len(set(removal_order.units)) == 23


@given(
    costs=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    capacities=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    count=st.integers(-1, 30),
)
def test_a_static_order_takes_the_cheapest_with_room_ties_by_index(
    costs: list[int], capacities: list[int], count: int
) -> None:
    third = len(costs) // 3
    sizes = (third, third, len(costs) - 2 * third)
    groups = candidates(sizes, tuple(min(r, s) for r, s in zip(capacities, sizes, strict=True)))
    removal_order = StaticOrder(groups, np.array(costs, dtype=np.float64)).pick(
        count, everything(len(costs))
    )
    capacity, wanted = list(groups.capacities), []
    for unit in sorted(range(len(costs)), key=lambda u: (costs[u], u)):
        if len(wanted) < count and capacity[groups.group_of[unit]]:
            capacity[groups.group_of[unit]] -= 1
            wanted.append(unit)
    assert removal_order.units.tolist() == wanted


def test_costs_alike_to_sixteen_bits_tie() -> None:
    keys = rounded(np.array([1.0, 1.0 + 2**-18, 1.0 + 2**-14, -1.0, math.inf]))
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] == -1
    assert keys[4] == math.inf


def test_the_price_of_no_picks_is_below_every_ceiling() -> None:
    assert RemovalOrder().max_cost == -math.inf

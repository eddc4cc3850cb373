"""The largest safe part of a cut: always measured, found by few measurements."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from elesh.safety import Entry, by_measured_costs, largest_safe, parts_alone
from leyline import Level

LEVELS = (Level.CHANNEL, Level.HEAD, Level.LAYER)
orders = st.lists(st.sampled_from(LEVELS), max_size=60).map(
    lambda levels: tuple((level, "group", number) for number, level in enumerate(levels))
)
costs = st.lists(st.integers(0, 9), min_size=60, max_size=60)


@given(orders, costs, st.integers(0, 120))
def test_what_is_kept_was_measured_as_safe_and_little_was_measured(
    order: tuple[Entry, ...], cost: list[int], limit: int
) -> None:
    asked: list[tuple[tuple[Entry, ...], bool]] = []

    def is_safe(entries: tuple[Entry, ...]) -> bool:
        answer = sum(cost[number] for _, _, number in entries) <= limit
        asked.append((entries, answer))
        return answer

    kept = largest_safe(order, is_safe)
    assert not kept or (set(kept), True) in [(set(entries), ok) for entries, ok in asked]
    assert list(kept) == [entry for entry in order if entry in set(kept)]
    assert len(asked) <= 1 + 4 * (2 + math.ceil(math.log2(len(order) + 1)))
    # Costs only add up, so nothing behind the kept part of a level would still go.
    for level in LEVELS:
        left = [entry for entry in order if entry[0] is level and entry not in set(kept)]
        if left:
            total = sum(cost[number] for _, _, number in (*kept, left[0]))
            assert total > limit


@given(orders, st.randoms(use_true_random=False))
def test_gates_that_come_and_go_never_let_an_unsafe_part_through(order, random) -> None:
    answers: dict[frozenset[Entry], bool] = {}

    def is_safe(entries: tuple[Entry, ...]) -> bool:
        return answers.setdefault(frozenset(entries), random.random() < 0.4)

    kept = largest_safe(order, is_safe)
    assert not kept or answers[frozenset(kept)]


def test_a_layer_that_is_too_much_does_not_keep_the_channels_behind_it() -> None:
    order = (
        (Level.CHANNEL, "a", 0),
        (Level.LAYER, "b", 0),
        (Level.CHANNEL, "a", 1),
        (Level.HEAD, "c", 0),
    )
    kept = largest_safe(order, lambda entries: all(entry[1] != "b" for entry in entries))
    assert kept == (order[0], order[2], order[3])


def entries(**sizes: int) -> dict[str, tuple[Entry, ...]]:
    return {
        name: tuple((Level.CHANNEL, name, unit) for unit in range(size))
        for name, size in sizes.items()
    }


def test_groups_are_placed_by_what_their_part_was_measured_to_cost() -> None:
    """Of three units, of which a hundredth of the costs says that they go first, the measured 6
    nats are 1, 2 and 3; of two others .1 are .05 each."""
    groups = entries(dear=3, cheap=2)
    order = (*groups["dear"], *groups["cheap"])
    costs = (0.01, 0.02, 0.03, 1.0, 1.0)
    found = by_measured_costs(order, costs, [(groups["dear"], 6.0), (groups["cheap"], 0.1)])
    assert found == (*groups["cheap"], *groups["dear"])
    found = by_measured_costs(order, costs, [(groups["dear"], 6.0), (groups["cheap"], 3.0)])
    dear, cheap = groups["dear"], groups["cheap"]
    assert found == (dear[0], *cheap, dear[1], dear[2])


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.floats(-1, 1)), min_size=1, max_size=40),
    st.floats(1e-9, 9),
)
def test_no_unit_overtakes_its_predecessors_in_its_group(
    drawn: list[tuple[str, float]], measured: float
) -> None:
    order = tuple((Level.CHANNEL, name, number) for number, (name, _) in enumerate(drawn))
    parts = [(part, measured * (1 + n)) for n, part in enumerate(parts_alone(order))]
    found = by_measured_costs(order, [cost for _, cost in drawn], parts)
    assert sorted(found) == sorted(order)
    for name in "abcd":
        own = [entry for entry in found if entry[1] == name]
        assert own == sorted(own)


def test_of_many_groups_the_smallest_are_one_part_and_every_unit_is_in_one() -> None:
    groups = entries(**{f"group{number}": 1 + number for number in range(40)})
    turns = itertools.zip_longest(*groups.values())
    order = tuple(entry for turn in turns for entry in turn if entry)
    parts = parts_alone(order)
    assert len(parts) == 16
    assert sorted(entry for part in parts for entry in part) == sorted(order)
    assert all(len({entry[1] for entry in part}) == 1 for part in parts[:15])
    assert list(parts[15]) == [entry for entry in order if entry in set(parts[15])]
    assert parts_alone(order[:3]) == [(entry,) for entry in order[:3]]

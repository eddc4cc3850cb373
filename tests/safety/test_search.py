"""The largest safe part of a cut: always measured, found by few measurements."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from elesh.safety import Entry, largest_safe
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

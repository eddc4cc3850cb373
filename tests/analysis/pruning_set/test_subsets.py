"""Parts of a cut: orders merged into one, units given back to multiples, targets made smaller."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from elesh.analysis.pruning_set.plans import merged, restricted, rounded_to_multiples
from leyline import ChannelPruningTarget, Level, RankedUnit, Redundancy, SparedUnit


def unit(name: str, index: int, cost: float = 0.0) -> RankedUnit:
    return RankedUnit(level=Level.CHANNEL, layer_name=name, index=index, cost=cost)


orders = st.lists(st.lists(st.floats(-5, 5), max_size=8), max_size=4).map(
    lambda lists: [
        [unit(f"g{number}", index, cost) for index, cost in enumerate(costs)]
        for number, costs in enumerate(lists)
    ]
)


@given(orders)
def test_no_unit_overtakes_its_predecessors_and_none_is_lost(found: list[list[RankedUnit]]) -> None:
    line = merged(found)
    for order in found:
        assert [u for u in line if u in order] == order
    assert len(line) == sum(map(len, found))


def test_a_cheap_unit_behind_a_dear_one_waits_for_it() -> None:
    first = [unit("a", 0, 1.0), unit("a", 1, 9.0), unit("a", 2, -1.0)]
    second = [unit("b", 0, 2.0), unit("b", 1, 8.0), unit("b", 2, 10.0)]
    names = [f"{u.layer_name}{u.index}" for u in merged([first, second])]
    assert names == ["a0", "b0", "b1", "a1", "a2", "b2"]


@given(
    taken=st.lists(st.integers(0, 1), max_size=20),
    sizes=st.tuples(st.integers(20, 40), st.integers(20, 40)),
    multiple=st.sampled_from((1, 2, 4, 8)),
)
def test_what_is_left_of_every_group_ends_at_its_multiple_or_loses_nothing(
    taken: list[int], sizes: tuple[int, int], multiple: int
) -> None:
    counts = [0, 0]
    units = []
    for group in taken:
        units.append(unit(f"g{group}", counts[group]))
        counts[group] += 1
    size_of = {f"g{i}": size for i, size in enumerate(sizes)}
    kept = rounded_to_multiples(units, size_of, dict.fromkeys(size_of, multiple))
    assert [u for u in units if u in kept] == list(kept)
    for name, own in groupby(sorted(kept, key=lambda u: u.layer_name), lambda u: u.layer_name):
        lost = list(own)
        assert (size_of[name] - len(lost)) % multiple == 0
        assert lost == [u for u in units if u.layer_name == name][: len(lost)]


def test_a_smaller_target_is_aligned_and_tells_what_it_gave_back() -> None:
    target = ChannelPruningTarget(
        layer_name="a",
        channel_indices=(1, 4, 6),
        original_indices=(2, 5, 7),
        importance=(0.1, 0.2, 0.3),
        errors=(0.01, 0.02, 0.03),
        redundancy_pairs=(
            Redundancy(kept=0, removed=4, similarity=0.97),
            Redundancy(kept=0, removed=6, similarity=0.96),
        ),
        channels_before=10,
        channels_after=7,
        spared=(SparedUnit(index=2, cost=0.9, reason="quota"),),
    )
    order = [unit("a", 6, 0.3), unit("a", 1, 0.1), unit("a", 4, 0.2)]
    (smaller,) = restricted([target], order, order[::2], "verification")
    assert isinstance(smaller, ChannelPruningTarget)
    assert smaller.channel_indices == (4, 6)
    assert smaller.original_indices == (5, 7)
    assert (smaller.importance, smaller.errors) == ((0.2, 0.3), (0.02, 0.03))
    assert smaller.channels_after == 8
    assert [(s.index, s.reason) for s in smaller.spared] == [(1, "verification"), (2, "quota")]
    assert restricted([target], order, [], "verification") == ()
    assert restricted([target], order, order, "verification") == (target,)

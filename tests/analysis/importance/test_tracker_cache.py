"""The local cache of trackers: the same state whatever came when, within its size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from networks import bundle, chain

from elesh.analysis.importance.tracker import TrackerCache, measurements_of

ARCHITECTURE = chain((20, 24))
BLOBS = {
    epoch: measurements_of(bundle(ARCHITECTURE, epoch=epoch, seed=epoch), 500).to_bytes()
    for epoch in range(1, 7)
}


@given(order=st.permutations(sorted(BLOBS)), cut=st.integers(0, 6))
def test_epochs_in_any_order_and_portions_give_one_state(order: list[int], cut: int) -> None:
    cache, whole = TrackerCache(10**9, 500), TrackerCache(10**9, 500)
    cache.take("run", {epoch: BLOBS[epoch] for epoch in order[:cut]})
    assert cache.missing("run", sorted(BLOBS)) == sorted(order[cut:])
    tracker = cache.take("run", {epoch: BLOBS[epoch] for epoch in order[cut:]})
    assert tracker.to_bytes() == whole.take("run", BLOBS).to_bytes()


def test_the_least_recently_used_run_goes_first_and_is_read_again() -> None:
    size = TrackerCache(10**9, 500).take("x", BLOBS).nbytes
    cache = TrackerCache(2 * size, 500)
    for run in ("a", "b"):
        cache.take(run, BLOBS)
    cache.take("a", {})
    cache.take("c", BLOBS)
    assert cache.nbytes <= 2 * size
    assert cache.missing("b", sorted(BLOBS)) == sorted(BLOBS)
    assert cache.missing("a", sorted(BLOBS)) == []


def test_one_run_larger_than_the_cache_is_kept_while_it_is_used() -> None:
    cache = TrackerCache(1, 500)
    assert cache.take("a", BLOBS).nbytes > 1
    assert cache.missing("a", sorted(BLOBS)) == []

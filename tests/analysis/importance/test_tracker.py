"""The tracker: the same bytes for any order of arrival, and figures that follow their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import bundle, chain

from elesh.analysis.importance.tracker import METRICS, ImportanceTracker, measurements_of
from leyline import (
    Conflict,
    ContractError,
    InvalidField,
    Level,
    Malformed,
    NotFinite,
    PruningGroup,
    ShapeMismatch,
    UnsupportedVersion,
)
from leyline.arrays import pack_arrays, unpack_arrays

Values = dict[str, npt.NDArray[np.float32]]
Event = tuple[int, PruningGroup, Values]


def group(
    name: str = "g",
    size: int = 4,
    origin: tuple[int, ...] | None = None,
    level: Level = Level.CHANNEL,
) -> PruningGroup:
    return PruningGroup(
        name=name,
        level=level,
        original_size=size,
        origin=tuple(range(size)) if origin is None else origin,
        slices=(),
        sites=(),
    )


def measured(of: PruningGroup, seed: int) -> Values:
    rng = np.random.default_rng(seed)
    return {m: rng.random(of.size, np.float32) for m in METRICS[of.level]}


def series(values: npt.ArrayLike, history: int = 500) -> tuple[ImportanceTracker, PruningGroup]:
    """A tracker that saw one unit: taylor as given, at every third epoch."""
    one, tracker = group(size=1), ImportanceTracker(history)
    for place, value in enumerate(np.asarray(values)):
        tracker.observe(3 * place, one, {"taylor": [value], "magnitude": [1], "frequency": [0]})
    return tracker, one


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[Event], list[Event]]:
    """Events of distinct epochs by group, and the same in any order with any repeats."""
    events: list[Event] = []
    for name, level in (("a/b", Level.CHANNEL), ("a", Level.HEAD)):
        for epoch in draw(st.lists(st.integers(0, 10**10 - 1), unique=True, max_size=9)):
            origin = draw(st.sets(st.integers(0, 3)).map(sorted))
            of = group(name, origin=tuple(origin), level=level)
            events.append((epoch, of, measured(of, epoch)))
    repeats = draw(st.lists(st.sampled_from(events), max_size=6)) if events else []
    return events, draw(st.permutations(events + repeats))


@given(arrivals(), st.integers(1, 6))
def test_late_repeated_and_reordered_epochs_give_the_same_bytes(
    both: tuple[list[Event], list[Event]], history: int
) -> None:
    straight, mixed = ImportanceTracker(history), ImportanceTracker(history)
    for tracker, events in ((straight, both[0]), (mixed, both[1])):
        for epoch, of, values in events:
            tracker.observe(epoch, of, values)
    assert mixed.to_bytes() == straight.to_bytes()
    for of in {event[1].name: event[1] for event in both[0]}.values():
        one, two = straight.track(of), mixed.track(of)
        for metric in one:
            for figure in ("count", "latest", "ema", "trend", "variance", "stability"):
                left, right = (getattr(t[metric], figure).tobytes() for t in (one, two))
                assert left == right, figure


@given(arrivals(), st.integers(1, 6), st.data())
def test_merged_trackers_are_one_that_saw_everything(
    both: tuple[list[Event], list[Event]], history: int, data: st.DataObject
) -> None:
    whole, left, right = (ImportanceTracker(history) for _ in range(3))
    for epoch, of, values in both[1]:
        whole.observe(epoch, of, values)
        for tracker in data.draw(st.sampled_from([(left,), (right,), (left, right)])):
            tracker.observe(epoch, of, values)
    left.merge(right)
    assert left.to_bytes() == whole.to_bytes()


@given(arrivals(), st.integers(1, 6))
def test_a_blob_reads_back_as_the_tracker_that_wrote_it(
    both: tuple[list[Event], list[Event]], history: int
) -> None:
    tracker = ImportanceTracker(history)
    for epoch, of, values in both[0]:
        tracker.observe(epoch, of, values)
    again = ImportanceTracker.from_bytes(tracker.to_bytes())
    assert again.to_bytes() == tracker.to_bytes()
    assert again.history == history
    for epoch, of, values in both[0]:
        assert not again.observe(epoch, of, values), "everything is there already, or dropped"
    assert again.to_bytes() == tracker.to_bytes()


def test_only_the_newest_epochs_are_kept_and_older_ones_dropped() -> None:
    of, tracker = group(), ImportanceTracker(3)
    assert [tracker.observe(e, of, measured(of, e)) for e in (5, 9, 7)] == [True] * 3
    assert not tracker.observe(4, of, measured(of, 4)), "older than a full history"
    assert tracker.observe(8, of, measured(of, 8))
    assert tracker.epochs(of) == (7, 8, 9)


def test_history_is_500_checkpoints_by_default() -> None:
    tracker, one = series(np.zeros(510))
    assert tracker.epochs(one)[0] == 30
    assert tracker.track(one)["taylor"].count.tolist() == [500]


def test_the_moving_average_is_adams_with_momentum_99_hundredths() -> None:
    values = np.random.default_rng(0).random(200).astype(np.float32)
    tracker, one = series(values)
    weights = 0.99 ** np.arange(200)[::-1]
    expected = (weights * values).sum() / weights.sum()
    assert tracker.track(one)["taylor"].ema[0] == pytest.approx(expected, rel=1e-12)


def test_the_moving_average_is_unbiased_from_the_first_checkpoint_on() -> None:
    for length in (1, 2, 50):
        tracker, one = series([7.0] * length)
        assert tracker.track(one)["taylor"].ema[0] == pytest.approx(7.0, rel=1e-12)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=80))
def test_trend_and_variance_are_a_regression_over_the_newest_50(values: list[float]) -> None:
    tracker, one = series(values)
    track, newest = tracker.track(one)["taylor"], np.array(values[-50:])
    places, size = np.arange(len(newest)), max(1.0, np.abs(newest).max())
    slope = np.linalg.lstsq(np.stack([places, np.ones(len(newest))], 1), newest, rcond=None)[0][0]
    assert track.trend[0] == pytest.approx(slope, rel=1e-6, abs=1e-9 * size)
    assert track.variance[0] == pytest.approx(newest.var(), rel=1e-6, abs=1e-9 * size**2)
    assert track.stability[0] == pytest.approx(1 / (1 + newest.var()), rel=1e-6)
    assert track.latest[0] == newest[-1]


def test_trend_counts_checkpoints_whatever_their_epochs() -> None:
    tracker, one = series(5 + 0.25 * np.arange(120))
    track = tracker.track(one)["taylor"]
    assert track.trend[0] == pytest.approx(0.25, rel=1e-12)
    assert tracker.track(one)["magnitude"].trend[0] == 0
    assert tracker.track(one)["magnitude"].stability[0] == 1


def test_one_checkpoint_has_no_trend_and_full_stability() -> None:
    tracker, one = series([3.0])
    track = tracker.track(one)["taylor"]
    assert (track.trend[0], track.variance[0], track.stability[0]) == (0, 0, 1)


def test_history_survives_pruning_by_original_numbers() -> None:
    tracker, before, after = ImportanceTracker(), group(), group(origin=(1, 3))
    for epoch in range(4):
        values = dict.fromkeys(METRICS[Level.CHANNEL], np.array([0, 1, 2, 3]) + epoch / 10)
        tracker.observe(epoch, before, values)
    for epoch in range(4, 6):
        values = dict.fromkeys(METRICS[Level.CHANNEL], np.array([1, 3]) + epoch / 10)
        tracker.observe(epoch, after, values)
    now = tracker.track(after)["taylor"]
    assert now.count.tolist() == [6, 6]
    assert now.latest == pytest.approx([1.5, 3.5])
    assert now.trend == pytest.approx([0.1, 0.1], rel=1e-5)
    restored = tracker.track(before)["taylor"]  # after a rollback
    assert restored.count.tolist() == [4, 6, 4, 6]
    assert restored.latest == pytest.approx([0.3, 1.5, 2.3, 3.5])
    assert restored.trend == pytest.approx([0.1] * 4, rel=1e-5)


def test_a_unit_cut_long_ago_keeps_its_own_newest_window() -> None:
    tracker, before, after = ImportanceTracker(), group(size=2), group(size=2, origin=(1,))
    for epoch in range(60):
        value = np.array([epoch, epoch**2])
        tracker.observe(epoch, before, dict.fromkeys(METRICS[Level.CHANNEL], value))
    for epoch in range(60, 200):
        tracker.observe(epoch, after, dict.fromkeys(METRICS[Level.CHANNEL], np.array([epoch**2])))
    track = tracker.track(before)["taylor"]
    newest = np.arange(150, 200)
    assert track.trend == pytest.approx([1, newest[0] + newest[-1]])  # of squares: twice the middle
    assert track.variance == pytest.approx([np.arange(50).var(), (newest**2).var()])


def test_a_unit_that_was_never_measured_has_no_figures() -> None:
    tracker, cut = ImportanceTracker(), group(origin=(0, 2, 3))
    tracker.observe(1, cut, measured(cut, 0))
    track = tracker.track(group())["taylor"]
    assert track.count.tolist() == [1, 0, 1, 1]
    for figure in (track.latest, track.ema, track.trend, track.variance, track.stability):
        assert np.isnan(figure).tolist() == [False, True, False, False]


def test_an_epoch_with_other_values_is_a_named_conflict_that_changes_nothing() -> None:
    tracker, of = ImportanceTracker(), group("block.1")
    tracker.observe(7, of, measured(of, 0))
    before, other = tracker.to_bytes(), measured(of, 0)
    other["magnitude"][2] += 1
    with pytest.raises(Conflict, match=r"channel/block\.1: epoch 7, metric 1, unit 2"):
        tracker.observe(7, of, other)
    fewer = group("block.1", origin=(0, 1, 3))
    with pytest.raises(Conflict, match="unit 2"):
        tracker.observe(7, fewer, {m: v[[0, 1, 3]] for m, v in measured(of, 0).items()})
    assert tracker.to_bytes() == before


def test_a_merge_that_conflicts_changes_nothing() -> None:
    left, right, a, b = ImportanceTracker(), ImportanceTracker(), group("a"), group("b")
    left.observe(1, b, measured(b, 0))
    right.observe(1, a, measured(a, 0))
    right.observe(1, b, measured(b, 1))
    before = left.to_bytes()
    with pytest.raises(Conflict, match="channel/b: epoch 1"):
        left.merge(right)
    assert left.to_bytes() == before
    resized = ImportanceTracker()
    resized.observe(2, group("b", 5), measured(group("b", 5), 0))
    with pytest.raises(ShapeMismatch, match="channel/b"):
        left.merge(resized)


def test_a_tracker_that_keeps_more_or_fewer_merges_and_the_newest_stay() -> None:
    of = group()
    for kept, others in ((3, 500), (500, 3)):
        mine, theirs = ImportanceTracker(kept), ImportanceTracker(others)
        for epoch in range(1, 6):
            theirs.observe(epoch, of, measured(of, epoch))
        mine.merge(theirs)
        assert mine.epochs(of) == (3, 4, 5)
        assert mine.history == kept


def test_values_that_compare_as_equal_are_the_same_measurement() -> None:
    one, two, of = ImportanceTracker(), ImportanceTracker(), group(size=1)
    for tracker, zero in ((one, 0.0), (two, -0.0)):
        tracker.observe(1, of, dict.fromkeys(METRICS[Level.CHANNEL], np.array([zero])))
    assert one.to_bytes() == two.to_bytes()


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"epoch": -1}, InvalidField, "epoch"),
        ({"epoch": 10**10}, InvalidField, "epoch"),
        ({"values": {"taylor": [0.0] * 4}}, InvalidField, "taylor, magnitude, frequency"),
        ({"taylor": [0.0] * 3}, ShapeMismatch, "g/taylor"),
        ({"taylor": [0.0, float("nan"), 0, 0]}, NotFinite, r"g/taylor\[1\]"),
        ({"taylor": [0.0, 0.0, 1e300, 0]}, NotFinite, r"g/taylor\[2\]"),
        ({"group": group(level=Level.JOINT)}, InvalidField, "level"),
        ({"group": group(size=5)}, ShapeMismatch, "4 original units"),
    ],
)
def test_measurements_that_do_not_fit_are_refused_by_name(
    change: dict[str, Any], error: type[ContractError], names: str
) -> None:
    tracker = ImportanceTracker()
    tracker.observe(1, group(), measured(group(), 0))
    before, of = tracker.to_bytes(), change.get("group", group())
    values = dict.fromkeys(METRICS[Level.CHANNEL], np.zeros(of.size))
    values = change.get("values", values | {k: v for k, v in change.items() if k == "taylor"})
    with pytest.raises(error, match=names):
        tracker.observe(change.get("epoch", 2), of, values)
    assert tracker.to_bytes() == before


BLOBS = {
    epoch: measurements_of(bundle(chain((20, 24)), epoch=epoch, seed=epoch), 500)
    for epoch in range(1, 7)
}


@given(order=st.permutations(sorted(BLOBS)))
def test_epochs_in_any_order_give_one_state(order: list[int]) -> None:
    tracker = ImportanceTracker.of_epochs("run", {epoch: BLOBS[epoch] for epoch in order}, 500)
    merged = ImportanceTracker(500)
    for epoch in order:
        merged.merge(ImportanceTracker.from_bytes(BLOBS[epoch]))
    assert tracker.to_bytes() == merged.to_bytes()


def test_asking_for_what_was_never_observed_is_an_error() -> None:
    tracker = ImportanceTracker()
    with pytest.raises(InvalidField, match="channel/g"):
        tracker.track(group())
    tracker.observe(1, group(), measured(group(), 0))
    with pytest.raises(ShapeMismatch, match="4 original units"):
        tracker.track(group(size=5))
    with pytest.raises(InvalidField, match="at least 1"):
        ImportanceTracker(0)


@pytest.mark.parametrize(
    ("part", "array", "error"),
    [
        ("epochs", np.array([[0, 2], [0, 1]], np.float32), InvalidField),
        ("epochs", np.array([[0, 1.5], [0, 2]], np.float32), InvalidField),
        ("epochs", np.array([[0, 1], [2**20, 2]], np.float32), InvalidField),
        ("epochs", np.array([[0, 1], [2**14, 2]], np.float32), InvalidField),
        ("epochs", np.zeros((3, 2), np.float32), ShapeMismatch),
        ("values", np.zeros((2, 2, 4), np.float32), ShapeMismatch),
        ("values", np.zeros((4, 3, 4), np.float32), ShapeMismatch),
        ("values", np.zeros((2, 3, 4), np.float16), ShapeMismatch),
        ("present", np.full((2, 4), 0.5, np.float16), ShapeMismatch),
        ("other", np.zeros(1, np.float32), Malformed),
    ],
)
def test_a_blob_that_is_no_tracker_is_refused_by_name(
    part: str, array: npt.NDArray[Any], error: type[ContractError]
) -> None:
    tracker = ImportanceTracker(3)
    for epoch in (1, 2):
        tracker.observe(epoch, group(), measured(group(), epoch))
    arrays, metadata = unpack_arrays(tracker.to_bytes())
    with pytest.raises(error, match="channel/g"):
        ImportanceTracker.from_bytes(pack_arrays(arrays | {f"channel/g/{part}": array}, metadata))


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"format": "other"}, Malformed),
        ({"version": "2"}, UnsupportedVersion),
        ({"history": "x"}, Malformed),
        ({"history": "0"}, InvalidField),
    ],
)
def test_a_blob_of_another_kind_or_version_is_refused(
    metadata: dict[str, str], error: type[ContractError]
) -> None:
    arrays, written = unpack_arrays(ImportanceTracker().to_bytes())
    with pytest.raises(error, match=next(iter(metadata))):
        ImportanceTracker.from_bytes(pack_arrays(arrays, written | metadata))

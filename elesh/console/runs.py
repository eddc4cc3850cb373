"""A run's page as plain data: the gain, what was cut where, what held it back.

Promises: pure functions of a history; accuracies are compared on the same data at the same moment
only; every figure that is unknown is None, and the page says so.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise

from elesh.operate.run_history import Checkpoint, Decided, Run, Width
from leyline import Level, PruningOutcome

from .lists import results_of

_MARKS = 400
_DIGITS = re.compile(r"[0-9a-f]{16}|[0-9][0-9.,e+-]*")
_KINDS = 6
"""Reasons of rejections that are listed."""


@dataclass(frozen=True)
class Band:
    """A phase of the schedule on the time line."""

    phase: str
    start: int
    end: int
    limit: float
    """Share of the units that may be gone by then."""


@dataclass(frozen=True)
class Mark:
    """A decision on the time line."""

    epoch: int
    result: str
    """One of ``RESULTS``."""
    key: str
    title: str


@dataclass(frozen=True)
class DecisionRow:
    """A decision in a table."""

    key: str
    run_id: str
    epoch: int
    level: str
    phase: str
    result: str
    units: int
    parameters: int
    """Parameters that it removes."""
    macs: int
    """Multiply-accumulates of one sample that it removes."""
    measured: bool
    accuracy_before: float | None
    """Held-out accuracy just before the cut, as the trainer measured it, 0 to 1."""
    accuracy_after: float | None
    """On the same data just after it; under the mask where that is all that was measured."""
    reason: str

    @property
    def accuracy_change(self) -> float | None:
        """What the cut itself did, as a difference of shares."""
        if self.accuracy_before is None or self.accuracy_after is None:
            return None
        return self.accuracy_after - self.accuracy_before


@dataclass(frozen=True)
class Latency:
    """Seconds of a call on the trainer's machine, measured just before and just after each cut."""

    before: float
    """Before the first cut that stayed."""
    now: float
    """What the cuts made of them."""
    spread: float | None
    """By how much two measurements of the same network differed, after a cut and before the next
    one: 0.1 is ten percent; None with a single cut, where nothing was measured twice."""

    @property
    def certain(self) -> bool:
        """Whether the change is larger than what the same network varied by."""
        if self.spread is None:
            return False
        return abs(math.log(self.now / self.before)) > math.log1p(self.spread)

    @property
    def said(self) -> str:
        """Milliseconds, and how sure they are."""
        took = f"{1000 * self.before:.3g} → {1000 * self.now:.3g} ms"
        if self.spread is None:
            return f"{took} around the only cut"
        return f"{took} around the cuts; the same network varied by {self.spread:.0%}"


@dataclass(frozen=True)
class Gain:
    """What the cuts of a run brought, and what they cost."""

    parameters: tuple[int, int]
    """Before the first cut, and now."""
    macs: tuple[int, int]
    """Of one sample."""
    units: tuple[tuple[str, int, int], ...]
    """Of each level: name, before the first cut, and now."""
    cuts: int
    """Cuts that stayed."""
    latency: Latency | None
    """None where a cut was not timed."""
    accuracy: tuple[float | None, float | None]
    """The run's own held-out figures at the checkpoint of the first cut, and at the last one:
    training went on between."""

    @property
    def change(self) -> float | None:
        """Of the accuracy from the one to the other; None where one was not measured."""
        before, now = self.accuracy
        return now - before if now is not None and before is not None else None


@dataclass(frozen=True)
class HeldBack:
    """Why decisions of a run were not applied."""

    what: str
    """In the words of the newest of them."""
    count: int
    key: str
    """Of the newest such decision."""


@dataclass(frozen=True)
class RunView:
    """One run."""

    run_id: str
    at: datetime
    """When it was last heard of."""
    epoch: int
    phase: str
    limit: float | None
    accuracy: float | None
    loss: float | None
    gain: Gain | None
    """None before the first checkpoint."""
    widths: tuple[Width, ...]
    """From input to output."""
    blocks: tuple[tuple[str, bool], ...]
    pruned: tuple[tuple[str, float], ...]
    """Share of the original units that are gone, by level."""
    results: tuple[tuple[str, int], ...]
    accuracies: tuple[tuple[int, float], ...]
    settled: int
    """The epoch from which on the network is past its first steep rise."""
    shares: tuple[tuple[int, float], ...]
    """Epoch and share of channels gone (of heads, where there are no channels)."""
    bands: tuple[Band, ...]
    marks: tuple[Mark, ...]
    """The newest ones."""
    held_back: tuple[HeldBack, ...]
    shortfall: str
    """What the newest decision could not reach, and why."""
    let_go: int
    """Rows that are not in memory."""


def run_view(run: Run) -> RunView:
    """One run's data."""
    points = [run.checkpoints[epoch] for epoch in sorted(run.checkpoints)]
    decided = sorted(run.decisions.values(), key=lambda d: (d.epoch, d.order, d.key))
    results = {each.key: run.result(each) for each in decided}
    last = points[-1] if points else None
    level = Level.CHANNEL if any(Level.CHANNEL in p.shape.pruned for p in points) else Level.HEAD
    cuts = [each for each in decided if results[each.key] == "applied"]
    accuracies = tuple((p.epoch, p.accuracy) for p in points if p.accuracy is not None)
    return RunView(
        run_id=run.run_id,
        at=run.at,
        epoch=run.epoch,
        phase=decided[-1].phase if decided else "",
        limit=decided[-1].phase_limit if decided else None,
        accuracy=last.accuracy if last else None,
        loss=last.loss if last else None,
        gain=_gain(run, cuts) if points else None,
        widths=_widths(points),
        blocks=last.shape.blocks if last else (),
        pruned=tuple((n.value, share) for n, share in last.shape.pruned.items()) if last else (),
        results=results_of(run),
        accuracies=accuracies,
        settled=_settled(accuracies),
        shares=tuple((p.epoch, p.shape.pruned[level]) for p in points if level in p.shape.pruned),
        bands=tuple(_bands(decided)),
        marks=tuple(
            Mark(d.epoch, results[d.key], d.key, _title(d, results[d.key]))
            for d in decided[-_MARKS:]
        ),
        held_back=tuple(_held_back(run, decided, results)),
        shortfall=decided[-1].shortfall if decided else "",
        let_go=run.let_go,
    )


def decision_row(run: Run, decided: Decided) -> DecisionRow:
    """A decision's row."""
    outcomes = run.outcomes.get(decided.key, [])
    before, after = _accuracies(outcomes[0]) if outcomes else (None, None)
    reason = decided.reason or (outcomes[-1].detail if outcomes else "")
    return DecisionRow(
        key=decided.key,
        run_id=decided.run_id,
        epoch=decided.epoch,
        level=" + ".join(decided.levels),
        phase=decided.phase,
        result=run.result(decided),
        units=decided.units,
        parameters=_parameters(decided, outcomes),
        macs=decided.macs_before - decided.macs_after,
        measured=decided.measured,
        accuracy_before=before,
        accuracy_after=after,
        reason=reason,
    )


def _parameters(decided: Decided, outcomes: Sequence[PruningOutcome]) -> int:
    """What the trainer removed, where it did; else what the decision would."""
    if outcomes and outcomes[0].result == "applied":
        return outcomes[0].parameters_before - outcomes[0].parameters_after
    return decided.parameters_before - decided.parameters_after


def _accuracies(outcome: PruningOutcome) -> tuple[float | None, float | None]:
    """Before and after a cut, on the same data at the same moment; NaN is unknown."""
    # A report that ends a watch (0 checkpoints left) was measured later than the cut.
    after = outcome.accuracy_masked if outcome.watched == 0 else outcome.accuracy_after
    after = outcome.accuracy_masked if after is None else after
    pair = [None if v is None or v != v else v for v in (outcome.accuracy_before, after)]
    return pair[0], pair[1]


def _widths(points: Sequence[Checkpoint]) -> tuple[Width, ...]:
    """The groups of the network, from input to output; of size 0 where one went with its layer."""
    if not points:
        return ()
    shape = points[-1].shape
    now = {width.name: width for width in shape.widths}
    removed = tuple(f"{name}." for name, gone in shape.blocks if gone)
    known = {width.name: width for point in reversed(points) for width in point.shape.widths}
    gone = {
        n: replace(w, size=0) for n, w in known.items() if n.startswith(removed) and n not in now
    }
    first = [width.name for width in points[0].shape.widths if width.name in now | gone]
    return tuple((now | gone)[name] for name in dict.fromkeys((*first, *now, *gone)))


def _gain(run: Run, cuts: Sequence[Decided]) -> Gain:
    points = [run.checkpoints[epoch] for epoch in sorted(run.checkpoints)]
    shape, stayed = points[-1].shape, [each for each in cuts if each.units]
    first = cuts[0].epoch if cuts else None
    counts: dict[str, tuple[int, int]] = {}
    for width in (each for each in _widths(points) if not each.reason):
        before, now = counts.get(width.level, (0, 0))
        counts[width.level] = before + width.original, now + width.size
    if shape.blocks:
        counts["layer"] = len(shape.blocks), sum(not removed for _, removed in shape.blocks)
    return Gain(
        parameters=(shape.original_parameters, shape.parameters),
        macs=(shape.original_macs, shape.macs),
        units=tuple((level, before, now) for level, (before, now) in counts.items()),
        cuts=len(stayed),
        latency=_latency(run, stayed),
        accuracy=(_at(run, first), points[-1].accuracy),
    )


def _latency(run: Run, stayed: Sequence[Decided]) -> Latency | None:
    first = [run.outcomes[each.key][0] for each in stayed if run.outcomes.get(each.key)]
    pairs = [(each.latency_before, each.latency_after) for each in first]
    known = [(was, now) for was, now in pairs if was and now]
    if not known or len(known) < len(stayed):
        return None
    # Between two cuts only the machine changed: that is left out.
    share = math.prod(now / was for was, now in known)
    repeats = [abs(math.log(again / now)) for (_, now), (again, _) in pairwise(known)]
    spread = math.expm1(max(repeats)) if repeats else None
    return Latency(known[0][0], known[0][0] * share, spread)


def _at(run: Run, epoch: int | None) -> float | None:
    point = run.checkpoints.get(epoch) if epoch is not None else None
    return point.accuracy if point else None


def _settled(accuracies: Sequence[tuple[int, float]]) -> int:
    """Where a run is past its first steep rise: at nine tenths of its best accuracy."""
    best = max((value for _, value in accuracies), default=0.0)
    return next((epoch for epoch, value in accuracies if value >= 0.9 * best), 0)


def _title(decided: Decided, result: str) -> str:
    kind = f"{decided.levels[0]}s" if len(decided.levels) == 1 else "units"
    what = f"{decided.units} {kind}" if decided.units else " + ".join(decided.levels)
    return f"epoch {decided.epoch}: {what} {result.replace('_', ' ')}"


def _bands(decided: list[Decided]) -> Iterator[Band]:
    """Phases as the decisions state them, each up to where the next begins."""
    starts: list[Decided] = []
    for each in decided:
        if not starts or starts[-1].phase != each.phase:
            starts.append(each)
    for index, each in enumerate(starts):
        begin = 0 if index == 0 else each.epoch
        end = starts[index + 1].epoch if index + 1 < len(starts) else decided[-1].epoch
        yield Band(each.phase, begin, max(end, begin), each.phase_limit)


def _held_back(run: Run, decided: Iterable[Decided], results: dict[str, str]) -> Iterator[HeldBack]:
    """The reasons of decisions that were not applied, the most frequent first."""
    counts: Counter[str] = Counter()
    newest: dict[str, HeldBack] = {}
    for each in decided:
        result = results[each.key]
        if result in ("applied", "approved"):
            continue
        outcome = run.outcome(each.key)
        reason = each.reason or (outcome.detail if outcome else "") or "no reason was given"
        what = f"{result.replace('_', ' ')}: {reason}"
        kind = _DIGITS.sub("", what)  # figures differ from one decision to the next
        counts[kind] += 1
        newest[kind] = HeldBack(what, counts[kind], each.key)
    for kind, _ in counts.most_common(_KINDS):
        yield newest[kind]

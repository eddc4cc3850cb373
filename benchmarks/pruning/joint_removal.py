"""Test accuracy after removing a share of all units, without fine-tuning.

    python -m benchmarks.pruning.joint_removal --nets resnet,concat,vgg,vit,vit-heads --seeds 0 1 2
    python -m benchmarks.pruning.joint_removal --nets vit-deep,vit-deep-heads --one-shot

``vit`` counts the hidden units of the feed-forward parts, ``vit-heads`` the attention heads. Every
order sees the same calibration samples (training images) and the same minimum of units a group. "In
rounds": a twentieth of the units at a time is cut, then everything is measured again; the rows of
the others are re-ranked as often. With redistribution the consumers are re-solved at every cut.
"In hindsight" looks at the test data: it masks the head that costs least there, one after another.
"Every head masked at every step" does so on all calibration samples: hundreds of passes over them,
so no rival of one shot, but what the samples say at most.
The last table sets what ours loses against the best other order of one shot.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.common.criteria import CRITERIA, lowest
from benchmarks.common.ratios import paired_ratio
from benchmarks.common.report import arguments, bars, show, write
from benchmarks.common.subjects import Batches, Subject, per_sample_loss
from elesh.analysis import select_channels
from elesh.analysis.levels.heads import HEADS
from elesh.settings import AttentionAnalysis, ChannelAnalysis, StructuredPruning
from elesh.trainer.surgery.masks import Masks
from leyline import CheckpointBundle, Level, Phase

SHARES = (0.05, 0.10, 0.20, 0.30, 0.40)
STEP = 0.05
_JUDGED = (0.20, 0.30, 0.40)
"""The shares at which one shot is set against the others."""
_MINIMUM = {"vit-deep": 2}
"""Channels that every group keeps, where not 4: its groups have eight."""
_HINDSIGHT = "in hindsight, by test loss"
_MASKING = "every head masked at every step"
Units = Mapping[str, Sequence[int]]
Order = Callable[[int], Units]
"""From a number of units to the units that go first."""
Rank = Callable[[Subject], Order]


@dataclass(frozen=True)
class Method:
    """How units are ranked and cut."""

    rank: Rank
    rounds: bool = False
    redistribute: bool = False


class Ours:
    """The analysis' own order; in rounds with r, what has moved since the network was whole.

    Args:
        redistribute: rank for whoever redistributes.
        scorer: another scorer instead of the default.
        ahead: the share of units that the projections look ahead to; in rounds a round.
    """

    def __init__(
        self,
        subject: Subject,
        minimum: int,
        *,
        redistribute: bool = False,
        rounds: bool = False,
        scorer: Any = "auto",
    ) -> None:
        self._minimum, self._scorer = minimum, scorer
        self._redistribute, self._ahead = redistribute, STEP if rounds else 0.2
        self._joint = not redistribute and scorer == "auto"
        carried = rounds and self._joint
        self._whole = subject.tools()[0].project(subject.calibration) if carried else None

    def __call__(self, subject: Subject) -> Order:
        recorder, _ = subject.tools()
        bundle = recorder.measure(
            subject.calibration,
            epoch=1,
            look_ahead=self._ahead if self._joint else 0,
            redistribute=self._redistribute,
        )
        moved = None
        if self._whole is not None:
            moved = recorder.project(subject.calibration) - self._whole
        if subject.level is Level.HEAD:
            return lambda count: self._heads(bundle, count, moved)
        settings = ChannelAnalysis(min_channels_per_layer=self._minimum)
        return lambda count: select_channels(
            bundle, count, settings=settings, scorer=self._scorer, moved=moved
        )

    def _heads(self, bundle: CheckpointBundle, count: int, moved: Any) -> Units:
        groups = [g for g in bundle.architecture.groups if g.prunable and g.level is Level.HEAD]
        attention = AttentionAnalysis(min_heads_per_layer=self._minimum)
        settings = StructuredPruning(attention_analysis=attention)
        scorer, _ = HEADS.choose_scorer(bundle, self._scorer, reconstructs=self._redistribute)
        ranking = HEADS.rank(bundle, settings, groups, scorer, Phase.MODERATE)
        row = (
            ranking.projections.moved(moved) if moved is not None and ranking.projections else None
        )
        return ranking.candidates.by_group(ranking.choose(count, moved=row).units)


def by_criterion(name: str, minimum: int) -> Rank:
    """Somebody else's scores."""

    def rank(subject: Subject) -> Order:
        scores = CRITERIA[name](subject)
        return lambda count: lowest(subject.groups, scores, count, minimum)

    return rank


def by_masking(minimum: int, samples: Callable[[Subject], Batches]) -> Rank:
    """Heads one after another, each time the one whose mask raises the loss least.

    Args:
        samples: what the loss is taken on. With the test samples, no order by others can be
            expected to do better.
    """

    def rank(subject: Subject) -> Order:
        masks, gone = Masks(subject.model), list[tuple[str, int]]()
        left = {group.name: group.size - minimum for group in subject.groups}
        heads = [(group.name, head) for group in subject.groups for head in range(group.size)]

        def loss_without(head: tuple[str, int]) -> float:
            masks.set(subject.architecture, _by_group([*gone, head]))
            try:
                return float(per_sample_loss(subject.model, samples(subject)).mean())
            finally:
                masks.clear()

        def first(count: int) -> Units:
            while len(gone) < count:
                free = [head for head in heads if head not in gone and left[head[0]]]
                best = min(free, key=loss_without)
                left[best[0]] -= 1
                gone.append(best)
            return _by_group(gone[:count])

        return first

    return rank


def _by_group(heads: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for group, head in heads:
        found.setdefault(group, []).append(head)
    return {group: sorted(chosen) for group, chosen in found.items()}


def methods(subject: Subject, minimum: int) -> dict[str, Method]:
    """All rows of the table."""
    heads = subject.level is Level.HEAD
    rows = {
        "ours": Method(Ours(subject, minimum)),
        "ours, in rounds": Method(Ours(subject, minimum, rounds=True), rounds=True),
    }
    for plain, method in list(rows.items()):
        rank = Ours(subject, minimum, redistribute=True)
        rows[f"{plain} + reconstruction"] = Method(rank, method.rounds, redistribute=True)
    mix = Ours(subject, minimum, scorer="multi_metric")
    fisher = Ours(subject, minimum, scorer="fisher")
    others: dict[str, Rank] = {"the document's mix": mix, "Fisher of the gates": fisher}
    others |= {name: by_criterion(name, minimum) for name in CRITERIA}
    if heads:
        others = {name: rank for name, rank in others.items() if not name.startswith("torch-")}
    rows |= {name: Method(rank) for name, rank in others.items()}
    rows |= {
        f"{name}, in rounds": Method(rank, rounds=True)
        for name, rank in others.items()
        if name != "random"
    }
    # How much is the order and how much the redistribution: the best of the others, with it.
    best = by_criterion("Molchanov 2017", minimum)
    for rounds in (False, True):
        name = "Molchanov 2017, in rounds" if rounds else "Molchanov 2017"
        rows[f"{name} + reconstruction"] = Method(best, rounds, redistribute=True)
    if heads:
        rows[_MASKING] = Method(by_masking(minimum, lambda subject: subject.calibration))
        rows[_HINDSIGHT] = Method(by_masking(minimum, lambda subject: subject.test))
    return rows


def rivals(names: Iterable[str]) -> list[str]:
    """The orders of one shot, without redistribution, that ours is set against."""
    left_out = ("ours", _HINDSIGHT, _MASKING)
    plain = [name for name in names if "in rounds" not in name and "+" not in name]
    return [name for name in plain if name not in left_out]


def cut(subject: Subject, units: Units, redistribute: bool) -> Subject:
    """The subject without these units (its network is changed)."""
    recorder, surgeon = subject.tools()
    moments = recorder.moments(subject.calibration, units) if redistribute else None
    return replace(subject, architecture=surgeon.cut(units, redistribute=moments))


def loss_of(subject: Subject) -> float:
    """Mean cross-entropy on the test samples, in nats."""
    return float(per_sample_loss(subject.model, subject.test).mean())


def effects(subject: Subject, method: Method) -> list[tuple[float, float]]:
    """Test accuracy and test loss at every share."""
    total = subject.units
    if not method.rounds:
        order = method.rank(subject)
        chosen = [order(round(share * total)) for share in SHARES]
        return [effect(cut(subject.copy(), units, method.redistribute)) for units in chosen]
    now, gone, found = subject.copy(), 0, []
    for number in range(1, round(SHARES[-1] / STEP) + 1):
        target = round(number * STEP * total)
        if target > gone:
            now = cut(now, method.rank(now)(target - gone), method.redistribute)
        gone = target
        if any(abs(number * STEP - share) < 1e-9 for share in SHARES):
            found.append(effect(now))
    return found


def effect(subject: Subject) -> tuple[float, float]:
    """Test accuracy and test loss."""
    return subject.accuracy(), loss_of(subject)


def judged(unit: str, share: float, lost: Mapping[str, Sequence[float]]) -> list[str]:
    """Ours against the best other: a row of the last table.

    Args:
        lost: by order, what it loses at this share, seed by seed.
    """
    best = min(rivals(lost), key=lambda name: statistics.fmean(lost[name]))
    ratio = paired_ratio(lost["ours"], lost[best])
    said = str(ratio) if ratio else "undetermined: other within its noise"
    return [f"{share:.0%}", unit, bars(lost["ours"], 4), f"{bars(lost[best], 4)} ({best})", said]


def print_tables(net: str, figures: Mapping[str, Any], seconds: float) -> None:
    """Accuracies, rises of the test loss, and the ratio at 20%."""
    before, whole, rows = figures["before"], figures["loss before"], figures["rows"]
    loss_increases = {
        name: np.array(losses) - np.array(whole)[:, None]
        for name, losses in figures["losses"].items()
    }
    shares = ["order", *(f"{share:.0%}" for share in SHARES)]
    show(
        f"{net}: {figures['units']} units, {len(before)} seeds, before {bars(before)} "
        f"({seconds:.0f} s of CPU)",
        shares,
        [[name, *map(bars, np.transpose(found).tolist())] for name, found in rows.items()],
    )
    show(
        f"{net}: rise of the test loss, nats, before {bars(whole)}",
        shares,
        [[name, *map(bars, found.T.tolist())] for name, found in loss_increases.items()],
    )
    if "ours" not in rows or not rivals(rows):
        return
    losses = {name: np.array(before)[:, None] - np.array(found) for name, found in rows.items()}
    show(
        f"{net}: lost by one shot",
        ["at", "in", "ours", "best other", "ratio, paired by seed"],
        [
            judged(
                unit,
                share,
                {name: by[:, SHARES.index(share)].tolist() for name, by in lost.items()},
            )
            for unit, lost in (("accuracy", losses), ("test loss", loss_increases))
            for share in _JUDGED
        ],
    )


def main() -> None:
    """Measure and print, net by net."""
    nets = ("resnet", "concat", "vgg", "vit", "vit-heads", "vit-deep", "vit-deep-heads")
    parser = arguments(__doc__.splitlines()[0], nets)
    parser.add_argument("--minimum", type=int, help="units every group keeps: 4 channels, 1 head")
    parser.add_argument("--samples", type=int, help="calibration samples; all of the training set")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--one-shot", action="store_true", help="no rows in rounds")
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    for net in asked.nets:
        found: dict[str, Any] = {"before": [], "loss before": [], "units": 0, "shares": SHARES}
        rows, losses = found.setdefault("rows", {}), found.setdefault("losses", {})
        figures[net], begun = found, time.process_time()
        for seed in asked.seeds:
            subject = Subject.trained(net, seed, asked.epochs, asked.cache, asked.samples)
            minimum = asked.minimum or (1 if subject.level is Level.HEAD else _MINIMUM.get(net, 4))
            found["units"] = subject.units
            found["before"].append(subject.accuracy())
            found["loss before"].append(loss_of(subject))
            for name, method in methods(subject, minimum).items():
                if asked.only in name and not (asked.one_shot and method.rounds):
                    accuracies, after = zip(*effects(subject, method), strict=True)
                    rows.setdefault(name, []).append(list(accuracies))
                    losses.setdefault(name, []).append(list(after))
            write(asked.json, figures)
        print_tables(net, found, time.process_time() - begun)


if __name__ == "__main__":
    main()

"""Test accuracy after removing a share of all units, without fine-tuning.

    python -m benchmarks.joint_removal --nets resnet,concat,vgg,vit,vit-heads --seeds 0 1 2 3 4

``vit`` counts the hidden units of the feed-forward parts, ``vit-heads`` the attention heads. Every
order sees the same calibration samples (training images) and the same minimum of units a group. "In
rounds": a twentieth of the units at a time is cut, then everything is measured again; the rows of
the others are re-ranked as often. With redistribution the consumers are re-solved at every cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.common.criteria import CRITERIA, lowest
from benchmarks.common.report import arguments, bars, show, write
from benchmarks.common.subjects import Subject
from elesh.analysis import select_channels
from elesh.analysis.heads import rank_heads
from elesh.settings import AttentionAnalysis, ChannelAnalysis
from leyline import CheckpointBundle, Level, Phase

SHARES = (0.05, 0.10, 0.20, 0.30, 0.40)
STEP = 0.05
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
            ahead=self._ahead if self._joint else 0,
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
        settings = AttentionAnalysis(min_heads_per_layer=self._minimum)
        scorer = "output_projection" if self._joint else self._scorer
        ranking = rank_heads(bundle, settings, groups, scorer, Phase.MODERATE)
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


def methods(subject: Subject, minimum: int) -> dict[str, Method]:
    """All rows of the table."""
    heads = subject.level is Level.HEAD
    rows = {
        "ours": Method(Ours(subject, minimum)),
        "ours, in rounds": Method(Ours(subject, minimum, rounds=True), rounds=True),
    }
    for plain, method in list(rows.items()):
        # Input moments are of channels; heads keep their order and are only re-solved.
        rank = method.rank if heads else Ours(subject, minimum, redistribute=True)
        rows[f"{plain} + redistribution"] = Method(rank, method.rounds, redistribute=True)
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
        rows[f"{name} + redistribution"] = Method(best, rounds, redistribute=True)
    return rows


def cut(subject: Subject, units: Units, redistribute: bool) -> Subject:
    """The subject without these units (its network is changed)."""
    recorder, surgeon = subject.tools()
    moments = recorder.moments(subject.calibration, units) if redistribute else None
    return replace(subject, architecture=surgeon.cut(units, redistribute=moments))


def accuracies(subject: Subject, method: Method) -> list[float]:
    """Test accuracy at every share."""
    total = subject.units
    if not method.rounds:
        order = method.rank(subject)
        chosen = [order(round(share * total)) for share in SHARES]
        return [cut(subject.copy(), units, method.redistribute).accuracy() for units in chosen]
    now, gone, found = subject.copy(), 0, []
    for number in range(1, round(SHARES[-1] / STEP) + 1):
        target = round(number * STEP * total)
        if target > gone:
            now = cut(now, method.rank(now)(target - gone), method.redistribute)
        gone = target
        if any(abs(number * STEP - share) < 1e-9 for share in SHARES):
            found.append(now.accuracy())
    return found


def main() -> None:
    """Measure and print, net by net."""
    parser = arguments(__doc__.splitlines()[0], ("resnet", "concat", "vgg", "vit", "vit-heads"))
    parser.add_argument("--minimum", type=int, help="units every group keeps: 4 channels, 1 head")
    parser.add_argument("--samples", type=int, help="calibration samples; all of the training set")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    for net in asked.nets:
        rows: dict[str, list[list[float]]] = {}
        before, units, begun = [], 0, time.process_time()
        for seed in asked.seeds:
            subject = Subject.trained(net, seed, asked.epochs, asked.cache, asked.samples)
            minimum = asked.minimum or (1 if subject.level is Level.HEAD else 4)
            before.append(subject.accuracy())
            units = subject.units
            for name, method in methods(subject, minimum).items():
                if asked.only in name:
                    rows.setdefault(name, []).append(accuracies(subject, method))
            figures[net] = {"before": before, "units": units, "shares": SHARES, "rows": rows}
            write(asked.json, figures)
        title = f"{net}: {units} units, {len(asked.seeds)} seeds, before {bars(before)}"
        show(
            f"{title} ({time.process_time() - begun:.0f} s of CPU)",
            ["order", *(f"{share:.0%}" for share in SHARES)],
            [[name, *map(bars, np.transpose(found).tolist())] for name, found in rows.items()],
        )


if __name__ == "__main__":
    main()

"""Test accuracy after removing a share of all channels, without fine-tuning.

    python -m benchmarks.joint_removal --nets resnet,concat,vgg --seeds 0 1 2

Every order sees the same calibration samples (all training images) and the same minimum of
channels a group. "In rounds": a twentieth of the channels at a time is cut, then everything is
measured again; the rows of the others are re-ranked as often. With redistribution the consumers
are re-solved at every cut.
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
from elesh.settings import ChannelAnalysis

SHARES = (0.05, 0.10, 0.20, 0.30, 0.40)
STEP = 0.05
Units = Mapping[str, Sequence[int]]
Choose = Callable[[Subject, int], Units]


@dataclass(frozen=True)
class Method:
    """How channels are chosen and cut."""

    choose: Choose
    rounds: bool = False
    redistribute: bool = False


class Ours:
    """Output projections; in rounds with r, what has been moved since the network was whole."""

    def __init__(self, subject: Subject, settings: ChannelAnalysis, *, carry: bool = True) -> None:
        self._settings, self._carry = settings, carry
        self._whole = subject.tools()[0].project(subject.calibration)

    def __call__(self, subject: Subject, count: int) -> Units:
        recorder, _ = subject.tools()
        bundle = recorder.measure(subject.calibration, epoch=1)
        moved = recorder.project(subject.calibration) - self._whole if self._carry else None
        return select_channels(bundle, count, settings=self._settings, moved=moved)


def multi_metric(settings: ChannelAnalysis) -> Choose:
    """The design document's mix."""

    def choose(subject: Subject, count: int) -> Units:
        bundle = subject.tools()[0].measure(subject.calibration, epoch=1)
        return select_channels(bundle, count, settings=settings, scorer="multi_metric")

    return choose


def methods(subject: Subject, minimum: int) -> dict[str, Method]:
    """All rows of the table."""
    settings = ChannelAnalysis(min_channels_per_layer=minimum)
    ours, afresh = Ours(subject, settings), Ours(subject, settings, carry=False)
    rows = {
        "ours": Method(ours),
        "ours + redistribution": Method(ours, redistribute=True),
        "ours, in rounds": Method(ours, rounds=True),
        "ours, in rounds + redistribution": Method(ours, rounds=True, redistribute=True),
        "ours, in rounds, r = 0": Method(afresh, rounds=True),
        "ours, in rounds, r = 0 + redistribution": Method(afresh, rounds=True, redistribute=True),
        "multi-metric mix": Method(multi_metric(settings)),
    }

    def by(criterion: str) -> Choose:
        score = CRITERIA[criterion]
        return lambda now, count: lowest(now.architecture, score(now), count, minimum)

    rows |= {name: Method(by(name)) for name in CRITERIA}
    rows["multi-metric mix, in rounds"] = Method(multi_metric(settings), rounds=True)
    for name in CRITERIA:
        if name != "random":
            rows[f"{name}, in rounds"] = Method(by(name), rounds=True)
    # How much is the order and how much the redistribution: the best of the others, with it.
    best = by("Molchanov 2017")
    rows["Molchanov 2017 + redistribution"] = Method(best, redistribute=True)
    rows["Molchanov 2017 + redistribution, in rounds"] = Method(
        best, rounds=True, redistribute=True
    )
    return rows


def cut(subject: Subject, method: Method, count: int) -> Subject:
    """The subject without ``count`` more channels (its network is changed)."""
    units = method.choose(subject, count)
    recorder, surgeon = subject.tools()
    moments = recorder.moments(subject.calibration, units) if method.redistribute else None
    return replace(subject, architecture=surgeon.cut(units, redistribute=moments))


def accuracies(subject: Subject, method: Method) -> list[float]:
    """Test accuracy at every share."""
    total = subject.channels
    if not method.rounds:
        return [cut(subject.copy(), method, round(s * total)).accuracy() for s in SHARES]
    now, gone, found = subject.copy(), 0, []
    for number in range(1, round(SHARES[-1] / STEP) + 1):
        target = round(number * STEP * total)
        now, gone = cut(now, method, target - gone), target
        if any(abs(number * STEP - share) < 1e-9 for share in SHARES):
            found.append(now.accuracy())
    return found


def main() -> None:
    """Measure and print, net by net."""
    parser = arguments(__doc__.splitlines()[0], ("resnet", "concat", "vgg"))
    parser.add_argument("--minimum", type=int, default=4, help="channels every group keeps")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    for net in asked.nets:
        rows: dict[str, list[list[float]]] = {}
        before, channels, begun = [], 0, time.perf_counter()
        for seed in asked.seeds:
            subject = Subject.trained(net, seed, asked.epochs, asked.cache)
            before.append(subject.accuracy())
            channels = subject.channels
            for name, method in methods(subject, asked.minimum).items():
                if asked.only in name:
                    rows.setdefault(name, []).append(accuracies(subject, method))
        figures[net] = {"before": before, "channels": channels, "shares": SHARES, "rows": rows}
        title = f"{net}: {channels} channels, {len(asked.seeds)} seeds, before {bars(before)}"
        show(
            f"{title} ({time.perf_counter() - begun:.0f} s)",
            ["order", *(f"{share:.0%}" for share in SHARES)],
            [[name, *map(bars, np.transpose(found).tolist())] for name, found in rows.items()],
        )
        write(asked.json, figures)


if __name__ == "__main__":
    main()

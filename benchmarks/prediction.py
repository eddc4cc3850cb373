"""Predicted against measured rise of the loss, for sets of channels.

    python -m benchmarks.prediction --nets resnet,concat,vgg --seeds 0 1 2

Random sets of 2, 5, 10 and 20% of the channels and sets that orders choose (ours, Molchanov 2017
and 2019, from 5 to 35%), masked, on the calibration samples that the prediction is made from and
on test samples. Pearson correlation of predicted with measured nats, over all sets of a network;
"largest" are random sets of 20% alone, which differ only in who is in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common.criteria import CRITERIA, lowest
from benchmarks.common.report import arguments, bars, show, write
from benchmarks.common.subjects import Batches, Subject, per_sample_loss
from elesh.analysis import select_channels
from elesh.analysis.candidates import Candidates
from elesh.analysis.scores import set_removal, single_removal
from elesh.settings import ChannelAnalysis
from elesh.trainer import Surgeon
from leyline import CheckpointBundle

Units = Mapping[str, Sequence[int]]
RANDOM, DRAWS = (0.02, 0.05, 0.10, 0.20), 25
CHOSEN = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35)


def random_sets(subject: Subject) -> list[Units]:
    """Seeded draws among all channels."""
    rng, candidates = np.random.default_rng(subject.seed), Candidates.of(subject.groups, 1)
    return [
        candidates.by_group(rng.choice(candidates.count, round(share * candidates.count), False))
        for share in RANDOM
        for _ in range(DRAWS)
    ]


def chosen_sets(subject: Subject, bundle: CheckpointBundle) -> list[Units]:
    """What orders take."""
    counts = [round(share * subject.units) for share in CHOSEN]
    settings = ChannelAnalysis(min_channels_per_layer=4)
    sets: list[Units] = [select_channels(bundle, count, settings=settings) for count in counts]
    for name in ("Molchanov 2017", "Molchanov 2019"):
        scores = CRITERIA[name](subject)
        sets += [lowest(subject.groups, scores, count, 4) for count in counts]
    return sets


def measured(subject: Subject, sets: Sequence[Units], batches: Batches) -> list[float]:
    """The rise of the mean loss with each set masked, in nats."""
    surgeon, rises = Surgeon(subject.model, subject.architecture), []
    plain = float(per_sample_loss(subject.model, batches).mean())
    for units in sets:
        surgeon.mask(units)
        rises.append(float(per_sample_loss(subject.model, batches).mean()) - plain)
        surgeon.unmask()
    return rises


def correlations(subject: Subject) -> dict[str, dict[str, float]]:
    """Pearson by predictor and kind of set, and how large predictions are."""
    bundle = subject.tools()[0].measure(subject.calibration, epoch=1)
    kinds = {"random": random_sets(subject), "chosen": chosen_sets(subject, bundle)}
    kinds["both"] = [*kinds["random"], *kinds["chosen"]]
    same = measured(subject, kinds["both"], subject.calibration)
    held_out = measured(subject, kinds["both"], subject.test)

    def alone(units: Units) -> float:
        gates = bundle.gates
        return sum(float(single_removal(gates[n])[list(lost)].sum()) for n, lost in units.items())

    rows: dict[str, dict[str, float]] = {}
    start = len(kinds["random"])
    parts = {
        "random": slice(0, start),
        "random, largest": slice(start - DRAWS, start),
        "chosen": slice(start, None),
        "both": slice(None),
    }
    for name, predict in {
        "together (ours)": lambda units: set_removal(bundle.gates, units)[0],
        "sum of single removals": alone,
    }.items():
        told = np.array([predict(units) for units in kinds["both"]])
        row = {kind: _pearson(told[part], same[part]) for kind, part in parts.items()}
        row["both, held out"] = _pearson(told, held_out)
        row["predicted / measured"] = float(np.median(told / np.maximum(same, 1e-9)))
        rows[name] = row
    return rows


def _pearson(told: Sequence[float], found: Sequence[float]) -> float:
    return float(np.corrcoef(told, found)[0, 1])


def main() -> None:
    """Measure and print, net by net."""
    parser = arguments(__doc__.splitlines()[0], ("resnet", "concat", "vgg"))
    parser.add_argument("--samples", type=int, default=512, help="calibration samples")
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    for net in asked.nets:
        found = [
            correlations(Subject.trained(net, seed, asked.epochs, asked.cache, asked.samples))
            for seed in asked.seeds
        ]
        figures[net] = found
        columns = list(next(iter(found[0].values())))
        show(
            f"{net}: Pearson of predicted and measured rise, {len(asked.seeds)} seeds",
            ["prediction", *columns],
            [
                [name, *(bars([rows[name][column] for rows in found]) for column in columns)]
                for name in found[0]
            ],
        )
        write(asked.json, figures)


if __name__ == "__main__":
    main()

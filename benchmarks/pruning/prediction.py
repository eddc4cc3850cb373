"""Predicted against measured rise of the loss, for sets of channels.

    python -m benchmarks.pruning.prediction --nets resnet,concat,vgg,vit --seeds 0 1 2

Random sets of 2, 5, 10 and 20% of the channels and sets that orders choose (ours, Molchanov 2017
and 2019, from 5 to 35%), masked, on the calibration samples that the prediction is made from and
on test samples. Pearson correlation of predicted with measured nats, over all sets of a network;
"largest" are random sets of 20% alone, which differ only in who is in them; "ranks" is Spearman's
correlation over all sets. Ratios are medians of predicted over measured. The ceiling is how well
the rise measured on every other sample tells the one on the samples between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from benchmarks.common.criteria import CRITERIA, lowest
from benchmarks.common.report import arguments, bars, show, write
from benchmarks.common.subjects import Batches, Subject, per_sample_loss
from elesh.analysis import select_channels
from elesh.analysis.candidates import Candidates
from elesh.analysis.importance.scores import single_removal
from elesh.analysis.pruning_set.draft import set_removal
from elesh.settings import ChannelAnalysis
from elesh.trainer import Surgeon
from leyline import CheckpointBundle

Units = Mapping[str, Sequence[int]]
Doubles = npt.NDArray[np.float64]
RANDOM, DRAWS = (0.02, 0.05, 0.10, 0.20), 25
CHOSEN = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35)
_MEASURABLE = 1e-9
"""Nats by which ratios divide at least."""


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


def measured(subject: Subject, sets: Sequence[Units], batches: Batches) -> Doubles:
    """[S, N]: the rise of each sample's loss with each set masked, in nats."""
    surgeon, loss_increases = Surgeon(subject.model, subject.architecture), []
    plain = per_sample_loss(subject.model, batches)
    for units in sets:
        surgeon.mask(units)
        loss_increases.append((per_sample_loss(subject.model, batches) - plain).numpy())
        surgeon.unmask()
    return np.array(loss_increases)


def correlations(subject: Subject) -> dict[str, dict[str, float]]:
    """By predictor, and for the ceiling: correlations by kind of set, and the ratios."""
    bundle = subject.tools()[0].measure(subject.calibration, epoch=1)
    random, chosen = random_sets(subject), chosen_sets(subject, bundle)
    sets, start = [*random, *chosen], len(random)
    same = measured(subject, sets, subject.calibration)
    found, held_out = same.mean(1), measured(subject, sets, subject.test).mean(1)

    def alone(units: Units) -> float:
        gates = bundle.gates
        return sum(float(single_removal(gates[n])[list(lost)].sum()) for n, lost in units.items())

    def row(told: Doubles, found: Doubles, held_out: Doubles) -> dict[str, float]:
        parts = {
            "random": slice(0, start),
            "largest": slice(start - DRAWS, start),
            "chosen": slice(start, None),
            "both": slice(None),
        }
        ratios = told / np.maximum(found, _MEASURABLE)
        return {
            **{kind: _pearson(told[part], found[part]) for kind, part in parts.items()},
            "both, held out": _pearson(told, held_out),
            "both, ranks": float(spearmanr(told, found).statistic),
            **{f"ratio, {kind}": float(np.median(ratios[p])) for kind, p in parts.items()},
        }

    together = np.array([set_removal(bundle.gates, units)[0] for units in sets])
    return {
        "together (ours)": row(together, found, held_out),
        "sum of single removals": row(np.array([alone(units) for units in sets]), found, held_out),
        "ceiling": {
            **row(same[:, 0::2].mean(1), same[:, 1::2].mean(1), held_out),
            "both, held out": _pearson(found, held_out),
        },
    }


def _pearson(told: Doubles, found: Doubles) -> float:
    return float(np.corrcoef(told, found)[0, 1])


def main() -> None:
    """Measure and print, net by net."""
    parser = arguments(__doc__.splitlines()[0], ("resnet", "concat", "vgg", "vit"))
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
        seeds = f"{len(asked.seeds)} seeds"
        for title, part in (
            (f"{net}: Pearson of predicted and measured rise, {seeds}", slice(0, 5)),
            (f"{net}: ranks, and the median of predicted / measured, {seeds}", slice(5, None)),
        ):
            rows = [
                [name, *(bars([rows[name][column] for rows in found]) for column in columns[part])]
                for name in found[0]
            ]
            show(title, ["prediction", *columns[part]], rows)
        write(asked.json, figures)


if __name__ == "__main__":
    main()

"""How well the single-removal score orders channels, against removing them one by one.

    python -m benchmarks.pruning.ranking --nets resnet,concat,vgg,vit-heads --seeds 0 1 2

Kendall tau within each layer, averaged over layers, between ``single_removal`` (from one
calibration pass) and the loss measured with that one channel masked. "Half split" is the measured
rise on even samples against that on odd ones: what measuring itself is worth with half of the
samples. Held out: the same score against the rise on test samples; its ceiling is the measured
rise on the calibration samples against that on the test samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import kendalltau

from benchmarks.common.criteria import CRITERIA
from benchmarks.common.report import arguments, bars, show, write
from benchmarks.common.subjects import Batches, Subject, per_sample_loss
from elesh.analysis.importance.scores import MID, magnitude, multi_metric, single_removal
from elesh.analysis.levels.heads import LATE as HEADS_LATE
from elesh.analysis.levels.heads import multi_factor
from elesh.trainer import Surgeon
from leyline import Level

Values = npt.NDArray[np.float64]
ByGroup = Mapping[str, Values]


def measured_rise(subject: Subject, batches: Batches) -> ByGroup:
    """[C, N] by group: how much each sample's loss rises when one channel is masked."""
    plain = per_sample_loss(subject.model, batches)
    surgeon, found = Surgeon(subject.model, subject.architecture), {}
    for group in subject.groups:
        rows = []
        for unit in range(group.size):
            surgeon.mask({group.name: [unit]})
            rows.append(per_sample_loss(subject.model, batches) - plain)
            surgeon.unmask()
        found[group.name] = torch.stack(rows).numpy()
    return found


def tau(left: ByGroup, right: ByGroup) -> float:
    """Mean over groups of Kendall's tau-b; a group that is all ties says nothing and is left out.

    Raises:
        ValueError: if no group has an order.
    """
    taus = [kendalltau(left[name], right[name]).statistic for name in right]
    known = [value for value in taus if np.isfinite(value)]
    if not known:
        raise ValueError("no layer has channels of different importance")
    return float(np.mean(known))


def mean(rise: ByGroup, part: slice = slice(None)) -> ByGroup:
    """[C] by group: the mean over some samples."""
    return {name: row[:, part].mean(1) for name, row in rise.items()}


def our_scores(subject: Subject) -> dict[str, ByGroup]:
    """The scores that come with a checkpoint, by name."""
    bundle = subject.tools()[0].measure(subject.calibration, epoch=1, look_ahead=0)
    names = [group.name for group in subject.groups]
    singles = {name: single_removal(bundle.gates[name]) for name in names}
    if subject.level is Level.HEAD:
        heads = {name: multi_factor([bundle.heads[name]], HEADS_LATE) for name in names}
        return {"single removal (ours)": singles, "multi-metric mix": heads}
    data = [bundle.channels[name] for name in names]
    ends = np.cumsum([group.size for group in data])[:-1]
    return {
        "single removal (ours)": singles,
        "multi-metric mix": dict(zip(names, np.split(multi_metric(data, MID), ends), strict=True)),
        "magnitude": dict(zip(names, np.split(magnitude(data), ends), strict=True)),
    }


def taus(subject: Subject) -> dict[str, dict[str, float]]:
    """All figures of one trained network: by row and column."""
    same = measured_rise(subject, subject.calibration)
    held_out = mean(measured_rise(subject, subject.test))
    scores = our_scores(subject) | {
        name: CRITERIA[name](subject)
        for name in ("Molchanov 2019", "Molchanov 2017", "torch-pruning Taylor")
        if subject.level is Level.CHANNEL or not name.startswith("torch-")
    }
    ceilings = {
        "same data": tau(mean(same, slice(0, None, 2)), mean(same, slice(1, None, 2))),
        "held out": tau(mean(same), held_out),
    }
    rows = {"ceiling": ceilings}
    for name, score in scores.items():
        rows[name] = {"same data": tau(score, mean(same)), "held out": tau(score, held_out)}
    for row in rows.values():
        row["share of ceiling"] = row["held out"] / ceilings["held out"]
    return rows


def main() -> None:
    """Measure and print, net by net."""
    parser = arguments(__doc__.splitlines()[0], ("resnet", "concat", "vgg", "vit-heads"))
    parser.add_argument("--samples", type=int, default=512, help="calibration samples")
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    columns = ("same data", "held out", "share of ceiling")
    for net in asked.nets:
        found = []
        for seed in asked.seeds:
            subject = Subject.trained(net, seed, asked.epochs, asked.cache, asked.samples)
            found.append(taus(subject))
        figures[net] = found
        show(
            f"{net}: Kendall tau a layer, {asked.samples} samples, {len(asked.seeds)} seeds",
            ["score", *columns],
            [
                ["ceiling (half split; measured)" if name == "ceiling" else name]
                + [bars([rows[name][column] for rows in found]) for column in columns]
                for name in found[0]
            ],
        )
        write(asked.json, figures)


if __name__ == "__main__":
    main()

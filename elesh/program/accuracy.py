"""The accuracy targets that need the network: its held-out samples give the true importance.

Promises: what a target means is said in its check; the same checkpoint gives the same figures;
nothing of the samples that the statistics were made of is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import safetensors.torch
import torch

from elesh.analysis.accuracy import (
    AccuracyCheck,
    ByGroup,
    agreement,
    not_measured,
    ranking_scores,
    redundancy,
)
from elesh.analysis.importance.scores import Pair
from elesh.analysis.levels.layers import first_to_go
from elesh.safety import Entry
from elesh.settings import Settings
from leyline import CheckpointBundle, Level, NetworkExport, PruningGroup

from .measure import Bench
from .program import MIN_SAMPLES

Progress = Callable[[int, int], None]
"""Called with how many of how many measurements are done."""


def open_bench(bundle: CheckpointBundle, network: NetworkExport) -> Bench:
    """The network on its held-out samples, with as much time as it takes.

    Raises:
        ContractError: naming what is wrong with program, weights or samples.
    """
    return Bench(network, bundle.architecture)


def ranking_check(
    bench: Bench, bundle: CheckpointBundle, settings: Settings, most: int, progress: Progress
) -> AccuracyCheck:
    """The scorer's order of single channels against the loss with each one masked.

    Args:
        most: channels of a group that are masked, evenly spread over it.
    """
    name, target = "channel_importance_ranking", settings.accuracy_targets
    wanted = target.channel_importance_ranking
    scorer, scores = ranking_scores(bundle, settings)
    if not scores:
        return not_measured(name, wanted, "no channel of this network can be removed")
    chosen = {group: _spread(len(row), most) for group, row in scores.items()}
    loss_increases = _loss_increases(bench, chosen, progress)
    value = agreement(
        wanted.metric,
        {group: scores[group][units] for group, units in chosen.items()},
        _means(loss_increases, slice(None)),
    )
    halves = _means(loss_increases, slice(0, None, 2)), _means(loss_increases, slice(1, None, 2))
    count = sum(map(len, chosen.values()))
    detail = (
        f"{count} channels in {len(chosen)} groups, ranked by {scorer}, against the loss with each "
        f"one masked on {bench.samples} held-out samples"
    )
    if value is None:
        return not_measured(name, wanted, f"no group has an order: {detail}")
    ceiling = agreement(wanted.metric, *halves)
    return AccuracyCheck(name, wanted.metric, wanted.target, value, ceiling, detail)


def _spread(size: int, most: int) -> list[int]:
    """At most so many of the units, evenly spread."""
    places = np.linspace(0, size - 1, min(size, most))
    return sorted({round(place) for place in places.tolist()})


def _loss_increases(
    bench: Bench, chosen: Mapping[str, Sequence[int]], progress: Progress
) -> ByGroup:
    """[K, N] by group: how much each sample's loss rises with one unit masked."""
    plain, rows = bench.outcomes(()).losses, dict[str, list[np.ndarray]]()
    total, done = sum(map(len, chosen.values())), 0
    for group, units in chosen.items():
        for unit in units:
            masked = bench.outcomes([(Level.CHANNEL, group, unit)]).losses
            rows.setdefault(group, []).append(masked - plain)
            progress(done := done + 1, total)
    return {group: np.stack(each) for group, each in rows.items()}


def _means(loss_increases: ByGroup, part: slice) -> ByGroup:
    return {group: row[:, part].mean(axis=1) for group, row in loss_increases.items()}


def redundancy_check(bench: Bench, bundle: CheckpointBundle, settings: Settings) -> AccuracyCheck:
    """Of the pairs that are called redundant, the share of which one can stand in for the other.

    Heads are called redundant by their attention patterns, channels by their activations. Whether
    the one that goes could be made from the one that stays is another question, and the one that
    matters: see :func:`replaceability`. Channels only where the network has no heads.
    """
    name, wanted = (
        "attention_redundancy_detection",
        settings.accuracy_targets.attention_redundancy_detection,
    )
    groups = bundle.architecture.groups
    heads = any(group.level is Level.HEAD and group.prunable for group in groups)
    level, pruning = Level.HEAD if heads else Level.CHANNEL, settings.structured_pruning
    threshold = (
        pruning.attention_analysis.similarity_threshold
        if heads
        else pruning.channel_analysis.redundancy_threshold
    )
    pairs = redundancy(bundle, settings, level)
    if not pairs:
        return not_measured(name, wanted, f"no two {level}s are more alike than {threshold:g}")
    found = [replaceability(bench, bundle.architecture.group[g], each) for g, each in pairs.items()]
    whole, even, odd = (np.concatenate(part) > threshold for part in zip(*found, strict=True))
    ceiling = float(odd[even].mean()) if even.any() else None
    detail = (
        f"{int(whole.sum())} of {len(whole)} redundant pairs of {level}s: the output of the one "
        f"that goes, made from the other's, has a cosine over {threshold:g} with itself on "
        f"{bench.samples} held-out samples"
    )
    value = float(whole.mean())
    return AccuracyCheck(name, wanted.metric, wanted.target, value, ceiling, detail)


def replaceability(
    bench: Bench, group: PruningGroup, pairs: Sequence[Pair]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[P] three times, for all held-out samples and for the even and the odd ones: the cosine
    between what the unit that goes sends to its consumers and its best linear prediction from what
    the unit that stays sends there, the least of the group's sites.

    The uncentred multiple correlation. Of channels it is the magnitude of their cosine similarity;
    of heads, whose channels have no order in common, it does not depend on how each is turned.
    """
    units = sorted({unit for pair in pairs for unit in (pair.kept, pair.removed)})
    least = np.ones((3, len(pairs)))
    for site in group.sites:
        indices, width = site.all_of(units), site.width
        halves = [
            bench.products(site, indices, torch.arange(first, bench.samples, 2)).numpy()
            for first in (0, 1)
        ]
        for row, gram in enumerate((halves[0] + halves[1], *halves)):
            for place, pair in enumerate(pairs):
                kept, gone = (
                    slice(units.index(unit) * width, (units.index(unit) + 1) * width)
                    for unit in (pair.kept, pair.removed)
                )
                least[row, place] = min(least[row, place], _explained(gram, kept, gone))
    return least[0], least[1], least[2]


def _explained(gram: np.ndarray, kept: slice, gone: slice) -> float:
    """The cosine between some columns and their least-squares prediction from others."""
    whole = float(np.trace(gram[gone, gone]))
    if not whole > 0:
        return 1.0  # it is always zero: nothing is missing
    across = gram[kept, gone]
    made = float(np.sum(across * (np.linalg.pinv(gram[kept, kept], hermitian=True) @ across)))
    return math.sqrt(min(1.0, max(0.0, made / whole)))


def gradient_flow_check(
    bench: Bench, network: NetworkExport, bundle: CheckpointBundle, settings: Settings
) -> AccuracyCheck:
    """How much of the gradient flow is left with the layers skipped that would go first.

    Flow is the norm of the gradients of the outputs along seeded directions, in the parameters
    that stay: the same as the gate ``gradient_flow``.
    """
    name, wanted = "layer_skip_potential", settings.accuracy_targets.layer_skip_potential
    layers = first_to_go(bundle, settings.structured_pruning.layer_analysis)
    if not layers:
        limit = settings.structured_pruning.layer_analysis.skip_potential_threshold
        reason = f"no layer with statistics has a skip potential over {limit:g}"
        return not_measured(name, wanted, reason)
    entries: list[Entry] = [(Level.LAYER, layer, 0) for layer in layers]
    change = bench.flow_change(bench.measure(()), bench.measure(entries), entries)
    detail = f"norm of the gradients with {', '.join(layers)} skipped, as a share of that before"
    ceiling = _flow_ceiling(network, bundle)
    return AccuracyCheck(name, wanted.metric, wanted.target, 1 - change, ceiling, detail)


def _flow_ceiling(network: NetworkExport, bundle: CheckpointBundle) -> float | None:
    """The same between two halves of the samples with nothing skipped."""
    tensors = safetensors.torch.load(network.held_out)
    size = len(tensors["labels"]) // 2
    if size < MIN_SAMPLES:
        return None
    benches = []
    for first in (0, 1):
        half = {key: x[first::2][:size].contiguous() for key, x in tensors.items()}
        part = NetworkExport(network.program, network.weights, safetensors.torch.save(half))
        benches.append(open_bench(bundle, part))
    even, odd = (bench.measure(()) for bench in benches)
    return 1 - benches[0].flow_change(even, odd, ())

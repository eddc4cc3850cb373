"""Other people's criteria: a score for every channel, the least important first.

Promises: every criterion sees the same calibration samples, the true labels and the same groups,
and its channels are chosen under the same minimum: the lowest scores of the whole net first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch_pruning as tp
from torch import Tensor, nn

from elesh.analysis.candidates import Candidates
from elesh.analysis.orders import StaticOrder
from elesh.analysis.selection import select
from elesh.trainer.gates import GateMeter, axis_of
from elesh.trainer.tally import GroupTally
from leyline import PrunedArchitecture

from .subjects import Subject

__all__ = ["CRITERIA", "Scores", "lowest"]

Scores = Mapping[str, npt.NDArray[np.float64]]
"""By group name [C], higher is more important."""


def lowest(
    architecture: PrunedArchitecture, scores: Scores, count: int, minimum: int
) -> dict[str, tuple[int, ...]]:
    """The ``count`` channels of the lowest scores, no group below ``minimum``."""
    groups = [group for group in architecture.groups if group.prunable]
    candidates = Candidates.of(groups, minimum)
    row = np.concatenate([scores[name] for name in candidates.names])
    return candidates.by_group(select(lambda: StaticOrder(candidates, row), count).units)


def gate_gradients(subject: Subject) -> Scores:
    """[N, C] by group: the gate gradients of the true-label loss, sample by sample."""
    tallies = [GroupTally(group) for group in subject.architecture.groups if group.prunable]
    axes = {axis_of(site): None for tally in tallies for site in tally.group.sites}
    rows: dict[str, list[npt.NDArray[np.float64]]] = {t.group.name: [] for t in tallies}
    with GateMeter(subject.model, axes, lambda axis, x: None) as meter:
        for x, y in subject.calibration:
            meter.expect(len(x))
            loss = nn.functional.cross_entropy(subject.model(x), y, reduction="sum")
            sums, _ = meter.backward(loss, keep=False)
            for tally in tallies:
                rows[tally.group.name].append(tally.gate(sums, len(x)))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def molchanov_2019(subject: Subject) -> Scores:
    """Mean over samples of (sum of g * a)^2: "Importance estimation", equation 8, on gates."""
    return {name: np.square(g).mean(0) for name, g in gate_gradients(subject).items()}


def molchanov_2017(subject: Subject) -> Scores:
    """Mean over samples of abs(sum of g * a): "Resource efficient inference", equation 7."""
    return {name: np.abs(g).mean(0) for name, g in gate_gradients(subject).items()}


def molchanov_2017_l2(subject: Subject) -> Scores:
    """The same, as that paper advises: scores of a layer divided by their norm (section 2.2)."""
    scores = molchanov_2017(subject)
    return {name: row / max(float(np.linalg.norm(row)), 1e-300) for name, row in scores.items()}


def random(subject: Subject) -> Scores:
    """A seeded draw."""
    rng = np.random.default_rng(subject.seed)
    return {g.name: rng.random(g.size) for g in subject.architecture.groups if g.prunable}


def tp_magnitude(subject: Subject) -> Scores:
    """torch-pruning's group magnitude (L2, mean over the group, mean-normalised)."""
    return _torch_pruning(subject, tp.importance.GroupMagnitudeImportance(p=2))


def tp_taylor(subject: Subject) -> Scores:
    """torch-pruning's group Taylor from the gradient of the mean loss over all samples."""
    total = sum(len(y) for _, y in subject.calibration)
    subject.model.zero_grad(set_to_none=True)
    for x, y in subject.calibration:
        (nn.functional.cross_entropy(subject.model(x), y, reduction="sum") / total).backward()
    try:
        return _torch_pruning(subject, tp.importance.GroupTaylorImportance())
    finally:
        subject.model.zero_grad(set_to_none=True)


def _torch_pruning(subject: Subject, importance: Callable[..., Tensor | None]) -> Scores:
    example = subject.calibration[0][0][:2]
    graph = tp.DependencyGraph().build_dependency(subject.model, example_inputs=example)
    scores = {}
    for group in subject.architecture.groups:
        if group.prunable:
            module = subject.model.get_submodule(group.layers[0])
            prune = graph.get_pruner_of_module(module).prune_out_channels
            root = graph.get_pruning_group(module, prune, idxs=list(range(group.size)))
            found = importance(root)
            if found is None or len(found) != group.size:
                raise RuntimeError(f"torch-pruning has no score for {group.name}")
            scores[group.name] = found.detach().double().numpy()
    return scores


CRITERIA: dict[str, Callable[[Subject], Scores]] = {
    "Molchanov 2019": molchanov_2019,
    "Molchanov 2017": molchanov_2017,
    "Molchanov 2017, l2": molchanov_2017_l2,
    "torch-pruning Taylor": tp_taylor,
    "torch-pruning magnitude": tp_magnitude,
    "random": random,
}
"""By the name in the tables."""

"""Other people's criteria: a score for every channel, the least important first.

Promises: every criterion sees the same calibration samples, the true labels and the same groups,
and its channels are chosen under the same minimum: the lowest scores of the whole net first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.common.subjects import Subject
from elesh.analysis.candidates import Candidates
from elesh.analysis.selection.choose import select
from elesh.analysis.selection.removal_order import StaticOrder
from elesh.trainer.calibration.accumulators import GroupTally
from elesh.trainer.network.gates import GateMeter
from leyline import PruningGroup

__all__ = ["CRITERIA", "Scores", "lowest"]

_LAST, _SUMMED = 4, 64
"""Samples that torch-pruning's Hessian is given, and that its sums made here are of."""
Scores = Mapping[str, npt.NDArray[np.float64]]
"""By group name [C], higher is more important."""


def lowest(
    groups: Sequence[PruningGroup], scores: Scores, count: int, minimum: int
) -> dict[str, tuple[int, ...]]:
    """The ``count`` units of the lowest scores, no group below ``minimum``."""
    candidates = Candidates.of(groups, minimum)
    row = np.concatenate([scores[name] for name in candidates.names])
    return candidates.by_group(select(lambda: StaticOrder(candidates, row), count).units)


def gate_gradients(subject: Subject) -> Scores:
    """[N, C] by group: the gate gradients of the true-label loss, sample by sample."""
    tallies = [GroupTally(group) for group in subject.groups]
    axes = {site.axis: None for tally in tallies for site in tally.group.sites}
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
    return {group.name: rng.random(group.size) for group in subject.groups}


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


def tp_hessian(subject: Subject) -> Scores:
    """torch-pruning's group Hessian (squared gradients, OBD), as it is.

    ``accumulate_grad`` of 1.6.1 looks its sums up under another key than it stores them, so that
    only the last sample counts.
    """
    importance = tp.importance.GroupHessianImportance()
    for x, y in ((x[-_LAST:], y[-_LAST:]) for x, y in subject.calibration[-1:]):
        for loss in nn.functional.cross_entropy(subject.model(x), y, reduction="none"):
            subject.model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(subject.model)
    try:
        return _torch_pruning(subject, importance)
    finally:
        subject.model.zero_grad(set_to_none=True)


def tp_hessian_summed(subject: Subject) -> Scores:
    """The same as it is meant: the mean over samples is taken here, of the first 64."""
    squares = {path: torch.zeros_like(p) for path, p in subject.model.named_parameters()}
    x, y = (part[:_SUMMED] for part in subject.calibration[0])
    for loss in nn.functional.cross_entropy(subject.model(x), y, reduction="none"):
        subject.model.zero_grad()
        loss.backward(retain_graph=True)
        for path, parameter in subject.model.named_parameters():
            if parameter.grad is not None:
                squares[path] += parameter.grad**2 / len(y)
    for path, parameter in subject.model.named_parameters():
        parameter.grad = squares[path]
    try:
        return _torch_pruning(subject, tp.importance.GroupHessianImportance())
    finally:
        subject.model.zero_grad(set_to_none=True)


def _torch_pruning(subject: Subject, importance: Callable[..., Tensor | None]) -> Scores:
    example = subject.calibration[0][0][:2]
    graph = tp.DependencyGraph().build_dependency(subject.model, example_inputs=example)
    scores = {}
    for group in subject.groups:
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
    "torch-pruning Hessian": tp_hessian,
    "torch-pruning Hessian, summed": tp_hessian_summed,
    "random": random,
}
"""By the name in the tables."""

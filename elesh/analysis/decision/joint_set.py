"""The joint pruning set of several levels: what goes, in which order, and what it does.

Promises: a layer that goes takes its own channels and heads out of the cut; channels and heads are
merged into one order where their costs are of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elesh import safety
from elesh.analysis.budgets.joint import Fitting, fitting
from elesh.analysis.candidates import Doubles
from elesh.analysis.importance.output_projections import sample_weights
from elesh.analysis.levels.analyze_level import LevelDraft, budget_gate
from elesh.analysis.pruning_set.effects import Cut, RelativeOutputError
from elesh.analysis.pruning_set.plans import Target
from elesh.analysis.pruning_set.subsets import Identity, merged, restricted
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    GateResult,
    LayerPruningTarget,
    Level,
    RankedUnit,
)

__all__ = ["JointSet", "named"]

_JOINT_COSTS = frozenset({"output_projection", "reconstruction", "fisher", "margins"})
"""Scorers whose costs are of one kind whatever the level."""


@dataclass(frozen=True)
class JointSet:
    """The cut of several levels together, without what they take from each other."""

    parts: tuple[LevelDraft, ...]
    targets: tuple[Target, ...]
    order: tuple[RankedUnit, ...]
    cut: Cut
    error: RelativeOutputError
    gates: tuple[GateResult, ...]
    """Of the joint set: structure, predicted shift, budget, requirements."""
    needless: frozenset[Identity]
    """Units that the budget is met without."""

    @classmethod
    def of(
        cls, bundle: CheckpointBundle, parts: Sequence[LevelDraft], settings: Settings
    ) -> JointSet:
        """All of ``parts``."""
        fit = _resolved(bundle, parts, settings)
        targets, order = fit.targets, fit.order
        cut = Cut.of(bundle, targets, _scorer(parts))
        error = _relative_error(bundle, parts, cut)
        limit = settings.structured_pruning.channel_analysis.max_predicted_shift
        gates = (
            cut.structure,
            safety.predicted_shift(error.value, error.standard_error, limit),
            *([budget_gate(fit.use)] if fit.use else []),
            safety.requirements(bundle.requirements, cut.loss_rise, cut.parameters_removed),
        )
        gates = named(Level.JOINT, gates)
        return cls(tuple(parts), targets, order, cut, error, gates, fit.unneeded)

    @property
    def fault(self) -> str:
        """Why the levels cannot go together; empty if they can."""
        return safety.rejection(self.gates[:-1])


def named(level: Level, gates: Sequence[GateResult]) -> tuple[GateResult, ...]:
    """The gates with the level before their names."""
    return tuple(gate.model_copy(update={"name": f"{level}.{gate.name}"}) for gate in gates)


def _resolved(bundle: CheckpointBundle, parts: Sequence[LevelDraft], settings: Settings) -> Fitting:
    """All targets and their order, without the units of groups that go with a whole layer and
    those that a budget is met without."""
    channels = settings.structured_pruning.channel_analysis
    round_to = bundle.parameters.round_to
    targets, order = _uncoupled(bundle, parts)
    return fitting(
        bundle,
        targets,
        order,
        round_to=channels.round_to if round_to == 1 else round_to,
        comparable=_comparable(parts),
    )


def _uncoupled(
    bundle: CheckpointBundle, parts: Sequence[LevelDraft]
) -> tuple[tuple[Target, ...], tuple[RankedUnit, ...]]:
    targets = [target for part in parts for target in part.draft.targets]
    layers = [t.layer_name for t in targets if isinstance(t, LayerPruningTarget)]
    order = _ordered(parts)
    if not layers:
        return tuple(targets), order
    left = bundle.architecture.without_layers(layers).group
    kept = tuple(
        unit
        for unit in order
        if unit.level is Level.LAYER or (unit.layer_name in left and left[unit.layer_name].prunable)
    )
    return restricted(targets, order, kept, "coupling"), kept


def _ordered(parts: Sequence[LevelDraft]) -> tuple[RankedUnit, ...]:
    """Channels and heads together where their costs are of one kind; whole layers last."""
    orders = [p.draft.order for p in parts if p.level is not Level.LAYER]
    first = (
        merged(orders) if _comparable(parts) else tuple(unit for order in orders for unit in order)
    )
    return first + tuple(unit for p in parts if p.level is Level.LAYER for unit in p.draft.order)


def _comparable(parts: Sequence[LevelDraft]) -> bool:
    """Whether channels and heads have costs of one kind."""
    scorers = {p.draft.statistics.scorer for p in parts if p.level is not Level.LAYER}
    return len(scorers) == 1 and scorers <= _JOINT_COSTS


def _relative_error(
    bundle: CheckpointBundle, parts: Sequence[LevelDraft], cut: Cut
) -> RelativeOutputError:
    """The predicted output error of the joint set.

    The movement of all units together on all samples, plus a correction for each level: its own
    prediction, made on samples that did not choose, less its movement on all samples. Units are
    chosen where the samples make them look cheap, and the correction takes that out again. No level
    was chosen by the columns of another, so what levels do together needs no correction.
    """
    found = [part.predicted for part in parts]
    mean_square = max((p.energy for p in found if p), default=0.0)
    if not found or not mean_square or any(p is None for p in found):
        return RelativeOutputError()
    if _scorer(parts) == "reconstruction" and bundle.parameters.reconstruction is not None:
        # Residuals of different levels are taken for independent, as those of one level are.
        moved = sum(p.damage for p in found if p)
        error = float(np.sqrt(sum(p.error**2 for p in found if p)))
        return RelativeOutputError(moved / mean_square, error / mean_square)
    output_error = _mean_square(_moved(bundle, cut.units, cut.layers))
    error = 0.0
    for part in parts:
        predicted, own = part.predicted, part.draft
        assert predicted is not None
        layers = [target.layer_name for target in own.layers]
        output_error += predicted.damage - _mean_square(_moved(bundle, own.units, layers))
        error += predicted.error**2
    return RelativeOutputError(
        max(output_error, 0.0) / mean_square, float(np.sqrt(error)) / mean_square
    )


def _scorer(parts: Sequence[LevelDraft]) -> str:
    """What ranked channels and heads, where that is one thing; else nothing."""
    used = {p.draft.statistics.scorer for p in parts if p.level is not Level.LAYER}
    return used.pop() if len(used) == 1 else ""


def _mean_square(row: Doubles) -> float:
    return float(np.mean(row * row)) if len(row) else 0.0


def _moved(
    bundle: CheckpointBundle, units: Mapping[str, Sequence[int]], layers: Sequence[str]
) -> Doubles:
    """[N]: by how much removing units and layers moves the outputs, sample by sample, weighted
    as where units are chosen."""
    rows = [
        bundle.gates[name].projections[:, list(lost)].sum(axis=1, dtype=np.float64)
        for name, lost in sorted(units.items())
    ]
    rows += [np.asarray(bundle.layers[name].projections, np.float64) for name in sorted(layers)]
    if not rows:
        return np.zeros(0)
    gate = next(iter(bundle.gates.values()), None)
    weights = np.ones(1) if gate is None or not units else sample_weights(gate)
    return np.asarray(np.sum(rows, axis=0) * weights)

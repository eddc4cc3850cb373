"""A level's set shortened to what its gates let pass.

A gate on the predicted effect judges the set as one; a smaller set may pass it.
Promises: what is left is a beginning of the removal order that ends at the groups' multiples; the
other units are listed as kept near the cut; a set that passes stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from elesh.analysis.candidates import Doubles, multiple_of
from elesh.analysis.importance.output_projections import Prediction, sample_weights
from elesh.analysis.pruning_set.plans import LevelPlan
from elesh.analysis.pruning_set.subsets import restricted, rounded_to_multiples
from elesh.analysis.selection.shortfalls import sentence
from elesh.safety import predicted_shift
from elesh.settings import Settings
from leyline import CheckpointBundle, Level, RankedUnit

__all__ = ["largest", "shortened_plan"]


def largest(count: int, passes: Callable[[int], bool]) -> int:
    """The longest beginning that passes, of ``count`` units that do not, found by halving."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            low = middle
        else:
            high = middle
    return low


def shortened_plan(bundle: CheckpointBundle, settings: Settings, plan: LevelPlan) -> LevelPlan:
    """The plan, with as much of its order as the predicted effect may be.

    Only where the checkpoint asks for that (``failing_gate``), and the level has groups.
    """
    prediction, mean_square = plan.prediction, plan.output_mean_square
    asked = bundle.parameters.failing_gate == "shorten" and plan.level is not Level.LAYER
    if not asked or prediction is None or not mean_square > 0 or not plan.order:
        return plan
    limit = settings.structured_pruning.channel_analysis.max_predicted_shift
    output_errors, whole = _output_errors(bundle, plan, prediction), prediction.output_error

    def passes(count: int) -> bool:
        share = output_errors[count - 1] / mean_square if count else 0.0
        relative = prediction.standard_error / whole if whole > 0 else 0.0
        return predicted_shift(share, share * relative, limit).passed

    if passes(len(plan.order)):
        return plan
    kept = _rounded(plan, plan.order[: largest(len(plan.order), passes)])
    scale = output_errors[len(kept) - 1] / whole if kept and whole > 0 else 0.0
    why = f"{len(kept)} of {len(plan.order)}: more would move the outputs beyond {limit:g}"
    return replace(
        plan,
        targets=restricted(plan.targets, plan.order, kept, "limit"),
        order=kept,
        prediction=_scaled(prediction, scale) if kept else None,
        shortfall=sentence(plan.shortfall, why),
        nothing=plan.nothing if kept else f"nothing to remove: {why}",
    )


def _scaled(prediction: Prediction, scale: float) -> Prediction:
    random = prediction.random
    return Prediction(
        output_error=prediction.output_error * scale,
        standard_error=prediction.standard_error * scale,
        random=random if random is None else random * min(1.0, math.sqrt(scale)),
    )


def _output_errors(bundle: CheckpointBundle, plan: LevelPlan, prediction: Prediction) -> Doubles:
    """[K]: the predicted movement after each unit of the order, rising to that of the whole."""
    if plan.scorer == "reconstruction":
        rising = np.cumsum([max(unit.cost, 0.0) for unit in plan.order])
    else:
        gate = bundle.gates[plan.order[0].layer_name]
        moved = np.zeros(len(gate.projections))
        weights, found = sample_weights(gate), []
        for unit in plan.order:
            moved += bundle.gates[unit.layer_name].projections[:, unit.index] * weights
            found.append(float(np.mean(moved * moved)))
        rising = np.maximum.accumulate(found)
    last = float(rising[-1])
    return np.asarray(rising * (prediction.output_error / last if last > 0 else 1.0), np.float64)


def _rounded(plan: LevelPlan, units: Sequence[RankedUnit]) -> tuple[RankedUnit, ...]:
    groups = [group for group in plan.groups if any(u.layer_name == group.name for u in units)]
    multiples = {
        group.name: multiple_of(group, plan.round_to if plan.level is Level.CHANNEL else 1)
        for group in groups
    }
    return rounded_to_multiples(units, {group.name: group.size for group in groups}, multiples)

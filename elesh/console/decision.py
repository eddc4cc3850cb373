"""A decision's page as plain data: verdict, cut, evidence, outcome.

Promises: pure functions of what was recorded; every target and every unit that was kept near the
cut has its reason; what is no longer there is said, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elesh.analysis import Explanation, UnitExplanation, explain
from elesh.operate.explain import gate_parts, removed, result_of, verdict
from elesh.operate.replay import DecisionContext
from leyline import (
    CheckpointBundle,
    GateResult,
    IdempotencyKey,
    PruningOutcome,
    StructuralPruningDecision,
)

HEATS = 9
"""Steps of the heat scale."""
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """One figure of a quantity by one party, with its interval where it has one."""

    who: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A quantity as predicted and as measured."""

    quantity: str
    percent: bool
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True)
class GateRow:
    """One safety gate."""

    name: str
    level: str
    """The level that it is of; empty for one of the whole decision."""
    passed: bool
    measured: float | None
    limit: float | None
    unit: str
    """Of both figures; ``%`` for shares."""
    detail: str


@dataclass(frozen=True)
class Cell:
    """One unit of a strip."""

    unit: int
    heat: int
    """0 (least important of the network) to HEATS - 1."""
    state: str
    """``kept``, ``removed`` or ``spared``."""
    title: str


@dataclass(frozen=True)
class Strip:
    """The units of one group, least important first."""

    group: str
    level: str
    cells: tuple[Cell, ...]
    removed: int
    after: int
    """Units that stay."""
    loss_rise: float | None = None
    """Predicted increase of the loss if the group alone lost that much, in nats a sample."""
    loss_rise_error: float | None = None


@dataclass(frozen=True)
class UnitRow:
    """A unit that goes or was kept near the cut, with what it alone would cost."""

    explanation: UnitExplanation
    alone: float | None
    """Mean square by which the outputs move if it alone goes, in squared output units."""
    error: float | None
    """Half the difference between the two halves of the samples."""


@dataclass(frozen=True)
class DecisionView:
    """All that a decision's page shows."""

    decision: StructuralPruningDecision
    key: IdempotencyKey
    result: str
    """What became of it: a result of the trainer, or ``approved`` or ``rejected``."""
    verdict: str
    """That, what it saves and why, in a sentence."""
    levels: tuple[str, ...]
    """Those that were asked for."""
    goes: str
    """What it removes, in words."""
    explanation: Explanation
    comparisons: tuple[Comparison, ...]
    failed: tuple[GateRow, ...]
    """Gates that failed."""
    passed: tuple[GateRow, ...]
    """Gates that passed."""
    strips: tuple[Strip, ...]
    units: tuple[UnitRow, ...]
    outcomes: tuple[PruningOutcome, ...]
    missing: str
    """Why the statistics are not there; empty where they are."""


def decision_view(
    context: DecisionContext, outcomes: Sequence[PruningOutcome] = ()
) -> DecisionView:
    """The page's data; ``outcomes`` are what the trainer said, oldest first."""
    decision, bundle = context.decision, context.bundle
    explanation = explain(decision, bundle)
    gates = [_gate(gate) for gate in decision.safety.gates]
    return DecisionView(
        decision=decision,
        key=decision.key,
        result=result_of(decision, outcomes),
        verdict=verdict(decision, outcomes),
        levels=tuple(part.level.value for part in decision.levels) or (decision.key.level.value,),
        goes=removed(decision),
        explanation=explanation,
        comparisons=tuple(_comparisons(decision, outcomes)),
        failed=tuple(gate for gate in gates if not gate.passed),
        passed=tuple(gate for gate in gates if gate.passed),
        strips=tuple(_strips(explanation, bundle)) if bundle else (),
        units=tuple(_units(explanation, bundle)),
        outcomes=tuple(outcomes),
        missing=context.missing,
    )


def _gate(gate: GateResult) -> GateRow:
    level, name = gate_parts(gate.name)
    unit = _UNITS.get(name, "")
    return GateRow(name, level, gate.passed, gate.measured, gate.limit, unit, gate.detail)


_UNITS = {
    "statistics": "samples",
    "cumulative_limit": "%",
    "minimum_channels": "channels",
    "minimum_heads": "heads",
    "minimum_layers": "layers",
    "predicted_shift": "%",
    "predicted_loss": "nats a sample",
    "labels": "%",
    "measured_loss": "nats a sample",
    "measured_accuracy": "%",
    "accuracy_retention": "%",
    "class_accuracy": "%",
    "gradient_flow": "%",
    "ranking": "%",
}
"""What the figures of a gate are in; those of others are plain numbers."""


def _comparisons(
    decision: StructuralPruningDecision, outcomes: Sequence[PruningOutcome]
) -> Iterator[Comparison]:
    """Loss and accuracy as predicted, as measured in the worker, as measured by the trainer."""
    loss, accuracy = list(_loss(decision, outcomes)), list(_accuracy(decision, outcomes))
    if loss:
        yield Comparison("loss increase, nats a sample", False, tuple(loss))
    if accuracy:
        yield Comparison("accuracy drop, points", True, tuple(accuracy))
    shift, error = (
        decision.statistics.predicted_shift,
        decision.statistics.predicted_shift_error,
    )
    if shift is not None:
        low, high = (None, None) if error is None else (max(0.0, shift - error), shift + error)
        estimate = Estimate("predicted", shift, low, high)
        yield Comparison("change of the outputs, share of their mean square", False, (estimate,))


def _loss(
    decision: StructuralPruningDecision, outcomes: Sequence[PruningOutcome]
) -> Iterator[Estimate]:
    measured = decision.safety.verification
    predicted = decision.statistics.predicted_loss_rise
    if measured and measured.predicted_loss_rise is not None:
        predicted = measured.predicted_loss_rise
    if predicted is not None:
        yield Estimate("predicted", predicted)
    if measured:
        interval = measured.loss_rise_interval
        yield Estimate("worker, held out", measured.loss_rise, interval.low, interval.high)
    for outcome in outcomes[:1]:
        yield from _difference("trainer, masked", outcome.loss_before, outcome.loss_masked)


def _accuracy(
    decision: StructuralPruningDecision, outcomes: Sequence[PruningOutcome]
) -> Iterator[Estimate]:
    measured = decision.safety.verification
    if measured:
        interval = measured.accuracy_drop_interval
        yield Estimate("worker, held out", measured.accuracy_drop, interval.low, interval.high)
    for outcome in outcomes[:1]:
        before, masked = outcome.accuracy_before, outcome.accuracy_masked
        yield from _difference("trainer, masked", masked, before)


def _difference(who: str, before: float | None, after: float | None) -> Iterator[Estimate]:
    if before is not None and after is not None and math.isfinite(after - before):
        yield Estimate(who, after - before)


def _strips(explanation: Explanation, bundle: CheckpointBundle) -> Iterator[Strip]:
    """One strip for each group with importance, on a scale that all of them share."""
    scores = {group.name: _importance(bundle, group.name) for group in bundle.architecture.groups}
    known = {name: values for name, (values, _) in scores.items() if values is not None}
    heats = _heats(known)
    states = {(row.group, row.unit): row for row in explanation.units}
    targets = {target.name: target for target in explanation.targets}
    for group in bundle.architecture.groups:
        values = known.get(group.name)
        if values is None or not group.prunable:
            continue
        cells = []
        for unit in np.argsort(values, kind="stable").tolist():
            row = states.get((group.name, unit))
            state = row.verdict if row else "kept"
            title = f"{group.level} {unit}: importance {values[unit]:.3g}, {state}"
            title += f" ({row.reason})" if row else ""
            cells.append(Cell(unit, int(heats[group.name][unit]), state, title))
        removed = sum(cell.state == "removed" for cell in cells)
        target = targets.get(group.name)
        yield Strip(
            group.name,
            group.level.value,
            tuple(cells),
            removed,
            group.size - removed,
            target.loss_rise if target else None,
            target.loss_rise_error if target else None,
        )


def _importance(bundle: CheckpointBundle, name: str) -> tuple[Doubles | None, Doubles | None]:
    """What each unit alone would cost, with its half-split error; shapes [units].

    From the output projections where they are there, else the Taylor scores, without an error.
    """
    gate = bundle.gates.get(name)
    if gate is not None and gate.projections.size:
        squares = np.square(np.asarray(gate.projections, np.float64))
        middle = len(squares) // 2
        if middle == 0:
            return squares.mean(0), None
        first, second = squares[:middle].mean(0), squares[middle:].mean(0)
        return squares.mean(0), np.abs(first - second) / 2
    data = bundle.channels.get(name)
    if data is not None:
        return np.asarray(data.taylor_importance, np.float64), None
    heads = bundle.heads.get(name)
    if heads is not None:
        return np.asarray(heads.gradient_sensitivity, np.float64), None
    return None, None


def _heats(known: dict[str, Doubles]) -> dict[str, npt.NDArray[np.int64]]:
    """Steps 0 to HEATS - 1 on one logarithmic scale over the whole network."""
    positive = np.concatenate([v[v > 0] for v in known.values()] or [np.zeros(0)])
    if not positive.size:
        return {name: np.zeros(len(values), np.int64) for name, values in known.items()}
    low, high = np.log(np.quantile(positive, 0.02)), np.log(positive.max())
    width = max(high - low, 1e-12)
    return {
        name: np.clip(
            np.floor((np.log(np.maximum(values, 1e-300)) - low) / width * HEATS), 0, HEATS - 1
        ).astype(np.int64)
        for name, values in known.items()
    }


def _units(explanation: Explanation, bundle: CheckpointBundle | None) -> Iterator[UnitRow]:
    """Rows by group: what goes, then what was kept near the cut, each by rising score."""
    scores = {
        name: _importance(bundle, name) if bundle else (None, None)
        for name in {row.group for row in explanation.units}
    }
    for row in sorted(explanation.units, key=lambda r: (r.group, r.verdict, r.score, r.unit)):
        values, errors = scores[row.group]
        yield UnitRow(
            row,
            None if values is None else float(values[row.unit]),
            None if errors is None else float(errors[row.unit]),
        )

"""The safety gates: each compares one measured value with one limit, and all are always listed.

Promises: pure functions of plain figures, no gate looks at another's verdict. A cut is made only
if every gate passes; one that passed all gates but was predicted rather than measured is a
conditional go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from leyline import (
    ContractError,
    GateResult,
    Level,
    PerformanceRequirements,
    Phase,
    PrunedArchitecture,
    PruningGroup,
)

MIN_SAMPLES = 32
"""Fewer calibration samples than this rank by chance."""


_NOT_JUDGED = "not judged: nothing is cut, or there are no output projections"


def phase_gate(phase: Phase, level: Level = Level.CHANNEL) -> GateResult:
    """Passed in the phases that prune; whole layers go in the aggressive one only."""
    if level is Level.LAYER:
        detail = f"{phase} phase; layers are removed in the aggressive phase only"
        return GateResult(name="phase", passed=phase is Phase.AGGRESSIVE, detail=detail)
    idle = {
        Phase.PREPARATION: "preparation phase: telemetry only",
        Phase.VALIDATION: "validation phase: monitoring only",
    }
    return GateResult(
        name="phase", passed=phase not in idle, detail=idle.get(phase, f"{phase} phase")
    )


def cumulative_limit(
    removed: int, cut: int, original: int, limit: float, level: Level = Level.CHANNEL
) -> GateResult:
    """Passed while ``removed`` earlier and ``cut`` now are within the limit, as a share of the
    original units. Where nothing is cut, nothing is judged (a limit may have been lowered)."""
    share = (removed + cut) / original if original else 0.0
    return GateResult(
        name="cumulative_limit",
        passed=not cut or share <= limit,
        measured=share,
        limit=limit,
        detail=f"{removed + cut} of {original} original {level}s removed after this cut",
    )


def minimum_units(
    architecture: PrunedArchitecture,
    units: Mapping[str, Sequence[int]],
    minimum: int,
    level: Level = Level.CHANNEL,
) -> GateResult:
    """Passed if every group that loses a unit keeps at least ``minimum``."""
    kept = {
        name: architecture.group[name].size - len(lost)
        for name, lost in units.items()
        if name in architecture.group and lost
    }
    short = [f"{name}: {count}" for name, count in sorted(kept.items()) if count < minimum]
    return GateResult(
        name=f"minimum_{level}s",
        passed=not short,
        measured=min(kept.values(), default=None),
        limit=minimum,
        detail=", ".join(short[:20]),
    )


def minimum_layers(present: int, cut: int, minimum: int) -> GateResult:
    """Passed if at least ``minimum`` removable layers are left, or none is cut."""
    return GateResult(
        name="minimum_layers",
        passed=not cut or present - cut >= minimum,
        measured=present - cut,
        limit=minimum,
    )


def structure(
    architecture: PrunedArchitecture,
    units: Mapping[str, Sequence[int]],
    layers: Sequence[str] = (),
) -> tuple[GateResult, PrunedArchitecture | None]:
    """Passed if the architecture without ``units`` and ``layers`` holds together; with it.

    Every slice must lie inside its tensor afterwards, every tensor keep at least one index along
    every dimension, and every group at least one unit: an emptied group is a layer that passes
    nothing on. Where the gate fails there is no architecture.
    """
    try:
        after = architecture.without(units) if any(units.values()) else architecture
        after = after.without_layers(layers) if layers else after
    except ContractError as error:
        return GateResult(name="structure", passed=False, detail=str(error)[:2000]), None
    before = architecture.tensor
    faults = [
        f"tensor {t.path} would have shape {t.shape}"
        for t in after.tensors
        if 0 in t.shape and 0 not in before[t.path].shape
    ]
    faults += [
        f"group {g.name} would be empty"
        for g in after.groups
        if not g.size and architecture.group[g.name].size
    ]
    gate = GateResult(
        name="structure",
        passed=not faults,
        measured=len(faults),
        limit=0,
        detail="; ".join(faults[:20]),
    )
    return gate, None if faults else after


def mixed_owners(architecture: PrunedArchitecture, group: PruningGroup) -> bool:
    """Whether the group couples tensors of the host network with those of a seed."""
    return len({architecture.tensor[part.tensor].owner for part in group.slices}) > 1


def gradient_isolation(
    architecture: PrunedArchitecture,
    units: Mapping[str, Sequence[int]],
    layers: Sequence[str] = (),
) -> GateResult:
    """Passed if no group and no layer that is cut couples host and seed tensors (section
    "Architectural Principles": their gradients never meet, so neither may a cut)."""
    mixed = [
        name
        for name in sorted(units)
        if units[name] and mixed_owners(architecture, architecture.group[name])
    ]
    mixed += [
        name
        for name in layers
        if len({architecture.tensor[path].owner for path in architecture.block[name].tensors}) > 1
    ]
    return GateResult(
        name="gradient_isolation",
        passed=not mixed,
        measured=len(mixed),
        limit=0,
        detail=", ".join(mixed[:20]),
    )


def statistics_sound(
    samples: int, measured: int, prunable: int, distinct: int | None = None
) -> GateResult:
    """Passed if there are enough samples that differ, and statistics of any of the ``prunable``
    groups.

    That they are finite and belong to this very network is checked where a bundle is read: a
    bundle that fails there is refused by a named error and never gets here.
    """
    count = samples if distinct is None else min(samples, distinct)
    copies = "" if count == samples else f" ({count} that differ)"
    return GateResult(
        name="statistics",
        passed=count >= MIN_SAMPLES and (measured > 0 or not prunable),
        measured=count,
        limit=MIN_SAMPLES,
        detail=f"{samples} samples{copies}; "
        f"{measured} of {prunable} prunable groups have statistics",
    )


def noise(
    output_error: float | None, standard_error: float | None, random: float | None
) -> GateResult:
    """Passed if the cut is predicted to do less than a random one of the same size.

    ``output_error`` was predicted on samples that did not choose the cut. Where it does not lie two
    standard errors below what a random choice does on average, the ranking is noise.
    """
    if output_error is None or standard_error is None or random is None:
        return GateResult(name="noise", passed=True, detail=_NOT_JUDGED)
    upper = output_error + 2 * standard_error
    return GateResult(
        name="noise",
        passed=upper < random or upper == 0,
        measured=upper,
        limit=random,
        detail="predicted shift plus two standard errors; limit: a random cut's",
    )


def predicted_shift(shift: float | None, error: float | None, limit: float) -> GateResult:
    """Passed if the outputs are predicted to move little, two standard errors included."""
    if shift is None:
        return GateResult(name="predicted_shift", passed=True, limit=limit, detail=_NOT_JUDGED)
    upper = shift + 2 * (error or 0.0)
    return GateResult(
        name="predicted_shift",
        passed=upper <= limit,
        measured=upper,
        limit=limit,
        detail="share of the outputs' mean square, two standard errors included",
    )


def requirements(
    asked: PerformanceRequirements, loss_increase: float | None, parameters_removed: float
) -> GateResult:
    """Passed if the request's own limits hold; a limit on an unknown figure does not hold."""
    faults = []
    limit = asked.max_predicted_loss_rise
    if limit is not None and loss_increase is None:
        faults.append("max_predicted_loss_rise: the loss rise is not known without gate statistics")
    elif limit is not None and loss_increase is not None and loss_increase > limit:
        faults.append(f"max_predicted_loss_rise: {loss_increase:.4g} over {limit:.4g}")
    share = asked.min_parameters_removed
    if share is not None and parameters_removed < share:
        faults.append(f"min_parameters_removed: {parameters_removed:.4g} below {share:.4g}")
    return GateResult(name="requirements", passed=not faults, detail="; ".join(faults))


def rejection(gates: Iterable[GateResult]) -> str:
    """Which gates failed and why; empty if none did."""
    return "; ".join(f"{gate.name}: {_why(gate)}" for gate in gates if not gate.passed)[:8192]


def _why(gate: GateResult) -> str:
    """What a failed gate says of itself."""
    figures = (
        f"{gate.measured:.4g} against {gate.limit:.4g}"
        if gate.measured is not None and gate.limit is not None
        else ""
    )
    return ", ".join(part for part in (figures, gate.detail) if part)

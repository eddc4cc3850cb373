"""The safety gates that only the layer level has. Pure functions, as in :mod:`.gates`."""

from __future__ import annotations

from collections.abc import Sequence

from leyline import ContractError, GateResult, Phase, PrunedArchitecture

__all__ = ["layer_isolation", "layer_phase", "layer_structure", "minimum_layers"]


def layer_phase(phase: Phase) -> GateResult:
    """Passed in the aggressive phase only: channels go first, then heads, whole layers last."""
    detail = f"{phase} phase; layers are removed in the aggressive phase only"
    return GateResult(name="phase", passed=phase is Phase.AGGRESSIVE, detail=detail)


def minimum_layers(present: int, cut: int, minimum: int) -> GateResult:
    """Passed if at least ``minimum`` removable layers are left, or none is cut."""
    return GateResult(
        name="minimum_layers",
        passed=not cut or present - cut >= minimum,
        measured=present - cut,
        limit=minimum,
    )


def layer_structure(
    architecture: PrunedArchitecture, names: Sequence[str]
) -> tuple[GateResult, PrunedArchitecture | None]:
    """Passed if the architecture without the layers holds together; with that architecture."""
    try:
        after = architecture.without_layers(names)
    except ContractError as error:
        return GateResult(name="structure", passed=False, detail=str(error)[:8192]), None
    return GateResult(name="structure", passed=True), after


def layer_isolation(architecture: PrunedArchitecture, names: Sequence[str]) -> GateResult:
    """Passed if no layer that is cut holds tensors of both the host and a seed."""
    mixed = [
        name
        for name in names
        if len({architecture.tensor[path].owner for path in architecture.block[name].tensors}) > 1
    ]
    return GateResult(
        name="gradient_isolation",
        passed=not mixed,
        measured=len(mixed),
        limit=0,
        detail=", ".join(mixed[:20]),
    )

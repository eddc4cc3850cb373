"""What the decisions of all levels say alike: why gates rejected them, and who decided."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version

from leyline import GateResult

__all__ = ["elesh_version", "rejection"]


@cache
def elesh_version() -> str:
    """The installed version."""
    return version("elesh")


def rejection(gates: Sequence[GateResult]) -> str:
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

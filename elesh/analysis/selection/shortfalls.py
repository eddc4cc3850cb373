"""What was asked for or allowed and is not removed, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from leyline import CheckpointBundle, Level

from .schedule import Allowance
from .select import Selection

__all__ = ["near_the_cut", "short_of_quota", "short_of_target", "sentence"]


def short_of_target(bundle: CheckpointBundle, level: Level, allowed: Allowance) -> str:
    """How far the schedule stays below the share that the request asks for."""
    asked = bundle.parameters.target_ratio
    if asked is None or asked <= allowed.share + 1e-9:
        return ""
    return (
        f"asked for {asked:.2%} of the original {level}s, "
        f"the schedule allows {allowed.share:.2%} at this epoch"
    )


def short_of_quota(quota: int, selection: Selection, level: Level) -> str:
    """How much of the quota is not used, and why."""
    short = quota - len(selection.units)
    if short <= 0:
        return ""
    noise, back = len(selection.noise), min(len(selection.kept_for_multiple), short)
    counts = {
        "inside the noise": noise,
        "kept so that groups end at their multiples": back,
        "kept so that no group falls below what it must keep": max(0, short - noise - back),
    }
    reasons = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
    return f"{short} of the {quota} {level}s that may go stay: {reasons}"


def near_the_cut(
    bundle: CheckpointBundle,
    level: Level,
    ignored: Iterable[tuple[str, str]],
    max_cost: float | None,
) -> Iterator[tuple[str, str]]:
    """The ignored groups; where they were measured, how many of their units would have gone.

    Args:
        max_cost: what the most expensive unit that goes costs, in squared output units; None if
            units were not ranked by output projections.
    """
    for name, reason in ignored:
        gate = bundle.gates.get(name)
        if gate is None or max_cost is None:
            yield name, reason
            continue
        squares = np.einsum("ij,ij->j", gate.projections, gate.projections, dtype=np.float64)
        near = int(np.count_nonzero(squares / len(gate.projections) <= max_cost))
        words = f"; {near} of its {level}s would cost no more than the most expensive that goes"
        yield name, reason + (words if near else "")


def sentence(*parts: str) -> str:
    """The parts that say anything, as one sentence."""
    return "; ".join(part for part in parts if part)

"""Which groups can lose units at all, and why each other one cannot."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from elesh.analysis.candidates import floor_of
from elesh.safety import mixed_owners
from leyline import CheckpointBundle, InvalidField, Level, PruningGroup

__all__ = ["Eligible", "eligible_groups", "unwanted_names"]


@dataclass(frozen=True)
class Eligible:
    """The groups that can lose units, and why each other group cannot."""

    groups: tuple[PruningGroup, ...]
    ignored: tuple[tuple[str, str], ...]


def eligible_groups(
    bundle: CheckpointBundle,
    scorer: str,
    minimum: int,
    round_to: int = 1,
    *,
    level: Level = Level.CHANNEL,
    shard: Collection[str] | None = None,
) -> Eligible:
    """Which groups of a level can lose units; with a ``shard``, of these groups only.

    Raises:
        InvalidField: if the request ignores a group or layer that does not exist.
    """
    unwanted = unwanted_names(bundle)
    groups, ignored = [], []
    for group in bundle.architecture.groups:
        if group.level is not level or (shard is not None and group.name not in shard):
            continue
        reason = _why_not(bundle, group, scorer, unwanted)
        floor = floor_of(group, minimum, round_to)
        if not reason and group.size <= floor:
            reason = f"has {group.size} {level}s, must keep {floor}"
        if reason:
            ignored.append((group.name, reason))
        else:
            groups.append(group)
    return Eligible(tuple(groups), tuple(ignored))


def unwanted_names(bundle: CheckpointBundle) -> frozenset[str]:
    """The groups, layers and blocks that the request ignores.

    Raises:
        InvalidField: if one of them does not exist.
    """
    architecture, unwanted = bundle.architecture, frozenset(bundle.parameters.ignored_layers)
    if not unwanted:
        return unwanted
    known = {name for g in architecture.groups for name in (g.name, *g.layers)}
    known |= {layer.name for layer in architecture.layers} | set(architecture.block)
    if unknown := sorted(unwanted - known):
        raise InvalidField("parameters.ignored_layers", "names of groups or layers", unknown)
    return unwanted


def _why_not(
    bundle: CheckpointBundle, group: PruningGroup, scorer: str, unwanted: frozenset[str]
) -> str:
    if not group.prunable:
        return group.reason or "not prunable"
    if named := unwanted.intersection((group.name, *group.layers)):
        return f"ignored by the request: {', '.join(sorted(named))}"
    if mixed_owners(bundle.architecture, group):
        return "couples host and seed tensors (gradient isolation)"
    if scorer in ("output_projection", "reconstruction", "fisher"):
        return "" if group.name in bundle.gates else "no gate statistics"
    vectors = bundle.heads if group.level is Level.HEAD else bundle.channels
    return "" if group.name in vectors else f"no {group.level} statistics"

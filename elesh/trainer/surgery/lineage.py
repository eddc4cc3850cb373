"""The original and the current structure of a network, remembered on the network itself.

Promises: the record goes along with copies and pickles of the network and is in no ``state_dict``;
the cuts between the two can be made again, in order, on descriptors alone; whoever looks at a cut
network anew keeps its numbers and its history.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

from torch import nn

from leyline import (
    InvalidField,
    LayerBlock,
    Level,
    PrunedArchitecture,
    PruningGroup,
    PruningRecord,
)

_ATTRIBUTE = "_elesh_lineage"


@dataclass(frozen=True)
class Lineage:
    """The two ends of a network's cuts."""

    _not_followed = True

    original: PrunedArchitecture
    """Before the first cut."""
    now: PrunedArchitecture
    """After the last one; its history leads from one to the other."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing in it ever changes


def lineage_of(model: nn.Module) -> Lineage | None:
    """What is remembered of this network; None where nothing ever cut it."""
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, Lineage) else None


def remember(
    model: nn.Module, now: PrunedArchitecture, original: PrunedArchitecture | None = None
) -> None:
    """Note what the network is now.

    Args:
        original: what it was before its first cut, where that is not remembered already; None:
            nothing is remembered.
    """
    known = lineage_of(model)
    if original is None and not now.history:
        same = known is not None and known.original.model_hash == now.model_hash
        original = known.original if known is not None and same else now
    elif original is None and known is not None:
        pairs = zip(known.now.history, now.history, strict=False)
        original = known.original if all(a == b for a, b in pairs) else None
    if original is None:
        vars(model).pop(_ATTRIBUTE, None)
    else:
        vars(model)[_ATTRIBUTE] = Lineage(original, now)


def original_of(model: nn.Module, now: PrunedArchitecture) -> PrunedArchitecture:
    """What a network was before the cuts in the history of what it is ``now``."""
    known = lineage_of(model)
    return known.original if known is not None and now.history else now


def continued(known: PrunedArchitecture, found: PrunedArchitecture) -> PrunedArchitecture:
    """A cut network that was looked at anew: with the numbers and the history of its cuts, and with
    what was found now of which groups and blocks may go.

    Args:
        known: what the network is by its lineage.
        found: the same network, as if it had never been cut.
    """
    other = "it is not what it was before the network was cut"

    def group(one: PruningGroup) -> PruningGroup:
        now = found.group.get(one.name)
        same = now is not None and (now.slices, now.sites) == (one.slices, one.sites)
        prunable, reason = (now.prunable, now.reason) if now and same else (False, other)
        return one.model_copy(update={"prunable": prunable, "reason": reason})

    def block(one: LayerBlock) -> LayerBlock:
        now = found.block.get(one.name)
        if one.removed:
            return one
        wiring = (one.branch, one.stand_ins, one.tensors)
        same = now is not None and (now.branch, now.stand_ins, now.tensors) == wiring
        prunable, reason = (now.prunable, now.reason) if now and same else (False, other)
        return one.model_copy(update={"prunable": prunable, "reason": reason})

    return PrunedArchitecture.build(
        known.tensors,
        known.layers,
        tuple(map(group, known.groups)),
        history=known.history,
        blocks=tuple(map(block, known.blocks)),
        products=known.products,
        original_parameters=known.original_parameters,
        original_macs=known.original_macs,
    )


@dataclass(frozen=True)
class Step:
    """Cuts that were made together: of one decision and one kind."""

    epoch: int
    key: str
    units: dict[str, tuple[int, ...]]
    """Original numbers by group; empty where layers go."""
    layers: tuple[str, ...] = ()


def steps(history: Iterable[PruningRecord]) -> Iterator[Step]:
    """A history as the calls that made it, oldest first."""

    def together(record: PruningRecord) -> tuple[int, str, bool]:
        return record.epoch, record.idempotency_key, record.level is Level.LAYER

    for (epoch, key, whole), records in groupby(history, together):
        if whole:
            yield Step(epoch, key, {}, tuple(record.group for record in records))
            continue
        units: dict[str, tuple[int, ...]] = {}
        for record in records:
            if record.group in units:  # it lost units twice under one name
                yield Step(epoch, key, units)
                units = {}
            units[record.group] = record.original_indices
        yield Step(epoch, key, units)


def present(architecture: PrunedArchitecture, step: Step) -> dict[str, list[int]]:
    """The units of a step in the present numbering.

    Raises:
        InvalidField: if a group or a unit is not there (any more).
    """
    found: dict[str, list[int]] = {}
    for name, originals in step.units.items():
        group = architecture.group.get(name)
        if group is None:
            raise InvalidField("group", f"one of {sorted(architecture.group)}", name)
        unit_of = {original: unit for unit, original in enumerate(group.origin)}
        gone = [index for index in originals if index not in unit_of]
        if gone:
            raise InvalidField(f"history.{name}", "original units that are still there", gone)
        found[name] = [unit_of[index] for index in originals]
    return found


def replayed(original: PrunedArchitecture, history: Iterable[PruningRecord]) -> PrunedArchitecture:
    """The architecture after a history of cuts, without any network.

    Raises:
        InvalidField: if a record names what is not there (any more).
    """
    *_, last = stages(original, history)
    return last


def stages(
    original: PrunedArchitecture, history: Iterable[PruningRecord]
) -> Iterator[PrunedArchitecture]:
    """The architecture before a history of cuts and after each of them."""
    now = original
    yield now
    for step in steps(history):
        if step.layers:
            now = now.without_layers(step.layers, epoch=step.epoch, key=step.key)
        else:
            now = now.without(present(now, step), epoch=step.epoch, key=step.key)
        yield now


def require_same(known: PrunedArchitecture, architecture: PrunedArchitecture) -> None:
    """Refuse an architecture that is of another network than the ``known`` one, after its cuts.

    Raises:
        InvalidField: naming the first tensor that differs.
    """
    there = replayed(known, architecture.history[len(known.history) :])
    ours, others = (
        {each.path: each.shape for each in one.tensors} for one in (there, architecture)
    )
    for path in (*ours, *others):
        if ours.get(path) != others.get(path):
            raise InvalidField(
                f"architecture.{path}",
                f"shape {ours.get(path, 'of no tensor')}, as cuts of this network leave it",
                str(others.get(path, "no such tensor")),
                hint="it is of another network: build the network as it was before, or go on "
                "under another run id",
            )

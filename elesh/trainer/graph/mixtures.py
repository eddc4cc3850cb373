"""What a mixture of experts asks of groups: the example inputs reach only some of its modules, and
consumers read rows that are not divided evenly among samples.

Promises: channels count as enclosed only where a module hands out nothing but what layers inside of
it made by mixing them, and only its siblings are then known not to read them. What is measured of a
sample is that sample's: a group is refused where a consumer reads rows of which that is not known
(the steps of a packed sequence).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from elesh.trainer.network.calling import (
    Inputs,
    batch_size,
    call,
    device_of,
    packed_in,
    tensors_in,
    through_layers,
)
from elesh.trainer.network.gates import Axis
from elesh.trainer.network.kinds.matrices import layer_at
from elesh.trainer.network.rows import Rows
from elesh.trainer.network.sizes import holder_of_group
from elesh.trainer.network.state import seed_generators
from leyline import PruningGroup

from .residual_branches import Trace

_NONE: set[str] = set()
MIXED = (
    "its consumers read rows that are not divided evenly among samples (steps of a packed sequence)"
)


@dataclass(frozen=True)
class Gate:
    """What the traced pass showed of the input of a consumer."""

    rows: int
    """The size of its first axis."""
    acting: npt.NDArray[np.bool_]
    """[channels] whether a mask there moves an output, to first order: the channel is not zero
    throughout, and the outputs have a gradient with respect to what the consumer made (its weights
    are random)."""


def without_mixed(
    groups: Sequence[PruningGroup], inputs: Inputs, rows: Mapping[Axis, int]
) -> tuple[PruningGroup, ...]:
    """The groups, those of which a consumer reads rows that samples do not share evenly marked.

    Args:
        rows: of what enters each consumer, as far as is known.
    """
    candidates = [group for group in groups if group.prunable]
    return refused(groups, dict.fromkeys(mixed_in(inputs, candidates, rows), MIXED))


def followed(copied: nn.Module, inputs: Inputs, groups: Iterable[PruningGroup]) -> dict[Axis, int]:
    """The rows of what enters every consumer in a network that picks rows, by a pass: as many as
    samples, where it is known which sample each belongs to, and one more where it is not."""
    samples, found = batch_size(inputs), dict[Axis, int]()
    rows = Rows(copied, lambda: samples)

    def noted(axis: Axis) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = next(iter(tensors_in([*args, *kwargs.values()])), None)
            if x is not None:
                found[axis] = max(found.get(axis, 0), samples + (not rows.knows(x)))

        return note

    axes = dict.fromkeys(site.axis for group in groups for site in group.sites)
    handles = [*through_layers(copied, (path for path, _ in axes)), *rows.put_on()]
    try:
        for axis in axes:
            module = layer_at(copied, axis[0])
            handles.append(module.register_forward_pre_hook(noted(axis), with_kwargs=True))
        seed_generators(device_of(copied), 0)
        with torch.no_grad():
            call(copied, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def picking_in(functions: Iterable[Any]) -> bool:
    """Whether one of these functions of an autograd graph picks rows by numbers."""
    return any(f.name().startswith(("IndexBackward", "IndexSelectBackward")) for f in functions)


def mixed_in(inputs: Inputs, groups: Sequence[PruningGroup], rows: Mapping[Axis, int]) -> set[str]:
    """Those of the groups of which a consumer reads rows that samples do not share evenly."""
    packed, samples = packed_in(inputs), batch_size(inputs)
    steps = 0 if packed is None else packed.data.shape[0]

    def mixes(axis: Axis) -> bool:
        count = rows.get(axis)
        return count is not None and (count % samples != 0 or count == steps != samples)

    return {g.name for g in groups if any(mixes(site.axis) for site in g.sites)}


def refused(groups: Iterable[PruningGroup], reasons: Mapping[str, str]) -> tuple[PruningGroup, ...]:
    """The groups, those that have a reason marked with it."""
    return tuple(
        group.model_copy(update={"prunable": False, "reason": reasons[group.name]})
        if group.name in reasons
        else group
        for group in groups
    )


def beside(layer: str, holder: str, anywhere: bool = False) -> bool:
    """Whether a layer is inside of a sibling of this module, or ``anywhere`` outside of it: code
    may hand on what is between the parts of a module, but not the heads of an attention."""
    around, _, own = holder.rpartition(".")
    near = anywhere or layer.startswith(f"{around}.")
    return bool(own) and near and not f"{layer}.".startswith(f"{holder}.")


def enclosed_in(passage: Trace, groups: Sequence[PruningGroup]) -> Mapping[str, str]:
    """By group, the innermost module around all of it, where its channels do not leave that."""
    outputs: dict[Any, set[str]] = {}
    for one in passage.passes:
        if one.output is not None:
            outputs.setdefault(one.output, set()).add(one.name)
    found: dict[str, str] = {}
    for group in groups:
        holder = holder_of_group(group)
        readers = {site.module for site in group.sites}
        if holder and group.prunable and _encloses(holder, passage, outputs, group, readers):
            found[group.name] = holder
    return found


def _encloses(
    holder: str,
    passage: Trace,
    outputs: Mapping[Any, set[str]],
    group: PruningGroup,
    readers: set[str],
) -> bool:
    """Whether nothing that this module returned was made of the group's channels but by what reads
    them."""
    calls = [one for one in passage.passes if one.name == holder]
    if not calls or any(one.made is None for one in calls):
        return False
    stack, seen = [one.made[0] for one in calls if one.made is not None], set[Any]()
    stack += [function for one in calls for function in one.further]
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        names = outputs.get(function, _NONE)
        if not names.isdisjoint(group.layers):
            return False
        if names.isdisjoint(readers):
            stack += [before for before, _ in function.next_functions]
    return True

"""Channels that a reshape spreads over several axes, of which one stays theirs.

Maxout takes the largest of several neighbours, split attention (ResNeSt, SKNet) a softmax over the
shares of a layer's outputs: what works along one of the axes leaves the other, and all that lies
along the first goes with one unit.

Promises: nothing is said where a product reads what is spread (heads), or where readers disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch_pruning.ops import OPTYPE

from .axes import dim_of, moved_axis

__all__ = ["axis_left"]

_SOFTMAX = ("Softmax", "SafeSoftmax", "LogSoftmax")
_PRODUCTS = ("BmmBackward0", "MmBackward0")
_LAID_OUT = ("View", "UnsafeView", "Reshape")


def axis_left(
    node: Any,
    axes: Sequence[int],
    made: Callable[[Any], Sequence[int]],
    own_axis: Callable[[Any], int | None],
) -> int | None:
    """Which of the axes that a reshape spreads channels over stays theirs; None if that is not
    known.

    Args:
        made: the shape of what a node makes.
        own_axis: where the channels of what a layer makes lie; None of other operations.
    """
    stack = [(node, {axis: axis for axis in axes})]
    found, seen = set[int](), set[Any]()
    while stack:
        at, places = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        for reader in at.outputs:
            if reader.grad_fn.name() in _PRODUCTS:
                return None
            left = _left(reader, places, made(at), made(reader), own_axis)
            if not left:
                return None
            if len(left) < len(places):
                found |= left.keys()
            elif own_axis(reader) is None and not reader.grad_fn.name().startswith(_LAID_OUT):
                stack.append((reader, dict(left)))
    return found.pop() if len(found) == 1 else None


def _left(
    reader: Any,
    places: Mapping[int, int],
    before: Sequence[int],
    after: Sequence[int],
    own_axis: Callable[[Any], int | None],
) -> Mapping[int, int]:
    """By axis that is still there, where it lies behind an operation."""
    function, own = reader.grad_fn, own_axis(reader)
    name = function.name()
    if own is not None:  # A layer: the axis of its channels, if it is one of these.
        return {axis: at for axis, at in places.items() if at == own % len(before)} or places
    if name.startswith(_LAID_OUT):
        return places
    if name.startswith(_SOFTMAX):
        mixed = dim_of(function, len(before))
        return {axis: at for axis, at in places.items() if at != mixed}
    if reader.type == OPTYPE.ELEMENTWISE and len(reader.inputs) > 1 and len(after) >= len(before):
        return {axis: at + len(after) - len(before) for axis, at in places.items()}
    moved = {axis: moved_axis(function, at, before, after) for axis, at in places.items()}
    return {
        axis: at
        for axis, at in moved.items()
        if at is not None and at < len(after) and (after[at] > 1 or before[places[axis]] == 1)
    }

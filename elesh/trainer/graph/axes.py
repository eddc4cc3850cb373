"""What autograd's functions tell about axes: the shapes of outputs, where an operation puts an axis
of its input, and which axis stays the channels' where a reshape spreads them over several.

Maxout takes the largest of several neighbours, split attention (ResNeSt, SKNet) a softmax over the
shares of a layer's outputs: what works along one of the axes leaves the other, and all that lies
along the first goes with one unit. Nothing is said where a product reads what is spread (heads), or
where readers disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch_pruning.ops import OPTYPE

from elesh.trainer.network.calls import Link

_SOFTMAX = ("Softmax", "SafeSoftmax", "LogSoftmax")
PRODUCTS = ("BmmBackward0", "MmBackward0")
"""Functions that multiply activations by activations."""
_LAID_OUT = ("View", "UnsafeView", "Reshape")


def moved_axis(function: Any, axis: int, before: Sequence[int], after: Sequence[int]) -> int | None:
    """Where an operation puts an axis of its input; None where it has no such axis."""
    if axis >= len(before):
        return None
    if (
        len(after) == len(before)
        and list(after) == list(before)
        and before.count(before[axis]) == 1
    ):
        return axis
    name = function.name()
    if name.startswith("IndexBackward"):
        return indexed_axis(function._saved_indices, axis)
    if name.startswith("Permute"):
        order = [signed(dim) % len(before) for dim in function._saved_dims]
        return order.index(axis)
    if name.startswith(("Unsqueeze", "Stack")):
        return axis + (axis >= signed(function._saved_dim) % len(after))
    if name.startswith("TBackward"):
        return len(before) - 1 - axis
    if name.startswith("Transpose"):
        one, two = (signed(d) % len(before) for d in (function._saved_dim0, function._saved_dim1))
        return {one: two, two: one}.get(axis, axis)
    if "View" in name or "Reshape" in name:
        return _place(before, axis, after)
    if len(after) < len(before):
        gone = len(before) - len(after)
        dims = _dims(function, len(before))
        if len(dims) == gone:
            return None if axis in dims else axis - sum(dim < axis for dim in dims)
        # Reduced or selected axes: those behind the channels do not move them.
        return axis if after[: axis + 1] == before[: axis + 1] else max(axis - gone, 0)
    return axis


def _dims(function: Any, ndim: int) -> set[int]:
    """The axes that a function takes something of, or reduces, as far as it says so."""
    said = getattr(function, "_saved_dim", ())
    return {signed(dim) % ndim for dim in ((said,) if isinstance(said, int) else said or ())}


def indexed_axis(indices: Sequence[Tensor | None], axis: int) -> int | None:
    """Where the axis of channels is once others were picked from by numbers; None if it was."""
    spread: list[int | None] = []  # By axis of what is picked from: how many axes its numbers have.
    for index in indices:
        marks = index is not None and index.dtype == torch.bool
        spread += (
            [1] * index.ndim if marks and index is not None else [getattr(index, "ndim", None)]
        )
    picked = [place for place, ndim in enumerate(spread) if ndim is not None]
    if axis in picked or not picked:
        return None if picked else axis
    made = max(ndim for ndim in spread if ndim is not None)
    apart = picked[-1] - picked[0] >= len(picked)  # Then the axes that are made come first.
    first = 0 if apart else picked[0]
    return axis + made * (first <= axis) - sum(place < axis for place in picked)


def _place(before: Sequence[int], axis: int, after: Sequence[int]) -> int | None:
    """The axis of ``after`` that begins, or else ends, where ``axis`` of ``before`` does."""
    place = begins_at(before, axis, after)
    return ends_at(before, axis, after) if place is None else place


def ends_at(before: Sequence[int], axis: int, after: Sequence[int]) -> int | None:
    """The axis of ``after`` that ends where ``axis`` of ``before`` does, and holds all of it."""
    reach = math.prod(before[: axis + 1])
    for place, size in enumerate(after):
        if math.prod(after[: place + 1]) == reach and size > 1:
            return place if size % before[axis] == 0 else None
    return None


def begins_at(before: Sequence[int], axis: int, after: Sequence[int]) -> int | None:
    """The axis of ``after`` that begins where ``axis`` of ``before`` does."""
    outer = math.prod(before[:axis])
    for place, size in enumerate(after):
        if math.prod(after[:place]) == outer and size > 1:
            return place
    return None


def input_links(node: Any) -> list[Link]:
    """The edges of autograd behind a node's inputs, in the same order."""
    return [node.grad_fn.next_functions[i] for i in input_positions(node)]


def input_positions(node: Any) -> list[int]:
    """Which of the arguments of a node's function are its inputs."""
    functions = {id(producer.grad_fn) for producer in node.inputs}
    return [
        i
        for i, (part, _) in enumerate(node.grad_fn.next_functions)
        if part is not None and (id(part) in functions or "AccumulateGrad" not in part.name())
    ]


def shape_of(function: Any, number: int) -> Sequence[int]:
    """The shape of a function's output."""
    if hasattr(function, "variable"):
        return list(function.variable.shape)
    return list(function._input_metadata[number].shape)


def any_along(x: Tensor, dim: int) -> Tensor:
    """[size of the axis ``dim``] bool: whether anything there is not zero."""
    rest = [axis for axis in range(x.ndim) if axis != dim % x.ndim]
    if not x.numel():
        return torch.zeros(x.shape[dim], dtype=torch.bool, device=x.device)
    # Largest values are found ten times as quickly as whether any differs from zero.
    found: Tensor = (x.abs().amax(rest) if rest else x) != 0
    return found


def padding(function: Any, axis: int, ndim: int) -> tuple[int, int]:
    """How many are put before and behind what lies along an axis; negative where it is cropped."""
    sizes, place = [signed(size) for size in function._saved_pad], 2 * (ndim - 1 - axis)
    return (sizes[place], sizes[place + 1]) if place < len(sizes) else (0, 0)


def dim_of(function: Any, ndim: int) -> int:
    """The axis that a function works along."""
    return signed(function._saved_dim) % ndim


def signed(dim: int) -> int:
    """Autograd shows negative dimensions as unsigned numbers."""
    return dim - 2**64 if dim >= 2**63 else dim


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
            if reader.grad_fn.name() in PRODUCTS:
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

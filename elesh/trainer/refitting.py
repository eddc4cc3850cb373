"""Adapts a traced program to the network after a cut, without tracing again.

Promises: what is returned has computed, plain and under masks, for two and for three samples, what
the network computes; where the cut changed more than sizes there is nothing to return, and the
network is traced again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from elesh.program.program import DOES_NOT_RUN, GateSlot, Node, Program, decoded, resolve
from leyline import ContractError, PrunedArchitecture

Slot = tuple[str, int | None, int]
"""Module, axis (None: a branch) and width of a gate."""
Expected = Callable[[int], tuple[dict[str, Tensor], list[Tensor], Tensor]]
"""For a number of samples: inputs, gates, and what the network makes of them."""
_VIEWS = frozenset(("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"))
_NORMS = frozenset(("aten.layer_norm.default", "aten.rms_norm.default"))
_CONVOLUTIONS = frozenset(f"aten.conv{dims}d.default" for dims in (1, 2, 3))
_GROUPS = 6
"""Where a convolution's arguments have the number of its groups."""
_SAMPLES = (2, 3)
_TOLERANCE = 1e-4
"""Of the largest output: the same operators on the same weights differ by rounding alone."""


def refitted(
    program: Program,
    was: PrunedArchitecture,
    now: PrunedArchitecture,
    slots: Sequence[Slot],
    weights: Mapping[str, Tensor],
    expected: Expected,
) -> Program | None:
    """The program of ``was`` as one of ``now``; None where it is not the same but for sizes.

    Args:
        slots: the gates of the network now, in the program's order.
        weights: of the network now, by path.
        expected: asked for two and for three samples.
    """
    places = [(slot.module, slot.dim) for slot in program.gates]
    if program.batch is not None or places != [(module, dim) for module, dim, _ in slots]:
        return None
    sizes = {group.name: group.size for group in was.groups}
    changed = {
        (sizes[group.name], group.size)
        for group in now.groups
        if sizes.get(group.name, group.size) != group.size
    }
    gates = [GateSlot(slot.value, *place) for slot, place in zip(program.gates, slots, strict=True)]
    found = replace(program, model_hash=now.model_hash, gates=tuple(gates))
    try:
        for samples in _SAMPLES:
            inputs, masks, outputs = expected(samples)
            found = _with_sizes(found, program.gates, sorted(changed), weights, inputs, masks)
            if not alike(found.run(weights, inputs, masks), outputs):
                return None
    except (*DOES_NOT_RUN, ContractError):
        return None
    return found


def alike(found: Tensor, outputs: Tensor) -> bool:
    """Whether a program's outputs are the network's, but for rounding."""
    if found.shape != outputs.shape or not torch.isfinite(outputs).all():
        return False
    scale = float(outputs.abs().max())
    return bool((found - outputs).abs().max() <= _TOLERANCE * max(scale, 1e-12))


def _with_sizes(
    program: Program,
    old_gates: Sequence[GateSlot],
    changed: Sequence[tuple[int, int]],
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    masks: Sequence[Tensor],
) -> Program:
    """The program with the sizes of its views as the values need them that really pass."""
    values: dict[str, Any] = {name: weights[path] for name, path in program.weights.items()}
    values |= {name: inputs[key] for name, key in program.inputs.items()}
    values |= {slot.value: mask for slot, mask in zip(program.gates, masks, strict=True)}
    of_gate = {
        new.value: (old.size, new.size) for old, new in zip(old_gates, program.gates, strict=True)
    }
    nodes: list[Node] = []
    for node in program.nodes:
        source = node.args[0].get("value") if node.args and isinstance(node.args[0], dict) else None
        if node.operator in _VIEWS and source is not None:
            own = of_gate.get(source)
            node = _fitting(node, values, [own] if own else changed, always=own is not None)
        node = _as_the_weights(node, values)
        if source in of_gate and node.operator != "aten.mul.Tensor":
            of_gate[node.name] = of_gate[source]  # another form of the same gate
        args = [decoded(value, values) for value in node.args]
        kwargs = {key: decoded(value, values) for key, value in node.kwargs.items()}
        values[node.name] = resolve(node.operator)(*args, **kwargs)
        nodes.append(node)
    return replace(program, nodes=tuple(nodes))


def _as_the_weights(node: Node, values: Mapping[str, Any]) -> Node:
    """A normalisation over the sizes that its input has, a convolution in the groups it has."""
    size: Any
    if node.operator in _NORMS:
        x = decoded(node.args[0], values)
        number, size = 1, list(x.shape[-len(node.args[1]) :])
    elif node.operator in _CONVOLUTIONS and len(node.args) > _GROUPS:
        x, weight = (decoded(part, values) for part in node.args[:2])
        number, size = _GROUPS, x.shape[1] // weight.shape[1]
    else:
        return node
    return replace(node, args=(*node.args[:number], size, *node.args[number + 1 :]))


def _fitting(
    node: Node, values: Mapping[str, Any], changed: Sequence[tuple[int, int]], *, always: bool
) -> Node:
    """A view with one of its sizes brought from before the cut to after it, where it must be."""
    source, shape = values[node.args[0]["value"]], node.args[1]
    if not always and _holds(decoded(shape, values), source.numel()):
        return node
    plain = [n for n, size in enumerate(shape) if type(size) is int and size > 1]
    exact = [(n, new) for old, new in changed for n in plain if shape[n] == old]
    several = [
        (n, shape[n] // old * new) for old, new in changed for n in plain if shape[n] % old == 0
    ]
    for n, size in (*exact, *several):
        other = [*shape[:n], size, *shape[n + 1 :]]
        if _holds(decoded(other, values), source.numel()):
            return replace(node, args=(node.args[0], other, *node.args[2:]))
    return node


def _holds(shape: Sequence[int], count: int) -> bool:
    """Whether a tensor of so many elements can be seen in this shape."""
    known = math.prod(size for size in shape if size != -1)
    return known == count if -1 not in shape else known > 0 and count % known == 0

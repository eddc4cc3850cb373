"""Follows single channels through the dependency graph, from the layers that make them.

Promises: channels are joined where they meet on one axis of one tensor, a shared weight's too, and
where a layer can lose them only together; channels that cannot be followed are listed with what
happens to them.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from elesh.trainer.network.layers import FEWEST_PLACES, channel_axes

from .dependency_graph import DependencyGraph, axes_of
from .indexing import RESHAPED, SUMMED, Ints

__all__ = ["Reach"]

_PADDED = "the code pads its channels by a fixed number"


@dataclass
class _Side:
    """The channels of one side of a node: where they are numbered from, and which were met."""

    offset: int
    seen: npt.NDArray[np.bool_]


class _Queue:
    """Channels that are to be followed from a side of a node, in the order of the forward pass:
    what comes to a concatenation by many ways is followed on together."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[Any, Any], list[tuple[Ints, Any]]] = {}
        self._order: list[tuple[int, int, Any, Any]] = []
        self._count = 0

    def put(self, node: Any, function: Any, indices: Ints, came: Any) -> None:
        """``came``: the node that they come from."""
        waiting = self._waiting.setdefault((node, function), [])
        waiting.append((indices, came))
        if len(waiting) == 1:
            self._count += 1
            turn = node.grad_fn._sequence_nr(), self._count
            heapq.heappush(self._order, (*turn, node, function))

    def __iter__(self) -> Iterator[tuple[Any, Any, Ints, Any]]:
        while self._order:
            node, function = heapq.heappop(self._order)[2:]
            waiting = self._waiting.pop((node, function))
            indices, came = waiting[0]
            if len(waiting) > 1:
                indices, came = np.concatenate([one[0] for one in waiting]), None
            yield node, function, indices, came


class Reach:
    """All channels that can be reached from a producing layer, and which touch each other."""

    def __init__(self, graph: DependencyGraph) -> None:
        self._graph = graph
        self.sides: dict[tuple[Any, Any], _Side] = {}
        self.lost: list[tuple[Ints, Any, str]] = []
        """Numbers of channels that are connected to one that does not exist, or to none but mixed,
        the node there, and what happens to them."""
        self.met: list[tuple[Ints, Any, Any]] = []
        """Numbers of channels over which a product of two activations sums, the node that one of
        its operands comes from, and its own: channels at one place go together."""
        self._edges: list[tuple[Ints, Ints]] = []
        self._factors: dict[Any, dict[Any, list[tuple[_Side, Ints]]]] = {}
        """By product, and what its operands come from: the channels over which it sums."""
        self._count = 0
        self._walk()
        self._pair()
        self._join_shared()

    def labels(self) -> tuple[Ints, set[nn.Module]]:
        """The number of the component of every channel, and the convolutions of which whole groups
        go although they could lose places."""
        whole = set[nn.Module]()
        while True:
            none = np.zeros(0, dtype=np.int64)
            edges = [*self._edges, *self._joins(whole), (none, none)]
            one, two = (np.concatenate(side) for side in zip(*edges, strict=True))
            ones = np.ones(len(one), dtype=np.int8)
            matrix = coo_matrix((ones, (one, two)), (self._count, self._count))
            labels: Ints = connected_components(matrix, directed=False)[1].astype(np.int64)
            fresh = self._without_places(labels) - whole
            if not fresh:
                return labels, whole
            whole |= fresh

    def _without_places(self, labels: Ints) -> set[nn.Module]:
        """Convolutions that could lose groups and cannot lose places: their inputs are not known,
        or places hang together, so that few units are left, and fewer than there are groups."""
        known = dict[nn.Module, int]()
        for (node, _), side in self.sides.items():
            axes = axes_of(node)
            if axes.blocks and axes.shares:
                units = len(np.unique(labels[side.offset + side.seen.nonzero()[0]]))
                several = side.seen.all() and units >= min(FEWEST_PLACES, axes.blocks)
                known[node.module] = known.get(node.module, 0) + bool(several)
        return {module for module, sides in known.items() if sides < 2}

    def _side(self, node: Any, function: Any) -> _Side:
        key = (node, function)
        if key not in self.sides:
            size = self._graph.channels(node, function)
            self.sides[key] = _Side(self._count, np.zeros(size, dtype=np.bool_))
            self._count += size
        return self.sides[key]

    def _walk(self) -> None:
        graph, queue = self._graph, _Queue()
        relations = {node: graph.relations.of(node) for node in graph.module2node.values()}
        for node, function, indices in _produced(graph):
            self._side(node, function).seen[indices] = True
            queue.put(node, function, indices, None)
        for node, function, indices, came in queue:
            here = self._side(node, function)
            padded = graph.relations.padded(node)
            if len(padded) and len(padded := np.intersect1d(padded, indices)):
                self.lost.append((padded + here.offset, node, _PADDED))
            for dependency, relation, forwards in relations[node]:
                target = dependency.target
                if not dependency.is_triggered_by(function):
                    continue
                if target is came and relation.single and _single(node, target):
                    continue  # The way that they came.
                if relation.summed and forwards:
                    how = graph.relations.how_summed(node, target)
                    if how == SUMMED:
                        parts = self._factors.setdefault(target, {}).setdefault(node, [])
                        parts.append((here, indices))
                    elif graph.is_returned(target):
                        self.lost.append((indices + here.offset, target, how))
                there = self._side(target, dependency.handler)
                pairs = relation.forwards(indices) if forwards else relation.backwards(indices)
                if not (relation.same and len(here.seen) <= len(there.seen)):
                    inside = pairs[1] < len(there.seen)
                    if not inside.all():
                        beyond = np.unique(pairs[0][~inside]) + here.offset
                        self.lost.append((beyond, node, RESHAPED))
                        pairs = pairs[0][inside], pairs[1][inside]
                self._edges.append((pairs[0] + here.offset, pairs[1] + there.offset))
                fresh = pairs[1][~there.seen[pairs[1]]]
                if len(fresh):
                    fresh = fresh if forwards or relation.same else np.unique(fresh)
                    there.seen[fresh] = True
                    queue.put(target, dependency.handler, fresh, node)

    def _pair(self) -> None:
        """Connect the channels over which products sum, place by place; they are lost where one of
        the operands has none, or not all."""
        for product, operands in self._factors.items():
            places = [self._placed(product, *one) for one in operands.items()]
            known = [one for one in places if one is not None]
            if len(known) == len(places) == 2 and len(known[0]) == len(known[1]):
                self._edges.append((known[0], known[1]))
                self.met.append((known[0], next(iter(operands)), product))
                continue
            for parts in operands.values():
                lost = [(indices + side.offset, product, SUMMED) for side, indices in parts]
                self.lost += lost

    def _placed(self, product: Any, node: Any, parts: list[tuple[_Side, Ints]]) -> Ints | None:
        """The numbers of the channels along the axis that a product sums over, each place once;
        None if that is not so."""
        taken = self._graph.relations.factor(node, product)
        if taken is None:
            return None
        relation, size = taken
        pairs = [(side.offset, *relation.forwards(indices)) for side, indices in parts]
        here = np.concatenate([offset + came for offset, came, _ in pairs])
        there = np.concatenate([place for _, _, place in pairs])
        order = there.argsort(kind="stable")
        whole = len(there) == size and bool((there[order] == np.arange(size)).all())
        return here[order] if whole else None

    def _join_shared(self) -> None:
        """Connect what lies on the same axis of a weight that several layers share."""
        met: dict[tuple[int, int], list[_Side]] = {}
        for (node, function), side in self.sides.items():
            if not isinstance(node.module, nn.Module):
                continue
            axes, inward = channel_axes(node.module), self._is_input(node, function)
            for attribute, dim in axes.inputs if inward else axes.outputs:
                held = node.module._parameters.get(attribute)
                if held is not None and held.shape[dim] == len(side.seen):
                    met.setdefault((id(held), dim), []).append(side)
        for first, *others in met.values():
            for other in others:
                both = (first.seen & other.seen).nonzero()[0]
                self._edges.append((both + first.offset, both + other.offset))

    def _is_input(self, node: Any, function: Any) -> bool:
        """Whether this is the side of a layer's inputs, where they are not its outputs."""
        pruner = self._graph.get_pruner_of_module(node.module)
        return bool(function == pruner.prune_in_channels != pruner.prune_out_channels)

    def _joins(self, whole: Collection[nn.Module]) -> Iterator[tuple[Ints, Ints]]:
        """Connections of what layers can only lose together: the channels of a block of their own,
        on both sides; or, on one side, the same places of all shares."""
        first: dict[tuple[nn.Module, int], int] = {}
        for (node, function), side in self.sides.items():
            axes, indices = axes_of(node), side.seen.nonzero()[0]
            if axes.period and self._is_input(node, function):
                continue
            if by_place := bool(axes.shares) and node.module not in whole:
                numbers = indices % max(1, len(side.seen) // axes.shares)
            elif axes.blocks:
                numbers = indices * axes.blocks // max(1, len(side.seen))
            else:
                continue
            found, places, which = np.unique(numbers, return_index=True, return_inverse=True)
            roots = (indices[places] + side.offset).tolist()
            if not by_place:
                keys = [(node.module, number) for number in found.tolist()]
                roots = [first.setdefault(key, root) for key, root in zip(keys, roots, strict=True)]
            yield np.array(roots, dtype=np.int64)[which], indices + side.offset


def _single(one: Any, two: Any) -> bool:
    """Whether one edge connects two nodes."""
    nodes = (*one.inputs, *one.outputs)
    return sum(node is two for node in nodes) == 1


def _produced(graph: DependencyGraph) -> Iterator[tuple[Any, Any, Ints]]:
    """The output channels of every producing layer."""
    for module, node in graph.module2node.items():
        if isinstance(module, nn.Module) and channel_axes(module).produces:
            pruner = graph.get_pruner_of_module(module)
            yield node, pruner.prune_out_channels, np.arange(pruner.get_out_channels(module))

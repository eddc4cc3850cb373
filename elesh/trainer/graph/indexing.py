"""How channel numbers change along an edge of the dependency graph.

Torch-Pruning infers these maps from neighbouring layers and gives up, or errs, where a
concatenation or a split is flattened, split parts are used in another order than they were made,
or a constant is concatenated. Autograd knows the shapes of everything it ran, so we take the maps
from there: from the sizes along the axis that holds the channels, followed from layer to layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torch_pruning.ops import OPTYPE

from elesh.trainer.network.calls import Link
from elesh.trainer.network.kinds.experts import is_experts
from elesh.trainer.network.kinds.norms import norm_of
from elesh.trainer.network.layers import channel_axes, normalises_maps

from .axes import (
    PRODUCTS,
    axis_left,
    begins_at,
    dim_of,
    ends_at,
    indexed_axis,
    input_links,
    input_positions,
    moved_axis,
    padding,
    shape_of,
    signed,
)

Ints = npt.NDArray[np.int64]
RESHAPED = "its channels could not be followed through a reshape"
SUMMED = "a product outside of any layer sums over its channels"
RETURNED = "the network returns a sum over its channels"
Pairs = tuple[Ints, Ints]
"""Channels at the source of a dependency, and those at its target that they are."""


@dataclass(frozen=True)
class Relation:
    """Producer channel ``p`` is consumer channels ``(p - start) / step * width + offset + 0...``
    and, ``repeats`` times in all, those ``period`` further on.

    Only ``start <= p < stop`` get through.
    """

    start: int = 0
    stop: int | None = None
    step: int = 1
    width: int = 1
    offset: int = 0
    repeats: int = 1
    period: int = 0
    summed: bool = False
    """Whether the consumer sums over the channels, or picks some; none get through."""

    @cached_property
    def single(self) -> bool:
        """Whether no channel becomes several."""
        return self.width == 1 and self.repeats == 1

    @cached_property
    def same(self) -> bool:
        """Whether channels keep their numbers, and all get through."""
        return self is _PLAIN or self == _PLAIN

    def forwards(self, channels: Ints) -> Pairs:
        """Pairs (producer's, consumer's) of the producer's channels."""
        if self.same:
            return channels, channels
        passing = channels[self._passes(channels)]
        first = (passing - self.start) // self.step * self.width + self.offset
        turns = np.arange(self.repeats)[:, None] * self.period
        spread = first[:, None] + (turns + np.arange(self.width)).reshape(-1)
        return np.repeat(passing, self.repeats * self.width), spread.reshape(-1)

    def backwards(self, channels: Ints) -> Pairs:
        """Pairs (consumer's, producer's) of the consumer's channels."""
        if self.same:
            return channels, channels
        here = channels[channels >= self.offset]
        once = here - self.offset
        once = once % self.period if self.period else once
        there = once // self.width * self.step + self.start
        passing = self._passes(there)
        return here[passing], there[passing]

    def _passes(self, p: Ints) -> npt.NDArray[np.bool_]:
        inside: npt.NDArray[np.bool_] = p >= self.start
        if self.stop is not None:
            inside &= p < self.stop
        inside &= (p - self.start) % self.step == 0
        return inside


_PLAIN = Relation()


@dataclass(frozen=True, eq=False)
class Table(Relation):
    """Any other relation: pairs of a producer's and a consumer's channels."""

    pairs: Pairs = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    single, same = False, False

    def forwards(self, channels: Ints) -> Pairs:
        return self._of(channels, *self.pairs)

    def backwards(self, channels: Ints) -> Pairs:
        return self._of(channels, *reversed(self.pairs))

    @staticmethod
    def _of(channels: Ints, here: Ints, there: Ints) -> Pairs:
        met = np.isin(here, channels)
        return here[met], there[met]


class Relations:
    """The relations of a dependency graph's edges, one for each of a node's dependencies."""

    def __init__(self, links: Mapping[Any, list[Link]]) -> None:
        self._bridged = links
        self._axes: dict[Any, int | None] = {}
        self._own: dict[Any, int | None] = {}
        self._shapes: dict[Any, Sequence[int]] = {}
        self._shapes_of: dict[Link, Sequence[int]] = {}
        self._behind: dict[Any, list[Link]] = {}
        self._edges: dict[tuple[Any, int], Relation] = {}
        self._spreads_over: dict[Any, tuple[Sequence[int], int] | None] = {}

    def of(self, node: Any) -> list[tuple[Any, Relation, bool]]:
        """``(dependency, relation, forwards)`` of a node: to its inputs, then to its outputs."""
        inward = len(node.inputs)
        found = [
            (dependency, self._edge(producer, node, slot), False)
            for slot, (dependency, producer) in enumerate(
                zip(node.dependencies[:inward], node.inputs, strict=True)
            )
        ]
        used: dict[int, int] = {}
        for dependency, consumer in zip(node.dependencies[inward:], node.outputs, strict=True):
            slots = [slot for slot, x in enumerate(consumer.inputs) if x is node]
            turn = used.get(id(consumer), 0)
            used[id(consumer)] = turn + 1
            found.append((dependency, self._edge(node, consumer, slots[turn]), True))
        return found

    def channels(self, node: Any) -> int:
        """How many channels a node can have at most, going by the shapes of what it works on."""
        # A split and a slice are numbered as their input is.
        taking = node.type in (OPTYPE.SPLIT, OPTYPE.SLICE) and node.inputs
        shape = (self._input_shape(node) if taking else None) or self._made(node)
        axis = self._axis(node)
        return shape[axis] if axis is not None else max(shape, default=0)

    def taken(self, producer: Any, link: Link) -> Relation:
        """Which channels of a node the consumer of this link gets, and as which."""
        start, stop, step = self._taken(producer, link)
        return Relation(start, stop, step)

    def factor(self, node: Any, product: Any) -> tuple[Relation, int] | None:
        """Which channels of a node a product sums over, as which places of how many; None if it
        has several operands of that node."""
        links = [link for link in self.links(product) if link[0] is node.grad_fn]
        axis = self._axis_at(node, links[0]) if len(links) == 1 else None
        return None if axis is None else (self.taken(node, links[0]), self._shape(links[0])[axis])

    def splits_channels(self, node: Any) -> bool:
        """Whether this is a reshape that spreads channels over several axes (heads)."""
        if node.type != OPTYPE.RESHAPE:
            return False
        width = self._width(node)
        split = width is not None and width < 1
        return split and not self._makes_maps(node) and self._spread(node) is None

    def _spread(self, node: Any) -> Callable[[Ints], Ints] | None:
        """Of a reshape that spreads channels over several axes of which one stays theirs: from
        numbers of channels to those along this axis."""
        if node not in self._spreads_over:
            self._spreads_over[node] = self._axes_of_spread(node)
        known = self._spreads_over[node]
        if known is None:
            return None
        sizes, which = known
        inner = math.prod(sizes[which + 1 :])
        return lambda places: places // inner % sizes[which]

    def _axes_of_spread(self, node: Any) -> tuple[Sequence[int], int] | None:
        """The sizes of the axes, and which one of them stays; None if there is no such reshape."""
        before, axis = self._input_shape(node), self._input_axis(node)
        return None if before is None or axis is None else self._spread_from(node, before, axis)

    def _spread_from(
        self, node: Any, before: Sequence[int], axis: int
    ) -> tuple[Sequence[int], int] | None:
        """The same, where the channels lie on this axis of what it gets."""
        made = self._made(node)
        if node.type != OPTYPE.RESHAPE:
            return None
        first = begins_at(before, axis, made)
        if first is None or made[first] >= before[axis]:
            return None
        last = first
        while math.prod(made[first : last + 1]) < before[axis] and last + 1 < len(made):
            last += 1
        if math.prod(made[first : last + 1]) != before[axis]:
            return None
        left = axis_left(node, range(first, last + 1), self._made, self._own_axis)
        return None if left is None else (made[first : last + 1], left - first)

    def _makes_maps(self, node: Any) -> bool:
        """Whether a reshape lays [N, C * H * W] out as maps [N, C, H, W] for the layers that come
        next: all positions of a map are one of their channels."""
        before, made = self._input_shape(node), self._made(node)
        if node.type != OPTYPE.RESHAPE or before is None or len(before) != 2 or len(made) < 3:
            return False
        if made[0] != before[0]:
            return False
        waiting, axes = list(node.outputs), set[int | None]()
        while waiting:
            reader = waiting.pop()
            own = self._own_axis(reader)
            if own is None:
                waiting += reader.outputs
            axes.add(own)
        return axes - {None} == {1}

    def how_summed(self, node: Any, reader: Any) -> str:
        """What happens to the channels of a node where a relation says that they are summed."""
        if reader.grad_fn.name() in PRODUCTS and reader not in self._bridged:
            return SUMMED
        return RESHAPED if self.keeps_numbers(node, reader) else RETURNED

    def padded(self, node: Any) -> Ints:
        """The channels of what a node makes that it makes itself, of a number."""
        before, axis = self._input_shape(node), self._axis(node)
        if not node.grad_fn.name().startswith(_PADS) or before is None or axis is None:
            return np.zeros(0, dtype=np.int64)
        first, channels = (
            padding(node.grad_fn, axis, len(before))[0],
            np.arange(self._made(node)[axis]),
        )
        return channels[(channels < first) | (channels >= first + before[axis])]

    def lies_along(self, node: Any, from_end: int, size: int) -> bool | None:
        """Whether what an operation makes, element by element, has its channels, so many, on an
        axis counted from the end; None where that is not known or it is no such operation."""
        axis, made = self._axis(node), self._made(node)
        if node.type != OPTYPE.ELEMENTWISE or axis is None or len(made) < -from_end:
            return None
        return bool(axis - len(made) == from_end and made[from_end] == size)

    def is_across(self, node: Any) -> bool:
        """Whether the channels of what a layer reads are positions to it."""
        links = self._bridged.get(node) or self.links(node)
        return bool(links) and self._crosses(node.inputs[0], node, links[0])

    def keeps_numbers(self, node: Any, reader: Any) -> bool:
        """Whether every number that an operation makes is one of those that it gets of a node, or
        belongs to one: nothing is summed, nor chosen by size."""
        name, sizes = reader.grad_fn.name(), (math.prod(self._made(one)) for one in (node, reader))
        fewer = next(sizes) > next(sizes)
        return name not in PRODUCTS and (not fewer or name.startswith(_TAKES))

    def lies_like(self, node: Any, other: Any) -> bool:
        """Whether two nodes make the same shape, with their channels on the same axis."""
        axis = self._axis(node)
        return (
            axis is not None and axis == self._axis(other) and self._made(node) == self._made(other)
        )

    def parameter_axis(self, node: Any) -> int:
        """The axis of a bare parameter that lies where what it is added to has its channels."""
        shape = node.module.shape
        for consumer in node.outputs:
            there = self._axis(consumer)
            if consumer.type == OPTYPE.ELEMENTWISE and there is not None:
                axis = there - len(self._made(consumer)) + len(shape)
                if axis >= 0 and shape[axis] > 1:
                    return int(axis)
        wide = (axis for axis, size in enumerate(shape) if size > 1)
        led = (axis for axis in wide if self._leads_to_channels(node, axis))
        return next(led, int(node.pruning_dim % len(shape)))

    def _leads_to_channels(self, node: Any, axis: int) -> bool:
        """Whether an axis of what is made of a parameter alone becomes that of channels where it
        meets them."""
        at: int | None = axis
        before: Sequence[int] = node.module.shape
        while at is not None and len(node.outputs) == 1:
            node = node.outputs[0]
            made = self._made(node)
            if len(node.inputs) > 1:
                there = self._axis(node)
                if there is None or node.type != OPTYPE.ELEMENTWISE:
                    return False
                return bool(there - len(made) == at - len(before))
            at, before = moved_axis(node.grad_fn, at, before, made), made
        return False

    def _edge(self, producer: Any, consumer: Any, slot: int) -> Relation:
        if (consumer, slot) not in self._edges:
            self._edges[consumer, slot] = self._made_edge(producer, consumer, slot)
        return self._edges[consumer, slot]

    def _made_edge(self, producer: Any, consumer: Any, slot: int) -> Relation:
        link = (self._bridged.get(consumer) or self.links(consumer))[slot]
        start, stop, step = self._taken(producer, link)
        width, offset, repeats, period = 1, 0, 1, 0
        if consumer.type == OPTYPE.CONCAT:
            offset, size = self._window(consumer, slot)
            stop = size if stop is None else stop
        elif consumer.type == OPTYPE.RESHAPE:
            if self._makes_maps(consumer):
                places = np.arange(self._input_shape(consumer)[1])  # type: ignore[index]
                pairs = start + places * step, places * self._made(consumer)[1] // len(places)
                return Table(pairs=pairs)
            if (spread := self._spread(consumer)) is not None:
                places = np.arange(self._input_shape(consumer)[self._input_axis(consumer)])  # type: ignore[index]
                return Table(pairs=(start + places * step, spread(places)))
            width = max(1, int(self._width(consumer) or 1))
            repeats, period = self._turns(consumer)
        elif (moved := self._rearranged(consumer, start, stop, step)) is not None:
            return moved
        elif consumer.type in (OPTYPE.ELEMENTWISE, OPTYPE.EXPAND):
            passed = (self.channels(producer) if stop is None else stop) - start
            if (passed == 1) != (self.channels(consumer) == 1) or self._spreads(
                producer, consumer, link
            ):
                # One for all channels (an attention map, a mean over channels): no coupling.
                stop = start
        product = consumer.grad_fn.name() in PRODUCTS and consumer not in self._bridged
        if product and self._axis(producer) is None:
            stop = start  # A matrix without channels (attention weights) mixes positions.
        weighs = slot > 0 and isinstance(consumer.module, nn.Module) and is_experts(consumer.module)
        summed = self._is_summed(producer, consumer) or self._is_reduced(producer, consumer, link)
        if weighs or summed or self._crosses(producer, consumer, link):
            stop = start
        if (start, stop, step, width, offset, repeats, summed) == (0, None, 1, 1, 0, 1, False):
            return _PLAIN  # Most are.
        return Relation(start, stop, step, width, offset, repeats, period, summed)

    def _rearranged(self, node: Any, start: int, stop: int | None, step: int) -> Relation | None:
        """How an operation puts the channels that it gets together, in another order or between
        others; None if it does not."""
        function, axis, before = node.grad_fn, self._input_axis(node), self._input_shape(node)
        if axis is None or before is None or not function.name().startswith(_REARRANGED):
            return None
        size, name, places = before[axis], function.name(), np.arange(before[axis])
        came = start + places * step
        if name.startswith(_PADS):
            first, last = padding(function, axis, len(before))
            here = Relation(start, stop, step) if first == last == 0 else None
            return here or Table(pairs=_inside(came, places + first, size + first + last))
        if name.startswith("Glu"):
            halved = dim_of(function, len(before)) == axis
            return Table(pairs=(came, places % (size // 2))) if halved else None
        if axis != (1 if name.startswith("ChannelShuffle") else len(before) - 3):
            return None
        if name.startswith("PixelUnshuffle"):
            return Relation(start, stop, step, width=function._saved_downscale_factor**2)
        if name.startswith("PixelShuffle"):
            return Table(pairs=(came, places // function._saved_upscale_factor**2))
        many = function._saved_groups  # As many have to stay in each group: one of each goes.
        made = (places % (size // many) * many)[:, None] + np.arange(many)
        return Table(pairs=(np.repeat(came, many), made.reshape(-1)))

    def _crosses(self, producer: Any, consumer: Any, link: Link) -> bool:
        """Whether the producer's channels lie on another axis than the consumer's: they are
        positions to it (tokens that are mixed on a transposed map)."""
        here, came, function = self._axis_at(producer, link), self._shape(link), consumer.grad_fn
        if here is None or here >= len(came):
            return False
        if function.name().startswith("IndexBackward"):  # By numbers: some channels at a position.
            return indexed_axis(function._saved_indices, here) is None
        if self._own_axis(consumer) is not None:
            own = channel_axes(consumer.module).site_dim
            return own is not None and own % len(came) != here
        there = self._axis(consumer)
        if consumer.type != OPTYPE.ELEMENTWISE or there is None or len(consumer.inputs) < 2:
            return False  # Of a single input, the operation may move its axes.
        made = self._made(consumer)
        if function.name().startswith("Stack"):
            return bool(moved_axis(function, here, came, made) != there)
        return bool(there - len(made) != here - len(came))

    def _spreads(self, producer: Any, consumer: Any, link: Link) -> bool:
        """Whether a value that has no channels is the same for all channels of the consumer."""
        there, came, made = self._axis(consumer), self._shape(link), self._made(consumer)
        if there is None or self._axis(producer) is not None or made[there] == 1:
            return False
        place = there - len(made)
        return len(came) < -place or came[place] == 1

    def _taken(self, producer: Any, link: Link) -> tuple[int, int | None, int]:
        """Which of the producer's channels this consumer gets: (start, stop, step)."""
        if isinstance(producer.module, nn.RNNBase):  # Its last states are of one direction each.
            return 0, self._shape(link)[-1], 1
        if producer.type not in (OPTYPE.SPLIT, OPTYPE.SLICE) or not producer.inputs:
            return 0, None, 1
        function, axis = producer.grad_fn, self._axis(producer)
        if axis is None or dim_of(function, len(shape_of(function, 0))) != axis:
            return 0, None, 1
        if producer.type == OPTYPE.SLICE:
            size = (self._input_shape(producer) or shape_of(function, 0))[axis]
            ends = (signed(function._saved_start), signed(function._saved_end))
            start, stop = (end + size if end < 0 else end for end in ends)
            return start, stop, function._saved_step
        number = link[1]
        sizes = [meta.shape[axis] for meta in function._input_metadata]
        return sum(sizes[:number]), sum(sizes[: number + 1]), 1

    def _window(self, node: Any, slot: int) -> tuple[int, int | None]:
        """Where a concatenation puts the channels of one of its inputs, and how many they are."""
        function, axis = node.grad_fn, self._axis(node)
        shape = shape_of(function, 0)
        if axis is None or dim_of(function, len(shape)) != axis:
            return 0, None
        parts = function.next_functions
        sizes = [0 if part is None else shape_of(part, number)[axis] for part, number in parts]
        unknown = [i for i, (part, _) in enumerate(parts) if part is None]
        if len(unknown) == 1:  # One constant, or the network's own input.
            sizes[unknown[0]] = shape[axis] - sum(sizes)
        place = input_positions(node)[slot]
        return sum(sizes[:place]), sizes[place]

    def _width(self, node: Any) -> float | None:
        """Channels after a reshape for each channel before it; below 1 where they are split."""
        before, axis = self._input_shape(node), self._input_axis(node)
        if before is None or axis is None:
            return None
        after = self._made(node)
        place = begins_at(before, axis, after)
        return None if place is None else after[place] / before[axis]

    def _turns(self, node: Any) -> tuple[int, int]:
        """How often all channels come one after the other behind a reshape that merges axes before
        theirs into them (neighbouring patches), and how many they are; (1, 0) where it does not."""
        before, axis = self._input_shape(node), self._input_axis(node)
        if before is None or axis is None or begins_at(before, axis, self._made(node)) is not None:
            return 1, 0
        place = ends_at(before, axis, self._made(node))
        return (1, 0) if place is None else (self._made(node)[place] // before[axis], before[axis])

    def _axis(self, node: Any) -> int | None:
        """The axis that holds the channels of a node's (first) output; None if not known."""
        # Depth first without recursion: networks are deeper than Python's stack.
        stack, opened = [] if node in self._axes else [node], set()
        while stack:
            top = stack[-1]
            needed = [] if top in opened or self._own_axis(top) is not None else top.inputs
            missing = [producer for producer in needed if producer not in self._axes]
            opened.add(top)
            if missing:
                stack.extend(missing)
            elif stack.pop() not in self._axes:
                self._axes[top] = self._compute(top)
        return self._axes[node]

    def _is_summed(self, producer: Any, node: Any) -> bool:
        """Whether a product sums over the channels of one of its operands."""
        here = self._axes.get(producer)
        if here is None or node.grad_fn.name() not in PRODUCTS or node in self._bridged:
            return False
        places = [
            n for n, link in enumerate(node.grad_fn.next_functions) if link[0] is producer.grad_fn
        ]
        sizes = [len(self._shape(node.grad_fn.next_functions[place])) for place in places]
        return any(here == size - 1 - n for n, size in zip(places, sizes, strict=True))

    def _is_reduced(self, producer: Any, node: Any, link: Link) -> bool:
        """Whether an operation sums over a node's channels, or picks some, and leaves no axis."""
        here, came, made = self._axis_at(producer, link), self._shape(link), self._made(node)
        if node in self._bridged or here is None or len(made) >= len(came):
            return False
        if node.grad_fn.name() in PRODUCTS or self._axis(node) is not None:
            return False
        return moved_axis(node.grad_fn, here, came, made) is None

    def _made(self, node: Any) -> Sequence[int]:
        """The shape of a node's (first) output."""
        if node not in self._shapes:
            self._shapes[node] = self._shape((node.grad_fn, 0))
        return self._shapes[node]

    def _shape(self, link: Link) -> Sequence[int]:
        if link not in self._shapes_of:
            self._shapes_of[link] = shape_of(*link)
        return self._shapes_of[link]

    def links(self, node: Any) -> list[Link]:
        if node not in self._behind:
            self._behind[node] = input_links(node)
        return self._behind[node]

    def _input_shape(self, node: Any) -> Sequence[int] | None:
        links = self.links(node)
        return self._shape(links[0]) if links else None

    def _own_axis(self, node: Any) -> int | None:
        if node not in self._own:
            self._own[node] = _own_axis(node)
        return self._own[node]

    def _input_axis(self, node: Any) -> int | None:
        links = self._bridged.get(node) or self.links(node)
        pairs = zip(node.inputs, links, strict=True)
        axes = (self._axis_at(*pair) for pair in pairs if self._axis(pair[0]) is not None)
        return next(axes, None)

    def _axis_at(self, producer: Any, link: Link) -> int | None:
        """The axis of a node's channels in one of its outputs: a layer may be called with one of
        three axes, then with one of four."""
        own = self._own_axis(producer)
        return self._axis(producer) if own is None else own % len(self._shape(link))

    def _compute(self, node: Any) -> int | None:
        own = self._own_axis(node)
        if own is not None:
            return own % len(self._made(node))
        if not self._made(node):
            return None  # A number: a loss, or a sum over all.
        # What was made first is the stream that branches are added to, whatever their axes.
        first = sorted(node.inputs, key=lambda producer: producer.grad_fn._sequence_nr())
        if node.grad_fn.name() in PRODUCTS:
            first = [producer for producer in first if not self._is_summed(producer, node)]
        led = next((one for one in first if self._axes.get(one) is not None), None)
        if led is None:
            return None
        link = (self._bridged.get(node) or self.links(node))[node.inputs.index(led)]
        axis, before, made = self._axis_at(led, link), self._shape(link), self._made(node)
        if axis is None:
            return None
        merged = node.type == OPTYPE.ELEMENTWISE and len(node.inputs) > 1
        if merged and not node.grad_fn.name().startswith("Stack"):
            return axis + len(made) - len(before)  # It is spread over the axes before.
        spread = self._spread_from(node, before, axis)
        there = moved_axis(node.grad_fn, axis, before, made)
        return there if spread is None or there is None else there + spread[1]


_TAKES = ("Slice", "Select", "Split", "Unbind", "Index", "Gather", "AsStrided", "Diagonal")
"""Operations that hand on some of what they get."""
_PADS = "ConstantPad"
_REARRANGED = (_PADS, "Glu", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle")
"""Operations by which channels change their numbers, though it is the same axis."""


def _own_axis(node: Any) -> int | None:
    """The channel axis of what a layer puts out."""
    module = node.module
    if not isinstance(module, nn.Module):
        return None
    if normalises_maps(module):
        return 1
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        shape, size = tuple(shape_of(node.grad_fn, 0)), module.normalized_shape[-1]
        if len(shape) < 3 or (shape[-1] == size and shape[1] != size):
            return -1
        norm = norm_of(module, shape)  # Subclasses may have them behind the samples.
        return -1 if norm is None else norm.dim
    if isinstance(module, (nn.Linear, nn.Embedding, nn.MultiheadAttention)):
        return -1
    axes = channel_axes(module)
    if axes.made_dim is not None:
        return axes.made_dim % len(shape_of(node.grad_fn, 0))
    if axes.site_dim == -1:
        return -1
    return 1 if axes.outputs else None


def _inside(came: Ints, made: Ints, size: int) -> Pairs:
    """Pairs of which the second is one of so many channels."""
    kept = (made >= 0) & (made < size)
    return came[kept], made[kept]

"""Where attention heads are: found by what feeds a softmax, whatever the modules are called.

Promises: the model is not touched. An attention is a layer whose input was made by one to three
other layers, of which the values come past a softmax (or a fused attention kernel) and queries
and keys come through it; head counts are read off the shapes of the products. That its heads can
be removed is not said here: the proof masks and cuts them like every other group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from elesh.trainer.network.calls import Call
from elesh.trainer.network.headcounts import common_holder
from elesh.trainer.network.layers import channel_axes
from elesh.trainer.network.multihead import NATIVE, native_projections
from leyline import GateSite, Level, PruningGroup, Span, TensorSlice


@dataclass(frozen=True)
class Attention:
    """One attention layer: its projections and how their channels split into units.

    A unit is a head, or, where several query heads share keys and values, all heads of one
    key/value head (grouped-query attention: none of them can go without the others).
    """

    name: str
    """Path of the module that holds all of it."""
    layers: tuple[str, ...]
    """The layers that make queries, keys and values."""
    spans: tuple[tuple[str, int, Span], ...]
    """Tensor path, dimension and the units' indices, for every tensor that shrinks."""
    site: GateSite
    """The input of the output projection."""
    units: int

    def group(self, name: str, reason: str) -> PruningGroup:
        """The group of its heads."""
        return PruningGroup(
            name=name,
            level=Level.HEAD,
            layers=self.layers,
            original_size=self.units,
            origin=tuple(range(self.units)),
            slices=tuple(
                TensorSlice(tensor=path, dim=dim, **dict(span)) for path, dim, span in self.spans
            ),
            sites=(self.site,),
            prunable=not reason,
            reason=reason,
        )


def find_attentions(calls: Sequence[Call]) -> tuple[Attention, ...]:
    """The attentions of a traced forward pass, in order of execution."""
    producers = {
        call.output: call
        for call in calls
        if call.output is not None and channel_axes(call.module).produces
    }
    found: dict[str, Attention] = {}
    for call in calls:
        attention = None
        if type(call.module) is NATIVE:
            attention = _native(call)
        elif channel_axes(call.module).site_dim == -1 and call.inputs:
            attention = _traced(call, producers)
        if attention is not None:
            found.setdefault(attention.site.module, attention)
    return tuple(found.values())


def _native(call: Call) -> Attention | None:
    """Of ``nn.MultiheadAttention``, whose projections are not modules."""
    module = call.module
    assert isinstance(module, NATIVE)
    projections = native_projections(module)
    heads, width = module.num_heads, module.head_dim
    if not projections:
        return None
    spans = [
        (f"{call.name}.{path}", 0, _blocks([(start, width) for start in starts], heads))
        for path, starts in projections.items()
    ]
    site = GateSite(module=f"{call.name}.out_proj", dim=-1, width=width)
    spans.append((f"{call.name}.out_proj.weight", 1, Span(width=width)))
    layers = tuple(path for path, _, _ in spans if path.endswith("weight"))[:-1]
    return Attention(call.name, layers, tuple(spans), site, heads)


def _traced(call: Call, producers: dict[Any, Call]) -> Attention | None:
    """Of separate modules, if ``call`` is the output projection of an attention."""
    walk = _Walk(producers)
    walk.back(call.inputs[0][0])
    if len(walk.products) != 1 or len(walk.plain) != 1 or not 1 <= len(walk.scored) <= 2:
        return None
    values = walk.plain[0]
    places = {id(one): place for place, one in enumerate(producers.values())}
    others = [x for x in walk.scored if x is not values]
    others.sort(key=lambda one: (-_out_channels(one), places[id(one)]))
    shape = _shape(walk.products[0], call, values, others)
    return None if shape is None else _assembled(call, values, others, shape)


class _Walk:
    """Backwards through autograd, up to the layers that made what went into a layer.

    Layers that are met past the softmax (values) and through it (queries and keys) are told
    apart; one that is met both ways makes several of them.
    """

    def __init__(self, producers: dict[Any, Call]) -> None:
        self._producers = producers
        self.scored: list[Call] = []
        self.plain: list[Call] = []
        self.products: list[Any] = []
        """Softmax or fused attention functions that were met."""

    def back(self, start: Any) -> None:
        """Collect what ``start`` was made from."""
        seen: set[tuple[Any, bool]] = set()
        stack = [(start, False)]
        while stack:
            function, scored = stack.pop()
            if function is None or (function, scored) in seen:
                continue
            seen.add((function, scored))
            if function in self._producers:
                met = self.scored if scored else self.plain
                if self._producers[function] not in met:
                    met.append(self._producers[function])
                continue
            stack += self._before(function, scored)

    def _before(self, function: Any, scored: bool) -> Iterator[tuple[Any, bool]]:
        sources = [source for source, _ in function.next_functions]
        name = function.name()
        fused = name.startswith("ScaledDotProduct")
        if (fused or name.startswith("Softmax")) and function not in self.products:
            self.products.append(function)
        for place, source in enumerate(sources):
            values = fused and place == 2
            through = fused or name.startswith("Softmax")
            yield source, scored or (through and not values)


@dataclass(frozen=True)
class _Shape:
    """Heads, key/value heads, and channels of a query (or key) head and of a value head."""

    heads: int
    shared: int
    width: int
    value_width: int


def _shape(product: Any, output: Call, values: Call, others: Sequence[Call]) -> _Shape | None:
    """The head counts; None where the sizes do not fit together."""
    inner = _in_channels(output)
    queries = _out_channels(others[0]) if others else inner
    heads = _heads(product, output, queries)
    if not heads or inner % heads or queries % heads:
        return None
    width, value_width = queries // heads, inner // heads
    total = _out_channels(values) + sum(map(_out_channels, others))
    shared, rest = divmod(total - queries, width + value_width)
    if rest or shared < 1 or heads % shared:
        return None
    return _Shape(heads, shared, width, value_width)


def _heads(product: Any, output: Call, queries: int) -> int:
    """How many heads there are: each query token has a row of the softmax for every head."""
    if product.name().startswith("ScaledDotProduct"):
        return queries // int(product._saved_query.shape[-1])
    rows = int(product._saved_result.shape[:-1].numel())
    return rows // output.positions if output.positions else 0


def _out_channels(call: Call) -> int:
    attribute, dim = channel_axes(call.module).outputs[0]
    return int(getattr(call.module, attribute).shape[dim])


def _in_channels(call: Call) -> int:
    attribute, dim = channel_axes(call.module).inputs[0]
    return int(getattr(call.module, attribute).shape[dim])


def _assembled(
    output: Call, values: Call, others: Sequence[Call], shape: _Shape
) -> Attention | None:
    """The attention; layers that make several of queries, keys and values have them in that
    order, each with its heads one after the other (the proof refutes any other layout)."""
    share = shape.heads // shape.shared
    query, key, value = share * shape.width, shape.width, share * shape.value_width
    made: list[list[int]] = {
        0: [[query, key, shape.value_width]],
        1: [[query], [key, shape.value_width]],
        2: [[query], [key], [shape.value_width]],
    }[len(others)]
    blocks = list(zip((*others, values), made, strict=True))
    spans: list[tuple[str, int, Span]] = []
    for layer, widths in blocks:
        if shape.shared * sum(widths) != _out_channels(layer):
            return None
        starts = [shape.shared * sum(widths[:i]) for i in range(len(widths))]
        span = _blocks(list(zip(starts, widths, strict=True)), shape.shared)
        for attribute, dim in channel_axes(layer.module).outputs:
            if getattr(layer.module, attribute) is not None:
                spans.append((f"{layer.name}.{attribute}", dim, span))
    for attribute, dim in channel_axes(output.module).inputs:
        spans.append((f"{output.name}.{attribute}", dim, Span(width=value)))
    names = tuple(layer.name for layer, _ in blocks)
    site = GateSite(module=output.name, dim=-1, width=value)
    holder = common_holder((*names, output.name)) or output.name
    return Attention(holder, names, tuple(spans), site, shape.shared)


def _blocks(blocks: Sequence[tuple[int, int]], units: int) -> Span:
    """The span of units that own ``width`` indices in each of several blocks (start, width)."""
    if len(blocks) == 1:
        start, width = blocks[0]
        return Span(start=start, width=width)
    listed = (
        range(start + unit * width, start + (unit + 1) * width)
        for unit in range(units)
        for start, width in blocks
    )
    return Span(width=sum(width for _, width in blocks), indices=tuple(chain.from_iterable(listed)))

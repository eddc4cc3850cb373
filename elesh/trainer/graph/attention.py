"""Finds attention heads by what depends on what, whatever the modules are called.

Promises: the model is not touched. An attention is a layer (the output projection) whose input was
made by other layers past a softmax or a fused attention kernel. Which of their channels, and which
entries of parameters on the way (tables of relative positions, scales), belong to which head is
read off derivatives: the input channels of one head depend on them, those of another do not. So
every layout of queries, keys and values is understood. That heads can be removed is not said here:
the proof masks and cuts them like every other group.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from elesh.trainer.network.calls import Call
from elesh.trainer.network.kinds.matrices import plain_name, weight_path
from elesh.trainer.network.layers import channel_axes, held
from elesh.trainer.network.multihead import NATIVE, native_projections
from elesh.trainer.network.sizes import common_holder, splits
from leyline import GateSite, Level, NormSite, PruningGroup, Span, TensorSlice

from .axes import shape_of
from .dependencies import SOFTMAX, Met, Probe, Source, Sources, attends

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
MOST_BLOCKS = 256
"""No attention has more heads than this."""


@dataclass(frozen=True)
class Attention:
    """Attention heads that can only go together: of one layer, or of all layers that share a table
    of positions.

    A unit is a head; where several query heads share keys and values, all heads of one key/value
    head (grouped queries: none of them can go without the others). Where all heads share one
    key/value head (multi-query), that one stays and a unit is a query head.
    """

    name: str
    """Path of the module that holds all of it."""
    layers: tuple[str, ...]
    """The layers that make what goes with the heads: queries, keys and values."""
    spans: tuple[tuple[str, int, Span], ...]
    """Tensor path, dimension and the units' indices, for every tensor that shrinks."""
    sites: tuple[GateSite, ...]
    """The inputs of the output projections, each before those of layers that mix its heads."""
    units: int
    reason: str = ""
    """Why its heads cannot go, if that is known already."""
    norms: tuple[NormSite, ...] = ()
    """Normalisations over all queries or all keys."""

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
            sites=self.sites,
            norms=self.norms,
            prunable=not reason,
            reason=reason,
        )


def find_attentions(
    calls: Sequence[Call],
    model: nn.Module,
    buffers: Mapping[str, nn.Parameter],
    functions: Iterable[Any],
) -> tuple[Attention, ...]:
    """The attentions of a traced forward pass, in order of execution.

    Args:
        calls: of a pass whose autograd graph is alive.
        buffers: those that are leaves of it, by path.
        functions: of that graph.
    """
    if not attends(functions):
        calls = [one for one in calls if type(one.module) is NATIVE]
    sources = Sources(calls, model, buffers)
    suspects = [_suspect(call, sources) for call in calls]
    sources.touched(probe for one in suspects if one is not None for probe in one.probes)
    found: dict[str, Attention] = {}
    for call, suspect in zip(calls, suspects, strict=True):
        attention = _native(call) if type(call.module) is NATIVE else _traced(suspect)
        if attention is not None:
            found.setdefault(attention.sites[0].module, attention)
    mixers = {site.module for one in found.values() for site in one.sites[1:]}
    return tuple(_joined([one for name, one in found.items() if name not in mixers]))


def _native(call: Call) -> Attention | None:
    """Of ``nn.MultiheadAttention``, whose projections are not modules."""
    module = call.module
    assert isinstance(module, NATIVE)
    projections = native_projections(module)
    heads, width = module.num_heads, module.head_dim
    if not projections:
        return None
    spans = []
    for path, starts in projections.items():
        rows = np.arange(heads * width).reshape(heads, 1, width) + np.array(starts)[:, None]
        spans.append((f"{call.name}.{path}", 0, span_of(rows.reshape(heads, -1))))
    site = GateSite(module=f"{call.name}.out_proj", dim=-1, width=width)
    spans.append((f"{call.name}.out_proj.weight", 1, Span(width=width)))
    layers = tuple(path for path, _, _ in spans if path.endswith("weight"))[:-1]
    return Attention(call.name, layers, tuple(spans), (site,), heads)


@dataclass(frozen=True)
class _Suspect:
    """What may be the output projection of an attention of separate modules."""

    call: Call
    inner: int
    """How many channels it reads."""
    mixers: tuple[Call, ...]
    probes: tuple[Probe, ...]
    """Of its input, then of those of the mixers."""


def _suspect(call: Call, sources: Sources) -> _Suspect | None:
    """``call``, if the shapes behind it are those of an attention."""
    if channel_axes(call.module).site_dim is None or not call.inputs:
        return None
    if type(call.module) is NATIVE:
        return None
    link = call.inputs[0]
    met = sources.behind(link)
    dim = channel_axes(call.module).site_dim
    assert dim is not None
    attribute, axis = channel_axes(call.module).inputs[0]
    weight = held(call.module, attribute)
    if weight is None or shape_of(*link)[dim] != weight.shape[axis]:
        return None
    inner = int(weight.shape[axis])
    mixers = () if met.products else _mixers(met, sources)
    if mixers:
        blocks = shape_of(*mixers[0].inputs[0])[-1]
    else:
        blocks = _blocks(met, inner, call.positions, shape_of(*link)[0])
    if blocks < 2 or inner % blocks:
        return None
    asked = [(link, dim), *((mixer.inputs[0], -1) for mixer in mixers)]
    probes = tuple(Probe(of, axis, blocks, sources.behind(of)) for of, axis in asked)
    return _Suspect(call, inner, mixers, tuple(one for one in probes if one.met.sources))


def _traced(suspect: _Suspect | None) -> Attention | None:
    """Of separate modules, whose probes were answered."""
    if suspect is None or not suspect.probes:
        return None
    blocks = suspect.probes[0].blocks
    touched = [pair for probe in suspect.probes for pair in probe.touched]
    units = _units(blocks, touched)
    if len(units) < 2:
        return None
    met = [source for probe in suspect.probes for source in probe.met.sources]
    return _assembled(suspect.call, suspect.inner // blocks, units, touched, met, suspect.mixers)


def _mixers(met: Met, sources: Sources) -> tuple[Call, ...]:
    """Layers that mix the scores or weights of all heads (talking heads), the last one first, in
    front of a product with values: they read and make one channel for each head."""
    found: list[Call] = []
    scores: list[int] = []
    while True:
        reached = [call for source in met.sources if (call := sources.made_by(source))]
        for call in reached:
            link = call.inputs[0] if call.inputs else (None, 0)
            if call in found or not isinstance(call.module, nn.Linear) or link[0] is None:
                continue
            behind, shape = sources.behind(link), shape_of(*link)
            made = [shape_of(one, 0) for one in behind.products if one.name() in SOFTMAX]
            # The scores with their axis of heads moved to the end, and nothing else of their size.
            sizes = [sorted(size) for size in made if shape[-1] in size[:-1]]
            square = shape[-1] == call.module.in_features == call.module.out_features
            if square and sorted(shape) in (*sizes, scores):
                found.append(call)
                met, scores = behind, sorted(shape)
                break
        else:
            return tuple(found)


def _blocks(met: Met, inner: int, positions: int, samples: int) -> int:
    """Into how many blocks the channels are divided to see what they depend on: as many as there
    are heads, or more (blocks of one head share its queries)."""
    most = 1
    for product in met.products or met.bilinear:
        if product in met.bilinear:
            guesses = [shape_of(product, 0)[0] // samples]
        elif product.name().startswith("ScaledDotProduct"):
            width = int(product._saved_value.shape[-1])
            guesses = [inner // width if width else 1]
        else:
            result = product._saved_result
            guesses = [int(result.shape[:-1].numel()) // positions if positions else 1]
            guesses += [int(result.shape[-3])] if result.ndim >= 4 else []
        fitting = [n for n in guesses if n and inner % n == 0 and n <= MOST_BLOCKS]
        most = max([most, *fitting])
    return most


def _units(blocks: int, touched: Sequence[tuple[Source, Bools]]) -> list[list[int]]:
    """Blocks that depend on the same things, together; what all depend on joins none."""
    label = np.arange(blocks)
    for _, matrix in touched:
        own = matrix[:, matrix.any(0) & ~matrix.all(0)]
        for column in {column.tobytes(): column for column in own.T}.values():
            joined = np.unique(label[column])
            label[np.isin(label, joined)] = joined[0]
    return [np.flatnonzero(label == one).tolist() for one in np.unique(label)]


def _assembled(
    call: Call,
    width: int,
    units: Sequence[Sequence[int]],
    touched: Sequence[tuple[Source, Bools]],
    sources: Sequence[Source],
    mixers: Sequence[Call] = (),
) -> Attention | None:
    """The attention whose units are these blocks, each of ``width`` input channels of ``call``, and
    of one of each mixer."""
    places: dict[tuple[str, int], list[Ints]] = {}
    layers: list[str] = []
    norms: list[NormSite] = []
    for source, matrix in touched:
        matrix = matrix & ~matrix.all(0)
        rows = [np.flatnonzero(matrix[list(unit)].any(0)) for unit in units]
        if not any(map(len, rows)):
            continue
        if len(set(map(len, rows))) > 1:
            return None
        for tensor in source.tensors:
            places.setdefault(tensor, []).append(np.stack(rows))
        layers += [source.layer] if source.layer else []
        if (norm := source.norm) is not None:
            normed = span_fields(np.stack(rows))
            kind, dim, eps = norm.kind, norm.dim, norm.eps
            norms.append(NormSite(module=source.normed_by, dim=dim, kind=kind, eps=eps, **normed))
    if not layers:
        return None
    sites: list[GateSite] = []
    for reader, size in ((call, width), *((mixer, 1) for mixer in mixers)):
        read = np.array(units)[:, :, None] * size + np.arange(size)
        axes, span = channel_axes(reader.module), span_fields(read.reshape(len(units), -1))
        for attribute, dim in axes.inputs:
            path = weight_path(reader.name, reader.module, attribute)
            places[path, dim] = [read.reshape(len(units), -1)]
        sites.append(GateSite(module=reader.name, dim=axes.site_dim or 0, **span))
    names = tuple(dict.fromkeys(layers))
    near = [name for name in names if common_holder([name, call.name])]
    holder = common_holder((*(near or names), call.name)) or call.name
    listed = tuple((*at, span_of(np.concatenate(rows, axis=1))) for at, rows in places.items())
    reason = _mixed(names, sources)
    return Attention(holder, names, listed, tuple(sites), len(units), reason, tuple(norms))


def _mixed(names: Sequence[str], sources: Sequence[Source]) -> str:
    """Why the heads cannot go, if all depend on the same queries and keys; a table that queries are
    multiplied by (relative positions) is neither."""
    scored = [source for source in sources if source.scored]
    made = [source.layer for source in scored if source.edge is not None]
    layers = [layer for layer in made if plain_name(layer) == layer or layer in names]
    if not layers or any(layer in names for layer in layers):
        return ""
    between = [path for s in scored if s.parameter is not None for path, _ in s.tensors[:1]]
    by = f" ({', '.join(between[:2])})" if between else ""
    return f"queries and keys are mixed across heads before the softmax{by}"


def _joined(found: list[Attention]) -> Iterator[Attention]:
    """Attentions that share a tensor along the axis of heads, as one: of as many units."""
    while found:
        first, *found = found
        while other := next((o for o in found if _shared(first, o)), None):
            found.remove(other)
            first = _union(first, other, _shared(first, other))
        yield first


def _shared(one: Attention, two: Attention) -> list[tuple[Span, Span]]:
    mine = {(path, dim): span for path, dim, span in one.spans}
    return [(mine[path, dim], span) for path, dim, span in two.spans if (path, dim) in mine]


def _union(one: Attention, two: Attention, shared: Sequence[tuple[Span, Span]]) -> Attention:
    """Both; the units must lie alike on what they share."""
    if one.units != two.units or any(a != b for a, b in shared):
        reason = f"heads of {one.name} and {two.name} depend on shared tensors in different ways"
        return replace(one, reason=one.reason or reason)
    spans = {(path, dim): span for path, dim, span in (*one.spans, *two.spans)}
    return replace(
        one,
        name=common_holder([f"{one.name}.", f"{two.name}."]) or one.name,
        layers=tuple(dict.fromkeys((*one.layers, *two.layers))),
        spans=tuple((path, dim, span) for (path, dim), span in spans.items()),
        sites=(*one.sites, *two.sites),
        norms=(*one.norms, *two.norms),
        reason=one.reason or two.reason,
    )


def tied(
    groups: Sequence[PruningGroup], among: Collection[str] | None = None
) -> list[tuple[PruningGroup, tuple[str, ...]]]:
    """Groups of heads with the widths that their projections read, each as one group, and the names
    of those that it stands for: where code takes the width of all heads from that of its input
    (``reshape(B, N, C)``), neither can go without the other, but equal shares of both can. And
    widths of one size of which a layer reads one and makes the other, where a third reads both
    (queries, and keys at fewer positions).

    Args:
        among: names of those that cannot go by themselves.
    """
    makers: dict[str, list[PruningGroup]] = {}
    for group in groups:
        for path in {part.tensor for part in group.slices if _owner(part.tensor) in group.layers}:
            makers.setdefault(path, []).append(group)
    readers = {  # By the width that they read; a function may multiply by what they make.
        group.name: {m.name: m for part in group.slices for m in makers.get(part.tensor, ())}
        for group in groups
        if group.level is Level.CHANNEL
    }
    named, edges = {group.name: group for group in groups}, list[list[PruningGroup]]()
    for name, found in readers.items():
        for maker in found.values():
            both = found.keys() & readers.get(maker.name, {}).keys() - {name, maker.name}
            alike = maker.size == named[name].size and both
            if maker.name != name and (maker.level is Level.HEAD or alike):
                edges.append([maker, named[name]])
    names = named.keys() if among is None else among
    return _together([[g for g in edge if g.name in names] for edge in edges])


def parts_of_one_layer(groups: Sequence[PruningGroup]) -> list[list[PruningGroup]]:
    """Groups of one size that one layer makes."""
    parts: dict[tuple[str, int], list[PruningGroup]] = {}
    for group in groups:
        for layer in group.layers if group.level is Level.CHANNEL else ():
            parts.setdefault((layer, group.size), []).append(group)
    return [alike for alike in parts.values() if len(alike) > 1]


def tied_parts(
    groups: Sequence[PruningGroup], model: nn.Module, among: Collection[str]
) -> list[tuple[PruningGroup, tuple[str, ...]]]:
    """The same of equal parts that the outputs of one layer are split into, where a module keeps
    the size of a part or of all (Res2Net, CSPNet), or none can go by itself.

    Args:
        among: names of those that cannot go by themselves.
    """
    return _together(
        [
            alike
            for alike in parts_of_one_layer(groups)
            if any(splits(model, one, len(alike)) for one in alike)
            or all(one.name in among for one in alike)
        ]
    )


def _together(
    edges: Sequence[Sequence[PruningGroup]],
) -> list[tuple[PruningGroup, tuple[str, ...]]]:
    """What is connected, each as one group."""
    clusters: list[dict[str, PruningGroup]] = []
    for edge in edges:
        named = {group.name: group for group in edge}
        if len(edge) < 2:
            continue
        for other in [known for known in clusters if not named.keys().isdisjoint(known)]:
            clusters.remove(other)
            named = other | named
        clusters.append(named)
    found = []
    for cluster in clusters:
        members = sorted(cluster.values(), key=lambda group: group.level is not Level.HEAD)
        units = math.gcd(*(group.size for group in members))
        if units > 1:
            names = tuple(group.name for group in members)
            found.append((in_shares(members, units), names))
    return found


def _owner(path: str) -> str:
    return path.rpartition(".")[0]


def in_shares(groups: Sequence[PruningGroup], units: int) -> PruningGroup:
    """One group of so many units, each with an equal share of the units of all of these."""
    slices: dict[tuple[str, int], list[Ints]] = {}
    sites: dict[tuple[str, int], list[Ints]] = {}
    norms: dict[tuple[str, int], list[Ints]] = {}
    known: dict[tuple[str, int], NormSite] = {}

    def add(into: dict[tuple[str, int], list[Ints]], at: tuple[str, int], rows: Ints) -> None:
        held = into.setdefault(at, [])  # Functions in one module may read the same several times.
        held += [] if any(np.array_equal(rows, other) for other in held) else [rows]

    for group in groups:
        for part in group.slices:
            add(slices, (part.tensor, part.dim), _rows(part, group, units))
        for site in group.sites:
            add(sites, (site.module, site.dim), _rows(site, group, units))
        for norm in group.norms:
            add(norms, (norm.module, norm.dim), _rows(norm, group, units))
            known[norm.module, norm.dim] = norm

    def span(rows: list[Ints]) -> dict[str, Any]:
        return span_fields(np.concatenate(rows, axis=1))

    return PruningGroup(
        name=groups[0].name,
        level=groups[0].level,
        layers=tuple(dict.fromkeys(layer for group in groups for layer in group.layers)),
        original_size=units,
        origin=tuple(range(units)),
        slices=tuple(TensorSlice(tensor=p, dim=d, **span(r)) for (p, d), r in slices.items()),
        sites=tuple(GateSite(module=p, dim=d, **span(r)) for (p, d), r in sites.items()),
        norms=tuple(known[at].model_copy(update=span(rows)) for at, rows in norms.items()),
    )


def _rows(part: Span, group: PruningGroup, units: int) -> Ints:
    """[units, width] of a span in equal shares."""
    return np.array(part.all_of(range(group.size)), dtype=np.int64).reshape(units, -1)


def span_of(units: Ints) -> Span:
    """The span of indices [units, width]; compact where regular."""
    return Span(**span_fields(units))


def span_fields(units: Ints) -> dict[str, Any]:
    """The fields of :func:`span_of`."""
    listed, width = units.reshape(-1), units.shape[1]
    start = int(listed[0])
    if bool((np.diff(listed) == 1).all()):
        return {"start": start, "width": width}
    return {"width": width, "indices": tuple(listed.tolist())}

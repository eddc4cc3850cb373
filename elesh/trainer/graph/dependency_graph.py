"""Which channels of which layers belong together: the wiring of a network, traced once.

Torch-Pruning's dependency graph says which operation passes channels on to which, and
:mod:`.indexing` how their numbers change on the way. We follow single channels through it: all
(layer, side, index) that are connected make up one removable unit. Following channels one by one,
not whole layers, is what gets gated units (``a, b = x.chunk(2)``), channels that are used twice
and layers of which only a part is coupled right.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch_pruning as tp
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from elesh.trainer.network.buffers import with_history
from elesh.trainer.network.calling import Inputs, batch_size, call, tensors_in
from elesh.trainer.network.calls import Calls, Link
from elesh.trainer.network.layers import FEWEST_PLACES, ChannelAxes, channel_axes, is_taught
from elesh.trainer.network.norms import Norm, eps_of, norm_of, standardised
from leyline import InvalidField, LayerDescriptor

from .attention import Attention, find_attentions
from .dependencies import CallByFunction, calls_by_functions, in_order, weights_used
from .indexing import Relations, shape_of
from .residual_branches import Trace, behind


@dataclass(frozen=True)
class Port:
    """One side of a node of the graph: the channels that enter or leave it.

    ``module`` is None for an operation without channels of its own (addition, activation, ...).
    """

    name: str
    side: str
    """``in`` or ``out``; ``out`` also for what treats channels one by one; ``norm`` for the input
    of a normalisation over channels."""
    module: nn.Module | None = None
    parameter_dim: int | None = None
    """For a bare parameter: the axis that holds the channels."""
    refusal: str = ""
    """Why channels that come here cannot be removed, where the operation itself forbids it."""
    norm: Norm | None = None
    """What takes statistics over the channels: the module, or of its weight one that reads them."""


Ints = npt.NDArray[np.int64]
Family = dict[Port, Ints]
"""Units that touch the same ports in the same numbers: by port, their channels [units, width]."""


@dataclass(frozen=True)
class Wiring:
    """What the tracing found."""

    layers: tuple[LayerDescriptor, ...]
    """Layers with parameters, in order of execution."""
    families: tuple[Family, ...]
    """Connected channels, in no particular order."""
    attentions: tuple[Attention, ...] = ()
    """Attention layers whose heads may be removable."""
    failure: str = ""
    """Why the wiring is not known, where the dependency graph could not be built."""
    passage: Trace = field(default_factory=lambda: Trace((), ()))
    """The pass itself; while this is kept, so is the autograd graph."""

    readers: Mapping[str, str] = field(default_factory=dict)
    """By layer whose weight a function multiplies by: the module whose first input is the layer's,
    or itself where it can be called instead; empty where there is none."""

    @cached_property
    def called(self) -> frozenset[str]:
        """The modules that were called."""
        return frozenset(one.name for one in self.passage.passes)


def trace(model: nn.Module, inputs: Inputs, compared: Callable[[Any], Any] | None = None) -> Wiring:
    """Trace a model that may be changed (a copy): parameters must require gradients.

    Args:
        compared: from what the model returns to its outputs; None: all of it.

    Raises:
        InvalidField: if the model does not run with these inputs.
    """
    with _out_of_place(model):
        with with_history(model) as buffers, contextlib.suppress(InvalidField):
            wiring = _traced(model, inputs, compared, buffers)
            if not (buffers and wiring.failure):
                return wiring
        return _traced(model, inputs, compared)


@contextlib.contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Activations of their own modules write nothing over: what a layer made as a view (a linear
    layer, of sequences) would have another history then, without the layer."""
    changed = [module for module in model.modules() if vars(module).get("inplace") is True]
    try:
        for module in changed:
            vars(module)["inplace"] = False
        yield
    finally:
        for module in changed:
            vars(module)["inplace"] = True


def _traced(
    model: nn.Module,
    inputs: Inputs,
    compared: Callable[[Any], Any] | None,
    buffers: Mapping[str, nn.Parameter] = MappingProxyType({}),
) -> Wiring:
    families, failure = tuple[Family, ...](), ""
    function_calls: Sequence[CallByFunction] = ()
    try:
        graph = _Graph(model, inputs, compared, buffers)
        calls, outputs, function_calls = graph.calls, graph.outputs, graph.function_calls
        families = tuple(_families(graph, model, buffers))
    except Exception as error:  # The graph of others' code: whatever it raises is a reason.
        failure = f"the dependency graph failed: {summary(error)}"
        calls, outputs = _run(model, inputs)
    made = [(t.grad_fn, t.output_nr) for t in tensors_in(outputs) if t.grad_fn is not None]
    passage = Trace(calls.made, made)
    layers = calls.layers(batch_size(inputs), weights_used(passage.reached))
    # What a function adds to such a product (biases of queries and values) goes with the heads.
    hidden = {one.call.name for one in function_calls if not one.own_bias}
    attended = [one for one in calls.made if one.name not in hidden]
    attentions = find_attentions(attended, model, buffers, passage.reached)
    readers = {one.call.name: one.at for one in function_calls}
    return Wiring(layers, families, attentions, failure, passage, readers)


def _run(model: nn.Module, inputs: Inputs) -> tuple[Calls, Any]:
    """The calls of one forward pass, and what the model returned."""
    with Calls(model) as calls:
        try:
            return calls, call(model, inputs)
        except Exception as error:  # Whatever the user's network raises.
            expected = "a batch as the model is called with: arguments, shapes, dtypes, device"
            hint = f"it was called in evaluation mode with {described(inputs)}"
            raise InvalidField("example_inputs", expected, summary(error), hint=hint) from error


def described(inputs: Inputs) -> str:
    """The tensors of a batch: shape, dtype and device."""
    kinds = [f"{list(x.shape)} {x.dtype} on {x.device}" for x in tensors_in(inputs)]
    return ", ".join(kinds).replace("torch.", "") or "no tensor"


def summary(error: BaseException) -> str:
    """An exception in one line."""
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if str(error).strip()
        else type(error).__name__
    )


class _Taught(tp.function.BasePruningFunc):  # type: ignore[misc]
    """Tells torch-pruning how many channels a layer that was taught has; nothing is pruned."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError

    def get_out_channels(self, layer: nn.Module) -> int:
        axes = channel_axes(layer)
        attribute, dim = (axes.outputs or axes.inputs)[0]
        return int(getattr(layer, attribute).shape[dim])

    def get_in_channels(self, layer: nn.Module) -> int:
        axes = channel_axes(layer)
        attribute, dim = (axes.inputs or axes.outputs)[0]
        return int(getattr(layer, attribute).shape[dim])


class _TaughtChannelwise(_Taught):
    """The same for a layer that treats channels one by one."""

    prune_in_channels = _Taught.prune_out_channels


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """The dependency graph without its own maps of channel numbers (see ``indexing``)."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        compared: Callable[[Any], Any] | None,
        buffers: Mapping[str, nn.Parameter],
    ) -> None:
        super().__init__()
        self._pruners: dict[int, Any] = {}

        def traced(output: Any) -> list[Tensor]:
            self.outputs = output
            output = output if compared is None else compared(output)
            tensors = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
            self.finals = {tensor.grad_fn for tensor in tensors}
            return tensors

        self.model, self.verbose = model, False
        for module in model.modules():
            if is_taught(module) and not isinstance(module, (nn.Linear, _ConvNd)):
                taught = _Taught() if channel_axes(module).inputs else _TaughtChannelwise()
                self.register_customized_layer(type(module), taught)
        self._module2name = {module: name for name, module in model.named_modules()}
        self._param_to_name, self.unwrapped_parameters = self._detect_unwrapped_parameters(None)
        self._param_to_name |= {held: path for path, held in buffers.items()}
        self.unwrapped_parameters += [(held, held.ndim - 1) for held in buffers.values()]
        self.calls = Calls(model)
        self.function_calls: list[CallByFunction] = []
        self.module2node = self._trace(model, inputs, self._forward, output_transform=traced)
        self.by_function: dict[Any, Any] = {}
        links = _bridge(self, self.calls)
        self.relations = Relations(links)
        _lead_past(self, links)
        self._build_dependency(self.module2node)

    def _forward(self, model: nn.Module, inputs: Inputs) -> Any:
        with self.calls:
            output = call(model, inputs)
        roots = [t.grad_fn for t in tensors_in(output) if t.grad_fn is not None]
        self.function_calls = calls_by_functions(self.calls.made, behind(roots), model)
        self.calls.made = in_order(self.calls.made, [one.call for one in self.function_calls])
        return output

    def _trace_computational_graph(
        self, module2node: Any, output: Any, gradfn2module: Any, reused: Any, visited: Any
    ) -> Any:
        gradfn2module |= {one.call.output: one.call.module for one in self.function_calls}
        gradfn2module |= {made: one.module for one in self.calls.made for made in one.others}
        return super()._trace_computational_graph(
            module2node, output, gradfn2module, reused, visited
        )

    def get_pruner_of_module(self, module: Any) -> Any:
        if id(module) not in self._pruners:
            self._pruners[id(module)] = super().get_pruner_of_module(module)
        return self._pruners[id(module)]

    def channels(self, node: Any, function: Any) -> int:
        """How many channels one side of a node can have at most."""
        pruner, axes = self.get_pruner_of_module(node.module), _axes_of(node)
        inward = function == pruner.prune_in_channels
        if axes.produces or (axes.inputs and inward):
            count = pruner.get_in_channels if inward else pruner.get_out_channels
            return int(count(node.module))
        return self.relations.channels(node)


def _bridge(graph: _Graph, calls: Calls) -> dict[Any, list[Link]]:
    """Connect every layer directly to what it was called with.

    Torch-Pruning walks through the operations that a layer consists of (a linear layer of a
    sequence reshapes, multiplies and reshapes) as if they were the network's own.

    Returns:
        what autograd knows of the inputs, in the order of ``node.inputs``.
    """
    nodes = {node.grad_fn: node for node in graph.module2node.values()}
    made = [one for one in calls.made if one.module in graph.module2node]
    nodes |= {f: graph.module2node[one.module] for one in made for f in (one.output, *one.others)}
    graph.by_function = nodes
    links: dict[Any, list[Link]] = {}
    for one in made:
        found = links.setdefault(graph.module2node[one.module], [])
        found += [link for link in one.inputs if link[0] in nodes]
    for node, came in links.items():
        before = [nodes[function] for function, _ in came]
        inside, queue = set(), list(node.inputs)
        while queue:
            inner = queue.pop()
            if inner not in before and inner not in inside:
                inside.add(inner)
                queue.extend(inner.inputs)
        for producer in {*before, *node.inputs}:
            producer.outputs = [x for x in producer.outputs if x is not node and x not in inside]
        node.inputs = before
        for producer in before:
            producer.add_output(node)
    return links


def _lead_past(graph: _Graph, links: dict[Any, list[Link]]) -> None:
    """Connect parameters that scale what lies across the channels they belong to (those of a stream
    whose tokens were mixed on a transposed map) to where that meets the stream."""
    relations = graph.relations
    for module, node in graph.module2node.items():
        if not isinstance(module, nn.Parameter) or len(node.outputs) != 1:
            continue
        wide = [(n - module.ndim, size) for n, size in enumerate(module.shape) if size > 1]
        at = scaled = node.outputs[0]
        if len(wide) != 1 or relations.lies_along(scaled, *wide[0]) is not False:
            continue
        while len(at.outputs) == 1 and relations.lies_along(at, *wide[0]) is False:
            at = at.outputs[0]
        if relations.lies_along(at, *wide[0]):
            links[at] = [*(links.get(at) or relations.links(at)), (node.grad_fn, 0)]
            scaled.inputs = [one for one in scaled.inputs if one is not node]
            at.inputs, node.outputs = [*at.inputs, node], [at]


def _families(graph: _Graph, model: nn.Module, buffers: Mapping[str, nn.Parameter]) -> list[Family]:
    """Connected components over (port, index) that some layer produces, alike ones together."""
    reach = _Reach(graph)
    labels, whole = reach.labels()
    ports = _Ports(graph, model, whole, buffers)
    table = _Table()
    for (node, function), side in reach.sides.items():
        indices = side.seen.nonzero()[0]
        owner = labels[side.offset + indices]
        port = ports.of(node, function)
        if port is not None:
            table.add(port, owner, indices)
        if node.grad_fn in graph.finals and (port is None or port.side == "out"):
            table.add(_OUTPUT, owner, np.zeros_like(indices))
    for port, owners, indices in reach.norms(model):
        table.add(port, labels[owners], indices)
    for lost, node, how in reach.lost:
        place = _place(node, {module: name for module, name in ports.names.items() if name})
        refusal = f"{how} ({place})"
        table.add(Port("lost", "out", refusal=refusal), labels[lost], np.zeros_like(lost))
    return table.families()


def _place(node: Any, names: Mapping[Any, str]) -> str:
    """A node of the graph in words: its module, or the name and the layer before it."""
    name, seen = "", set[int]()
    while id(node) not in seen:
        seen.add(id(node))
        if node.module in names:
            return f"{name} after {names[node.module]}" if name else f"at {names[node.module]}"
        name = name or str(node.grad_fn.name()).removesuffix("Backward0")
        node = node.inputs[0] if node.inputs else node
    return name


_OUTPUT = Port("output", "out", refusal="network output")


class _Table:
    """Rows (component, port, index), to be sorted into families."""

    def __init__(self) -> None:
        self._ports: dict[Port, int] = {}
        self._rows: list[Ints] = []

    def add(self, port: Port, owners: Ints, indices: Ints) -> None:
        """The components that the channels of a port belong to."""
        number = self._ports.setdefault(port, len(self._ports))
        self._rows.append(np.stack([owners, np.full_like(owners, number), indices]))

    def families(self) -> list[Family]:
        """Components with equally many channels at the same ports, by port [units, width]."""
        if not self._rows:
            return []
        owners, ports, indices = np.concatenate(self._rows, axis=1)
        width = int(indices.max()) + 1
        keys = np.sort((owners * len(self._ports) + ports) * width + indices)
        keys = keys[np.diff(keys, prepend=-1) > 0]
        both = keys // width
        first = np.flatnonzero(np.diff(both, prepend=-1))
        both, counts = both[first], np.diff(first, append=len(keys))
        rows = np.stack(
            [keys // width // len(self._ports), keys // width % len(self._ports), keys % width]
        )
        heads = np.append(both // len(self._ports), -1)
        starts = np.flatnonzero(np.diff(heads, prepend=-2))
        begins = starts[:-1]
        if not len(begins):
            return []
        # Components with the same ports and counts have the same sum of random numbers.
        generator = np.random.default_rng(0)
        drawn = generator.integers(1 << 63, size=(2, len(self._ports)), dtype=np.uint64)
        mixed = drawn[0, rows[1, first]] + counts.astype(np.uint64) * drawn[1, rows[1, first]]
        mixed ^= mixed >> np.uint64(29)
        sums = np.add.reduceat(mixed * np.uint64(0x9E3779B97F4A7C15), begins)
        _, kinds, sizes = np.unique(sums, return_inverse=True, return_counts=True)
        order = np.argsort(kinds, kind="stable")
        listed, found = list(self._ports), []
        lengths = np.diff(starts)
        for place in np.split(order, np.cumsum(sizes)[:-1]):
            family: Family = {}
            for column in range(int(lengths[place[0]])):
                at = first[begins[place] + column]
                spread = at[:, None] + np.arange(int(counts[begins[place[0]] + column]))[None]
                family[listed[int(rows[1, at[0]])]] = rows[2, spread]
            found.append(family)
        return found


_RESHAPED = "its channels could not be followed through a reshape"
_SUMMED = "a product that is no layer's sums over its channels"
_PADDED = "code adds it, in a number of its own, to channels that are added to it"


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


class _Reach:
    """All channels that can be reached from a producing layer, and which touch each other."""

    def __init__(self, graph: _Graph) -> None:
        self._graph = graph
        self.sides: dict[tuple[Any, Any], _Side] = {}
        self.lost: list[tuple[Ints, Any, str]] = []
        """Numbers of channels that are connected to one that does not exist, or to none but mixed,
        the node there, and what happens to them."""
        self._edges: list[Ints] = []
        self._count = 0
        self._walk()
        self._join_shared()

    def labels(self) -> tuple[Ints, set[nn.Module]]:
        """The number of the component of every channel, and the convolutions of which whole groups
        go although they could lose places."""
        whole = set[nn.Module]()
        while True:
            none = np.zeros((2, 0), dtype=np.int64)
            pairs = np.concatenate([*self._edges, *self._joins(whole), none], axis=1)
            ones = np.ones(pairs.shape[1], dtype=np.int8)
            matrix = coo_matrix((ones, (pairs[0], pairs[1])), (self._count, self._count))
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
            axes = _axes_of(node)
            if axes.blocks and axes.shares:
                units = len(np.unique(labels[side.offset + side.seen.nonzero()[0]]))
                several = side.seen.all() and units >= min(FEWEST_PLACES, axes.blocks)
                known[node.module] = known.get(node.module, 0) + bool(several)
        return {module for module, sides in known.items() if sides < 2}

    def norms(self, model: nn.Module) -> Iterator[tuple[Port, Ints, Ints]]:
        """Normalisations over channels that are met, with the numbers of the channels at their
        inputs and the places of these."""
        graph = self._graph
        names = {module: name for name, module in model.named_modules()}
        sides = {node: key for key in self.sides for node in key[:1]}
        known: dict[tuple[Any, ...], Norm | None] = {}
        for one in graph.calls.made:
            producer = graph.by_function.get(one.inputs[0][0]) if one.inputs else None
            if producer is None or producer not in sides:
                continue
            shape = tuple(shape_of(*one.inputs[0]))
            held = one.module._parameters.values()
            sizes = (p.shape for p in held if p is not None)
            like = (type(one.module), shape, eps_of(one.module), *sizes)
            if like not in known:
                known[like] = norm_of(one.module, shape)
            norm = known[like]
            if norm is None:
                continue
            function = sides[producer][1]
            if isinstance(producer.module, nn.Module):
                function = graph.get_pruner_of_module(producer.module).prune_out_channels
            side = self.sides.get((producer, function))
            if side is None:
                continue
            met = side.seen.nonzero()[0]
            here, there = graph.relations.taken(producer, one.inputs[0]).forwards(met)
            if len(there) and int(there.max()) < shape[norm.dim]:
                port = Port(names[one.module], "norm", one.module, norm=norm)
                yield port, here + side.offset, there

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
            if len(padded := np.intersect1d(graph.relations.padded(node), indices)):
                self.lost.append((padded + here.offset, node, _PADDED))
            for dependency, relation, forwards in relations[node]:
                target = dependency.target
                if not dependency.is_triggered_by(function):
                    continue
                if target is came and relation.single and _single(node, target):
                    continue  # The way that they came.
                if relation.summed and forwards:
                    self.lost.append((indices + here.offset, target, _SUMMED))
                there = self._side(target, dependency.handler)
                pairs = relation.forwards(indices) if forwards else relation.backwards(indices)
                inside = pairs[1] < len(there.seen)
                if not inside.all():
                    self.lost.append((np.unique(pairs[0][~inside]) + here.offset, node, _RESHAPED))
                    pairs = pairs[0][inside], pairs[1][inside]
                self._edges.append(np.stack([pairs[0] + here.offset, pairs[1] + there.offset]))
                fresh = pairs[1][~there.seen[pairs[1]]]
                if len(fresh):
                    fresh = fresh if forwards or relation.same else np.unique(fresh)
                    there.seen[fresh] = True
                    queue.put(target, dependency.handler, fresh, node)

    def _join_shared(self) -> None:
        """Connect what lies on the same axis of a weight that several layers share."""
        met: dict[tuple[int, int], list[_Side]] = {}
        for (node, function), side in self.sides.items():
            if not isinstance(node.module, nn.Module):
                continue
            axes, pruner = channel_axes(node.module), self._graph.get_pruner_of_module(node.module)
            inward = function == pruner.prune_in_channels != pruner.prune_out_channels
            for attribute, dim in axes.inputs if inward else axes.outputs:
                held = node.module._parameters.get(attribute)
                if held is not None and held.shape[dim] == len(side.seen):
                    met.setdefault((id(held), dim), []).append(side)
        for first, *others in met.values():
            for other in others:
                both = (first.seen & other.seen).nonzero()[0]
                self._edges.append(np.stack([both + first.offset, both + other.offset]))

    def _joins(self, whole: Collection[nn.Module]) -> Iterator[Ints]:
        """Connections of what layers can only lose together: the channels of a block of their own,
        on both sides; or, on one side, the same places of all shares."""
        first: dict[tuple[nn.Module, int], int] = {}
        for (node, _), side in self.sides.items():
            axes, indices = _axes_of(node), side.seen.nonzero()[0]
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
            yield np.stack([np.array(roots, dtype=np.int64)[which], indices + side.offset])


def _axes_of(node: Any) -> ChannelAxes:
    """What is known of a node's module, if it has one."""
    return channel_axes(node.module) if isinstance(node.module, nn.Module) else ChannelAxes()


def _single(one: Any, two: Any) -> bool:
    """Whether one edge connects two nodes."""
    nodes = (*one.inputs, *one.outputs)
    return sum(node is two for node in nodes) == 1


def _produced(graph: _Graph) -> Iterator[tuple[Any, Any, Ints]]:
    """The output channels of every producing layer."""
    for module, node in graph.module2node.items():
        if isinstance(module, nn.Module) and channel_axes(module).produces:
            pruner = graph.get_pruner_of_module(module)
            yield node, pruner.prune_out_channels, np.arange(pruner.get_out_channels(module))


class _Ports:
    """Nodes and pruning functions of the graph as ports, each made once."""

    def __init__(
        self,
        graph: _Graph,
        model: nn.Module,
        whole: Collection[nn.Module],
        buffers: Mapping[str, nn.Parameter],
    ) -> None:
        self._graph, self._whole = graph, whole
        self.names = self._modules = {module: name for name, module in model.named_modules()}
        held = (*model.named_parameters(), *buffers.items())
        self._parameters = {id(p): name for name, p in held}
        self._packed = {one.module for one in graph.calls.made if one.packed}
        self._made: dict[tuple[Any, Any], Port | None] = {}

    def of(self, node: Any, function: Any) -> Port | None:
        """The port; None for operations that only pass channels on."""
        key = (node, function)
        if key not in self._made:
            self._made[key] = self._make(node, function)
        return self._made[key]

    def _make(self, node: Any, function: Any) -> Port | None:
        thing = node.module
        if isinstance(thing, nn.Parameter):
            path, dim = self._parameters[id(thing)], self._graph.relations.parameter_axis(node)
            owner = channel_axes(self._graph.model.get_submodule(path.rpartition(".")[0]))
            return Port(path, "out", parameter_dim=dim, refusal=owner.refusal)
        if self._graph.relations.splits_channels(node):
            return Port(
                "reshape", "out", refusal="its channels are reshaped into several axes, as heads"
            )
        if not self._modules.get(thing):  # An operation, or the model itself being one layer.
            return None
        pruner = self._graph.get_pruner_of_module(thing)
        inward = function == pruner.prune_in_channels != pruner.prune_out_channels
        if inward and thing in self._packed:
            refusal = f"{self._modules[thing]} reads a packed sequence, whose rows are no samples"
            return Port(self._modules[thing], "in", refusal=refusal)
        if inward and thing in self._whole:  # Its inputs go with its outputs: nothing to mask.
            return Port(self._modules[thing], "in")
        norm = standardised(thing) if inward and channel_axes(thing).inputs else None
        return Port(self._modules[thing], "in" if inward else "out", module=thing, norm=norm)

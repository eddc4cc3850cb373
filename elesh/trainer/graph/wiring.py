"""Which channels of which layers belong together: the wiring of a network, traced once.

Torch-Pruning's dependency graph says which operation passes channels on to which, and
:mod:`.indexing` how their numbers change on the way. :mod:`.reach` follows single channels through
it: all (layer, side, index) that are connected make up one removable unit. Following channels one
by one, not whole layers, is what gets gated units (``a, b = x.chunk(2)``), channels that are used
twice and layers of which only a part is coupled right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from elesh.trainer.network.buffers import with_history
from elesh.trainer.network.calling import (
    Inputs,
    batch_size,
    call,
    described,
    summary,
    tensors_in,
)
from elesh.trainer.network.calls import Call, Calls, Link
from elesh.trainer.network.kinds.matrices import BareMatrix, bare_matrices
from elesh.trainer.network.kinds.norms import Norm, norm_of, standardised
from elesh.trainer.network.kinds.recurrent import has_states
from elesh.trainer.network.layers import channel_axes
from elesh.trainer.network.saved import Bytes
from leyline import InvalidField, LayerDescriptor

from .attention import Attention, find_attentions
from .axes import any_along, shape_of
from .dependencies import CallByFunction, weights_used
from .dependency_graph import DependencyGraph, alive_in
from .indexing import RESHAPED, RETURNED, SUMMED, Ints
from .proof.products import Product, Products, traced_products
from .reach import Reach
from .residual_branches import Trace


@dataclass(frozen=True)
class Port:
    """One side of a node of the graph: the channels that enter or leave it.

    ``module`` is None for an operation without channels of its own (addition, activation, ...).
    """

    name: str
    side: str
    """``in`` or ``out``; ``out`` also for what treats channels one by one; ``norm`` for the input
    of a normalisation over channels; ``behind`` for what a layer makes, where a product of
    activations sums over it."""
    module: nn.Module | None = None
    parameter_dim: int | None = None
    """For a bare parameter: the axis that holds the channels."""
    refusal: str = ""
    """Why channels that come here cannot be removed, where the operation itself forbids it."""
    norm: Norm | None = None
    """What takes statistics over the channels: the module, or of its weight one that reads them."""


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

    products: tuple[Product, ...] = ()
    """All that was multiplied, in order."""
    entered: Sequence[str] = ()
    """The modules that were called, in order of their beginning."""
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
        graph = DependencyGraph(model, inputs, compared, buffers)
        calls, outputs, function_calls = graph.calls, graph.outputs, graph.function_calls
        products = graph.products
        families = tuple(_families(graph, model, buffers))
        graph.release()
    except Exception as error:  # The graph of others' code: whatever it raises is a reason.
        failure = f"the dependency graph failed: {summary(error)}"
        calls, products, outputs = _run(model, inputs)
    made = [(t.grad_fn, t.output_nr) for t in tensors_in(outputs) if t.grad_fn is not None]
    passage = Trace(calls.made, made)
    layers = calls.layers(batch_size(inputs), weights_used(passage.reached))
    # What a function adds to such a product (biases of queries and values) goes with the heads.
    hidden = {one.call.name for one in function_calls if not one.own_bias}
    attended = [one for one in calls.made if one.name not in hidden]
    attentions = find_attentions(attended, model, buffers, passage.reached)
    readers = {one.call.name: one.at for one in function_calls}
    held = (*model.named_parameters(), *buffers.items())
    multiplied = traced_products(products, calls, {id(p): path for path, p in held})
    return Wiring(
        layers, families, attentions, failure, passage, multiplied, calls.entered, readers
    )


def _run(model: nn.Module, inputs: Inputs) -> tuple[Calls, Products, Any]:
    """The calls of one forward pass, what it multiplied, and what the model returned."""
    products = Products(lambda: calls.place)
    calls = Calls(model, any_along)
    saving = Bytes(alive_in(model, inputs), products, calls.is_multiplied)
    with calls, products, saving:
        try:
            return calls, products, call(model, inputs)
        except Exception as error:  # Whatever the user's network raises.
            expected = "a batch as the model is called with: arguments, shapes, dtypes, device"
            hint = f"it was called in evaluation mode with {described(inputs)}"
            raise InvalidField("example_inputs", expected, summary(error), hint=hint) from error


def _families(
    graph: DependencyGraph, model: nn.Module, buffers: Mapping[str, nn.Parameter]
) -> list[Family]:
    """Connected components over (port, index) that some layer produces, alike ones together."""
    reach = Reach(graph)
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
    for port, owners, indices in _norms(graph, reach, model):
        table.add(port, labels[owners], indices)
    for node, owners, indices in _factors(graph, reach, labels):
        table.add(Port(ports.names[node.module], "behind", node.module), owners, indices)
    for lost, node, how in reach.lost:
        place = _place(node, {module: name for module, name in ports.names.items() if name})
        name = "summed" if how == RETURNED else "lost"  # That it is an output comes first.
        port = Port(name, "out", refusal=f"{how} ({place})")
        port = _OUTPUT if how == RESHAPED and graph.is_returned(node) else port
        table.add(port, labels[lost], np.zeros_like(lost))
    return table.families()


def _factors(
    graph: DependencyGraph, reach: Reach, labels: Ints
) -> Iterator[tuple[Any, Ints, Ints]]:
    """Layers behind which channels can be masked over which products of activations sum, with the
    components of these and their places there; channels that no such layer makes are lost."""
    for numbers, operand, product in reach.met:
        makers, met = graph.makers(operand) or [], [np.zeros(0, dtype=np.int64)]
        if any(isinstance(m, BareMatrix) or has_states(m) for m in (one.module for one in makers)):
            makers = []
        for node in makers:
            side = reach.sides[node, graph.get_pruner_of_module(node.module).prune_out_channels]
            indices = side.seen.nonzero()[0]
            owners = labels[side.offset + indices]
            there = np.isin(owners, labels[numbers])
            met.append(owners[there])
            yield node, owners[there], indices[there]
        missing = ~np.isin(labels[numbers], np.concatenate(met))
        if missing.any():
            reach.lost.append((numbers[missing], product, SUMMED))


def _norms(
    graph: DependencyGraph, reach: Reach, model: nn.Module
) -> Iterator[tuple[Port, Ints, Ints]]:
    """Normalisations over channels that are met, with the numbers of the channels at their
    inputs and the places of these."""
    names = {module: name for name, module in model.named_modules()}
    functions = dict(reach.sides.keys())
    known: dict[tuple[Any, ...], Norm | None] = {}
    for one in graph.calls.made:
        came = _read_by(graph, one)
        producer = None if came is None else graph.by_function.get(came[0])
        if came is None or producer is None or producer not in functions:
            continue
        shape = tuple(shape_of(*came))
        held = one.module._parameters.values()
        sizes = (p.shape for p in held if p is not None)
        numbers = (n for n in vars(one.module).values() if isinstance(n, float))
        like = (type(one.module), shape, *numbers, *sizes)
        if like not in known:
            known[like] = norm_of(one.module, shape)
        norm = known[like]
        if norm is None:
            continue
        function = functions[producer]
        if isinstance(producer.module, nn.Module):
            function = graph.get_pruner_of_module(producer.module).prune_out_channels
        side = reach.sides.get((producer, function))
        if side is None:
            continue
        met = side.seen.nonzero()[0]
        here, there = graph.relations.taken(producer, came).forwards(met)
        if len(there) and int(there.max()) < shape[norm.dim]:
            port = Port(names[one.module], "norm", one.module, norm=norm)
            yield port, here + side.offset, there


def _read_by(graph: DependencyGraph, one: Call) -> Link | None:
    """What a layer was called with first: made by something, or a parameter as it is."""
    node = graph.module2node.get(one.module)
    if one.inputs or node is None or len(node.inputs) != 1:
        return one.inputs[0] if one.inputs else None
    return node.inputs[0].grad_fn, 0


def _place(node: Any, names: Mapping[Any, str]) -> str:
    """A node of the graph in words: its module, or the name and the layer before it."""
    name, seen = "", set[int]()
    while id(node) not in seen:
        seen.add(id(node))
        if node.module in names:
            return f"{name} after {names[node.module]}" if name else f"at {names[node.module]}"
        name = name or str(node.grad_fn.name()).partition("Backward")[0]
        node = node.inputs[0] if node.inputs else node
    return name


_OUTPUT = Port("output", "out", refusal="network output")


class _Table:
    """Rows (component, port, index), to be sorted into families."""

    def __init__(self) -> None:
        self._ports: dict[Port, int] = {}
        self._rows: list[tuple[Ints, int, Ints]] = []

    def add(self, port: Port, owners: Ints, indices: Ints) -> None:
        """The components that the channels of a port belong to."""
        number = self._ports.setdefault(port, len(self._ports))
        self._rows.append((owners, number, indices))

    def families(self) -> list[Family]:
        """Components with equally many channels at the same ports, by port [units, width]."""
        if not self._rows:
            return []
        owners, indices = (np.concatenate([row[n] for row in self._rows]) for n in (0, 2))
        ports = np.repeat([row[1] for row in self._rows], [len(row[0]) for row in self._rows])
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


class _Ports:
    """Nodes and pruning functions of the graph as ports, each made once."""

    def __init__(
        self,
        graph: DependencyGraph,
        model: nn.Module,
        whole: Collection[nn.Module],
        buffers: Mapping[str, nn.Parameter],
    ) -> None:
        self._graph, self._whole = graph, whole
        named = (*model.named_modules(), *bare_matrices(model).items())
        self.names = self._modules = {module: name for name, module in named}
        held = (*model.named_parameters(), *buffers.items())
        self._parameters = {id(p): name for name, p in held}
        self._packed = {one.module for one in graph.calls.made if one.packed}
        self._started = {one.module for one in graph.calls.made if one.started}
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
            if self._graph.is_returned(node):
                return _OUTPUT
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
        if not inward and has_states(thing):
            why = f"{self._modules[thing]} gets its first states as an input"
            started = thing in self._started
            states = Norm("states", -2, 0.0)
            return Port(self._modules[thing], "out", thing, None, why if started else "", states)
        norm = standardised(thing) if inward and channel_axes(thing).inputs else None
        return Port(self._modules[thing], "in" if inward else "out", module=thing, norm=norm)

"""Which channels of which layers belong together: the wiring of a network, traced once.

Torch-Pruning's dependency graph says which operation passes channels on to which, and
:mod:`.indexing` how their numbers change on the way. We follow single channels through it: all
(layer, side, index) that are connected make up one removable unit. Following channels one by one,
not whole layers, is what gets gated units (``a, b = x.chunk(2)``), channels that are used twice
and layers of which only a part is coupled right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from leyline import LayerDescriptor

from .calling import Inputs, batch_size, call, map_tensors, tensors_in
from .indexing import Relations
from .layers import channel_axes


@dataclass(frozen=True)
class Port:
    """One side of a node of the graph: the channels that enter or leave it.

    ``module`` is None for an operation without channels of its own (addition, activation, ...).
    """

    name: str
    side: str
    """``in`` or ``out``; ``out`` also for what treats channels one by one."""
    module: nn.Module | None = None
    parameter_dim: int | None = None
    """For a bare parameter: the axis that holds the channels."""
    refusal: str = ""
    """Why channels that come here cannot be removed, where the operation itself forbids it."""


Unit = dict[Port, tuple[int, ...]]
"""The channels that are connected: rising indices by port."""


@dataclass(frozen=True)
class Wiring:
    """What the tracing found."""

    layers: tuple[LayerDescriptor, ...]
    """Layers with parameters, in order of execution."""
    units: tuple[Unit, ...]
    """Connected channels, those that some layer produces, in no particular order."""
    failure: str = ""
    """Why the wiring is not known, where the dependency graph could not be built."""


def trace(model: nn.Module, inputs: Inputs) -> Wiring:
    """Trace a model that may be changed (a copy): parameters must require gradients."""
    layers: list[LayerDescriptor] = []
    try:
        graph = _Graph()
        graph.build(model, inputs, layers)
        return Wiring(tuple(layers), tuple(_units(graph, model)))
    except Exception as error:  # The graph of others' code: whatever it raises is a reason.
        if not layers:
            raise  # The network itself does not run.
        return Wiring(tuple(layers), (), f"the dependency graph failed: {summary(error)}")


def summary(error: BaseException) -> str:
    """An exception in one line."""
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if str(error).strip()
        else type(error).__name__
    )


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """The dependency graph without its own maps of channel numbers (see ``indexing``)."""

    def build(self, model: nn.Module, inputs: Inputs, layers: list[LayerDescriptor]) -> None:
        """Run the model and find its nodes and dependencies; append its layers."""

        def forward(model: nn.Module, inputs: Inputs) -> Any:
            with _observed(model, batch_size(inputs), layers):
                return call(model, inputs)

        def traced(output: Any) -> list[Tensor]:
            return [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]

        self.model, self.verbose = model, False
        self._module2name = {module: name for name, module in model.named_modules()}
        self._param_to_name, self.unwrapped_parameters = self._detect_unwrapped_parameters(None)
        self.module2node = self._trace(model, inputs, forward, output_transform=traced)
        self._build_dependency(self.module2node)
        self.relations = Relations()

    def channels(self, node: Any, function: Any) -> int:
        """How many channels one side of a node can have at most."""
        pruner = self.get_pruner_of_module(node.module)
        if isinstance(node.module, nn.Module) and channel_axes(node.module).produces:
            inward = function == pruner.prune_in_channels
            count = pruner.get_in_channels if inward else pruner.get_out_channels
            return int(count(node.module))
        return self.relations.channels(node)


class _observed:  # noqa: N801 - a context manager, used like a function
    """While entered, notes the layers in order of execution with their positions."""

    def __init__(self, model: nn.Module, batch: int, layers: list[LayerDescriptor]) -> None:
        self._model, self._batch, self._layers = model, batch, layers

    def __enter__(self) -> None:
        self._positions: dict[str, int] = {}
        self._modules: dict[str, nn.Module] = {}
        self._handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in self._model.named_modules()
            if name and any(True for _ in module.parameters(recurse=False))
        ]

    def _hook(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            used = _positions(module, inputs, output) // self._batch
            self._positions[name] = self._positions.get(name, 0) + used
            self._modules[name] = module

        return note

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        paths = {id(p): path for path, p in self._model.named_parameters()}
        for name, positions in self._positions.items():
            self._layers.extend(_descriptors(name, self._modules[name], positions, paths))


def _positions(module: nn.Module, inputs: Any, output: Any) -> int:
    """How often the weight was multiplied in this call."""
    if isinstance(module, _ConvTransposeNd):
        return tensors_in(inputs)[0].numel() // module.in_channels
    first = tensors_in(output)[0] if tensors_in(output) else None
    width = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
    return first.numel() // width if first is not None and isinstance(width, int) else 0


def _descriptors(
    name: str, module: nn.Module, positions: int, paths: Mapping[int, str]
) -> Iterator[LayerDescriptor]:
    """One descriptor, or one for each projection of an attention module."""
    kind = type(module).__name__.lower()
    weight = module._parameters.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        # Its projections are not called as modules; products of queries and keys are not counted.
        for path, parameter in module.named_parameters():
            if parameter.ndim == 2:
                yield LayerDescriptor(
                    name=f"{name}.{path}",
                    kind=kind,
                    weight=paths[id(parameter)],
                    positions=positions,
                )
    elif weight is not None and isinstance(module, (nn.Linear, _ConvNd)):
        yield LayerDescriptor(name=name, kind=kind, weight=paths[id(weight)], positions=positions)
    else:
        yield LayerDescriptor(name=name, kind=kind)


def _units(graph: _Graph, model: nn.Module) -> Iterator[Unit]:
    """Connected components over (port, index)."""
    elements, edges, lost = _connections(graph)
    ports = _Ports(graph, model)
    source, target = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    size = len(elements)
    matrix = coo_matrix((np.ones(len(source), dtype=np.int8), (source, target)), (size, size))
    count, labels = connected_components(matrix, directed=False)
    found: list[dict[Port, list[int]]] = [{} for _ in range(count)]
    for (node, function, index), label in zip(elements, labels, strict=True):
        port = ports.of(node, function)
        if port is not None:
            found[label].setdefault(port, []).append(index)
    for number in lost:
        found[labels[number]][_LOST] = [0]
    for unit in found:
        yield {port: tuple(sorted(set(indices))) for port, indices in unit.items()}


_LOST = Port("lost", "out", refusal="its channels could not be followed through a reshape")
_Element = tuple[Any, Any, int]
"""A node of the graph, a pruning function of it (that is: a side), and a channel number."""


def _connections(graph: _Graph) -> tuple[list[_Element], list[tuple[int, int]], set[int]]:
    """All channels that can be reached from a producing layer, and which touch each other.

    Returns:
        the channels, pairs of positions in that list, and positions of channels that are
        connected to one that does not exist.
    """
    number: dict[_Element, int] = {}
    edges: list[tuple[int, int]] = []
    lost: set[int] = set()
    relations = {node: graph.relations.of(node) for node in graph.module2node.values()}
    queue = list(_produced(graph))
    for node, function, indices in queue:
        for index in indices:
            number.setdefault((node, function, index), len(number))
    while queue:
        node, function, indices = queue.pop()
        for dependency, relation, forwards in relations[node]:
            if not dependency.is_triggered_by(function):
                continue
            target, handler, fresh = dependency.target, dependency.handler, []
            limit = graph.channels(target, handler)
            pairs = relation.forwards(indices) if forwards else relation.backwards(indices)
            for here, there in pairs:
                source = number[node, function, here]
                if there >= limit:
                    lost.add(source)
                    continue
                element = (target, handler, there)
                if element not in number:
                    number[element] = len(number)
                    fresh.append(there)
                edges.append((source, number[element]))
            if fresh:
                queue.append((target, handler, fresh))
    return list(number), edges, lost


def _produced(graph: _Graph) -> Iterator[tuple[Any, Any, list[int]]]:
    """The output channels of every producing layer."""
    for module, node in graph.module2node.items():
        if isinstance(module, nn.Module) and channel_axes(module).produces:
            pruner = graph.get_pruner_of_module(module)
            channels = range(pruner.get_out_channels(module))
            yield node, pruner.prune_out_channels, list(channels)


class _Ports:
    """Nodes and pruning functions of the graph as ports, each made once."""

    def __init__(self, graph: _Graph, model: nn.Module) -> None:
        self._graph = graph
        self._modules = {module: name for name, module in model.named_modules()}
        self._parameters = {id(p): name for name, p in model.named_parameters()}
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
            dim = node.pruning_dim % thing.ndim
            return Port(self._parameters[id(thing)], "out", parameter_dim=dim)
        if self._graph.relations.splits_channels(node):
            return Port(
                "reshape", "out", refusal="its channels are reshaped into several axes, as heads"
            )
        if isinstance(thing, tp.ops._OutputOp):
            return Port("output", "out", refusal="network output")
        if not self._modules.get(thing):  # An operation, or the model itself being one layer.
            return None
        pruner = self._graph.get_pruner_of_module(thing)
        inward = function == pruner.prune_in_channels != pruner.prune_out_channels
        return Port(self._modules[thing], "in" if inward else "out", module=thing)


def example_copy(inputs: Inputs) -> Any:
    """Example inputs that no tracing can change, in single precision where they are floats."""

    def copied(tensor: Tensor) -> Tensor:
        clone = tensor.detach().clone()
        return clone.float() if clone.is_floating_point() else clone

    with torch.inference_mode(False):
        return map_tensors(copied, inputs)

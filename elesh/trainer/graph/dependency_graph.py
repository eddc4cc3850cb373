"""Torch-Pruning's dependency graph of a network, with corrections for what it cannot see.

Promises: every layer is connected directly to what it was called with; kinds of layers that were
taught count as layers; channel numbers are those of :mod:`.indexing`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch_pruning.dependency.node import Node
from torch_pruning.ops import OPTYPE

from elesh.trainer.network.buffers import StaysFollowed
from elesh.trainer.network.calling import Inputs, call, tensors_in
from elesh.trainer.network.calls import Calls, Link
from elesh.trainer.network.kinds.matrices import BareMatrix, bare_matrices
from elesh.trainer.network.layers import ChannelAxes, channel_axes, taught_kind
from elesh.trainer.network.saved import Bytes

from .axes import any_along
from .dependencies import CallByFunction, calls_by_functions, in_order
from .indexing import Relations
from .proof.products import Products
from .residual_branches import behind

__all__ = ["DependencyGraph", "axes_of"]


class _Taught(tp.function.BasePruningFunc):  # type: ignore[misc]
    """Tells torch-pruning how many channels a layer that was taught has; nothing is pruned."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError

    def get_out_channels(self, layer: nn.Module) -> int:
        axes = channel_axes(layer)
        if axes.period:
            return axes.period * axes.shares
        attribute, dim = (axes.outputs or axes.inputs)[0]
        return int(getattr(layer, attribute).shape[dim])

    def get_in_channels(self, layer: nn.Module) -> int:
        axes = channel_axes(layer)
        attribute, dim = (axes.inputs or axes.outputs)[0]
        return int(getattr(layer, attribute).shape[dim])


class _TaughtChannelwise(_Taught):
    """The same for a layer that treats channels one by one."""

    prune_in_channels = _Taught.prune_out_channels


class _Results(TorchFunctionMode):
    """While entered, notes the functions of autograd that made what functions return."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: dict[Any, None] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, Tensor) and one.grad_fn is not None:
                self._noted[one.grad_fn] = None
        return made

    def ends_beside(self, functions: Collection[Any]) -> list[Any]:
        """The last of those that do not lead to these functions: what is not used of the sum that
        the last of several blocks returns."""
        beside = [one for one in self._noted if one not in functions]
        read = {before for one in behind(beside, functions) for before, _ in one.next_functions}
        return [one for one in beside if one not in read]


class DependencyGraph(tp.DependencyGraph):  # type: ignore[misc]
    """The dependency graph without its own maps of channel numbers (see ``indexing``)."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        compared: Callable[[Any], Any] | None,
        buffers: Mapping[str, nn.Parameter],
    ) -> None:
        super().__init__()
        self._pruners: dict[Any, Any] = {}
        self._made = 0

        def traced(output: Any) -> list[Tensor]:
            self.outputs = output
            output = output if compared is None else compared(output)
            tensors = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
            self.finals = {tensor.grad_fn for tensor in tensors}
            return tensors

        self.model, self.verbose = model, False
        self._mode = model.training
        for module in (*model.modules(), *bare_matrices(model).values()):
            if taught_kind(module) and not isinstance(module, (nn.Linear, _ConvNd)):
                mixes = isinstance(module, BareMatrix) or channel_axes(module).inputs
                taught = _Taught() if mixes else _TaughtChannelwise()
                self.register_customized_layer(type(module), taught)
        self._module2name = {module: name for name, module in model.named_modules()}
        self._module2name |= {module: name for name, module in bare_matrices(model).items()}
        self._param_to_name, self.unwrapped_parameters = self._detect_unwrapped_parameters(None)
        self._param_to_name |= {held: path for path, held in buffers.items()}
        self.unwrapped_parameters += [(held, held.ndim - 1) for held in buffers.values()]
        self._begin(model, inputs)
        self.function_calls: list[CallByFunction] = []
        self._dead_ends: list[Any] = []
        """Results that are not used: their sizes must fit, too."""
        self._followed = StaysFollowed() if buffers else contextlib.nullcontext()
        self.module2node = self._trace(model, inputs, self._forward, output_transform=traced)
        self.by_function: dict[Any, Any] = {}
        links = _bridge(self, self.calls)
        self.relations = Relations(links)
        _lead_past(self, links)
        _lead_through(self, links)
        self._build_dependency(self.module2node)

    def _begin(self, model: nn.Module, inputs: Inputs) -> None:
        """Nothing is noted of a pass yet."""
        self.products = Products(lambda: self.calls.place)
        self.calls = Calls(model, any_along)
        self._saving = Bytes(alive_in(model, inputs), self.products, self.calls.is_multiplied)

    def _forward(self, model: nn.Module, inputs: Inputs) -> Any:
        model.train(self._mode)  # It was put into evaluation mode meanwhile.
        output, functions = self._run(model, inputs, self._followed)
        if any(one.output is not None and one.output not in functions for one in self.calls.made):
            self._begin(model, inputs)
            with _Results() as noted:
                output, functions = self._run(model, inputs, self._followed)
            self._dead_ends = noted.ends_beside(functions)
        self.function_calls = calls_by_functions(self.calls.made, functions, model)
        called = {one.module for one in self.calls.made}
        self.unwrapped_parameters += [  # Tables of positions that code takes rows of.
            (module.weight, 1)
            for module in model.modules()
            if isinstance(module, nn.Embedding) and module not in called
        ]
        self.calls.made = in_order(self.calls.made, [one.call for one in self.function_calls])
        return output

    def _run(self, model: nn.Module, inputs: Inputs, mode: Any) -> tuple[Any, set[Any]]:
        """What the model returns, and the functions of autograd behind it."""
        with self.calls, self.products, self._saving, mode:
            output = call(model, inputs)
        roots = [t.grad_fn for t in tensors_in(output) if t.grad_fn is not None]
        return output, set(behind(roots))

    def _trace_computational_graph(
        self, module2node: Any, output: Any, gradfn2module: Any, reused: Any, visited: Any
    ) -> Any:
        """As torch-pruning's own in less of the time: an eighth of all functions that a recorder
        calls for a narrow transformer were called there."""
        gradfn2module |= {one.call.output: one.call.module for one in self.function_calls}
        gradfn2module |= {made: one.module for one in self.calls.made for made in one.others}
        matrices = [one for one in self.calls.made if isinstance(one.module, BareMatrix)]
        gradfn2module |= {one.output: one.module for one in matrices}
        bare = {
            id(held): (number, held) for number, (held, _) in enumerate(self.unwrapped_parameters)
        }
        root = output.grad_fn
        stack = [root, *self._dead_ends]

        def node_of(function: Any) -> Any:
            module = gradfn2module.get(function)
            if module is None:
                shape = output.shape if function is root and root in self.finals else None
                module = gradfn2module[function] = self._operation(function, shape)
            return module2node.get(module) or made(module, function)

        def made(module: Any, function: Any) -> Any:
            node = module2node[module] = _Node(module, function, self._module2name.get(module))
            if type(module) in self.CUSTOMIZED_PRUNERS:
                node.type = OPTYPE.CUSTOMIZED
            return node

        while stack:
            function = stack.pop()
            if function in visited:
                continue
            visited.add(function)
            node = node_of(function)
            for before, _ in function.next_functions:
                if before is None:
                    continue
                if hasattr(before, "variable"):
                    number, held = bare.get(id(before.variable), (None, None))
                    if held is None:
                        continue
                    gradfn2module[before] = held
                    self._module2name[held] = f"UnwrappedParameter_{number} ({held.shape})"
                came = node_of(before)
                node.inputs.append(came)
                came.outputs.append(node)
                stack.append(before)
        for held, dim in self.unwrapped_parameters:
            if held in module2node:
                module2node[held].pruning_dim = dim
        return module2node

    def _operation(self, function: Any, shape: Sequence[int] | None) -> nn.Module:
        """What stands for an operation that is no layer's; ``shape``: of the network's output."""
        number = self._made
        self._made += 1
        kind = _sort_of(function.name())
        found: nn.Module
        if shape is not None:
            found = tp.ops._OutputOp(number, shape=shape)
            return found
        if kind is tp.ops._SliceOp:
            found = kind(number, function)
            return found
        found = kind.__new__(kind)
        vars(found).update(_BARE, id=number, offsets=None, _grad_fn=function.name())
        return found

    def release(self) -> None:
        """Let go of everything. Nodes refer to each other, and so would keep the pass that was
        traced, with all that was saved for going backward, until garbage is searched for."""
        for node in self.module2node.values():
            vars(node).clear()
        self.__dict__.clear()

    def get_pruner_of_module(self, module: Any) -> Any:
        kind = type(module)
        key = kind if kind.__module__ == tp.ops.__name__ else id(module)
        if key not in self._pruners:
            self._pruners[key] = super().get_pruner_of_module(module)
        return self._pruners[key]

    def is_returned(self, node: Any) -> bool:
        """Whether the network's outputs hold what a node makes, laid out or changed in any way,
        with no layer and no sum between."""
        stack, seen = [node], set[int]()
        while stack:
            node = stack.pop()
            if node.grad_fn in self.finals:
                return True
            if id(node) not in seen:
                readers = (one for one in node.outputs if axes_of(one).site_dim is None)
                stack += [one for one in readers if self.relations.keeps_numbers(node, one)]
            seen.add(id(node))
        return False

    def makers(self, node: Any) -> list[Any] | None:
        """The layers that something was made of, with no other layer between; None if parameters
        without a layer are among them."""
        stack, seen, found = [node], set[int](), list[Any]()
        while stack:
            node = stack.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if axes_of(node).produces:
                found.append(node)
            elif isinstance(node.module, nn.Parameter):
                return None
            else:
                stack += node.inputs
        return found

    def channels(self, node: Any, function: Any) -> int:
        """How many channels one side of a node can have at most."""
        pruner, axes = self.get_pruner_of_module(node.module), axes_of(node)
        inward = function == pruner.prune_in_channels
        if axes.produces or (axes.inputs and inward):
            count = pruner.get_in_channels if inward else pruner.get_out_channels
            return int(count(node.module))
        return self.relations.channels(node)


def alive_in(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What is there before and after a pass."""
    return [*model.parameters(), *model.buffers(), *tensors_in(inputs)]


_BARE = vars(nn.Module())
"""What a module holds without parts, parameters and hooks; of operations nobody adds any."""
_SORTS = (
    ("catbackward", tp.ops._ConcatOp),
    ("split", tp.ops._SplitOp),
    ("unbind", tp.ops._UnbindOp),
    ("expand", tp.ops._ExpandOp),
    ("view", tp.ops._ReshapeOp),
    ("reshape", tp.ops._ReshapeOp),
)


@lru_cache(1024)
def _sort_of(name: str) -> Any:
    """What torch-pruning takes a function of autograd for."""
    lower = name.lower()
    found = next((kind for part, kind in _SORTS if part in lower), None)
    if found is None and "slice" in lower and "copyslices" not in lower:
        found = tp.ops._SliceOp
    return found or tp.ops._ElementWiseOp


@lru_cache(4096)
def _type_of(kind: Any) -> Any:
    """The type of the nodes of operations of this kind."""
    return tp.ops.module2type(kind.__new__(kind))


class _Node(Node):  # type: ignore[misc]
    """Torch-pruning's, which asks in turn whether an operation is one of each kind of layer."""

    def __init__(self, module: Any, function: Any, name: str | None) -> None:
        kind: Any = type(module)
        of_operation = kind.__module__ == tp.ops.__name__
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.dependencies: list[Any] = []
        self.module, self.grad_fn, self._name, self.module_class = module, function, name, kind
        self.type = _type_of(kind) if of_operation else tp.ops.module2type(module)
        self.enable_index_mapping, self.pruning_dim = True, -1


def axes_of(node: Any) -> ChannelAxes:
    """What is known of a node's module, if it has one."""
    return channel_axes(node.module) if isinstance(node.module, nn.Module) else ChannelAxes()


def _bridge(graph: DependencyGraph, calls: Calls) -> dict[Any, list[Link]]:
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
        if not came:  # A parameter as it is (a table of positions that is normalised) has no link.
            came += [(x.grad_fn, 0) for x in node.inputs if isinstance(x.module, nn.Parameter)]
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


def _lead_past(graph: DependencyGraph, links: dict[Any, list[Link]]) -> None:
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


def _lead_through(graph: DependencyGraph, links: dict[Any, list[Link]]) -> None:
    """Connect what a layer reads across its channels (positions that are mixed on a transposed map)
    to where what it makes meets channels again, which are the same there."""
    relations = graph.relations
    for node in list(graph.module2node.values()):
        if axes_of(node).site_dim is None or len(node.inputs) != 1:
            continue
        at, before = node, None
        while len(at.outputs) == 1 and (at is node or len(at.inputs) == 1):
            at = at.outputs[0]
        if len(at.inputs) > 1 and relations.is_across(node):
            before = _like(node, at, relations)
        if before is not None and before not in at.inputs and at not in links:
            links[at] = [*relations.links(at), (before.grad_fn, 0)]
            at.inputs, before.outputs = [*at.inputs, before], [*before.outputs, at]


def _like(node: Any, at: Any, relations: Relations) -> Any:
    """The nearest node before a layer whose channels lie as those of another node; None if there is
    none."""
    while len(node.inputs) == 1 and node is not at:
        node = node.inputs[0]
        if relations.lies_like(node, at):
            return node
        if axes_of(node).site_dim is not None:
            return None
    return None

"""A network's program from one call with real numbers, in a tenth of the time of ``torch.export``.

``torch.export`` reasons about every size as a symbol, which takes seconds of the training thread.
Here the operators of one call are noted, with a number of samples that divides no other size in
sight: whatever is a multiple of it counts samples. That is a guess, so it is tried.

Promises: what is returned has computed, under random masks, for two and for three samples, what the
network computes; where it has not, or the network looks at values (``if x.sum() > 0``), there is
nothing to return, and ``torch.export`` is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from elesh.program.program import DOES_NOT_RUN, IGNORED, GateSlot, Node, Program, encoded, name_of
from leyline import ContractError, InvalidField

from .refitting import Expected, Slot, alike

Call = Callable[[list[Tensor], dict[str, Tensor]], Tensor]
_PRIMES = (11, 13, 17, 19, 23, 29, 31)
"""Numbers of samples; small ones are sizes of kernels."""
_TRIED = (2, 3)
_LARGEST = 2**40
"""Larger numbers mean "to the end"."""
_SIZED = frozenset(
    """
    aten.view.default aten.reshape.default aten._unsafe_view.default aten.expand.default
    aten.broadcast_to.default aten.repeat.default aten.tile.default aten.unflatten.int
    aten.narrow.default aten.slice.Tensor aten.split_with_sizes.default
    aten.repeat_interleave.self_int aten.arange.default aten.arange.start aten.arange.start_step
    aten.zeros.default aten.ones.default aten.full.default aten.empty.memory_format
    aten.new_zeros.default aten.new_ones.default aten.new_full.default
    """.split()  # noqa: SIM905
)
"""Operators with sizes among their arguments, or numbers that follow from them."""


def quick_trace(
    call: Call,
    examples: Callable[[int], tuple[dict[str, Tensor], list[Tensor]]],
    slots: Sequence[Slot],
    tensors: Mapping[str, Tensor],
    sizes: Iterable[int],
    model_hash: str,
    expected: Expected,
) -> tuple[Program, dict[str, Tensor]] | None:
    """The program, and the tensors that the network makes from nothing, by the program's paths.

    Args:
        call: the network, of gates and inputs by name.
        examples: for a number of samples: inputs and gates.
        slots: what the gates multiply, in order.
        tensors: parameters and buffers by path.
        sizes: what sizes there are beside the number of samples.
        expected: asked for two and for three samples.
    """
    known = {size for size in sizes if size}
    samples = next((p for p in _PRIMES if all(size % p for size in known)), None)
    if samples is None:
        return None
    inputs, gates = examples(samples)
    try:
        with _one_fake_mode():
            traced = make_fx(call, tracing_mode="real", pre_dispatch=True)(gates, inputs)
        program, constants = _read(traced, samples, list(inputs), slots, tensors, model_hash)
        for count in _TRIED:
            given, masks, outputs = expected(count)
            if not alike(program.run({**tensors, **constants}, given, masks), outputs):
                return None
    except (*DOES_NOT_RUN, ContractError):  # torch.export will say why, if it cannot either
        return None
    return program, constants


def _one_fake_mode() -> AbstractContextManager[Any]:
    """``make_fx`` notes the shape of every value by a mode that it makes anew each time, with the
    whole stack, unless one is at hand: that is two thirds of what it takes."""
    return tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))


def _read(
    traced: fx.GraphModule,
    samples: int,
    names: Sequence[str],
    slots: Sequence[Slot],
    tensors: Mapping[str, Tensor],
    model_hash: str,
) -> tuple[Program, dict[str, Tensor]]:
    """The graph in the form that workers read.

    Raises:
        InvalidField: if it holds something that a program may not hold.
    """
    graph = traced.graph
    given = [node.name for node in graph.nodes if node.op == "placeholder"]
    gates = tuple(GateSlot(value, *slot) for value, slot in zip(given, slots, strict=False))
    inputs = dict(zip(given[len(slots) :], names, strict=True))
    paths, weights, constants = dict[int, str](), dict[str, str](), dict[str, Tensor]()
    for path, tensor in tensors.items():
        paths.setdefault(id(tensor), path)  # a tensor of several names is read by the first
    for node in graph.find_nodes(op="get_attr"):
        tensor = getattr(traced, str(node.target))
        weights[node.name] = path = paths.get(id(tensor), f"constant/{node.target}")
        if id(tensor) not in paths:
            constants[path] = tensor
    counter = _Counter(samples, given[0])
    nodes = tuple(_nodes(graph, counter))
    (output,) = graph.find_nodes(op="output")
    found = output.args[0]
    result = found[0] if isinstance(found, (list, tuple)) and len(found) == 1 else found
    if not isinstance(result, fx.Node):
        raise InvalidField("model", "one tensor as the output", str(result)[:200])
    nodes = (*counter.nodes(), *nodes)
    return Program(model_hash, weights, inputs, gates, nodes, result.name), constants


class _Counter:
    """Stands in for every multiple of the number of samples."""

    def __init__(self, samples: int, first: str) -> None:
        self._samples, self._first = samples, first
        self._factors: set[int] = set()

    def replaced(self, value: Any) -> Any:
        """An argument with references in place of what counts samples."""
        if isinstance(value, list):
            return [self.replaced(part) for part in value]
        if type(value) is not int or not 0 < value < _LARGEST or value % self._samples:
            return value
        factor = value // self._samples
        self._factors.add(factor)
        return {"value": self._name(factor)}

    def nodes(self) -> Iterator[Node]:
        """What makes the numbers that were asked for."""
        if self._factors:
            first = {"value": self._first}
            yield Node(self._name(1), "aten.sym_size.int", (first, 0), {})
        for factor in sorted(self._factors - {1}):
            args = ({"value": self._name(1)}, factor)
            yield Node(self._name(factor), "operator.mul", args, {})

    @staticmethod
    def _name(factor: int) -> str:
        return "samples" if factor == 1 else f"samples_{factor}"


def _nodes(graph: fx.Graph, counter: _Counter) -> Iterator[Node]:
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or str(node.target) in IGNORED:
            continue
        if node.target is torch._C._set_grad_enabled:
            continue  # who runs the program says whether gradients are wanted
        args = [encoded(value) for value in node.args]
        kwargs = {key: encoded(value) for key, value in node.kwargs.items()}
        operator = name_of(node.target)
        if operator in _SIZED:
            args = [counter.replaced(value) for value in args]
            kwargs = {key: counter.replaced(value) for key, value in kwargs.items()}
        yield Node(node.name, operator, tuple(args), kwargs)

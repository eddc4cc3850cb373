"""Residual branches of a network, read off the autograd graph of one forward pass.

A branch is one operand of an addition: a module's output that depends on the other operand, the
stream. Promises: the model is not changed; everything that only the branch leads to the outputs
(and so gets no gradient without it) is told apart from what others use, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from elesh.trainer.network.calling import Inputs, call, tensors_in
from elesh.trainer.surgery.bypass import first_of

Link = tuple[Any, int]
"""A tensor as autograd knows it: the function that made it and the number of its output."""


@dataclass(frozen=True)
class Pass:
    """One call of a module in the traced forward pass."""

    path: str
    entered: int
    """When it began, counted in events."""
    left: int
    """When it ended."""
    input: Link | None
    """Its first tensor input."""
    output: Link | None
    """Its first output, if that is a tensor."""
    extra_outputs: int
    shape: tuple[int, ...]
    """Of its first output."""


@dataclass(frozen=True)
class Branch:
    """One addition with a branch on it."""

    addition: Any
    contribution: Link
    stream: Link
    reads_stream: bool
    """Whether the branch depends on the stream: if not, the shortcut is a layer of its own."""


class Trace:
    """One forward pass of a model whose parameters require gradients."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.passes: list[Pass] = []
        self._clock = 0
        self._open: list[tuple[str, int, Link | None]] = []
        handles = []
        for path, module in model.named_modules():
            if path:
                handles.append(
                    module.register_forward_pre_hook(self._enter(path), with_kwargs=True)
                )
                handles.append(module.register_forward_hook(self._leave))
        try:
            output = call(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.roots = [t.grad_fn for t in tensors_in(output) if t.grad_fn is not None]

    def _enter(self, path: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._clock += 1
            came = tensors_in([*args, *kwargs.values()])
            self._open.append((path, self._clock, _link(came[0]) if came else None))

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._clock += 1
        path, entered, came = self._open.pop()
        first = first_of(output)
        tensor = first if isinstance(first, Tensor) else None
        self.passes.append(
            Pass(
                path,
                entered,
                self._clock,
                came,
                None if tensor is None else _link(tensor),
                len(output) - 1 if isinstance(output, tuple) else 0,
                () if tensor is None else tuple(tensor.shape),
            )
        )

    @cached_property
    def times(self) -> Counter[str]:
        """How often each module was called."""
        return Counter(one.path for one in self.passes)

    @cached_property
    def made(self) -> dict[Link, list[Pass]]:
        """The calls that had each tensor as their output."""
        found: dict[Link, list[Pass]] = {}
        for one in self.passes:
            if one.output is not None:
                found.setdefault(one.output, []).append(one)
        return found

    def branches(self) -> Iterator[Branch]:
        """Additions of a module's output to something, in order of execution where it counts."""
        found = []
        for node in self.reached():
            operands = [(function, number) for function, number in node.next_functions if function]
            if node.name().startswith("AddBackward") and len(operands) == 2:
                found += list(self._of(node, operands[0], operands[1]))
        found.sort(key=lambda branch: self.made[branch.contribution][0].left)
        yield from found

    def _of(self, node: Any, one: Link, two: Link) -> Iterator[Branch]:
        orders = ((one, two), (two, one))
        for contribution, stream in orders:
            if stream[0] in self._before(contribution[0]):
                if contribution in self.made:
                    yield Branch(node, contribution, stream, reads_stream=True)
                return
        for contribution, stream in orders:  # Branches side by side: (x + a(x)) + b(x).
            if contribution in self.made and self._summands(stream) & self._before(contribution[0]):
                yield Branch(node, contribution, stream, reads_stream=True)
                return
        if one in self.made and two in self.made:
            first, second = sorted(orders[0], key=lambda link: len(self._before(link[0])))
            yield Branch(node, second, first, reads_stream=False)

    @staticmethod
    def _summands(stream: Link) -> set[Any]:
        """What was added up to the stream, sums of sums included."""
        found, queue = set(), [stream[0]]
        while queue:
            node = queue.pop()
            if node.name().startswith("AddBackward"):
                below = [f for f, _ in node.next_functions if f is not None and f not in found]
                found.update(below)
                queue += below
        return found

    def _before(self, function: Any) -> set[Any]:
        return set(_walk([f for f, _ in function.next_functions if f is not None], None))

    def reached(self, without: Any = None) -> list[Any]:
        """All functions behind the outputs, not going through ``without``."""
        return list(_walk(self.roots, without))

    def parameters(self, without: Any = None) -> set[int]:
        """The ``id`` of every parameter that the outputs depend on, not through ``without``."""
        return {id(f.variable) for f in self.reached(without) if hasattr(f, "variable")}


def _link(tensor: Tensor) -> Link | None:
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _walk(starts: Iterable[Any], without: Any) -> Iterator[Any]:
    seen: set[Any] = set()
    queue = [node for node in starts if node is not without]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        queue += [f for f, _ in node.next_functions if f is not None and f is not without]

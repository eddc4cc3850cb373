"""Residual branches of a network, read from the autograd graph of one forward pass.

A branch is one operand of an addition: a module's output that depends on the other operand, the
stream. Promises: the model is not changed; everything that only the branch leads to the outputs
(and so gets no gradient without it) is distinguished from what others use, too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from elesh.trainer.network.calls import Call, Link

_MOVES = ("Transpose", "View", "Permute", "UnsafeView", "Clone", "ToCopy", "Reshape", "Squeeze")


@dataclass(frozen=True)
class Branch:
    """One addition with a branch on it."""

    addition: Any
    contribution: Link
    stream: Link
    reads_stream: bool
    """Whether the branch depends on the stream: if not, the shortcut is a layer of its own."""


class Trace:
    """A forward pass of a model whose parameters require gradients.

    Args:
        passes: its calls of modules.
        outputs: what made its outputs.
    """

    def __init__(self, passes: Sequence[Call], outputs: Sequence[Link]) -> None:
        self.passes, self.outputs = passes, outputs
        self.roots = [function for function, _ in outputs]

    @cached_property
    def times(self) -> Counter[str]:
        """How often each module was called."""
        return Counter(one.name for one in self.passes)

    @cached_property
    def made(self) -> dict[Link, list[Call]]:
        """The calls that had each tensor as their output."""
        return _grouped((one.made, one) for one in self.passes)

    @cached_property
    def given(self) -> dict[Link, list[Call]]:
        """The calls that had each tensor as their first input."""
        return _grouped((one.first, one) for one in self.passes)

    @cached_property
    def last(self) -> dict[str, Call]:
        """The last call of every module."""
        return {one.name: one for one in self.passes}

    def branches(self) -> list[Branch]:
        """Additions of a module's output to something, in order of execution where it counts."""
        found: dict[Link, Branch] = {}
        for node in self.reached:
            operands = [(function, number) for function, number in node.next_functions if function]
            if node.name().startswith("AddBackward") and len(operands) == 2:
                for branch in self._of(node, operands[0], operands[1]):
                    known = found.get(branch.contribution)
                    # The same of two branches side by side, as which it could not go.
                    if known is None or not known.reads_stream:
                        found[branch.contribution] = branch
        return sorted(found.values(), key=lambda one: self.made[one.contribution][0].left)

    def _of(self, node: Any, one: Link, two: Link) -> Iterator[Branch]:
        orders = ((one, two), (two, one))
        for contribution, stream in orders:
            if self._reads(contribution, {stream[0]}):
                for end in self._ends(contribution, stream):
                    yield Branch(node, end, stream, reads_stream=True)
                return
        for contribution, stream in orders:  # Branches side by side: (x + a(x)) + b(x).
            if contribution in self.made and self._reads(contribution, self._summands(stream)):
                yield Branch(node, contribution, stream, reads_stream=True)
                return
        if one in self.made and two in self.made:
            first, second = sorted(orders[0], key=lambda link: len(behind([link[0]])))
            yield Branch(node, second, first, reads_stream=False)

    def _ends(self, contribution: Link, stream: Link) -> Iterator[Link]:
        """The outputs of modules that a contribution is: it, or what it is the sum of (branches in
        parallel), scaled by parameters or with its axes moved."""
        queue = [contribution]
        while queue:
            link = queue.pop(0)
            function = link[0]
            operands = [(f, n) for f, n in function.next_functions if f is not None]
            inner = [one for one in operands if not hasattr(one[0], "variable")]
            scaled = function.name().startswith("MulBackward") and len(inner) < len(operands)
            # Where a dropout, or nothing, follows a scale, the scale is the outer module's own.
            if any(
                self.times[one.name] == 1 and not (scaled and _bare(one.module))
                for one in self.made.get(link, ())
            ):
                yield link
                continue
            summed = function.name().startswith("AddBackward")
            if len(inner) == 1 and (function.name().startswith(_MOVES) or len(operands) == 2):
                if function.name().startswith((*_MOVES, "MulBackward")):
                    queue += inner
            elif summed and len(inner) == 2 and all(self._reads(x, {stream[0]}) for x in inner):
                queue += inner
            elif link in self.made:
                yield link

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

    def _reads(self, start: Link, goals: set[Any]) -> bool:
        """Whether what ``start`` made depends on what one of ``goals`` made. Functions are numbered
        as they are called: what came before all goals is not looked at."""
        if not goals:
            return False
        first = min(goal._sequence_nr() for goal in goals)
        seen, stack = set[Any](), [start[0]]
        while stack:
            for function, _ in stack.pop().next_functions:
                if function in goals:
                    return True
                if function is not None and function not in seen:
                    seen.add(function)
                    if not hasattr(function, "variable") and function._sequence_nr() > first:
                        stack.append(function)
        return False

    def dead(self, contribution: Link) -> set[int]:
        """The ``id`` of every parameter that the outputs depend on through this alone."""
        uses, queue, found = Counter[Any](), [contribution[0]], set[int]()
        while queue:
            function = queue.pop()
            if hasattr(function, "variable"):
                found.add(id(function.variable))
            for before, _ in function.next_functions:
                if before is not None:
                    uses[before] += 1
                    if uses[before] == self._uses[before]:
                        queue.append(before)
        return found

    def alive(self, contributions: Iterable[Link]) -> set[Any]:
        """All functions that the outputs depend on in other ways than through these alone."""
        return set(behind(self.roots, {function for function, _ in contributions}))

    @cached_property
    def _uses(self) -> Counter[Any]:
        """How often the result of every function is used."""
        found = Counter(root for root in self.roots)
        for function in self.reached:
            found.update(before for before, _ in function.next_functions if before is not None)
        return found

    @cached_property
    def reached(self) -> list[Any]:
        """All functions behind the outputs."""
        return behind(self.roots)


def _grouped(pairs: Iterable[tuple[Link | None, Call]]) -> dict[Link, list[Call]]:
    found: dict[Link, list[Call]] = {}
    for link, one in pairs:
        if link is not None:
            found.setdefault(link, []).append(one)
    return found


def _bare(module: nn.Module) -> bool:
    """Whether a module has no parameters."""
    return next(module.parameters(), None) is None


def parameters_behind(functions: Iterable[Any]) -> set[int]:
    """The ``id`` of every parameter among these functions of an autograd graph."""
    return {id(f.variable) for f in functions if hasattr(f, "variable")}


def behind(starts: Sequence[Any], barriers: Collection[Any] = ()) -> list[Any]:
    """These functions and all that they depend on, but through ``barriers``."""
    seen: set[Any] = set(barriers)
    queue = list(starts)
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += [f for f, _ in node.next_functions if f is not None]
    return list(seen.difference(barriers))


def with_gradients(
    starts: Sequence[Link], drawn: Sequence[Tensor], ends: Sequence[Link]
) -> set[Link]:
    """Which of these ends have a gradient that is not zero. Only those of the first ones are ever
    there together: of the others it is looked at on its way."""
    numbers: dict[Any, list[int]] = defaultdict(list)
    for function, number in ends:
        numbers[function].append(number)
    found = set[Link]()

    def noting(function: Any) -> Callable[[tuple[Tensor | None, ...]], None]:
        def note(gradients: tuple[Tensor | None, ...]) -> None:
            for number in numbers[function]:
                gradient = gradients[number]
                if gradient is not None and bool(gradient.any()):
                    found.add((function, number))

        return note

    later = _behind_others(list(numbers))
    first = [link for link in ends if link[0] not in later]
    handles = [function.register_prehook(noting(function)) for function in later]
    try:
        gradients = torch.autograd.grad(
            [GradientEdge(*link) for link in starts],
            [GradientEdge(*link) for link in first],
            drawn,
            allow_unused=True,
        )
    finally:
        for handle in handles:
            handle.remove()
    return found | {
        link for link, g in zip(first, gradients, strict=True) if g is not None and bool(g.any())
    }


def _behind_others(functions: Sequence[Any]) -> list[Any]:
    """Those of these functions of an autograd graph that depend on others of them."""
    depends = dict[Any, bool]()
    among = set(functions)
    for function in sorted(behind(functions), key=lambda one: one._sequence_nr()):
        before = [one for one, _ in function.next_functions if one is not None]
        depends[function] = any(one in among or depends.get(one, False) for one in before)
    return [function for function in functions if depends[function]]

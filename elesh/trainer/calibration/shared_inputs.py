"""Consumers that read the same tensor, as query, key and value do: their slopes are added.

What such consumers lose, they lose together, so that the outputs move by the *sum* of their slopes
times one residual. Squares of single slopes would leave out what they do jointly.

Promises: a tensor that one consumer reads is passed on at once, as it is; of one that several read
the first consumer in the order of the forward pass gets the sum of all slopes, the others zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elesh.trainer.network.gates import Axis

_Key = tuple[int, int, tuple[int, ...]]


@dataclass
class _Pending:
    x: Tensor
    gradient: Tensor
    arrived: list[Axis]


@dataclass
class SharedInputs:
    """Who reads what in one forward pass.

    A tensor is known by its address, which no other has while the backward pass still needs it.
    """

    _readers: dict[_Key, list[Axis]] = field(default_factory=dict)
    _pending: dict[_Key, _Pending] = field(default_factory=dict)

    def clear(self) -> None:
        """Before the next forward pass."""
        self._readers.clear()
        self._pending.clear()

    def see(self, axis: Axis, x: Tensor) -> None:
        """In the forward pass: ``axis`` reads ``x``."""
        readers = self._readers.setdefault(_key(axis, x), [])
        if axis not in readers:  # A module that is called twice does not wait for itself.
            readers.append(axis)

    def together(self, axis: Axis, x: Tensor, gradient: Tensor) -> list[tuple[Axis, Tensor]]:
        """In the backward pass: the slopes that are complete with this one, by axis."""
        key = _key(axis, x)
        readers = self._readers.get(key, [axis])
        if len(readers) == 1:
            return [(axis, gradient)]
        waiting = self._pending.get(key)
        if waiting is None:
            waiting = self._pending[key] = _Pending(x, torch.zeros_like(gradient), [])
        waiting.gradient = waiting.gradient + gradient
        waiting.arrived.append(axis)
        if len(waiting.arrived) < len(readers):
            return []
        del self._pending[key]
        nothing = torch.zeros_like(gradient)
        return [(readers[0], waiting.gradient), *((other, nothing) for other in readers[1:])]

    def left(self) -> Iterator[tuple[Axis, Tensor, Tensor]]:
        """After the backward pass: axis, inputs and slopes where some reader had none, or was one
        of another tensor in the same memory (activation checkpointing)."""
        for waiting in self._pending.values():
            first, *others = dict.fromkeys(waiting.arrived)
            yield first, waiting.x, waiting.gradient
            for axis in others:
                yield axis, waiting.x, torch.zeros_like(waiting.gradient)
        self._pending.clear()


def _key(axis: Axis, x: Tensor) -> _Key:
    return x.data_ptr(), axis[1] % x.ndim, tuple(x.shape)

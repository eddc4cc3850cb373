"""Hooks that a training script has on parameters' gradients, and that a cut would break.

Promises: a hook that holds a tensor of its parameter's shape (a mask of the gradient, as sparse
training has it) is found, wherever it is within the hook's closure, arguments or object.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

__all__ = ["fixed_to_a_shape"]

_DEPTH = 3


def fixed_to_a_shape(model: nn.Module, names: Collection[str]) -> str:
    """The first of these parameters with a hook that would not fit after a cut; empty if none."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for name, parameter in model.named_parameters():
        if name in names and any(
            tensor.shape == parameter.shape and id(tensor) not in own
            for hook in _hooks(parameter)
            for tensor in _held(hook, _DEPTH)
        ):
            return name
    return ""


def _hooks(parameter: Tensor) -> Iterator[Any]:
    for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        yield from (getattr(parameter, kind, None) or {}).values()


def _held(thing: Any, depth: int) -> Iterator[Tensor]:
    """Tensors that a hook refers to."""
    if isinstance(thing, Tensor):
        yield thing
        return
    if not depth or isinstance(thing, nn.Module):
        return
    for part in _parts(thing):
        yield from _held(part, depth - 1)


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, FunctionType):
        return [
            *_contents(thing),
            *(thing.__defaults__ or ()),
            *(thing.__kwdefaults__ or {}).values(),
        ]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        return [thing.__func__, *getattr(thing.__self__, "__dict__", {}).values()]
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, (list, tuple)):
        return list(thing)
    return [*getattr(thing, "__dict__", {}).values()] if callable(thing) else []


def _contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # An empty cell.
            yield cell.cell_contents

"""Bypass modules, which take the place of removed modules.

Promises: a bypass module has no parameters and answers with its first input, or with zeros of that
input's shape; putting it in and taking it out again leaves every other module as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from elesh.trainer.network.calling import tensors_in
from leyline import StandIn

Replaced = tuple[str, nn.Module]
"""A path and the module that was there."""


class Bypass(nn.Module):
    """Stands where a module was removed.

    Its answer is a tensor of its own: who changes it in place (``ReLU(inplace=True)``, ``+=``) must
    not change what others still read. It keeps the module's plain settings (``eps``,
    ``batch_first``, ...), as others may ask for them; its parameters are None.

    Args:
        module: what it stands for.
        zero: answer with zeros instead of a copy of the first input.
        extra_outputs: None-s that follow the answer; 0 for a plain tensor.
    """

    def __init__(self, module: nn.Module, *, zero: bool, extra_outputs: int = 0) -> None:
        super().__init__()
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)):
                setattr(self, name, value)
        for name in module._parameters:
            self.register_parameter(name, None)
        self.zero, self.extra_outputs = zero, extra_outputs
        # PyTorch's transformer layers call their parts only while one of them has a hook.
        self.register_forward_hook(_nothing)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A copy of the first tensor among the arguments, or zeros like it."""
        first = tensors_in([*args, *kwargs.values()])[0]
        answer = torch.zeros_like(first) if self.zero else first.clone()
        return (answer, *[None] * self.extra_outputs) if self.extra_outputs else answer

    def extra_repr(self) -> str:
        """For printing."""
        return "zero" if self.zero else "identity"


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that does nothing."""


def put_in(model: nn.Module, stand_ins: Iterable[StandIn]) -> list[Replaced]:
    """Replace modules by their bypass modules; returns what was replaced, for :func:`put_back`."""
    replaced = []
    for stand_in in stand_ins:
        module = model.get_submodule(stand_in.module)
        bypass = Bypass(module, zero=stand_in.kind == "zero", extra_outputs=stand_in.extra_outputs)
        replaced.append((stand_in.module, module))
        _set(model, stand_in.module, bypass)
    return replaced


def put_back(model: nn.Module, replaced: Iterable[Replaced]) -> None:
    """Undo :func:`put_in`."""
    for path, module in replaced:
        _set(model, path, module)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def with_first(output: Any, first: Tensor) -> Any:
    """A module's output with another first tensor."""
    return (first, *output[1:]) if isinstance(output, tuple) else first


def first_of(output: Any) -> Any:
    """The first part of a module's output."""
    return output[0] if isinstance(output, tuple) and output else output

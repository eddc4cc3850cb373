"""Linear layers that people write themselves: a module with a matrix of its own, and perhaps a
vector that is added, whatever their names are and whichever way round the matrix lies.

Promises: told by what a shallow copy computes with random numbers in the place of its parameters,
once for every module; no attribute of the module changes, nor does PyTorch's random state.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from elesh.trainer.network.layers import ChannelAxes, is_transposed_linear, teach_layer

from .experts import is_router

__all__ = ["is_own_linear"]


@dataclass(frozen=True)
class _Linear:
    """How the parameters of a module lie."""

    weight: str
    bias: str
    transposed: bool
    """Whether the matrix is [in, out]."""


_KNOWN: WeakKeyDictionary[nn.Module, _Linear | None] = WeakKeyDictionary()


def is_own_linear(module: nn.Module) -> bool:
    """Whether this is such a layer, and none that is known otherwise."""
    known = is_transposed_linear(module) or is_router(module)
    return not known and _linear(module) is not None


def _axes(module: nn.Module) -> ChannelAxes:
    """The axes of its tensors that go with its channels."""
    found = _linear(module)
    assert found is not None
    makes, reads = (1, 0) if found.transposed else (0, 1)
    bias = ((found.bias, 0),) if found.bias else ()
    return ChannelAxes(((found.weight, makes), *bias), ((found.weight, reads),), -1, True)


def _refit(module: nn.Module) -> None:
    """Set its sizes from the shape of its matrix."""
    found, held = _linear(module), vars(module)
    assert found is not None
    weight = module._parameters[found.weight]
    assert weight is not None
    sizes = reversed(weight.shape) if found.transposed else weight.shape
    for name, size in zip(("out_features", "in_features"), sizes, strict=True):
        held |= {name: size} if type(held.get(name)) is int else {}


def _linear(module: nn.Module) -> _Linear | None:
    if module not in _KNOWN:
        _KNOWN[module] = _tried(module)
    return _KNOWN[module]


def _tried(module: nn.Module) -> _Linear | None:
    held = {name: p for name, p in module._parameters.items() if p is not None}
    matrices = [name for name, p in held.items() if p.ndim == 2 and min(p.shape) > 1]
    vectors = [name for name, p in held.items() if p.ndim == 1]
    if len(matrices) != 1 or len(vectors) > 1 or len(held) != 1 + len(vectors):
        return None
    if module._modules or module._buffers or held[matrices[0]].is_meta:
        return None
    try:
        tried = copy.copy(module)  # Its code may note something on it.
        tried.training = False
        with torch.no_grad(), torch.random.fork_rng([]):
            return _computed(tried, matrices[0], vectors[0] if vectors else "")
    except Exception:  # A module that takes other inputs, or is not complete, is none.
        return None


def _computed(module: nn.Module, matrix: str, bias: str) -> _Linear | None:
    generator = torch.Generator().manual_seed(0)
    held = module._parameters
    drawn: dict[str, Tensor] = {
        name: torch.randn(held[name].shape, generator=generator).to(held[name])  # type: ignore[union-attr]
        for name in (matrix, bias)
        if name
    }
    added = drawn[bias] if bias else 0.0
    for transposed in (False, True):
        weight = drawn[matrix].T if transposed else drawn[matrix]
        x = torch.randn(2, weight.shape[1], generator=generator).to(weight)
        if bias and len(drawn[bias]) != len(weight):
            continue
        vars(module).update(drawn)  # Found before parameters.
        try:
            made = type(module).forward(module, x)
        except Exception:  # It may lie the other way round.
            continue
        finally:
            for name in drawn:
                del vars(module)[name]
        expected = x @ weight.T + added
        same = isinstance(made, Tensor) and made.shape == expected.shape
        if same and torch.allclose(made.float(), expected.float(), rtol=1e-2, atol=1e-2):
            return _Linear(matrix, bias, transposed)
    return None


def _is_own(kind: type) -> bool:
    foreign = not kind.__module__.startswith("torch.")
    return foreign and not issubclass(kind, (nn.Linear, _ConvNd, nn.Embedding))


teach_layer(is_own_linear, _axes, _refit, among=_is_own)

"""Linear layers that people write themselves: a module with a matrix of its own, and perhaps a
vector that is added, whatever their names are and whichever way round the matrix lies; and those
that do more with what they multiply (an activation, neighbours in a graph that are summed), as long
as no channel knows of others.

Promises: told by what a shallow copy computes with random numbers in the place of its parameters,
once for every module; no attribute of the module changes, nor does PyTorch's random state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from elesh.trainer.network.layers import ChannelAxes, is_transposed_linear, teach_layer

from .experts import is_router


@dataclass(frozen=True)
class _Linear:
    """How the parameters of a module lie."""

    weight: str
    bias: str
    transposed: bool
    """Whether the matrix is [in, out]."""
    linear: bool = True
    """Whether it makes nothing but the products and the sum."""


_ROWS = 3
_MORE: tuple[Callable[[Tensor], tuple[Any, ...]], ...] = (
    lambda x: (),
    lambda x: (torch.rand(_ROWS, _ROWS).to(x),),
    lambda x: (torch.rand(_ROWS, _ROWS).to(x).to_sparse(),),
    lambda x: (torch.tensor([[0, 1, 2], [1, 2, 0]], device=x.device),),
)
"""What else such a layer may be given: nothing, weights of all pairs of rows, or edges."""


_KNOWN: WeakKeyDictionary[nn.Module, _Linear | None] = WeakKeyDictionary()


def is_own_linear(module: nn.Module) -> bool:
    """Whether this is such a layer that does nothing more, and none that is known otherwise."""
    found = _linear(module) if _is_own_layer(module) else None
    return found is not None and found.linear


def does_more(module: nn.Module) -> bool:
    """Whether this is such a layer that does more: a larger bias is no constant input then."""
    return _is_own(type(module)) and _is_own_layer(module) and not is_own_linear(module)


def _is_own_layer(module: nn.Module) -> bool:
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
    plain = not any(part._parameters or part._buffers for part in list(module.modules())[1:])
    if not plain or module._buffers or held[matrices[0]].is_meta:
        return None
    tried = _in_evaluation(module)
    with torch.no_grad(), torch.random.fork_rng([]):
        for more in _MORE:
            for transposed in (False, True):
                layer = _Linear(matrices[0], vectors[0] if vectors else "", transposed)
                try:
                    found = _computes(tried, layer, more)
                except Exception:  # It takes other inputs, or its matrix lies the other way round.
                    continue
                if found is not None:
                    return replace(layer, linear=found)
    return None


def _in_evaluation(module: nn.Module) -> nn.Module:
    """A copy with parameters of its own in no place: its code may note something on it."""
    made = copy.copy(module)
    made.training = False
    made._modules = {n: part and _in_evaluation(part) for n, part in module._modules.items()}
    return made


def _computes(
    module: nn.Module, layer: _Linear, more: Callable[[Tensor], tuple[Any, ...]]
) -> bool | None:
    """Whether a module is this linear layer, or else makes something of its products that knows
    nothing of other channels: it computes without some what it does of zeros in their place, and
    makes what it does but for those that it does not make. None if it is neither."""
    generator = torch.Generator().manual_seed(0)
    held = module._parameters
    names = [name for name in (layer.weight, layer.bias) if name]
    drawn = {n: torch.randn(held[n].shape, generator=generator).to(held[n]) for n in names}  # type: ignore[union-attr]
    makes, reads = (1, 0) if layer.transposed else (0, 1)
    matrix = drawn[layer.weight]
    x = torch.randn(_ROWS, matrix.shape[reads], generator=generator).to(matrix)
    if layer.bias and len(drawn[layer.bias]) != matrix.shape[makes]:
        return None
    others = more(x)

    def made(x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        vars(module).update(given)  # Found before parameters.
        try:
            return type(module).forward(module, x, *others)  # type: ignore[no-any-return]
        finally:
            for name in given:
                del vars(module)[name]

    whole = made(x, drawn)
    weight = matrix.T if layer.transposed else matrix
    expected = x @ weight.T + (drawn[layer.bias] if layer.bias else 0.0)
    if _alike(whole, expected) and not others:
        return True
    if whole.shape != expected.shape:
        return None
    axes = {layer.weight: makes, layer.bias: 0}
    fewer = {name: own.narrow(axes[name], 0, len(weight) - 1) for name, own in drawn.items()}
    silent = x.clone()
    silent[:, -1] = 0
    narrow = drawn | {layer.weight: matrix.narrow(reads, 0, matrix.shape[reads] - 1)}
    without = _alike(made(x[:, :-1], narrow), made(silent, drawn))
    return False if without and _alike(made(x, fewer), whole[:, :-1]) else None


def _alike(one: Any, two: Any) -> bool:
    same = isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape
    return same and torch.allclose(one.float(), two.float(), rtol=1e-2, atol=1e-2)


def _is_own(kind: type) -> bool:
    foreign = not kind.__module__.startswith("torch.")
    return foreign and not issubclass(kind, (nn.Linear, _ConvNd, nn.Embedding))


teach_layer(_is_own_layer, _axes, _refit, among=_is_own)

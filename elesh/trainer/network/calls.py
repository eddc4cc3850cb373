"""Notes which layers a forward pass called, with what and how often."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from leyline import LayerDescriptor

from .calling import tensors_in
from .layers import is_transposed_linear

Link = tuple[Any, int]
"""A tensor as autograd knows it: the function that made it and the number of its output."""


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    name: str
    module: nn.Module
    inputs: tuple[Link, ...]
    """What came in that has a history."""
    output: Any
    """The function that made its (first) output; None if it has no history."""
    positions: int
    """How often its weight was multiplied, all samples together."""


_MULTIPLY = {
    functional.linear: 0, functional.conv1d: 0, functional.conv2d: 0, functional.conv3d: 0,
    torch.conv1d: 0, torch.conv2d: 0, torch.conv3d: 0,
}  # fmt: skip
"""Functions that multiply by their second argument ("weight"), and its axis of outputs."""
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}


class _WeightsUsed(TorchFunctionMode):
    """While entered, counts how often parameters are multiplied, whoever does it."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: dict[int, int] = {}
        """By the id of the parameter, all samples together."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _MULTIPLY:
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            self._count(weight, result, _MULTIPLY[func])
        elif func in _PRODUCTS and len(args) > 1:
            self._count(args[1], result, -1)
        return result

    def _count(self, weight: Any, result: Any, dim: int) -> None:
        if isinstance(weight, nn.Parameter) and weight.ndim > 1 and isinstance(result, Tensor):
            used = result.numel() // max(1, weight.shape[dim])
            self.positions[id(weight)] = self.positions.get(id(weight), 0) + used


class Calls:
    """While entered, notes every call of a model's modules, in order."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self.made: list[Call] = []
        self._used = _WeightsUsed()
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> Calls:
        self._entered.enter_context(self._used)
        self._handles = [
            module.register_forward_hook(self._note(name), with_kwargs=True)
            for name, module in self._model.named_modules()
            if name
        ]
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()
        for handle in self._handles:
            handle.remove()

    def layers(self, samples: int) -> tuple[LayerDescriptor, ...]:
        """Descriptors of the modules with parameters of their own, in order of execution."""
        positions: dict[str, int] = {}
        for call in self.made:
            positions[call.name] = positions.get(call.name, 0) + call.positions
        modules = dict(self._model.named_modules())
        paths = {id(p): path for path, p in self._model.named_parameters()}
        called = tuple(
            descriptor
            for name, used in positions.items()
            if any(True for _ in modules[name].parameters(recurse=False))
            for descriptor in _descriptors(name, modules[name], used // samples, paths)
        )
        return called + tuple(self._by_functions(called, samples))

    def _by_functions(
        self, called: Sequence[LayerDescriptor], samples: int
    ) -> Iterator[LayerDescriptor]:
        """Layers whose weights others multiply by: their own forward pass is not called."""
        known = {layer.weight for layer in called if layer.weight}
        names = {layer.name for layer in called}
        for path, parameter in self._model.named_parameters():
            used = self._used.positions.get(id(parameter), 0) // samples
            if not used or path in known:
                continue
            owner, _, attribute = path.rpartition(".")
            kind = type(self._model.get_submodule(owner)).__name__.lower()
            name = owner if attribute == "weight" and owner not in names else path
            yield LayerDescriptor(name=name, kind=kind, weight=path, positions=used)

    def _note(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            came = [x for x in tensors_in([*args, *kwargs.values()]) if x.grad_fn is not None]
            left = tensors_in(output)
            self.made.append(
                Call(
                    name,
                    module,
                    tuple((x.grad_fn, x.output_nr) for x in came),
                    left[0].grad_fn if left else None,
                    _positions(module, tensors_in([*args, *kwargs.values()]), left),
                )
            )

        return note


def _positions(module: nn.Module, came: list[Tensor], left: list[Tensor]) -> int:
    if isinstance(module, _ConvTransposeNd):
        return came[0].numel() // module.in_channels
    if isinstance(module, _ConvNd):
        return left[0].numel() // module.out_channels
    if isinstance(module, nn.Linear):
        return left[0].numel() // module.out_features
    if is_transposed_linear(module):
        return left[0].numel() // left[0].shape[-1]
    return left[0].numel() // module.embed_dim if isinstance(module, nn.MultiheadAttention) else 0


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
    elif weight is not None and _multiplies(module):
        yield LayerDescriptor(name=name, kind=kind, weight=paths[id(weight)], positions=positions)
    else:
        yield LayerDescriptor(name=name, kind=kind)


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd)) or is_transposed_linear(module)

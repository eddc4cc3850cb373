"""A copy of a network to be traced and cut, with random weights that all have an effect.

Promises: the network is not changed, and only what is never written is shared; the weights of the
copy lie in a pool, so that it takes little more memory than its largest tensors: tensors whose
rows have the same length are windows of the same random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from elesh.trainer.network.calling import tensors_in
from leyline import InvalidField

from .dependency_graph import summary

__all__ = ["random_copy"]

_STEP = 257
"""Windows of a pool begin a multiple of so many numbers apart, so that no two layers are alike."""
_WINDOWS = 16


def random_copy(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy with every parameter in ``dtype``, random, and with gradients.

    Raises:
        InvalidField: if the model cannot be copied, naming the attribute that cannot.
    """
    made: dict[int, Any] = {}
    pool = _Pool(dtype)
    try:
        with torch.inference_mode(False):
            for tensor in _computed(model):
                made[id(tensor)] = tensor.detach().clone()
            for parameter in model.parameters():
                if not isinstance(parameter, (UninitializedBuffer, UninitializedParameter)):
                    made[id(parameter)] = pool.parameter(parameter)
            copied = copy.deepcopy(model, dict(made))
            _prepare_buffers(copied, dtype)
    except Exception as error:
        found = next(_uncopied(model, made), "") or summary(error)
        raise InvalidField("model", "a model that copy.deepcopy can copy", found) from error
    return copied


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Tensors with a history that modules keep from an earlier pass."""
    for module in model.modules():
        yield from (x for x in tensors_in(list(vars(module).values())) if not x.is_leaf)


class _Pool:
    """Random numbers that parameters are windows of."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._numbers: dict[tuple[int, torch.device], Tensor] = {}
        self._made = 0

    def parameter(self, like: Tensor) -> nn.Parameter:
        """A parameter of that shape; small ones have numbers of their own."""
        if not like.is_floating_point():
            return nn.Parameter(like.detach().clone(), requires_grad=False)
        self._made += 1
        if like.ndim < 2:
            generator = torch.Generator().manual_seed(self._made)
            drawn = torch.rand(like.shape, generator=generator, dtype=self._dtype) + 0.5
            return nn.Parameter(drawn.to(like.device))
        fan_in = max(1, like[0].numel())
        start = self._made % _WINDOWS * _STEP
        size = like.numel() + _WINDOWS * _STEP
        known = self._numbers.get((fan_in, like.device))
        if known is None or len(known) < size:
            generator = torch.Generator().manual_seed(fan_in)
            known = torch.randn(size, generator=generator, dtype=self._dtype)
            known = known.mul_((2 / fan_in) ** 0.5).to(like.device)
            self._numbers[fan_in, like.device] = known
        return nn.Parameter(known[start : start + like.numel()].view(like.shape))


def _prepare_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Buffers in ``dtype``; running statistics random."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _NormBase):
                for buffer in (module.running_mean, module.running_var):
                    if buffer is not None:
                        buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def _uncopied(model: nn.Module, made: dict[int, Any]) -> Iterator[str]:
    """Attributes that cannot be copied."""
    held = ("_parameters", "_buffers", "_modules")
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in held:
                continue
            try:
                copy.deepcopy(value, dict(made))
            except Exception as error:
                yield f"{path}.{name}".lstrip(".") + f": {summary(error)}"

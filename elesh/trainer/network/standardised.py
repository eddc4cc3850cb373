"""Convolutions that standardise their own weights: told by what they compute, and masked.

Each row of such a weight has its mean taken away and is divided by its deviation before it is used
(NFNet, BiT), so that without some inputs all others are scaled anew. As with a normalisation of
what passes, a mask has to take both over the inputs that are kept: for as long as the layer runs,
its weight is replaced by one of which it makes just that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from .layers import Norm, eps_of

__all__ = ["replace_weight", "standardised"]

_PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def standardised(module: nn.Module) -> Norm | None:
    """How a convolution standardises each row of its weight; None if it does not.

    Tried out: its output must not change where each row is scaled and shifted. The module has to
    say what it adds to the variance (``eps``).
    """
    if not isinstance(module, _ConvNd) or type(module).forward in _PLAIN:
        return None
    weight, eps = module._parameters.get("weight"), eps_of(module)
    if weight is None or not eps or isinstance(module, _ConvTransposeNd):
        return None
    reach = [k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, module.in_channels, *reach, generator=generator).to(weight)
    try:
        with torch.no_grad():
            same = _alike(module, weight, x)
    except Exception:  # One that takes other inputs is none that we know.
        return None
    return Norm("weights", 1 - weight.ndim, eps) if same else None


def _alike(module: nn.Module, weight: Tensor, x: Tensor) -> bool:
    changed = functional_call(module, {"weight": 2 * weight + weight.abs().mean()}, (x,))
    plain, none = module(x), module(0 * x)
    level = float((plain - none).abs().max())
    return level > 0 and bool(torch.allclose(changed, plain, rtol=0, atol=1e-2 * level))


def replace_weight(module: nn.Module, instead: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    """Until these handles are removed, every pass uses what ``instead`` makes of the weight."""

    def before(module: nn.Module, args: Any) -> None:
        weight = module._parameters["weight"]
        assert weight is not None
        vars(module)["weight"] = instead(weight)  # Found before parameters.

    def after(module: nn.Module, args: Any, output: Any) -> None:
        vars(module).pop("weight", None)

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]

"""Normalisations over channels: which modules are one, and what they do under a mask.

A layer normalisation takes its statistics over all channels of a position, so that a channel that
is merely set to zero changes what happens to all others. Under a mask it has to take them over the
channels that are kept, as it does after the cut. :func:`refilled` brings that about by its input
alone, so that any module that normalises so is masked alike, whatever its code looks like.

Promises: modules are recognized by what they compute, not by their name alone; nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["Norm", "norm_of", "refilled"]

_EPS = ("eps", "variance_epsilon", "epsilon")


@dataclass(frozen=True)
class Norm:
    """How a module normalises."""

    kind: Literal["layer", "rms"]
    dim: int
    """The axis of its input that the channels lie on; -1, or 1 behind the samples."""
    eps: float


def norm_of(module: nn.Module, shape: tuple[int, ...]) -> Norm | None:
    """How this module normalises an input of that shape over one axis; None if it does not.

    Layer and RMS normalisations of PyTorch are known; of modules that have "norm" in their type's
    name, it is tried out: the answer must not depend on the scale of what comes in, and must mix
    what lies along one axis only.
    """
    values = (vars(module).get(name) for name in _EPS)
    eps = next((value for value in values if isinstance(value, float)), 0.0)
    plain = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    if plain and isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if len(module.normalized_shape) != 1:
            return None
        if isinstance(module, nn.RMSNorm):
            return Norm("rms", -1, 0.0)
        return Norm("layer", -1, eps) if eps else None
    named = "norm" in type(module).__name__.lower()
    if isinstance(module, (_NormBase, nn.GroupNorm)) or not (named or _derived(module)):
        return None
    if any(True for _ in module.children()) or not 2 <= len(shape) <= 5:
        return None
    return _tried(module, shape, eps)


def _derived(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm))


def _tried(module: nn.Module, shape: tuple[int, ...], eps: float) -> Norm | None:
    like = next(iter(module.parameters()), None)
    small = (2, *(min(size, 3) for size in shape[1:]))
    sizes = {p.shape[0] for p in module.parameters() if p.ndim == 1 and p.shape[0] > 1}
    for dim in (-1, 1):
        size = shape[dim]
        if sizes and sizes != {size}:
            continue
        tried = list(small)
        tried[dim] = size
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tried, generator=generator, dtype=torch.float32)
        x = x if like is None else x.to(like)
        try:
            with torch.no_grad():
                found = _kind(module, x, dim)
        except Exception:  # A module with other inputs is no normalisation that we know.
            continue
        if found == "rms" or (found == "layer" and eps):
            kind: Literal["layer", "rms"] = "layer" if found == "layer" else "rms"
            return Norm(kind, dim if dim < 0 or len(shape) > 2 else -1, eps)
    return None


def _kind(module: nn.Module, x: Tensor, dim: int) -> str:
    y = module(x)
    if not isinstance(y, Tensor) or y.shape != x.shape or x.shape[dim] < 2:
        return ""

    def same(other: Tensor) -> bool:
        return bool(torch.allclose(other, y, rtol=1e-2, atol=1e-2))

    if not same(module(x * 4)) or same(module(x * 0)):
        return ""
    changed = x.clone()
    changed.select(dim, 0)[(0,) * (x.ndim - 1)] += 3
    moved = (module(changed) - y).abs() > 1e-4
    along = moved.movedim(dim, -1)[(0,) * (x.ndim - 1)]
    if int(moved.sum()) != int(along.sum()) or int(along.sum()) < 2:
        return ""
    return "layer" if same(module(x + 2)) else "rms"


def refilled(x: Tensor, gate: Tensor, dim: int, kind: str, eps: float) -> Tensor:
    """What a normalisation must be given to treat the kept channels as if there were no others.

    RMS: channels whose gate is zero get the root mean square of the kept ones. Layer: the kept
    channels less their mean, scaled so that variance over all channels plus ``eps`` stands to
    them as their own variance plus ``eps`` does; the others zero.

    Args:
        gate: of ones and zeros (or between), broadcastable to ``x``.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    gate = gate.to(wide.dtype)
    count = gate.sum(dim, keepdim=True)
    if kind == "rms":
        level = ((gate * wide * wide).sum(dim, keepdim=True) / count).sqrt()
        return (gate * wide + (1 - gate) * level).to(x.dtype)
    mean = (gate * wide).sum(dim, keepdim=True) / count
    centred = gate * (wide - mean)
    variance = (centred * centred).sum(dim, keepdim=True) / count
    lost = (1 - gate).mean(dim, keepdim=True)
    return (centred * (eps / (variance * lost + eps)).sqrt()).to(x.dtype)

"""How layers normalise over channels, and how they behave under a mask.

A layer normalisation takes its statistics over all channels of a position, so that a channel that
is merely set to zero changes what happens to all others. Under a mask it has to take them over the
channels that are kept, as it does after the cut. :func:`refilled` brings that about by its input
alone, so that any module that normalises so is masked alike, whatever its code looks like.

Some convolutions standardise their own weights (NFNet, BiT): each row has its mean taken away and
is divided by its deviation before it is used, so that without some inputs all others are scaled
anew. A mask has to take both over the inputs that are kept: for as long as the layer runs, its
weight is replaced by one of which it makes just that.

Promises: both are recognized by what they compute, not by their name alone; nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from elesh.trainer.network.layers import normalises_maps
from leyline import NormKind

_EPS = ("eps", "variance_epsilon", "epsilon")
_SHRUNK = 0.8
"""What is left of a normalised input so small that what is added to its variance shows."""


@dataclass(frozen=True)
class Norm:
    """How a module normalises."""

    kind: NormKind
    dim: int
    """The axis of its input that the channels lie on; -1, or 1 behind the samples. Of weights that
    are standardised row by row: of these, counted from the end."""
    eps: float


def norm_of(module: nn.Module, shape: tuple[int, ...]) -> Norm | None:
    """How this module normalises an input of that shape over one axis; None if it does not.

    Layer and RMS normalisations of PyTorch are known; modules that have "norm" in their type's
    name, something that they add to a variance (``eps``), or only vectors, are tried out: the
    answer must not depend on the scale of what comes in, and must mix what lies along one axis
    only; or be what came in, scaled by its global response.
    """
    eps = eps_of(module)
    plain = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    if normalises_maps(module):
        return Norm("map", 1, eps) if eps and len(shape) == 4 else None
    if plain and isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if len(module.normalized_shape) != 1:
            return None
        if isinstance(module, nn.RMSNorm):
            return Norm("rms", -1, 0.0)
        return Norm("layer", -1, eps) if eps else None
    if isinstance(module, nn.GroupNorm) and module.num_groups == 1 and eps and len(shape) > 2:
        return Norm("map", 1, eps)
    named = "norm" in type(module).__name__.lower() or eps > 0 or _scales(module)
    if isinstance(module, (_NormBase, nn.GroupNorm)) or not (named or _derived(module)):
        return None
    if any(True for _ in module.children()) or not 2 <= len(shape) <= 5:
        return None
    return _tried(module, shape, eps)


def eps_of(module: nn.Module) -> float:
    """What it says that it adds to the variance; 0 if it does not say."""
    values = (vars(module).get(name) for name in _EPS)
    return next((value for value in values if isinstance(value, float)), 0.0)


def _derived(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm))


def _scales(module: nn.Module) -> bool:
    """Whether somebody's own module holds nothing but vectors, of one length."""
    held = [parameter for parameter in module._parameters.values() if parameter is not None]
    own = not type(module).__module__.startswith("torch.")
    return own and bool(held) and {p.ndim for p in held} == {1} and len({*map(len, held)}) == 1


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
                how = _added(module, x, dim) if found == "layer" else None
        except Exception:  # A module with other inputs is no normalisation that we know.
            continue
        kind, known = how or (found, eps)
        if kind and (kind != "layer" or known):
            return Norm(kind, dim if dim < 0 or len(shape) > 2 else -1, known)
    return None


def _added(
    module: nn.Module, x: Tensor, dim: int
) -> tuple[Literal["layer", "deviation"], float] | None:
    """What is added to the variance, or to the deviation, told by how small inputs shrink."""
    none, squares = module(x * 0), x.var(dim, unbiased=False)
    far = torch.linalg.vector_norm(module(x * 2**10) - none, dim=dim)
    for scale in (2.0**-step for step in range(0, 40, 2)):
        left = torch.linalg.vector_norm(module(x * scale) - none, dim=dim) / far
        if float(left.mean()) < _SHRUNK:
            deviations = x.std(dim) * scale
            for kind, each in (
                ("layer", squares * scale**2 * (left**-2 - 1)),
                ("deviation", deviations * (1 / left - 1)),
            ):
                eps = float(each.median())
                if bool(torch.allclose(each, each.median(), rtol=1e-2, atol=0.0)):
                    short = float(f"{eps:.1e}")  # As people write it.
                    return kind, short if abs(short - eps) < 1e-3 * eps else eps  # type: ignore[return-value]
            return None
    return None


def _kind(module: nn.Module, x: Tensor, dim: int) -> Literal["layer", "rms", "response"] | None:
    y = module(x)
    if not isinstance(y, Tensor) or y.shape != x.shape or x.shape[dim] < 2:
        return None

    def same(other: Tensor) -> bool:
        return bool(torch.allclose(other, y, rtol=1e-2, atol=1e-2))

    if not same(module(x * 4)) or same(module(x * 0)):
        return "response" if _responds(module, x, dim) else None
    changed = x.clone()
    changed.select(dim, 0)[(0,) * (x.ndim - 1)] += 3
    moved = (module(changed) - y).abs() > 1e-4
    along = moved.movedim(dim, -1)[(0,) * (x.ndim - 1)]
    if int(moved.sum()) != int(along.sum()) or int(along.sum()) < 2:
        return None
    return "layer" if same(module(x + 2)) else "rms"


def _responds(module: nn.Module, x: Tensor, dim: int) -> bool:
    """Whether, but for a constant, every channel is scaled in proportion to its norm over all
    positions as a share of the mean of all channels' norms, or is passed on and that added."""
    positions = [axis for axis in range(1, x.ndim) if axis != dim % x.ndim]
    norms = torch.linalg.vector_norm(x, dim=positions, keepdim=True)
    share = norms / norms.mean(dim, keepdim=True)
    if x.ndim < 3 or bool((x == 0).any()):
        return False
    scale = (module(x) - module(x * 0)) / x
    slopes = [(scale - passed) / share for passed in (0.0, 1.0)]
    first = [slope.movedim(dim, -1).flatten(0, -2) for slope in slopes]
    flat = [bool(torch.allclose(one, one[:1], rtol=1e-2, atol=1e-3)) for one in first]
    return any(flat) and not bool(torch.allclose(scale, scale.mean(), atol=1e-3))


def refilled(x: Tensor, gate: Tensor, dim: int, kind: str, eps: float) -> Tensor:
    """What a normalisation must be given to treat the kept channels as if there were no others.

    RMS: channels whose gate is zero get the root mean square of the kept ones. Layer: the kept
    channels less their mean, scaled so that variance over all channels plus ``eps`` stands to
    them as their own variance plus ``eps`` does; the others zero. Deviation: likewise of the
    deviations, with one channel less in the denominator. Scores: the kept channels scaled, as a
    product with them will be divided by the root of their number; the others zero. Operand: the
    others zero. Map: the same over channels and
    positions together; weights: over each row. Response: the others get, at
    every position, what makes their norm the mean of the kept ones'.

    Args:
        gate: of ones and zeros (or between), broadcastable to ``x``.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    gate = gate.to(wide.dtype)
    count = gate.sum(dim, keepdim=True)
    positions = [axis for axis in range(1, x.ndim) if axis != dim % x.ndim]
    places = math.prod(x.shape[axis] for axis in positions)
    if kind == "operand":
        return (gate * wide).to(x.dtype)
    if kind == "scores":
        return (gate * wide * (x.shape[dim] / count).sqrt()).to(x.dtype)
    if kind == "rms":
        level = ((gate * wide * wide).sum(dim, keepdim=True) / count).sqrt()
        return (gate * wide + (1 - gate) * level).to(x.dtype)
    if kind == "response":
        norms: Tensor = torch.linalg.vector_norm(gate * wide, dim=positions, keepdim=True)
        level = norms.sum(dim, keepdim=True) / (count * math.sqrt(places))
        return (gate * wide + (1 - gate) * level).to(x.dtype)
    alone = kind in ("layer", "deviation")
    axes, many = (dim, count) if alone else ((dim, *positions), count * places)
    mean = (gate * wide).sum(axes, keepdim=True) / many
    centred = gate * (wide - mean)
    if kind == "deviation":
        total = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
        own, whole = total / (count - 1).sqrt(), total / math.sqrt(x.shape[dim] - 1)
        scaled: Tensor = centred * (eps / (own - whole + eps))
        return scaled.to(x.dtype)
    variance = (centred * centred).sum(axes, keepdim=True) / many
    lost = (1 - gate).mean(dim, keepdim=True)
    return (centred * (eps / (variance * lost + eps)).sqrt()).to(x.dtype)


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

"""Layers whose weight is computed, mainly as a direction times a gain (weight normalisation);
convolutions with standardised weights and a gain.

Promises: both ways of PyTorch to normalise so are known (``nn.utils.parametrizations.weight_norm``
and the older hook of ``nn.utils.weight_norm``), whichever axis has gains; what a cut leaves of such
a weight is what it was before: where a direction loses numbers that its length was taken over, its
gain makes up for them (:func:`gains_after`).

Reference: Salimans and Kingma, Weight Normalization, 2016.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from elesh.trainer.network.layers import LINEAR, ChannelAxes, conv_axes, teach_layer

_OLD: Any = sys.modules["torch.nn.utils.weight_norm"]
"""The module, which a function hides in its package."""


DIRECTIONS = ("weight_v", "parametrizations.weight.original1")
"""How the paths of directions end."""


@dataclass(frozen=True)
class WeightNorm:
    """Where a layer keeps gain and direction of its weight."""

    gain: str
    """Its attribute, of a part with a dot."""
    direction: str
    dim: int
    """The axis that has a gain for each place; -1: one gain for all."""


def weight_norm_of(module: nn.Module) -> WeightNorm | None:
    """How the weight of this layer is normalised; None if it is not."""
    if "parametrizations" in module._modules:
        made = _parametrized(module)
        if made is None or len(made) != 1 or not isinstance(made[0], _WeightNorm):
            return None
        where = "parametrizations.weight.original"
        return WeightNorm(f"{where}0", f"{where}1", made[0].dim)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _OLD.WeightNorm) and hook.name == "weight":
            return WeightNorm("weight_g", "weight_v", hook.dim)
    return None


def original_of(module: nn.Module) -> str:
    """The attribute that holds what a layer's weight is computed from, of the same shape; empty
    where it is not computed, or from something else."""
    norm = weight_norm_of(module)
    if norm is not None:
        return norm.direction
    if "weight_orig" in module._parameters:  # The older hook of spectral normalisation; masks.
        return "weight_orig"
    original = getattr(_parametrized(module), "original", None)
    same = isinstance(original, Tensor) and original.numel() == _numbers(module)
    return "parametrizations.weight.original" if same else ""


def _numbers(module: nn.Module) -> int:
    """How many a layer's weight has: the weight itself is not asked for, as that may change it."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, _ConvNd):
        pairs = module.in_channels * module.out_channels // module.groups
        return pairs * math.prod(module.kernel_size)
    return 0


def weight_of(module: nn.Module) -> Tensor | None:
    """A layer's weight, or what it is computed from; None if there is no one tensor of it."""
    held = module._parameters.get("weight")
    if held is not None:
        return held
    owner, _, name = original_of(module).rpartition(".")
    return module.get_submodule(owner)._parameters.get(name) if name else None


def owner_of(path: str) -> tuple[str, str]:
    """The layer that a tensor belongs to, and as what: all that its weight is computed from counts
    as its weight."""
    layer, found, _ = path.rpartition(".parametrizations.weight.")
    if found:
        return layer, "weight"
    owner, _, name = path.rpartition(".")
    return owner, "weight" if name in ("weight_v", "weight_g", "weight_orig") else name


def computed_by(module: nn.Module) -> str:
    """What computes a layer's weight, in words, and what to do to have it cut."""
    made = _parametrized(module)
    if made is not None:
        names = ", ".join(type(one).__name__.lstrip("_") for one in made)
        undo = "nn.utils.parametrize.remove_parametrizations"
        return (
            f"computed by a parametrisation ({names}), which a cut changes; {undo} makes it plain"
        )
    hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    undo = "remove_spectral_norm" if "SpectralNorm" in hooks else "prune.remove"
    named = ", ".join(hooks) or "something unknown"
    return (
        f"computed before every call ({named}), which a cut changes; nn.utils.{undo} makes it plain"
    )


def _parametrized(module: nn.Module) -> Any:
    """The list of what is applied to a layer's weight; None if nothing is."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    parts: Any = module.parametrizations
    return parts["weight"]


def _recompute(module: nn.Module) -> None:
    """Have a layer with the older hook hold the weight that its tensors give now."""
    with torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _OLD.WeightNorm) and hook.name == "weight":
                hook(module, ())


def gains_after(
    model: nn.Module, tensors: Mapping[str, Tensor], lost: Mapping[str, Mapping[int, Iterable[int]]]
) -> dict[str, Tensor]:
    """What the gains of weights have to be for these to stay what they are, as far as they stay.

    Args:
        tensors: gains and directions by path, before the cut.
        lost: by path and axis, which indices go.

    Returns:
        gains by path, in the sizes of before, and directions of which nothing but zeros would be
        left; those that a cut does not concern are left out.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        norm = weight_norm_of(module)
        if norm is None:
            continue
        gain, direction = (f"{path}.{name}".lstrip(".") for name in (norm.gain, norm.direction))
        axes = {dim: gone for dim, gone in lost.get(direction, {}).items() if dim != norm.dim}
        if not axes:
            continue
        whole = tensors[direction].detach().double()
        kept = whole.clone()
        for dim, gone in axes.items():
            kept.index_fill_(dim, torch.tensor(list(gone), device=kept.device), 0.0)
        lengths = [torch.norm_except_dim(x, 2, norm.dim) for x in (kept, whole)]
        share = torch.nan_to_num(lengths[0] / lengths[1])
        found[gain] = (tensors[gain].detach() * share).to(tensors[gain].dtype)
        if bool((nothing := lengths[0] == 0).any()):  # It would be divided by its length.
            found[direction] = torch.where(nothing, 1.0, whole).to(tensors[direction].dtype)
    return found


def _normed_axes(module: nn.Module) -> ChannelAxes:
    norm = weight_norm_of(module)
    axes = conv_axes(module) if isinstance(module, _ConvNd) else LINEAR
    assert norm is not None

    def held(pairs: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        normed = [norm.direction, norm.gain]
        found = ((n, d) for name, d in pairs for n in (normed if name == "weight" else [name]))
        return tuple((name, dim) for name, dim in found if name != norm.gain or dim == norm.dim)

    return replace(axes, outputs=held(axes.outputs), inputs=held(axes.inputs))


def _is_standardised(module: nn.Module) -> bool:
    """Whether a convolution's weights are standardised, and scaled by a gain for each output."""
    gain = module._parameters.get("gain")
    return gain is not None and gain.numel() == gain.shape[0] > 1


def _is_torchs(function: Any) -> bool:
    return bool(function.__module__.startswith("torch."))


def _standardised_axes(module: _ConvNd) -> ChannelAxes:
    axes = conv_axes(module)
    return replace(axes, outputs=(*axes.outputs, ("gain", 0)))


teach_layer(
    _is_standardised,
    _standardised_axes,
    among=lambda kind: issubclass(kind, _ConvNd) and not _is_torchs(kind.forward),
)
teach_layer(
    lambda module: "weight" not in module._parameters and weight_norm_of(module) is not None,
    _normed_axes,
    _recompute,
    among=lambda kind: issubclass(kind, (nn.Linear, _ConvNd)),
)

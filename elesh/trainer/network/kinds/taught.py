"""The kinds of layers that Elesh teaches itself, as a user teaches others: recurrent layers, the
linear layers of GPT-2, convolutions with standardised weights and a gain, weight normalisation,
experts in one tensor.

Promises: they are known as soon as any module of this folder is imported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from elesh.trainer.network.layers import LINEAR, ChannelAxes, conv_axes, teach_layer

from .experts import is_experts, is_router, reads_and_makes, refit_experts
from .recurrent import is_recurrent, recurrent_axes, refit_recurrent
from .weight_norms import recompute, weight_norm_of

__all__ = ["is_recurrent", "is_transposed_linear"]


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2 in Transformers, whose weight is [in, out]."""
    return _makes_transposed(type(module))


def _makes_transposed(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


_TRANSPOSED = ChannelAxes((("weight", 1), ("bias", 0)), (("weight", 0),), -1, True)


def _refit_transposed(module: Any) -> None:
    module.nx, module.nf = module.weight.shape


_BAG = ChannelAxes((("weight", 1),), produces=True)


def _refit_bag(module: Any) -> None:
    module.embedding_dim = module.weight.shape[1]


def _is_standardised(module: nn.Module) -> bool:
    """Whether this is a convolution with standardised weights, scaled by a gain for each output."""
    gain = module._parameters.get("gain") if isinstance(module, _ConvNd) else None
    return gain is not None and gain.numel() == gain.shape[0] > 1


def _standardised_axes(module: _ConvNd) -> ChannelAxes:
    axes = conv_axes(module)
    return replace(axes, outputs=(*axes.outputs, ("gain", 0)))


def _has_normed_weight(module: nn.Module) -> bool:
    """Whether this is a linear layer or a convolution whose weight is a direction times a gain."""
    return isinstance(module, (nn.Linear, _ConvNd)) and weight_norm_of(module) is not None


def _normed_axes(module: nn.Module) -> ChannelAxes:
    norm = weight_norm_of(module)
    axes = conv_axes(module) if isinstance(module, _ConvNd) else LINEAR
    assert norm is not None

    def held(pairs: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        normed = [norm.direction, norm.gain]
        found = ((n, d) for name, d in pairs for n in (normed if name == "weight" else [name]))
        return tuple((name, dim) for name, dim in found if name != norm.gain or dim == norm.dim)

    return replace(axes, outputs=held(axes.outputs), inputs=held(axes.inputs))


def _experts_axes(module: nn.Module) -> ChannelAxes:
    inputs, outputs = reads_and_makes(module)
    return ChannelAxes(outputs, inputs, site_dim=-1, produces=True)


_ROUTER = ChannelAxes(inputs=(("weight", 1),), site_dim=-1)


def _is_conv(kind: type) -> bool:
    return issubclass(kind, _ConvNd)


def _is_plain(kind: type) -> bool:
    return issubclass(kind, (nn.Linear, _ConvNd))


def _is_foreign(kind: type) -> bool:
    """Whether this is no layer of PyTorch."""
    return not kind.__module__.startswith("torch.")


teach_layer(nn.EmbeddingBag, lambda module: _BAG, _refit_bag)
for _recurrent in (nn.RNNBase, nn.RNNCellBase):
    teach_layer(_recurrent, recurrent_axes, refit_recurrent)
teach_layer(is_transposed_linear, lambda module: _TRANSPOSED, _refit_transposed, _makes_transposed)
teach_layer(_is_standardised, _standardised_axes, among=_is_conv)
teach_layer(_has_normed_weight, _normed_axes, recompute, among=_is_plain)
teach_layer(is_experts, _experts_axes, refit_experts, among=_is_foreign)
teach_layer(is_router, lambda module: _ROUTER, refit_experts, among=_is_foreign)

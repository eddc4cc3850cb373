"""Places behind layers, where code of the network multiplies what they make by other activations.

A mask acts on what a consumer reads. Queries and keys are read by no layer but by a product, which
sums over their channels: there the place right behind the layer that makes them is the consumer's
input. It is named after the layer, with brackets (``attention.query()``).

Promises: nothing is put into the network; what passes is not changed, unless a hook does so.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elesh.trainer.network.kinds.weight_norms import owner_of
from elesh.trainer.network.layers import channel_axes
from leyline import GateSite, TensorSlice

__all__ = ["LayerOutput", "output_of", "passing_outputs", "read_by"]


class LayerOutput(nn.Module):
    """Stands for the place behind a layer: called with what the layer makes, returns it."""

    def forward(self, x: Tensor) -> Tensor:
        """What it is given."""
        return x


_BEHIND: WeakKeyDictionary[nn.Module, LayerOutput] = WeakKeyDictionary()
"""What stands for the places behind layers."""


def output_of(layer: nn.Module) -> LayerOutput:
    """What stands for the place behind a layer, always the same."""
    return _BEHIND.setdefault(layer, LayerOutput())


def passing_outputs(layer: nn.Module) -> RemovableHandle:
    """Until this is removed, what the layer makes passes what stands for the place behind it; to be
    put on before hooks on that."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Any:
        return output_of(module)(output)

    return layer.register_forward_hook(hook)


def read_by(model: nn.Module, part: TensorSlice) -> GateSite | None:
    """Where a layer reads the channels that it multiplies by a part of its weight; None if the part
    is of something else."""
    owner, name = owner_of(part.tensor)
    axes = channel_axes(model.get_submodule(owner))
    if axes.site_dim is None or (name, part.dim) not in axes.inputs:
        return None
    span = part.model_dump(include={"start", "width", "indices"})
    return GateSite(module=owner, dim=axes.site_dim, **span)

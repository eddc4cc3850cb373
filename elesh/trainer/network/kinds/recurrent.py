"""Recurrent layers: what they read, and their states.

A state is read by all states a step later, inside of the layer, where no mask can be. But what a
unit adds to its state passes a function that makes nothing of nothing (tanh, ReLU): where the rows
of the weights that feed it are zero, the unit begins at zero and stays there, as if it had gone.
A unit is the same place of every layer and direction of one module, as all have one size.

Promises: nothing is changed for good; modules whose states cannot be told so have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elesh.trainer.network.layers import ChannelAxes, teach_layer

_CANDIDATES = {nn.LSTM: (2, 4), nn.GRU: (2, 3), nn.RNN: (0, 1)}
"""Which of how many parts of the rows makes what is added to the states: ``i, f, g, o`` and
``r, z, n`` in PyTorch's order (https://pytorch.org/docs/stable/generated/torch.nn.LSTM.html)."""


def is_recurrent(module: nn.Module) -> bool:
    """Whether this is one of PyTorch's recurrent layers, or a cell of one."""
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase))


def has_states(module: nn.Module) -> bool:
    """Whether the states of this module can go: of one of PyTorch's own layers, no cell, whose
    outputs are the states."""
    return type(module) in _CANDIDATES and not module.proj_size


def recurrent_axes(module: Any) -> ChannelAxes:
    """What comes in, and the states where these can go."""
    first = ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
    inputs = tuple((name, 1) for name in first if name in module._parameters)
    if not has_states(module):
        return ChannelAxes(inputs=inputs, site_dim=-1)
    made = [(name, 0) for name, held in module._parameters.items() if held is not None]
    read = [(name, 1) for name, _ in made if name.startswith("weight") and name not in first]
    directions = 2 if module.bidirectional else 1
    return ChannelAxes(
        (*made, *read), inputs, -1, True, shares=directions, period=module.hidden_size
    )


def refit_recurrent(module: Any) -> None:
    """Set the sizes of a recurrent layer from the shapes of its weights."""
    ((name, _), *_) = recurrent_axes(module).inputs
    module.input_size = getattr(module, name).shape[1]
    if has_states(module):
        module.hidden_size = module.weight_hh_l0.shape[1]


def without_states(module: Any, gate: Callable[[], Tensor]) -> list[RemovableHandle]:
    """Until these handles are removed, units whose gate is zero stay silent in every pass.

    Args:
        gate: makes [H] ones and zeros.
    """
    number, parts = _CANDIDATES[type(module)]

    def before(module: Any, args: Any) -> None:
        kept = gate()
        rows = [torch.ones_like(kept)] * parts
        rows[number] = kept
        levels = torch.cat(rows)
        held = vars(module)
        held["_whole"] = held["_flat_weights"]
        held["_flat_weights"] = [
            weight * levels.to(weight).view(-1, *[1] * (weight.ndim - 1))
            for weight in held["_flat_weights"]
        ]

    def after(module: Any, args: Any, output: Any) -> None:
        held = vars(module)
        if "_whole" in held:
            held["_flat_weights"] = held.pop("_whole")

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]


for _kind in (nn.RNNBase, nn.RNNCellBase):
    teach_layer(_kind, recurrent_axes, refit_recurrent)

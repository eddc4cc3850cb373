"""Experts of a mixture whose weights lie together in tensors with an axis of experts, as
Transformers has them, and the layers that choose among them.

Promises: they are told by what they hold, not by their names; what a mixture reads and makes goes
along with the stream around it, and the same hidden units of all experts go together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from elesh.trainer.network.layers import ChannelAxes, teach_layer

_HIDDEN = ("intermediate_dim", "intermediate_size", "moe_intermediate_size")
_WIDTH = ("hidden_dim", "hidden_size", "input_size")


def is_experts(module: nn.Module) -> bool:
    """Whether this is called with tokens, the numbers of their experts, and weights of these."""
    held = module._parameters
    down = held.get("down_proj")
    return (
        down is not None
        and down.ndim == 3
        and "is_transposed" in vars(module)
        and up_of(module) != ""
    )


def is_router(module: nn.Module) -> bool:
    """Whether this is no layer of PyTorch, and says which experts read a token."""
    weight = module._parameters.get("weight")
    plain = type(module).__module__.startswith("torch.") or module._modules
    return not plain and weight is not None and weight.ndim == 2 and "top_k" in vars(module)


def width_multiple(module: nn.Module) -> int:
    """What the widths of a mixture have to be a multiple of: products of all experts at once want
    rows of a multiple of 16 bytes, in half precision too."""
    way = getattr(vars(module).get("config"), "_experts_implementation", None)
    return 1 if way in (None, "eager", "batched_mm") else 8


def up_of(module: nn.Module) -> str:
    """The tensor that makes the hidden units."""
    found = (n for n in ("gate_up_proj", "up_proj") if module._parameters.get(n) is not None)
    return next(found, "")


def _is_transposed(module: nn.Module) -> bool:
    return bool(vars(module)["is_transposed"])


def _experts_axes(module: nn.Module) -> ChannelAxes:
    """Where the channels lie that a mixture reads, and those that it makes."""
    transposed = _is_transposed(module)
    made = (("down_proj", 2 if transposed else 1), ("down_proj_bias", 1))
    read = ((up_of(module), 1 if transposed else 2),)
    return ChannelAxes(made, read, site_dim=-1, produces=True)


_ROUTER = ChannelAxes(inputs=(("weight", 1),), site_dim=-1)


def _refit(module: Any) -> None:
    """Set the sizes of experts, or of a router, from the shapes of their tensors."""
    if is_router(module):
        width, hidden = module.weight.shape[1], None
    else:
        shape, transposed = module.down_proj.shape, _is_transposed(module)
        width, hidden = shape[2 if transposed else 1], shape[1 if transposed else 2]
    held = vars(module)
    held |= {name: width for name in _WIDTH if type(held.get(name)) is int}
    if hidden is not None:
        held |= {name: hidden for name in _HIDDEN if type(held.get(name)) is int}


def hidden_units(module: nn.Module) -> tuple[list[tuple[str, int, npt.NDArray[np.int64]]], str]:
    """The hidden units of all experts.

    Returns:
        tensors, their axes and the indices [units, width] of each unit there; and the part of the
        module whose input is zero where a unit has none, empty where there is no such part.
    """
    transposed, up = _is_transposed(module), up_of(module)
    down = module._parameters["down_proj"]
    assert down is not None
    inner = 1 if transposed else 2
    count = int(down.shape[inner])
    both = np.arange(count)[:, None]
    if up == "gate_up_proj":
        halves = np.stack([both[:, 0], both[:, 0] + count], 1)
        in_turns = np.stack([2 * both[:, 0], 2 * both[:, 0] + 1], 1)
        both = halves if vars(module).get("is_concatenated", True) else in_turns
    parts = [(up, 2 if transposed else 1, both), ("down_proj", inner, np.arange(count)[:, None])]
    if module._parameters.get(f"{up}_bias") is not None:
        parts.append((f"{up}_bias", 1, both))
    return parts, "act_fn" if _passes_zero(module._modules.get("act_fn")) else ""


def _passes_zero(part: nn.Module | None) -> bool:
    """Whether this is an activation that makes nothing of nothing."""
    if part is None:
        return False
    try:
        with torch.no_grad():
            made = part(torch.zeros(3))
    except Exception:  # It takes something else.
        return False
    return isinstance(made, Tensor) and made.shape == (3,) and not made.any()


def _is_foreign(kind: type) -> bool:
    """Whether this is no layer of PyTorch."""
    return not kind.__module__.startswith("torch.")


teach_layer(is_experts, _experts_axes, _refit, among=_is_foreign)
teach_layer(is_router, lambda module: _ROUTER, _refit, among=_is_foreign)

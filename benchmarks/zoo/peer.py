"""What torch-pruning makes of one network, as its manual says to call it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from elesh.trainer.network.calling import call, tensors_in

from .ours import SHARE

__all__ = ["examine"]

_PROJECTIONS = ("qkv", "query_key_value", "q_proj", "k_proj", "v_proj", "query", "key", "value")
"""Names of layers whose holder says how many heads they have."""


def examine(model: nn.Module, inputs: Any, outputs: Collection[str]) -> dict[str, Any]:
    """Prune ``SHARE`` of every group; the network is not to be used afterwards.

    Args:
        outputs: layers that make the network's outputs: told, as the manual asks for.

    Returns:
        ``verdict``; where it pruned, the share of parameters ``removed``, and ``most``: the largest
        share of a layer's outputs that it took.
    """
    import torch_pruning as tp

    wide = _widths(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    ignored = [module for name, module in model.named_modules() if name in outputs]
    heads = {
        module: _heads(holder)
        for holder in model.modules()
        if isinstance(_heads(holder), int)
        for name, module in holder.named_children()
        if isinstance(module, nn.Linear) and name in _PROJECTIONS
    }
    try:
        pruner = tp.pruner.MetaPruner(
            model,
            inputs if isinstance(inputs, dict) else (*inputs,) if len(inputs) > 1 else inputs[0],
            importance=tp.importance.MagnitudeImportance(),
            pruning_ratio=SHARE,
            ignored_layers=ignored,
            num_heads=heads,
            output_transform=lambda output: sum(
                t.sum() for t in tensors_in(output) if t.requires_grad
            ),
        )
    except Exception as error:
        return {"verdict": f"build: {type(error).__name__}"}
    try:
        pruner.step()
    except Exception as error:
        return {"verdict": f"prune: {type(error).__name__}"}
    _refit(model)
    removed = 1 - sum(parameter.numel() for parameter in model.parameters()) / before
    now = _widths(model)
    most = max(1 - now.get(name, width) / width for name, width in wide.items())
    found = {"removed": removed, "most": most}
    try:
        with torch.no_grad():
            call(model, inputs)
    except Exception as error:
        return {"verdict": f"broken afterwards: {type(error).__name__}", **found}
    return {"verdict": "works" if removed else "removed nothing", **found}


def _widths(model: nn.Module) -> dict[str, int]:
    """Output channels of convolutions and linear layers."""
    return {
        name: module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }


def _heads(holder: nn.Module) -> int | None:
    names = ("num_heads", "num_attention_heads")
    return next((getattr(holder, name) for name in names if hasattr(holder, name)), None)


def _refit(model: nn.Module) -> None:
    """Set the sizes that attentions keep beside their weights, as the peer's examples do by hand:
    it narrows heads and leaves their number."""
    for holder in model.modules():
        for name, module in holder.named_children():
            heads = _heads(holder)
            if heads and isinstance(module, nn.Linear) and name in _PROJECTIONS:
                fused = 3 if name in ("qkv", "query_key_value") else 1
                width = module.out_features // fused
                sizes = dict.fromkeys(("all_head_size", "attn_dim", "embed_dim"), width)
                sizes |= dict.fromkeys(("head_dim", "attention_head_size"), width // heads)
                for size, value in sizes.items():
                    if isinstance(getattr(holder, size, None), int):
                        setattr(holder, size, value)

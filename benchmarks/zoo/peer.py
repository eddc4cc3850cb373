"""What torch-pruning makes of one network, as its manual says to call it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from elesh.trainer.network.calling import call, tensors_in

from .ours import SHARE

__all__ = ["examine"]


def examine(model: nn.Module, inputs: Any, outputs: Collection[str]) -> dict[str, Any]:
    """Prune ``SHARE`` of every group; the network is not to be used afterwards.

    Args:
        outputs: layers that make the network's outputs: told, as the manual asks for.
    """
    import torch_pruning as tp

    before = sum(parameter.numel() for parameter in model.parameters())
    ignored = [module for name, module in model.named_modules() if name in outputs]
    heads = {
        module: holder.num_heads
        for holder in model.modules()
        if isinstance(getattr(holder, "num_heads", None), int)
        for name, module in holder.named_children()
        if isinstance(module, nn.Linear) and name in ("qkv", "q_proj", "k_proj", "v_proj")
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
    removed = 1 - sum(parameter.numel() for parameter in model.parameters()) / before
    try:
        with torch.no_grad():
            call(model, inputs)
    except Exception as error:
        return {"verdict": f"broken afterwards: {type(error).__name__}", "removed": removed}
    return {"verdict": "works" if removed else "removed nothing", "removed": removed}

"""The attributes by which attention modules know how many heads they have.

Modules keep these numbers beside their weights, under names of their own; after a cut they must
say the same as the shapes. An attribute is set only where its name is one of these *and* its value
was the number of heads (key/value heads, channels of all heads): a name alone proves nothing. What
is missing here is not cut wrongly: without the right number the module does not run, or does not
compute what the masked one does, and the proof refuses the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from leyline import PruningGroup

__all__ = ["HEAD_SIZES", "common_holder", "query_heads", "refit_heads"]

_HEADS = ("heads", "num_heads", "n_heads", "n_head", "nhead", "nheads", "num_attention_heads")
_SHARED = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
"""Key/value heads, where several query heads share one."""
_WIDTHS = ("all_head_size", "inner_dim", "split_size", "attn_dim")
"""Channels of all heads together: BERT, Diffusers and many others, GPT-2, timm."""

HEAD_SIZES = (*_HEADS, *_SHARED, *_WIDTHS)
"""The attributes that :func:`refit_heads` sets."""


def refit_heads(model: nn.Module, before: PruningGroup, after: PruningGroup) -> None:
    """Set the head counts of the modules around an attention that has lost units."""
    (site,) = before.sites
    share = query_heads(before)
    changes = [
        (_SHARED, before.size, after.size),
        (_HEADS, before.size * share, after.size * share),
        (_WIDTHS, before.size * site.width, after.size * site.width),
    ]
    for module in _holders(model, [*before.layers, site.module]):
        for names, old, new in changes:
            for name in names:
                if vars(module).get(name) == old:
                    setattr(module, name, new)


def query_heads(group: PruningGroup) -> int:
    """How many query heads a unit has: one, or those that share one key/value head.

    Queries and the output projection have a head's width for each of them, keys and values once.
    """
    widths = {part.tensor: part.width for part in group.slices}
    made = [widths.get(f"{layer}.weight", widths.get(layer, 0)) for layer in group.layers]
    (site,) = group.sites
    queries = made[0] if len(made) > 1 else site.width
    return (queries + site.width) // (sum(made) - queries)


def common_holder(layers: Sequence[str]) -> str:
    """The innermost module that holds all of these layers; empty for the model itself."""
    same = []
    for parts in zip(*(layer.split(".")[:-1] for layer in layers), strict=False):
        if len(set(parts)) > 1:
            break
        same.append(parts[0])
    return ".".join(same)


def _holders(model: nn.Module, layers: Sequence[str]) -> Iterator[nn.Module]:
    """The modules from the innermost one that holds all of the layers down to the layers."""
    top = common_holder(layers)
    paths = {top}
    for layer in layers:
        path = layer.rpartition(".")[0]
        while path != top:
            paths.add(path)
            path = path.rpartition(".")[0]
    for path in sorted(paths):
        yield model.get_submodule(path)

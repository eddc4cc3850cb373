"""The attributes by which attention modules know how many heads they have.

Modules keep these numbers beside their weights, under names of their own; after a cut they must
say the same as the shapes. An attribute is set only where its name is one of these *and* its value
was the number of heads (key/value heads, channels of all heads): a name alone proves nothing. What
is missing here is not cut wrongly: without the right number the module does not run, or does not
compute what the masked one does, and the proof refuses the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from leyline import Level, PruningGroup

__all__ = ["HEAD_SIZES", "common_holder", "constants", "refit_heads", "splits"]

_HEADS = ("heads", "num_heads", "n_heads", "n_head", "nhead", "nheads", "num_attention_heads")
_SHARED = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
"""Key/value heads, where several query heads share one."""
_SHARES = ("num_key_value_groups", "n_rep", "num_queries_per_kv")
"""How many query heads share one."""
_WIDTHS = ("all_head_size", "inner_dim", "split_size", "attn_dim")
"""Channels of all heads together: BERT, Diffusers and many others, GPT-2, timm."""

_SPLITS = ("width",)
"""Channels of each part that a layer's outputs are split into (Res2Net)."""

HEAD_SIZES = (*_HEADS, *_SHARED, *_SHARES, *_WIDTHS, *_SPLITS)
"""The attributes that :func:`refit_heads` sets."""


def refit_heads(model: nn.Module, before: PruningGroup, after: PruningGroup) -> None:
    """Set the head counts of the modules around attentions that have lost units, and the widths of
    parts of modules around layers that have lost channels."""
    for name in splits(model, before):
        setattr(model.get_submodule(common_holder(before.layers)), name, after.size)
    if before.level is not Level.HEAD:
        return
    done = set[tuple[nn.Module, str]]()
    for site in before.sites:
        layers = [layer for layer in before.layers if _nearest(layer, before) == site.module]
        old, new, width = before.size, after.size, site.width
        shares = _made(before, layers) <= width  # One key/value head for all stays as it is.
        changes: list[tuple[Sequence[str], int, int]]
        changes = [(_SHARES, old, new)] if shares else [(_SHARED, old, new)]
        changes.append((_WIDTHS, old * width, new * width))
        for module in _holders(model, [*layers, site.module]):
            held = vars(module)
            for names, was, becomes in changes:
                fitting = [n for n in names if held.get(n) == was and (module, n) not in done]
                done.update((module, name) for name in fitting)
                held |= dict.fromkeys(fitting, becomes)
            for name, buffer in constants(module).items():
                if len(buffer) == old * width:
                    module._buffers[name] = buffer[: new * width].clone()
            for name in _HEADS:  # Each unit has so many query heads.
                count, known = held.get(name), (module, name) in done
                if type(count) is int and count % old == 0 and not known:
                    held[name] = count // old * new
                    done.add((module, name))


def splits(model: nn.Module, group: PruningGroup) -> list[str]:
    """Attributes of the module around a group's layers that say how many units the group has."""
    around = vars(model.get_submodule(common_holder(group.layers)))
    return [name for name in _SPLITS if around.get(name) == group.size]


def constants(module: nn.Module) -> dict[str, Tensor]:
    """Buffers of one number for every channel, the same for all, that no ``state_dict`` holds (the
    bias that BEiT's keys do not have)."""
    return {
        name: held
        for name in module._non_persistent_buffers_set
        if (held := module._buffers.get(name)) is not None
        and held.ndim == 1
        and bool((held == held[:1]).all())
    }


def _nearest(layer: str, group: PruningGroup) -> str:
    """The output projection that a layer belongs to, where several attentions make up a group."""
    near = max(group.sites, key=lambda site: len(common_holder([layer, site.module])))
    return near.module


def _made(group: PruningGroup, layers: Sequence[str]) -> int:
    """How many channels these layers make for a unit."""
    widths = {part.tensor: part.width for part in group.slices}
    return sum(widths.get(f"{layer}.weight", widths.get(layer, 0)) for layer in layers)


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

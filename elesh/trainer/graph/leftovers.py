"""Tensors that are neither channels of a layer nor heads: hidden units of experts, and what is left
alone.

Promises: every weight that a pass multiplies by is in some group, and so are the states of
recurrent layers: no width of a network stays without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from elesh.trainer.network.kinds.experts import (
    hidden_units,
    is_experts,
    is_router,
    up_of,
    width_multiple,
)
from elesh.trainer.network.kinds.matrices import bare_matrices, layer_at, weight_path
from elesh.trainer.network.kinds.outputs import read_by
from elesh.trainer.network.kinds.recurrent import is_recurrent
from elesh.trainer.network.kinds.weight_norms import owner_of
from elesh.trainer.network.layers import channel_axes, held, named_tensors
from leyline import GateSite, Level, PruningGroup, TensorSlice

from .attention import span_fields
from .wiring import Wiring

__all__ = [
    "of_training",
    "of_unreached",
    "sites_in_training",
    "with_all_matrices",
    "with_readers_of_training",
    "with_the_rest",
    "with_vectors_of_training",
]


def with_the_rest(
    groups: Sequence[PruningGroup], wiring: Wiring, model: nn.Module
) -> tuple[PruningGroup, ...]:
    """The groups, and behind them those of what none of them has."""
    units, states = _experts(wiring, model), _states(wiring, model)
    return (*groups, *units, *states, *_weights(groups, wiring, model))


def _experts(wiring: Wiring, model: nn.Module) -> Iterator[PruningGroup]:
    """The hidden units of experts in one tensor: the same of all experts go together."""
    for layer in wiring.layers:
        module = layer_at(model, layer.name) if layer.name in wiring.called else None
        if module is None or not is_experts(module):
            continue
        parts, gate = hidden_units(module)
        site = f"{layer.name}.{gate}"
        reason = "" if gate and site in wiring.called else f"nothing in {layer.name} can be masked"
        size, multiple = len(parts[0][2]), width_multiple(module)
        if size % multiple or size == multiple:
            reason = (
                reason or f"its products want a multiple of {multiple} units, and it has {size}"
            )
        yield PruningGroup(
            name=f"{layer.name}.{up_of(module)}",
            layers=(layer.name,),
            original_size=size,
            origin=tuple(range(size)),
            slices=tuple(
                TensorSlice(tensor=f"{layer.name}.{name}", dim=dim, **span_fields(indices))
                for name, dim, indices in parts
            ),
            sites=() if reason else (GateSite(module=site, dim=-1),),
            prunable=not reason,
            reason=reason,
            unit_multiple=multiple,
        )


def _states(wiring: Wiring, model: nn.Module) -> Iterator[PruningGroup]:
    """The states of recurrent layers: each feeds all others, one step later."""
    for layer in wiring.layers:
        module = layer_at(model, layer.name) if layer.name in wiring.called else None
        if module is None or not is_recurrent(module) or channel_axes(module).produces:
            continue
        size = int(module.hidden_size)  # type: ignore[arg-type]
        kind = type(module).__name__
        yield _left(
            f"{layer.name}.states",
            layer.name,
            size,
            [
                TensorSlice(tensor=f"{layer.name}.{name}", dim=0, **_every(size, len(own)))
                for name, own in module._parameters.items()
                if own is not None and not name.startswith("weight_hr")
            ],
            f"each state of {layer.name} ({kind}) is read by all of its states in the next step",
        )


def _every(size: int, rows: int) -> dict[str, Any]:
    """The fields of a span: the same place of every gate."""
    return span_fields(np.arange(size)[:, None] + np.arange(0, rows, size)[None])


def _weights(
    groups: Sequence[PruningGroup], wiring: Wiring, model: nn.Module
) -> Iterator[PruningGroup]:
    """Weights that something multiplies by, and whose outputs are in no group."""
    tensors, modules = named_tensors(model), dict(model.named_modules())
    grouped = {name for group in groups for name in group.layers} & bare_matrices(model).keys()
    told = [group for group in groups if group.prunable or group.level is Level.HEAD]
    known = {(part.tensor, part.dim) for group in told for part in group.slices}
    for layer in wiring.layers:
        owner, _ = owner_of(layer.weight)
        weight, module = tensors.get(layer.weight), modules.get(owner)
        if weight is None or module is None or is_recurrent(module):
            continue
        dim = 0 if weight.ndim < 3 else weight.ndim - 1
        if layer.name in grouped:
            continue
        if channel_axes(module).produces or (layer.weight, dim) in known:
            continue
        if isinstance(module, nn.MultiheadAttention) or owner.endswith(".out_proj"):
            reason = f"{owner} is an attention whose heads were not found"
        elif is_router(module):
            reason = f"{owner} chooses experts by its outputs"
        else:
            reason = f"{layer.weight} is multiplied by outside of a layer that Elesh knows"
        size = int(weight.shape[dim])
        part = TensorSlice(tensor=layer.weight, dim=dim)
        yield _left(layer.name, layer.name, size, [part], reason)


def with_vectors_of_training(
    groups: Sequence[PruningGroup],
    model: nn.Module,
    fed: Collection[int],
    met: Callable[[Mapping[str, int]], Mapping[str, str]],
) -> tuple[PruningGroup, ...]:
    """The groups, with vectors that only training puts among their channels (what stands for masked
    steps or patches), which have to lose the same.

    Args:
        fed: ids of the parameters that the outputs depend on.
        met: from such vectors, by path with the axis they lie on, to the layers that make what they
            are put among.
    """
    vectors = {
        path: wide[0]
        for path, parameter in model.named_parameters()
        if id(parameter) not in fed
        if len(wide := [axis for axis, size in enumerate(parameter.shape) if size > 1]) == 1
        if not channel_axes(model.get_submodule(path.rpartition(".")[0])).outputs
    }
    tensors = named_tensors(model)
    found = list(groups)
    for path, layer in (met(vectors) if vectors else {}).items():
        module = layer_at(model, layer)
        attribute, dim = channel_axes(module).outputs[0]
        made = (weight_path(layer, module, attribute), dim)
        for number, group in enumerate(found):
            part = next((one for one in group.slices if (one.tensor, one.dim) == made), None)
            if part is None or tensors[path].numel() != tensors[part.tensor].shape[dim]:
                continue
            own = part.model_copy(update={"tensor": path, "dim": vectors[path]})
            found[number] = group.model_copy(update={"slices": (*group.slices, own)})
    return tuple(found)


def with_readers_of_training(
    groups: Sequence[PruningGroup], late: Collection[str], trained: Sequence[PruningGroup]
) -> tuple[PruningGroup, ...]:
    """The groups, with what layers that only training calls (auxiliary heads) read of them. A mask
    is not seen there: masks are looked at in evaluation.

    Args:
        late: names of such layers.
        trained: the groups of channels that training mode shows.
    """
    slices = {group.name: {(p.tensor, p.dim): p for p in group.slices} for group in trained}
    makers = {(layer, group.size): group for group in trained for layer in group.layers}
    found = []
    for group in groups:
        like = makers.get((group.layers[0], group.size))
        own = {(part.tensor, part.dim): part for part in group.slices}
        shown = slices[like.name] if like is not None else {}
        more = [part for part in shown.values() if owner_of(part.tensor)[0] in late]
        same = like is not None and like.layers == group.layers and own.items() <= shown.items()
        if group.prunable and more and same and like is not None:
            reason = f"{like.reason} (in training mode)" if like.reason else ""
            update = {"slices": (*group.slices, *more), "prunable": not reason, "reason": reason}
            group = group.model_copy(update=update)
        found.append(group)
    return tuple(found)


def sites_in_training(
    groups: Sequence[PruningGroup], late: Collection[str], model: nn.Module
) -> dict[str, tuple[GateSite, ...]]:
    """By group, where its channels enter layers that only training calls."""
    found: dict[str, tuple[GateSite, ...]] = {}
    for group in groups:
        for part in group.slices:
            site = read_by(model, part) if owner_of(part.tensor)[0] in late else None
            if site is not None:
                found[group.name] = (*found.get(group.name, ()), site)
    return found


def of_training(
    groups: Sequence[PruningGroup], names: Iterable[str], model: nn.Module
) -> Iterator[PruningGroup]:
    """The outputs of layers that only training calls, as far as they are in no group."""
    known = {(part.tensor, part.dim) for group in groups for part in group.slices}
    for group in of_unreached(sorted(names), model, "it runs in training mode only"):
        if known.isdisjoint((part.tensor, part.dim) for part in group.slices):
            yield group


def with_all_matrices(
    groups: Sequence[PruningGroup], model: nn.Module, followed: tuple[str, ...]
) -> tuple[PruningGroup, ...]:
    """The groups, and one for every parameter of several axes that none of them speaks of; what is
    ``followed`` (by the beginnings of paths) goes with others."""
    known = {part.tensor for group in groups for part in group.slices}
    layers = {layer for group in groups for layer in group.layers}
    found = []
    for path, parameter in model.named_parameters():
        wide = [axis for axis, size in enumerate(parameter.shape) if size > 1]
        told = path in known or path.startswith(followed) or owner_of(path)[0] in layers
        if len(wide) > 1 and not told:
            reason = f"{path} is used by the network's own code, not by a layer that Elesh knows"
            part = TensorSlice(tensor=path, dim=wide[0])
            found.append(_left(path, path, parameter.shape[wide[0]], [part], reason))
    return (*groups, *found)


def of_unreached(
    names: Iterable[str],
    model: nn.Module,
    reason: str = "the example inputs do not reach it; some with more samples or positions may",
) -> Iterator[PruningGroup]:
    """The outputs of layers that the example inputs do not reach."""
    paths = {id(tensor): path for path, tensor in named_tensors(model).items()}
    for name in names:
        module = layer_at(model, name)
        axes = channel_axes(module)
        weight = held(module, axes.outputs[0][0]) if axes.produces else None
        if weight is not None:
            made = [(held(module, attribute), dim) for attribute, dim in axes.outputs]
            known = [(paths[id(x)], dim) for x, dim in made if x is not None and id(x) in paths]
            parts = [TensorSlice(tensor=path, dim=dim) for path, dim in known]
            yield _left(name, name, int(weight.shape[axes.outputs[0][1]]), parts, reason)


def _left(
    name: str, layer: str, size: int, slices: Sequence[TensorSlice], reason: str
) -> PruningGroup:
    return PruningGroup(
        name=name,
        layers=(layer,),
        original_size=size,
        origin=tuple(range(size)),
        slices=tuple(slices),
        sites=(),
        prunable=False,
        reason=reason,
    )

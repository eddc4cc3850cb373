"""The attributes in which modules keep the sizes of their tensors and their numbers of heads.

Promises: after a cut :func:`refit` sets ``out_channels`` and its relatives from the shapes of the
tensors, and :func:`refit_heads` the numbers of heads.

Attention modules keep their numbers of heads beside their weights, under names of their own; after
a cut they must say the same as the shapes. An attribute is set only where its name is one of these
*and* its value was the number of heads (key/value heads, channels of all heads): a name alone
proves nothing. What is missing here is not cut wrongly: without the right number the module does
not run, or does not compute what the masked one does, and the proof refuses the group.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from leyline import Level, PrunedArchitecture, PruningGroup, TensorSlice

from .kinds.experts import is_experts
from .kinds.matrices import layer_at
from .kinds.weight_norms import owner_of
from .kinds.written_sizes import OtherNumbers, refit_written
from .layers import held, normalises_maps, taught_kind
from .multihead import NATIVE, commit

SIZES = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features",
    "num_parameters", "embedding_dim", "nf", "nx", "num_channels", "num_groups",
    "normalized_shape", "shape", "d_model", "input_size", "hidden_size",
)  # fmt: skip
"""The attributes that :func:`refit` sets."""


def cut_by_place(
    network: nn.Module, architecture: PrunedArchitecture, copies: Sequence[nn.Module] = ()
) -> set[nn.Module]:
    """The grouped convolutions, of the network and of copies with its paths, that lose the same
    places of every group, not whole groups."""
    if not any(isinstance(one, _ConvNd) and one.groups > 1 for one in network.modules()):
        return set()
    tensors = [p.tensor for group in architecture.groups for p in group.slices if p.dim == 1]
    owners = dict.fromkeys(map(owner_of, tensors))
    layers = [owner for owner, name in owners if name == "weight"]
    found = (view.get_submodule(layer) for view in (network, *copies) for layer in layers)
    return {module for module in found if isinstance(module, _ConvNd) and module.groups > 1}


def refit(module: nn.Module, by_place: bool = False) -> None:
    """Set the module's size attributes to what its tensors' shapes say.

    Args:
        by_place: whether it is one of :func:`cut_by_place`.
    """
    if isinstance(module, NATIVE):
        commit(module)
    taught = taught_kind(module)
    if taught is not None and taught.refit is not None:
        taught.refit(module)
    if isinstance(module, nn.Transformer):  # It checks the width of what it is given.
        norms = (part for part in module.modules() if isinstance(part, nn.LayerNorm))
        module.d_model = next(
            (len(n.weight) for n in norms if n.elementwise_affine), module.d_model
        )
    held = vars(module)  # What is a number is no tensor or part: no need to ask the module.
    shape = held.get("shape")
    if isinstance(shape, tuple):
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        # The shape that a single vector is viewed in (PoolFormer's scales of layers).
        wide = [place for place, size in enumerate(shape) if size != 1]
        if len(own) == 1 and own[0].ndim == 1 and len(wide) == 1:
            sizes = (len(own[0]) if place in wide else 1 for place in range(len(shape)))
            held["shape"] = tuple(sizes)
    weight = module._parameters.get("weight")
    if weight is None:
        weight = getattr(module, "weight", None)
    if isinstance(module, _NormBase):
        sized = weight if weight is not None else module.running_mean
        if sized is not None:
            held["num_features"] = sized.shape[0]
    elif not isinstance(weight, Tensor):
        return
    elif isinstance(module, _ConvNd):
        held |= _conv_sizes(module, weight, by_place)
    elif isinstance(module, nn.Linear):
        held["out_features"], held["in_features"] = weight.shape
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        held["embedding_dim"] = weight.shape[1]
    elif isinstance(module, nn.PReLU):
        held["num_parameters"] = weight.numel()
    elif isinstance(module, nn.GroupNorm):
        width, single = module.num_channels // module.num_groups, module.num_groups == 1
        held["num_channels"] = len(weight)
        held["num_groups"] = 1 if single else len(weight) // width
    elif isinstance(held.get("normalized_shape"), tuple):
        held["normalized_shape"] = tuple(weight.shape)


def _conv_sizes(module: _ConvNd, weight: Tensor, by_place: bool) -> dict[str, int]:
    """The sizes of a convolution whose weight has this shape."""
    first, second = weight.shape[:2]
    groups = module.groups
    if groups > 1 and not by_place:
        groups = max(1, first // (module.out_channels // groups))
        return {"groups": groups, "out_channels": first, "in_channels": second * groups}
    if isinstance(module, _ConvTransposeNd):
        return {"in_channels": first, "out_channels": second * groups}
    return {"in_channels": second * groups, "out_channels": first}


_HEADS = (
    "heads", "num_heads", "n_heads", "n_head", "nhead", "nheads", "num_attention_heads", "h", "nh",
    "n_local_heads", "num_q_heads", "num_query_heads", "n_q_heads", "attention_heads",
    "num_attn_heads", "attn_heads", "num_head", "nb_heads", "head_num",
)  # fmt: skip
_SHARED = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads",
    "n_local_kv_heads", "nkv",
)  # fmt: skip
"""Key/value heads, where several query heads share one."""
_SHARES = ("num_key_value_groups", "n_rep", "num_queries_per_kv")
"""How many query heads share one."""
_WIDTHS = (
    "all_head_size", "inner_dim", "split_size", "attn_dim", "val_attn_dim", "d_out", "n_embd",
    "d_model", "dim", "emb_dim", "hidden_size", "hidden_dim", "n_state", "dim_out", "dim_out_qk",
    "dim_out_v",
)  # fmt: skip
"""Channels of all heads together: BERT, Diffusers and many others, GPT-2, timm and its LeViT; and
where queries are as wide as the stream, the names that it has in code written by hand. Not
``embed_dim``, nor ``embed_size``: scales are made of these after the cut, and parts (CodeGen)."""

_SPLITS = ("width", "c", "expand_chs")
"""Channels of each part that a layer's outputs are split into (Res2Net, YOLO), or of all parts
together (timm's CSPNet)."""

_STREAMS = ("hidden_dim", "embed_dim")
"""Channels of the stream between the parts of a module (torchvision's ViT reshapes by it)."""

_AROUND = ("hidden_dim", "hidden_size", "input_size")
"""Channels of the stream around experts, by which the module that holds them reshapes."""

_MAPS = (
    "channels", "init_channels", "n_channels", "hidden_channels", "latent_channels", "hidden",
    "filters", "num_filters", "n_filters", "base", "ngf", "ndf", "nf",
)  # fmt: skip
"""Channels of the maps that a module lays the outputs of a linear layer out in (generators,
decoders), beside the names above."""

_UNFLATTENED = "unflattened_size"
"""The same of ``nn.Unflatten``: channels and positions."""

_PARTS = (
    "split_indices", "split_indexes", "split_sizes", "split_dims", "splits", "sections", "sizes",
    "dims", "input_split",
)  # fmt: skip
"""Lists of how many channels each part has that a layer's outputs are split into (MambaOut,
InceptionNeXt, FocalNet)."""

_CONFIGURATIONS = ("config", "args", "cfg", "params", "hparams")
"""Where modules without a number of their own read it (Phi-3); each gets a copy then."""

HEAD_SIZES = (
    *_HEADS,
    *_SHARED,
    *_SHARES,
    *_WIDTHS,
    *_SPLITS,
    *_STREAMS,
    *_MAPS,
    _UNFLATTENED,
    *_PARTS,
    *_CONFIGURATIONS,
)
"""The attributes that :func:`refit_heads` sets."""


_SIZES = frozenset((*SIZES, *HEAD_SIZES))


def sizes_of(module: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """A module's attributes of these names, and its methods with other numbers."""
    held = vars(module).items()
    return {n: value for n, value in held if n in names or isinstance(value, OtherNumbers)}


def put_sizes(module: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Give a module what :func:`sizes_of` found of it, or of a module like it; of its methods the
    others have their own numbers again."""
    held = vars(module)
    for name in [n for n, value in held.items() if isinstance(value, OtherNumbers)]:
        del held[name]
    for name, value in sizes.items():
        foreign = isinstance(value, OtherNumbers) and value.module is not module
        held[name] = OtherNumbers(module, name, value.numbers) if foreign else value


def size_names(architecture: PrunedArchitecture) -> frozenset[str]:
    """The attributes that keep sizes."""
    written = (size for group in architecture.groups for size in group.written)
    return _SIZES | {size.name for size in written if size.number is None}


def take_sizes(module: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Give a module size attributes, and what follows from them and from its tensors."""
    put_sizes(module, sizes)
    if isinstance(module, NATIVE):
        commit(module)
    taught = taught_kind(module)
    if taught is not None and taught.refit is not None:
        taught.refit(module)


def refit_heads(model: nn.Module, cuts: Sequence[tuple[PruningGroup, int]]) -> None:
    """Set the head counts of the modules around attentions, and the widths of modules, or of parts
    of them, around layers that have lost channels.

    Args:
        cuts: groups as they were before, and how many units each has left.
    """
    _refit_lists(model, cuts)
    _refit_wrapped(model, cuts)
    for before, left in cuts:
        _refit_around(model, before, left)
        if before.written:
            refit_written(model, before, before.size - left)


def _refit_wrapped(model: nn.Module, cuts: Sequence[tuple[PruningGroup, int]]) -> None:
    """Set how many channels a module says that its only convolution takes and makes, by which it
    checks what it is given (the up- and downsampling of Diffusers)."""
    gone: dict[tuple[str, int], int] = {}
    for before, left in cuts:
        for part in before.slices:
            layer, _, name = part.tensor.rpartition(".")
            if name == "weight" and part.dim in (0, 1):
                lost = part.width * (before.size - left)
                gone[layer, part.dim] = gone.get((layer, part.dim), 0) + lost
    for (layer, dim), lost in gone.items():
        only = layer_at(model, layer)
        if not isinstance(only, _ConvNd) or only.transposed or only.groups > 1:
            continue
        owner, _, name = layer.rpartition(".")
        wrapper, left = model.get_submodule(owner), only.weight.shape[dim]
        names = ("out_channels",) if dim == 0 else ("channels", "in_channels")
        said = [n for n in names if vars(wrapper).get(n) == left + lost]
        if said and [c for c, part in wrapper.named_children() if list(part.parameters())] == [
            name
        ]:
            vars(wrapper).update(dict.fromkeys(said, left))


def _refit_lists(model: nn.Module, cuts: Sequence[tuple[PruningGroup, int]]) -> None:
    """Set the lists of how many channels there are in each part of what a layer makes."""
    made: dict[str, list[tuple[TensorSlice, int, int]]] = {}
    around: dict[str, set[str]] = {}
    for before, left in cuts:
        owners = {part.tensor.rpartition(".")[0] for part in before.slices}
        for part in before.slices if before.level is not Level.HEAD else ():
            layer, _, name = part.tensor.rpartition(".")
            if part.dim == 0 and name == "weight" and layer in before.layers:
                made.setdefault(layer, []).append((part, before.size, left))
                around.setdefault(layer, set()).update(one.rpartition(".")[0] for one in owners)
    done = set[tuple[str, str]]()
    for layer, parts in made.items():
        gone = sum(part.width * (size - left) for part, size, left in parts)
        weight = held(layer_at(model, layer), "weight")
        channels = (0 if weight is None else len(weight)) + gone
        for path in sorted(around[layer]):
            module = vars(model.get_submodule(path))
            for name in (n for n in _PARTS if n in module and (path, n) not in done):
                sizes = module[name]
                if _are_sizes(sizes) and sum(sizes) == channels:
                    done.add((path, name))
                    module[name] = type(sizes)(_left_of(sizes, parts))


def _are_sizes(value: object) -> TypeGuard[list[int] | tuple[int, ...]]:
    listed = isinstance(value, (list, tuple)) and len(value) > 1
    return listed and all(type(n) is int and n > 0 for n in value)  # type: ignore[attr-defined]


def _left_of(sizes: Sequence[int], parts: Sequence[tuple[TensorSlice, int, int]]) -> list[int]:
    """What is left of each part of a layer's channels, where groups with so many units have others
    left."""
    now = np.array(sizes)
    for part, size, left in parts:
        places = np.array(part.all_of(range(size))).reshape(size, -1)
        at = np.searchsorted(np.cumsum(sizes), places, side="right")
        counts = np.stack([(at == n).sum(1) for n in range(len(sizes))])
        if bool((counts == counts[:, :1]).all()):  # Alike for all units.
            now -= counts[:, 0] * (size - left)
    found: list[int] = now.tolist()
    return found


def _refit_around(model: nn.Module, before: PruningGroup, left: int) -> None:
    """The same of one group."""
    around = vars(model.get_submodule(common_holder(before.layers)))
    for holder, name, parts in splits(model, before):
        holder[name] = parts * left
    for norm in before.norms:
        _refit_bare_norm(layer_at(model, norm.module), norm.width * (before.size - left))
    if before.level is not Level.HEAD:
        around |= {name: left for name in _STREAMS if around.get(name) == before.size}
        _refit_maps(model, before, left)
        for path, _, name in (layer.rpartition(".") for layer in before.layers):
            block = model.get_submodule(path)
            said = [size for size in _AROUND if vars(block).get(size) == before.size]
            module = block._modules.get(name) if said else None
            if module is not None and is_experts(module):  # The block around says it, too.
                vars(block).update(dict.fromkeys(said, left))
        return
    done = set[tuple[nn.Module, str]]()
    attentions = _attentions(before.layers, tuple(site.module for site in before.sites))
    for site in before.sites:
        layers = attentions[site.module]
        old, new, width = before.size, left, site.width
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
            if not any(name in held for name in _HEADS):
                _configure(module, _SHARED if not shares else (), old, new, width)
            for name in _HEADS:  # Each unit has so many query heads.
                count, known = held.get(name), (module, name) in done
                if type(count) is int and count % old == 0 and not known:
                    held[name] = count // old * new
                    done.add((module, name))


def _refit_maps(model: nn.Module, before: PruningGroup, left: int) -> None:
    """Set how many maps the outputs of linear layers are laid out in."""
    names = (*_MAPS, *_WIDTHS, *_STREAMS)
    for layer in before.layers:  # First states are made of as many.
        if isinstance(layer_at(model, layer), nn.RNNBase):
            held = vars(model.get_submodule(layer.rpartition(".")[0]))
            held |= {name: left for name in names if held.get(name) == before.size}
    for part in before.slices:
        layer = part.tensor.rpartition(".")[0]
        if part.width == 1 or part.dim != 0 or layer not in before.layers:
            continue
        readers = [layer, *(site.module for site in before.sites)]
        for module in _holders(model, readers):
            held = vars(module)
            if not any(name in held for name in _HEADS):  # There it counts channels of heads.
                held |= {name: left for name in names if held.get(name) == before.size}
        for module in model.get_submodule(common_holder(readers)).modules():
            sizes = vars(module).get(_UNFLATTENED)
            if isinstance(module, nn.Unflatten) and sizes is not None:
                maps, *positions = sizes
                if maps == before.size and math.prod(positions) == part.width:
                    module.unflattened_size = (left, *positions)


def _refit_bare_norm(module: nn.Module, lost: int) -> None:
    """Set the width of a normalisation that has no parameters to read it off."""
    shape = vars(module).get("normalized_shape")
    if isinstance(shape, tuple) and not any(p is not None for p in module._parameters.values()):
        maps = normalises_maps(module)
        sizes = (shape[0] - lost, *shape[1:]) if maps else (*shape[:-1], shape[-1] - lost)
        module.normalized_shape = sizes  # type: ignore[assignment]


def _configure(module: nn.Module, shared: Sequence[str], old: int, new: int, width: int) -> None:
    """Give a module a configuration of its own in which the numbers of heads are right, and the
    channels of all heads, so many each."""
    for place in _CONFIGURATIONS:
        known = vars(module).get(place)
        held = getattr(known, "__dict__", {})
        counts = {n: held[n] for n in (*_HEADS, *shared) if type(held.get(n)) is int}
        counts = {n: count // old * new for n, count in counts.items() if count % old == 0}
        if counts:
            own = copy.copy(known)
            widths = {n: new * width for n in _WIDTHS if held.get(n) == old * width}
            vars(own).update(counts | widths)
            vars(module)[place] = own


def splits(
    model: nn.Module, group: PruningGroup, parts: int = 0
) -> list[tuple[dict[str, Any], str, int]]:
    """Attributes of the module around a group that say how many units it has, or so many times as
    many: ``parts``, or as many as one of its layers makes for a unit.

    Returns:
        the module's attributes, the name of one, and how many times.
    """
    made = {f"{layer}.weight" for layer in group.layers}
    widths = [part.width for part in group.slices if part.tensor in made and part.dim == 0]
    many = parts or max(widths, default=1)
    owners = [part.tensor.rpartition(".")[0] for part in group.slices]
    around = vars(model.get_submodule(common_holder(owners if many > 1 else group.layers)))
    sizes = {times * group.size: times for times in (1, many)}
    return [(around, n, sizes[around[n]]) for n in _SPLITS if around.get(n) in sizes]


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


@lru_cache(1024)
def _attentions(layers: tuple[str, ...], outputs: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """The layers of each attention, by its output projection, where several make up a group."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(outputs, ())
    for layer in layers:
        near = max(outputs, key=lambda output: len(common_holder([layer, output])))
        found[near] += (layer,)
    return found


def _made(group: PruningGroup, layers: Sequence[str]) -> int:
    """How many channels these layers make for a unit."""
    widths = {part.tensor: part.width for part in group.slices}
    return sum(widths.get(f"{layer}.weight", widths.get(layer, 0)) for layer in layers)


def common_holder(layers: Sequence[str]) -> str:
    """The innermost module that holds all of these layers; empty for the model itself."""
    return ".".join(common_parts(layer.rpartition(".")[0] for layer in layers))


def holder_of_group(group: PruningGroup) -> str:
    """The innermost module that holds all tensors of a group and all that read it."""
    paths = [part.tensor.rpartition(".")[0] for part in group.slices]
    paths += [site.module.rpartition(".")[0] for site in group.sites]
    return ".".join(common_parts(paths))


def common_parts(paths: Iterable[str]) -> list[str]:
    """What the paths of several modules begin with."""
    parts = [path.split(".") for path in paths]
    if len(parts) < 2:
        return parts[0] if parts else []
    pairs = zip(min(parts), max(parts), strict=False)  # What these have in common, all have.
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def outwards(path: str) -> list[str]:
    """A module's path and those of all modules around it, but for the model."""
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _holders(model: nn.Module, layers: Sequence[str]) -> Iterator[nn.Module]:
    """The modules from the innermost one that holds all of the layers, and says what is done with
    them, down to the layers."""
    top = common_holder(layers)
    while top and isinstance(model.get_submodule(top), (nn.ModuleList, nn.ModuleDict)):
        top = top.rpartition(".")[0]
    paths = {top}
    for layer in layers:
        path = layer.rpartition(".")[0]
        while path != top:
            paths.add(path)
            path = path.rpartition(".")[0]
    for path in sorted(paths):
        yield model.get_submodule(path)

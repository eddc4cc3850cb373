"""What the tensors of a layer have to do with its channels, the attributes in which layers keep
their sizes and numbers of heads, and what normalisations over channels do under a mask.

Promises: the one place that knows module types. For every layer it says which axis of which tensor
shrinks with its inputs and with its outputs, and :func:`refit` sets ``out_channels`` and its
relatives from the shapes of the tensors after a cut. Normalisations are recognized by what they
compute, not by their name alone; nothing is changed.

A layer normalisation takes its statistics over all channels of a position, so that a channel that
is merely set to zero changes what happens to all others. Under a mask it has to take them over the
channels that are kept, as it does after the cut. :func:`refilled` brings that about by its input
alone, so that any module that normalises so is masked alike, whatever its code looks like.

Attention modules keep their numbers of heads beside their weights, under names of their own; after
a cut they must say the same as the shapes. An attribute is set only where its name is one of these
*and* its value was the number of heads (key/value heads, channels of all heads): a name alone
proves nothing. What is missing here is not cut wrongly: without the right number the module does
not run, or does not compute what the masked one does, and the proof refuses the group.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from leyline import Level, PrunedArchitecture, PruningGroup, ShapeMismatch, TensorDescriptor

from .multihead import NATIVE, commit, is_packed

__all__ = [
    "FEWEST_PLACES",
    "HEAD_SIZES",
    "Norm",
    "common_holder",
    "constants",
    "eps_of",
    "norm_of",
    "refilled",
    "refit_heads",
    "splits",
]


AxisOf = tuple[str, int]
"""An attribute of a module that holds a tensor, and a dimension of it."""


@dataclass(frozen=True)
class ChannelAxes:
    """The axes of a layer's tensors that go with its channels."""

    outputs: tuple[AxisOf, ...] = ()
    """Shrink with the output channels (for layers that treat channels one by one: the channels);
    attributes of parts with a dot."""
    inputs: tuple[AxisOf, ...] = ()
    """Shrink with the input channels, where those are not the output channels."""
    site_dim: int | None = None
    """The channel axis of the layer's input, if the layer mixes channels: a gate site."""
    produces: bool = False
    """Whether ``weight`` makes the output channels (convolutions, linear, embedding)."""
    refusal: str = ""
    """Why channels that meet this layer cannot be removed."""
    blocks: int = 0
    """Into how many equal blocks the layer's channels fall that can only go whole; 0: none."""
    shares: int = 0
    """Into how many equal shares the channels of either side fall, so that the same places of all
    go together; an axis of the weight that all have in common counts places. 0: none. With
    ``blocks``: either the one or the other."""


@dataclass(frozen=True)
class _Kind:
    """A kind of layer that was taught."""

    matches: Callable[[nn.Module], bool]
    axes: Callable[[Any], ChannelAxes]
    refit: Callable[[Any], None] | None


_TAUGHT: list[_Kind] = []


def teach_layer(
    kind: type[nn.Module] | Callable[[nn.Module], bool],
    axes: Callable[[Any], ChannelAxes],
    refit: Callable[[Any], None] | None = None,
) -> None:
    """Teach a kind of layer: which axes of its tensors go with its channels.

    To be called before a Recorder is made, in every process that cuts such networks. What is
    taught last is asked first; that a cut means the same as a mask is proved as for every layer.

    Args:
        kind: its type (subclasses are meant, too), or a function that tells such a module.
        axes: from a module to the axes.
        refit: sets the module's own sizes (``out_features`` and the like) from the shapes of its
            tensors; called after every cut and when one is taken back.
    """
    matches = (lambda module: isinstance(module, kind)) if isinstance(kind, type) else kind
    _TAUGHT.append(_Kind(matches, axes, refit))


def _taught(module: nn.Module) -> _Kind | None:
    for kind in reversed(_TAUGHT):  # Asked thousands of times while a network is traced.
        if kind.matches(module):
            return kind
    return None


def is_taught(module: nn.Module) -> bool:
    """Whether :func:`teach_layer` was called for such modules."""
    return _taught(module) is not None


def refit_taught(module: nn.Module) -> None:
    """Set the sizes of a module of a kind that was taught."""
    taught = _taught(module)
    if taught is not None and taught.refit is not None:
        taught.refit(module)


_SCALES = ChannelAxes((("weight", 0), ("bias", 0)))
_STATISTICS = ChannelAxes((*_SCALES.outputs, ("running_mean", 0), ("running_var", 0)))
_DEPTHWISE = ChannelAxes((("weight", 0), ("bias", 0)), produces=True)
FEWEST_PLACES = 8
"""Where every group of a convolution has so many channels, the same places of all groups are its
units, as one of them is a small part of the width then; whole groups are otherwise."""
_CONVOLUTION = ChannelAxes((("weight", 0), ("bias", 0)), (("weight", 1),), 1, True)
_TRANSPOSED = ChannelAxes((("weight", 1), ("bias", 0)), (("weight", 0),), 1, True)
_LINEAR = ChannelAxes((("weight", 0), ("bias", 0)), (("weight", 1),), -1, True)
_TRANSPOSED_LINEAR = ChannelAxes((("weight", 1), ("bias", 0)), (("weight", 0),), -1, True)
_EMBEDDING = ChannelAxes((("weight", 1),), produces=True)
_PACKED = ChannelAxes(
    (("in_proj_weight", 1), ("out_proj.weight", 0), ("out_proj.bias", 0)), site_dim=-1
)
"""An attention that reads and makes one width: its channels lie in both of its projections."""
_UNKNOWN = ChannelAxes()


def channel_axes(module: nn.Module) -> ChannelAxes:
    """The channel axes of this module; none for a type that is not known."""
    taught = _taught(module)
    if taught is not None:
        return taught.axes(module)
    if isinstance(module, _ConvNd):
        return _conv_axes(module)
    if isinstance(module, nn.Linear):
        return _LINEAR
    if isinstance(module, nn.Embedding):
        return _EMBEDDING
    if isinstance(module, _NormBase):
        return _STATISTICS
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        return _SCALES
    if isinstance(module, nn.GroupNorm):
        return replace(_SCALES, blocks=module.num_groups if module.num_groups > 1 else 0)
    if isinstance(module, nn.PReLU):
        return ChannelAxes((("weight", 0),) if module.num_parameters > 1 else ())
    if type(module) is NATIVE and is_packed(module):
        return _PACKED
    refusal = _refusal(module)
    return ChannelAxes(refusal=refusal) if refusal else _UNKNOWN


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2 in Transformers, whose weight is [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _conv_axes(module: _ConvNd) -> ChannelAxes:
    transposed = isinstance(module, _ConvTransposeNd)
    if module.groups > 1:
        if module.groups == module.in_channels == module.out_channels:
            return _DEPTHWISE
        if transposed:
            return replace(_TRANSPOSED, shares=module.groups)
        if min(module.in_channels, module.out_channels) >= module.groups * FEWEST_PLACES:
            return replace(_CONVOLUTION, blocks=module.groups, shares=module.groups)
        # A whole group goes with the channels that it reads and those that it makes.
        return replace(_DEPTHWISE, blocks=module.groups)
    return _TRANSPOSED if transposed else _CONVOLUTION


def _refusal(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return f"{kind} normalises over several axes, of which these channels are one"
    if isinstance(module, nn.MultiheadAttention):
        return "MultiheadAttention projects these channels one by one, or adds keys of its own"
    return ""


SIZES = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features",
    "num_parameters", "embedding_dim", "nf", "nx", "num_channels", "num_groups",
    "normalized_shape", "shape", "d_model", "input_size",
)  # fmt: skip
"""The attributes that :func:`refit` sets."""


def cut_by_place(model: nn.Module, architecture: PrunedArchitecture) -> set[nn.Module]:
    """The grouped convolutions that lose the same places of every group, not whole groups."""
    tensors = [p.tensor for group in architecture.groups for p in group.slices if p.dim == 1]
    owners = (path.rpartition(".") for path in dict.fromkeys(tensors))
    found = (model.get_submodule(owner) for owner, _, name in owners if name == "weight")
    return {module for module in found if isinstance(module, _ConvNd) and module.groups > 1}


def refit(module: nn.Module, by_place: bool = False) -> None:
    """Set the module's size attributes to what its tensors' shapes say.

    Args:
        by_place: whether it is one of :func:`cut_by_place`.
    """
    commit(module)
    refit_taught(module)
    if isinstance(module, nn.Transformer):  # It checks the width of what it is given.
        norms = (part for part in module.modules() if isinstance(part, nn.LayerNorm))
        module.d_model = next(
            (len(n.weight) for n in norms if n.elementwise_affine), module.d_model
        )
    held = vars(module).get("shape")
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    if isinstance(held, tuple) and len(own) == 1 and own[0].ndim == 1:
        # The shape that a single vector is viewed in (PoolFormer's scales of layers).
        wide = [place for place, size in enumerate(held) if size != 1]
        if len(wide) == 1:
            sizes = (len(own[0]) if place in wide else 1 for place in range(len(held)))
            module.shape = tuple(sizes)  # type: ignore[assignment]
    weight = getattr(module, "weight", None)
    if isinstance(module, _NormBase):
        sized = weight if weight is not None else module.running_mean
        if sized is not None:
            module.num_features = sized.shape[0]
    elif not isinstance(weight, Tensor):
        return
    elif isinstance(module, _ConvNd):
        _refit_conv(module, weight, by_place)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.numel()
    elif isinstance(module, nn.GroupNorm):
        width, single = module.num_channels // module.num_groups, module.num_groups == 1
        module.num_channels = len(weight)
        module.num_groups = 1 if single else len(weight) // width
    elif isinstance(vars(module).get("normalized_shape"), tuple) and weight.ndim == 1:
        module.normalized_shape = tuple(weight.shape)  # type: ignore[assignment]


def _refit_conv(module: _ConvNd, weight: Tensor, by_place: bool) -> None:
    if by_place:
        whole, shared = weight.shape[0], weight.shape[1] * module.groups
        transposed = isinstance(module, _ConvTransposeNd)
        module.in_channels, module.out_channels = (whole, shared) if transposed else (shared, whole)
    elif module.groups > 1:
        made = module.out_channels // module.groups
        module.groups = max(1, weight.shape[0] // made)
        module.out_channels = weight.shape[0]
        module.in_channels = weight.shape[1] * module.groups
    elif isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = weight.shape[:2]
    else:
        module.out_channels, module.in_channels = weight.shape[:2]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by ``state_dict`` path, each tensor once."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def describe_tensors(model: nn.Module) -> tuple[TensorDescriptor, ...]:
    """The descriptors of :func:`named_tensors`, in that order."""
    return tuple(
        TensorDescriptor(
            path=path,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            kind="parameter" if isinstance(tensor, nn.Parameter) else "buffer",
        )
        for path, tensor in named_tensors(model).items()
    )


def require_fit(
    model: nn.Module, architecture: PrunedArchitecture, *, joined: bool = False
) -> None:
    """Refuse an architecture that does not describe this model as it is now.

    Buffers that no group has a part in may come, go and change their shape (memory banks, caches).

    Args:
        joined: whether there may be other parameters beside those described.

    Raises:
        ShapeMismatch: naming the first tensor that is missing, unknown or of another shape.
    """
    hint = "was the model changed without its Surgeon, or is the architecture of another model?"
    found = {path: tuple(tensor.shape) for path, tensor in named_tensors(model).items()}
    ours = {part.tensor for group in architecture.groups for part in group.slices}
    for descriptor in architecture.tensors:
        shape = found.pop(descriptor.path, None)
        free = descriptor.kind == "buffer" and descriptor.path not in ours
        if shape != descriptor.shape and not free:
            raise ShapeMismatch(
                f"model.{descriptor.path}",
                f"shape {descriptor.shape}",
                "no such tensor" if shape is None else f"shape {shape}",
                hint=hint,
            )
    parameters = {} if joined else dict(model.named_parameters())
    for path, shape in ((path, shape) for path, shape in found.items() if path in parameters):
        raise ShapeMismatch(f"model.{path}", "no such tensor", f"shape {shape}", hint=hint)


def _transposed_axes(module: nn.Module) -> ChannelAxes:
    return _TRANSPOSED_LINEAR


def _refit_transposed(module: Any) -> None:
    module.nx, module.nf = module.weight.shape


def _is_standardised(module: nn.Module) -> bool:
    """Whether this is a convolution with standardised weights, scaled by a gain for each output."""
    gain = module._parameters.get("gain") if isinstance(module, _ConvNd) else None
    return gain is not None and gain.numel() == gain.shape[0] > 1


def _standardised_axes(module: _ConvNd) -> ChannelAxes:
    axes = _conv_axes(module)
    return replace(axes, outputs=(*axes.outputs, ("gain", 0)))


def _recurrent_axes(module: nn.Module) -> ChannelAxes:
    """What comes in; its states stay."""
    first = ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
    return ChannelAxes(inputs=tuple((n, 1) for n in first if n in module._parameters), site_dim=-1)


def _refit_recurrent(module: Any) -> None:
    ((name, _), *_) = _recurrent_axes(module).inputs
    module.input_size = getattr(module, name).shape[1]


def is_recurrent(module: nn.Module) -> bool:
    """Whether this is one of PyTorch's recurrent layers, or a cell of one."""
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase))


teach_layer(is_recurrent, _recurrent_axes, _refit_recurrent)
teach_layer(is_transposed_linear, _transposed_axes, _refit_transposed)
teach_layer(_is_standardised, _standardised_axes)


_EPS = ("eps", "variance_epsilon", "epsilon")


@dataclass(frozen=True)
class Norm:
    """How a module normalises."""

    kind: Literal["layer", "rms", "response", "map", "weights"]
    dim: int
    """The axis of its input that the channels lie on; -1, or 1 behind the samples. Of weights that
    are standardised row by row: of these, counted from the end."""
    eps: float


def norm_of(module: nn.Module, shape: tuple[int, ...]) -> Norm | None:
    """How this module normalises an input of that shape over one axis; None if it does not.

    Layer and RMS normalisations of PyTorch are known; of modules that have "norm" in their type's
    name, it is tried out: the answer must not depend on the scale of what comes in, and must mix
    what lies along one axis only; or be what came in, scaled by its global response.
    """
    eps = eps_of(module)
    plain = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    if plain and isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if len(module.normalized_shape) != 1:
            return None
        if isinstance(module, nn.RMSNorm):
            return Norm("rms", -1, 0.0)
        return Norm("layer", -1, eps) if eps else None
    if isinstance(module, nn.GroupNorm) and module.num_groups == 1 and eps and len(shape) > 2:
        return Norm("map", 1, eps)
    named = "norm" in type(module).__name__.lower()
    if isinstance(module, (_NormBase, nn.GroupNorm)) or not (named or _derived(module)):
        return None
    if any(True for _ in module.children()) or not 2 <= len(shape) <= 5:
        return None
    return _tried(module, shape, eps)


def eps_of(module: nn.Module) -> float:
    """What it says that it adds to the variance; 0 if it does not say."""
    values = (vars(module).get(name) for name in _EPS)
    return next((value for value in values if isinstance(value, float)), 0.0)


def _derived(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm))


def _tried(module: nn.Module, shape: tuple[int, ...], eps: float) -> Norm | None:
    like = next(iter(module.parameters()), None)
    small = (2, *(min(size, 3) for size in shape[1:]))
    sizes = {p.shape[0] for p in module.parameters() if p.ndim == 1 and p.shape[0] > 1}
    for dim in (-1, 1):
        size = shape[dim]
        if sizes and sizes != {size}:
            continue
        tried = list(small)
        tried[dim] = size
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tried, generator=generator, dtype=torch.float32)
        x = x if like is None else x.to(like)
        try:
            with torch.no_grad():
                found = _kind(module, x, dim)
        except Exception:  # A module with other inputs is no normalisation that we know.
            continue
        if found and (found != "layer" or eps):
            return Norm(found, dim if dim < 0 or len(shape) > 2 else -1, eps)
    return None


def _kind(module: nn.Module, x: Tensor, dim: int) -> Literal["layer", "rms", "response"] | None:
    y = module(x)
    if not isinstance(y, Tensor) or y.shape != x.shape or x.shape[dim] < 2:
        return None

    def same(other: Tensor) -> bool:
        return bool(torch.allclose(other, y, rtol=1e-2, atol=1e-2))

    if not same(module(x * 4)) or same(module(x * 0)):
        return "response" if _responds(module, x, dim) else None
    changed = x.clone()
    changed.select(dim, 0)[(0,) * (x.ndim - 1)] += 3
    moved = (module(changed) - y).abs() > 1e-4
    along = moved.movedim(dim, -1)[(0,) * (x.ndim - 1)]
    if int(moved.sum()) != int(along.sum()) or int(along.sum()) < 2:
        return None
    return "layer" if same(module(x + 2)) else "rms"


def _responds(module: nn.Module, x: Tensor, dim: int) -> bool:
    """Whether, but for a constant, every channel is scaled in proportion to its norm over all
    positions as a share of the mean of all channels' norms, or is passed on and that added."""
    positions = [axis for axis in range(1, x.ndim) if axis != dim % x.ndim]
    norms = torch.linalg.vector_norm(x, dim=positions, keepdim=True)
    share = norms / norms.mean(dim, keepdim=True)
    if x.ndim < 3 or bool((x == 0).any()):
        return False
    scale = (module(x) - module(x * 0)) / x
    slopes = [(scale - passed) / share for passed in (0.0, 1.0)]
    first = [slope.movedim(dim, -1).flatten(0, -2) for slope in slopes]
    flat = [bool(torch.allclose(one, one[:1], rtol=1e-2, atol=1e-3)) for one in first]
    return any(flat) and not bool(torch.allclose(scale, scale.mean(), atol=1e-3))


def refilled(x: Tensor, gate: Tensor, dim: int, kind: str, eps: float) -> Tensor:
    """What a normalisation must be given to treat the kept channels as if there were no others.

    RMS: channels whose gate is zero get the root mean square of the kept ones. Layer: the kept
    channels less their mean, scaled so that variance over all channels plus ``eps`` stands to
    them as their own variance plus ``eps`` does; the others zero. Map: the same over channels and
    positions together; weights: over each row. Response: the others get, at
    every position, what makes their norm the mean of the kept ones'.

    Args:
        gate: of ones and zeros (or between), broadcastable to ``x``.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    gate = gate.to(wide.dtype)
    count = gate.sum(dim, keepdim=True)
    positions = [axis for axis in range(1, x.ndim) if axis != dim % x.ndim]
    places = math.prod(x.shape[axis] for axis in positions)
    if kind == "rms":
        level = ((gate * wide * wide).sum(dim, keepdim=True) / count).sqrt()
        return (gate * wide + (1 - gate) * level).to(x.dtype)
    if kind == "response":
        norms: Tensor = torch.linalg.vector_norm(gate * wide, dim=positions, keepdim=True)
        level = norms.sum(dim, keepdim=True) / (count * math.sqrt(places))
        return (gate * wide + (1 - gate) * level).to(x.dtype)
    axes, many = (dim, count) if kind == "layer" else ((dim, *positions), count * places)
    mean = (gate * wide).sum(axes, keepdim=True) / many
    centred = gate * (wide - mean)
    variance = (centred * centred).sum(axes, keepdim=True) / many
    lost = (1 - gate).mean(dim, keepdim=True)
    return (centred * (eps / (variance * lost + eps)).sqrt()).to(x.dtype)


_HEADS = (
    "heads", "num_heads", "n_heads", "n_head", "nhead", "nheads", "num_attention_heads", "h", "nh",
    "n_local_heads", "num_q_heads", "num_query_heads", "n_q_heads", "attention_heads",
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
    "d_model", "dim", "emb_dim", "hidden_size", "hidden_dim", "n_state",
)  # fmt: skip
"""Channels of all heads together: BERT, Diffusers and many others, GPT-2, timm and its LeViT; and
where queries are as wide as the stream, the names that it has in code written by hand. Not
``embed_dim``, nor ``embed_size``: scales are made of these after the cut, and parts (CodeGen)."""

_SPLITS = ("width", "c", "expand_chs")
"""Channels of each part that a layer's outputs are split into (Res2Net, YOLO), or of all parts
together (timm's CSPNet)."""

_STREAMS = ("hidden_dim", "embed_dim")
"""Channels of the stream between the parts of a module (torchvision's ViT reshapes by it)."""

_CONFIGURATION = "config"
"""Where modules without a number of their own read it (Phi-3); each gets a copy then."""

HEAD_SIZES = (*_HEADS, *_SHARED, *_SHARES, *_WIDTHS, *_SPLITS, *_STREAMS, _CONFIGURATION)
"""The attributes that :func:`refit_heads` sets."""


def refit_heads(model: nn.Module, before: PruningGroup, left: int) -> None:
    """Set the head counts of the modules around attentions that have so many units left, and the
    widths of modules, or of parts of them, around layers that have lost channels."""
    around = vars(model.get_submodule(common_holder(before.layers)))
    for holder, name, parts in splits(model, before):
        holder[name] = parts * left
    for norm in before.norms:
        _refit_bare_norm(model.get_submodule(norm.module), norm.width * (before.size - left))
    if before.level is not Level.HEAD:
        around |= {name: left for name in _STREAMS if around.get(name) == before.size}
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
                _configure(module, _SHARED if not shares else (), old, new)
            for name in _HEADS:  # Each unit has so many query heads.
                count, known = held.get(name), (module, name) in done
                if type(count) is int and count % old == 0 and not known:
                    held[name] = count // old * new
                    done.add((module, name))


def _refit_bare_norm(module: nn.Module, lost: int) -> None:
    """Set the width of a normalisation that has no parameters to read it off."""
    shape = vars(module).get("normalized_shape")
    if isinstance(shape, tuple) and not any(p is not None for p in module._parameters.values()):
        module.normalized_shape = (*shape[:-1], shape[-1] - lost)  # type: ignore[assignment]


def _configure(module: nn.Module, shared: Sequence[str], old: int, new: int) -> None:
    """Give a module a configuration of its own in which the numbers of heads are right."""
    known = vars(module).get(_CONFIGURATION)
    held = getattr(known, "__dict__", {})
    counts = {n: held[n] for n in (*_HEADS, *shared) if type(held.get(n)) is int}
    counts = {n: count for n, count in counts.items() if count % old == 0}
    if counts:
        own = copy.copy(known)
        for name, count in counts.items():
            vars(own)[name] = count // old * new
        vars(module)[_CONFIGURATION] = own


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
    same = []
    for parts in zip(*(layer.split(".")[:-1] for layer in layers), strict=False):
        if len(set(parts)) > 1:
            break
        same.append(parts[0])
    return ".".join(same)


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

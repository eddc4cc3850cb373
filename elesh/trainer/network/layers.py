"""How the tensors of a layer relate to its channels.

Promises: the one place that knows module types. For every layer it says which axis of which tensor
shrinks with its inputs and with its outputs; kinds of layers that it does not know are taught.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from leyline import PrunedArchitecture, ShapeMismatch, TensorDescriptor

from .multihead import NATIVE, is_packed
from .traversal import modules_in, parameters_in

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
    made_dim: int | None = None
    """The axis of the channels that it makes, where that is said; else it is told by the kind."""
    period: int = 0
    """If not 0: how many places of its outputs there are, each of which every axis of the outputs
    holds once in so many entries (the gates of a recurrent layer, one behind the other)."""


@dataclass(frozen=True)
class _Kind:
    """A kind of layer that was taught."""

    among: Callable[[type[nn.Module]], bool]
    """Whether modules of a type may be of this kind."""
    matches: Callable[[nn.Module], bool]
    axes: Callable[[Any], ChannelAxes]
    refit: Callable[[Any], None] | None


_TAUGHT: list[_Kind] = []


def teach_layer(
    kind: type[nn.Module] | Callable[[nn.Module], bool],
    axes: Callable[[Any], ChannelAxes],
    refit: Callable[[Any], None] | None = None,
    among: Callable[[type[nn.Module]], bool] | None = None,
) -> None:
    """Teach a kind of layer: which axes of its tensors go with its channels.

    To be called before a Recorder is made, in every process that cuts such networks. What is
    taught last is asked first; that a cut means the same as a mask is proved as for every layer.

    Args:
        kind: its type (subclasses are meant, too), or a function that tells such a module.
        axes: from a module to the axes.
        refit: sets the module's own sizes (``out_features`` and the like) from the shapes of its
            tensors; called after every cut and when one is taken back.
        among: tells the types whose modules the function in ``kind`` is asked about; default: all.
    """
    if isinstance(kind, type):
        wanted: type[nn.Module] = kind
        _TAUGHT.append(_Kind(lambda one: issubclass(one, wanted), lambda module: True, axes, refit))
    else:
        _TAUGHT.append(_Kind(among or (lambda one: True), kind, axes, refit))


def taught_kind(module: nn.Module) -> _Kind | None:
    """What :func:`teach_layer` was told of such modules; None if nothing."""
    own: Any = type(module)
    for kind in _taught_of(own, len(_TAUGHT)):  # Asked thousands of times while a pass is traced.
        if kind.matches(module):
            return kind
    return None


@lru_cache(4096)
def _taught_of(kind: Any, taught: int) -> tuple[_Kind, ...]:
    """The kinds, of so many, that modules of a type may be of; those taught last first."""
    return tuple(one for one in reversed(_TAUGHT) if one.among(kind))


_SCALES = ChannelAxes((("weight", 0), ("bias", 0)))
_STATISTICS = ChannelAxes((*_SCALES.outputs, ("running_mean", 0), ("running_var", 0)))
_DEPTHWISE = ChannelAxes((("weight", 0), ("bias", 0)), produces=True)
FEWEST_PLACES = 8
"""Where every group of a convolution has so many channels, the same places of all groups are its
units, as one of them is a small part of the width then; whole groups are otherwise."""
_CONVOLUTION = ChannelAxes((("weight", 0), ("bias", 0)), (("weight", 1),), 1, True)
_TRANSPOSED = ChannelAxes((("weight", 1), ("bias", 0)), (("weight", 0),), 1, True)
LINEAR = ChannelAxes((("weight", 0), ("bias", 0)), (("weight", 1),), -1, True)
_EMBEDDING = ChannelAxes((("weight", 1),), produces=True)
_PACKED = ChannelAxes(
    (("in_proj_weight", 1), ("out_proj.weight", 0), ("out_proj.bias", 0)), site_dim=-1
)
"""An attention that reads and makes one width: its channels lie in both of its projections."""
_UNKNOWN = ChannelAxes()


_REMEMBERED = threading.local()


@contextlib.contextmanager
def axes_remembered() -> Iterator[None]:
    """While entered, this thread asks for the axes of every module once: no layer may change."""
    _REMEMBERED.axes = {}
    try:
        yield
    finally:
        del _REMEMBERED.axes


def forget_axes(module: nn.Module) -> None:
    """Ask for the axes of a module again: it is known only now how it is used."""
    getattr(_REMEMBERED, "axes", {}).pop(module, None)


def channel_axes(module: nn.Module) -> ChannelAxes:
    """The channel axes of this module; none for a type that is not known."""
    known: dict[nn.Module, ChannelAxes] | None = getattr(_REMEMBERED, "axes", None)
    if known is not None and module in known:
        return known[module]
    own: Any = type(module)
    taught = taught_kind(module)
    rule = _rule(own) if taught is None else taught.axes
    axes = rule(module) if callable(rule) else rule
    if known is not None:
        known[module] = axes
    return axes


@lru_cache(4096)
def _rule(kind: Any) -> ChannelAxes | Callable[[Any], ChannelAxes]:
    """The axes of all modules of a type, or what tells those of one."""
    if issubclass(kind, _ConvNd):
        return conv_axes
    if issubclass(kind, nn.Linear):
        return LINEAR
    if issubclass(kind, nn.Embedding):
        return _EMBEDDING
    if issubclass(kind, _NormBase):
        return _STATISTICS
    if issubclass(kind, (nn.LayerNorm, nn.RMSNorm)):
        return _norm_axes
    if issubclass(kind, nn.GroupNorm):
        return _group_norm_axes
    if issubclass(kind, nn.PReLU):
        return _prelu_axes
    if issubclass(kind, nn.MultiheadAttention):
        return _attention_axes
    return _UNKNOWN


def made_dim(module: nn.Module) -> int:
    """The axis of the channels that a layer makes."""
    axes = channel_axes(module)
    dim = axes.site_dim if axes.made_dim is None else axes.made_dim
    if dim is None:
        dim = 1 if isinstance(module, _ConvNd) else -1
    return dim


def _norm_axes(module: nn.LayerNorm | nn.RMSNorm) -> ChannelAxes:
    if len(module.normalized_shape) == 1:
        return _SCALES
    if normalises_maps(module):
        return _SCALES
    kind = type(module).__name__
    refusal = f"{kind} normalises over several axes, of which these channels are one"
    return ChannelAxes(refusal=refusal)


def _group_norm_axes(module: nn.GroupNorm) -> ChannelAxes:
    return replace(_SCALES, blocks=module.num_groups if module.num_groups > 1 else 0)


def _prelu_axes(module: nn.PReLU) -> ChannelAxes:
    return ChannelAxes((("weight", 0),) if module.num_parameters > 1 else ())


def _attention_axes(module: nn.MultiheadAttention) -> ChannelAxes:
    if type(module) is NATIVE and is_packed(module):
        return _PACKED
    refusal = "MultiheadAttention projects these channels one by one, or adds keys of its own"
    return ChannelAxes(refusal=refusal)


def conv_axes(module: _ConvNd) -> ChannelAxes:
    """The channel axes of a convolution, by its groups."""
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


def normalises_maps(module: nn.Module) -> bool:
    """Whether this is a layer normalisation over [C, H, W], whose channels come first."""
    return type(module) is nn.LayerNorm and len(module.normalized_shape) == 3


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2 in Transformers, whose weight is [in, out]."""
    return _makes_transposed(type(module))


def _makes_transposed(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _refit_transposed(module: Any) -> None:
    module.nx, module.nf = module.weight.shape


_IN_OUT = ChannelAxes((("weight", 1), ("bias", 0)), (("weight", 0),), -1, True)
teach_layer(nn.EmbeddingBag, lambda module: _EMBEDDING)  # :mod:`.sizes` knows its size
teach_layer(is_transposed_linear, lambda module: _IN_OUT, _refit_transposed, _makes_transposed)


def held(module: nn.Module, attribute: str) -> Tensor | None:
    """A tensor of a module, or of a part of it (with a dot)."""
    part, _, name = attribute.rpartition(".")
    owner = module.get_submodule(part)
    return (owner._parameters | owner._buffers).get(name)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by ``state_dict`` path, each tensor once."""
    tensors: dict[str, Tensor] = dict(parameters_in(model))
    for prefix, module in modules_in(model).items():
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

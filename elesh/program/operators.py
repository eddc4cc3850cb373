"""Which operators a program may hold: those that compute, and nothing that reaches outside.

A program is data that came over the bus. It names operators; only those that this module resolves
are ever called. They are PyTorch's core ATen operators (``torch.Tag.core``), the compositions
listed below, and Python arithmetic on sizes. None of them opens a file, a socket or a library;
``aten.from_file`` and operators of other libraries are refused by name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from leyline import InvalidField

__all__ = ["IGNORED", "name_of", "resolve"]

IGNORED = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_scalar.default",
        "aten._assert_async.msg",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
    }
)
"""Operators that only assert: an exporter leaves them out."""

_COMPOSITIONS = frozenset(
    """
    __and__ __or__ _weight_norm absolute adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d add_ alpha_dropout arange avg_pool1d baddbmm batch_norm bilinear
    broadcast_tensors broadcast_to celu chunk clamp_max clamp_min concat concatenate contiguous
    conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d cosine_similarity cross detach detach_ div_
    dropout dropout_ einsum elu_ embedding expand_as feature_dropout flatten floor_divide
    gelu_ group_norm hardsigmoid hardswish hardswish_ hardtanh_ index_add instance_norm layer_norm
    leaky_relu_ lift_fresh_copy linalg_vector_norm linear log_sigmoid log_softmax logaddexp
    logsumexp masked_fill masked_fill_ matmul max_pool1d max_pool2d max_pool3d mish mish_ movedim
    moveaxis mul_ multiply narrow negative new_full new_ones new_zeros norm nuclear_norm one_hot
    ones ones_like outer pad permute pixel_shuffle pixel_unshuffle prelu relu6 relu6_ relu_
    repeat_interleave reshape reshape_as rms_norm rsub scaled_dot_product_attention selu selu_
    sigmoid_ silu silu_ softmax softplus special_softmax split split_with_sizes square squeeze_
    stack std subtract sub_ swapaxes swapdims t tanh_ tensor_split tile to transpose tril triu
    true_divide type_as unbind unflatten unsafe_chunk unsafe_split unsqueeze_ upsample_bilinear2d
    upsample_nearest2d view_as where zeros zeros_like
    """.split()  # noqa: SIM905
)
"""ATen operators that PyTorch builds from core ones and ``torch.export`` keeps as they are."""
_FORBIDDEN = frozenset({"from_file"})
_PYTHON: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in "add sub mul floordiv truediv mod neg getitem eq ne lt le gt ge".split()  # noqa: SIM905
} | {"math.sqrt": math.sqrt, "math.floor": math.floor, "math.ceil": math.ceil, "math.trunc": int}
_NAMES = {
    id(function): name
    for name, function in (*_PYTHON.items(), ("math.trunc", math.trunc))
    if function is not int
}


def name_of(target: Any) -> str:
    """The name of a graph node's target, for example ``aten.linear.default``.

    Raises:
        InvalidField: if it is none that a program may hold.
    """
    name = _NAMES.get(id(target)) or str(target)
    resolve(name)
    return name


def resolve(name: str) -> Callable[..., Any]:
    """The function that an operator's name stands for.

    Raises:
        InvalidField: if it is none that a program may hold.
    """
    if name in _PYTHON:
        return _PYTHON[name]
    library, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    known = packet.isidentifier() and overload.isidentifier() and library == "aten"
    if known and packet not in _FORBIDDEN:
        function = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if isinstance(function, torch._ops.OpOverload) and _computes(function, packet):
            return function
    raise InvalidField("program.operator", "a core ATen operator", name[:200])


def _computes(function: torch._ops.OpOverload, packet: str) -> bool:
    is_size = packet in ("sym_size", "sym_numel", "sym_stride")
    return torch.Tag.core in function.tags or packet in _COMPOSITIONS or is_size

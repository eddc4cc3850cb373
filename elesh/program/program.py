"""A network as data: a list of operators, read without running anything, checked, and run here.

``torch.export.load`` is not used: it falls back to unrestricted pickle where tensors do not load
otherwise, and hands size expressions of the file to ``sympify``, which evaluates Python. A program
here is msgpack of names, numbers and lists (see decision 0030), its weights are safetensors.
Weights and held-out samples are checked against what they claim to be; what is wrong is a named
error.

A program computes ``outputs = f(weights, inputs, gates)``. There is one gate for every place where
removable units enter a consumer (an axis) and for every branch that can be removed whole; each is
a matrix [N, units along the axis] that multiplies what passes. A mask is a gate of ones and zeros,
and the gradient with respect to gates is the statistic that units are ranked by.

It names operators; only those that compute and reach nothing outside are ever called. They are
PyTorch's core ATen operators (``torch.Tag.core``), others listed below, and Python
arithmetic on sizes. None of them opens a file, a socket or a library; ``aten.from_file`` and
operators of other libraries are refused by name.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import msgpack
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from leyline import InvalidField, Malformed, NotFinite, PrunedArchitecture, ShapeMismatch, TooLarge
from leyline.network.bundle import first_error
from leyline.network.parts import MAX_AXIS

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

_OTHERS = frozenset(
    """
    absolute adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d add_ addbmm addcdiv addcmul addmm addmv adjoint
    affine_grid_generator all alpha_dropout aminmax __and__ arange argsort avg_pool1d baddbmm
    batch_norm bilinear block_diag broadcast_tensors broadcast_to bucketize cdist celu_ celu
    chain_matmul channel_shuffle chunk clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clip
    column_stack complex concat concatenate contiguous conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d copy_ cosine_similarity count_nonzero cross cumprod detach_
    detach diag diag_embed div_ dot dropout dropout_ dsplit dstack einsum elu_ embedding erfc exp_
    expand_as feature_dropout fill_ flatten fliplr flipud floor_divide frac frobenius_norm gelu_
    glu grid_sampler group_norm gru hardshrink hardsigmoid hardsigmoid_ hardswish_ hardswish
    hardtanh_ heaviside hsplit hstack hypot im2col imag index_add index_copy index_fill index_put_
    inner instance_norm isfinite isinf kron layer_norm leaky_relu_ lerp lift_fresh_copy
    linalg_multi_dot linalg_norm linalg_vector_norm linear log_sigmoid log_softmax logaddexp
    logcumsumexp logit logsumexp lstm masked_fill masked_fill_ matmul matrix_H max_pool1d
    max_pool2d max_pool3d median meshgrid mH mish mish_ moveaxis movedim mT mul_ multiply mv
    nan_to_num narrow native_channel_shuffle neg_ negative new_full new_ones new_zeros norm
    nuclear_norm numpy_T one_hot ones ones_like __or__ outer pad pairwise_distance permute
    pixel_shuffle pixel_unshuffle polar pow_ prelu real relu_ relu6 relu6_ repeat_interleave
    reshape reshape_as rms_norm rnn_relu rnn_tanh roll rot90 rsub scaled_dot_product_attention
    searchsorted selu_ selu sigmoid_ silu_ silu sinc softmax softplus softshrink special_softmax
    split split_with_sizes sqrt_ square_ square squeeze_ squeeze stack std std_mean sub_ subtract
    swapaxes swapdims t take_along_dim tanh_ tensor_split tensordot threshold_ threshold tile to
    trace transpose tril triu true_divide type_as unbind unflatten unfold unsafe_chunk unsafe_split
    _unsafe_view unsqueeze_ upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d
    _upsample_bilinear2d_aa upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_trilinear3d var_mean view_as view_as_complex view_as_real
    vsplit vstack _weight_norm where xlogy zero_ zeros zeros_like
    """.split()  # noqa: SIM905
)
"""Other ATen operators that ``torch.export`` keeps as they are: functions of their arguments alone,
like core ones."""
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
        InvalidField: if a program may not hold it.
    """
    name = _NAMES.get(id(target)) or str(target)
    resolve(name)
    return name


def resolve(name: str) -> Callable[..., Any]:
    """The function that an operator's name stands for.

    Raises:
        InvalidField: if a program may not hold it.
    """
    if name in _PYTHON:
        return _PYTHON[name]
    library, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    known = packet.isidentifier() and overload.isidentifier() and library == "aten"
    if known and packet not in _FORBIDDEN:
        function = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if isinstance(function, torch._ops.OpOverload):
            is_size = packet in ("sym_size", "sym_numel", "sym_stride")
            if torch.Tag.core in function.tags or packet in _OTHERS or is_size:
                return function
    raise InvalidField("program.operator", "an ATen operator that only computes", name[:200])


FORMAT = 1
DOES_NOT_RUN = (
    *(RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError),
    *(ArithmeticError, AssertionError, OSError),
)
"""What operators complain with where a program is not what it says."""
_MAX_NODES = 200_000
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128),
    )
}
Size = Annotated[StrictInt, Field(ge=1, le=MAX_AXIS)]
_MEMORY_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last)
_CONSTANTS: Mapping[str, Mapping[str, Any]] = {
    "dtype": _DTYPES,
    "device": {"cpu": torch.device("cpu")},
    "layout": {str(torch.strided): torch.strided},
    "memory_format": {str(value): value for value in _MEMORY_FORMATS},
}
"""What a tagged argument can stand for, beside a value."""


@dataclass(frozen=True)
class GateSlot:
    """One gate: what it multiplies, and how wide it is."""

    value: str
    """The name of the graph's input that it is."""
    module: str
    """The consumer whose first input it multiplies, or the branch whose output."""
    dim: int | None
    """The axis of that input as architectures name it; None for a branch (of width 1)."""
    size: int


@dataclass(frozen=True)
class Node:
    """One call of an operator. Arguments are numbers, text, lists and tagged references."""

    name: str
    operator: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Document(BaseModel):
    """A program's bytes once they are msgpack: every field of its type, nothing else in it."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1]
    model_hash: StrictStr
    weights: dict[StrictStr, StrictStr]
    inputs: dict[StrictStr, StrictStr]
    gates: list[tuple[StrictStr, StrictStr, StrictInt | None, Size]]
    nodes: list[tuple[StrictStr, StrictStr, tuple[Any, ...], dict[StrictStr, Any]]]
    output: StrictStr
    batch: Size | None = None


@dataclass(frozen=True)
class Program:
    """The graph. :meth:`read` has resolved every operator and every reference."""

    model_hash: str
    """Of the architecture that it computes."""
    weights: Mapping[str, str]
    """Path in the weights by the name of the graph's input."""
    inputs: Mapping[str, str]
    """Name in the held-out batch by the name of the graph's input."""
    gates: tuple[GateSlot, ...]
    nodes: tuple[Node, ...]
    output: str
    batch: int | None = None
    """The number of samples that it takes, where it does not take any."""

    def packed(self) -> bytes:
        """Msgpack; the same program, the same bytes."""
        packed: bytes = msgpack.packb(
            {
                "format": FORMAT,
                "model_hash": self.model_hash,
                "weights": dict(self.weights),
                "inputs": dict(self.inputs),
                "gates": [[g.value, g.module, g.dim, g.size] for g in self.gates],
                "nodes": [[n.name, n.operator, list(n.args), dict(n.kwargs)] for n in self.nodes],
                "output": self.output,
                "batch": self.batch,
            }
        )
        return packed

    @classmethod
    def read(cls, data: bytes) -> Program:
        """The program of some bytes. Nothing is run.

        Raises:
            Malformed, InvalidField, TooLarge: naming what is wrong with it.
        """
        try:
            fields = _Document.model_validate(msgpack.unpackb(data, strict_map_key=True))
        except ValidationError as error:
            raise first_error(error, "program") from None
        except (ValueError, RecursionError, msgpack.UnpackException) as error:
            raise Malformed("program", "a program of this format", str(error)[:200]) from None
        if len(fields.nodes) > _MAX_NODES:
            raise TooLarge("program.nodes", f"at most {_MAX_NODES}", len(fields.nodes))
        parts = dict(fields)
        del parts["format"]
        parts["gates"] = tuple(GateSlot(*gate) for gate in fields.gates)
        parts["nodes"] = tuple(Node(*node) for node in fields.nodes)
        program = cls(**parts)
        known = {*program.weights, *program.inputs, *(gate.value for gate in program.gates)}
        for node in program.nodes:
            resolve(node.operator)
            unknown = [name for name in _names_in(node) if name not in known]
            if unknown:
                raise InvalidField(f"program.{node.name}", "values made before it", unknown[0])
            known.add(node.name)
        if program.output not in known:
            raise InvalidField("program.output", "a value of the program", program.output)
        return program

    def run(
        self,
        weights: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        gates: Sequence[Tensor],
        watched: MutableMapping[str, Tensor] | None = None,
        instead: Mapping[str, Callable[..., Any]] | None = None,
    ) -> Tensor:
        """The network's outputs.

        Args:
            weights: tensors by path.
            inputs: tensors by name, N samples along their first dimension.
            gates: [N, size] for every slot, in their order.
            watched: names of values, which are filled in.
            instead: what makes a value in place of its operator, by the value's name.
        """
        values: dict[str, Any] = {name: weights[path] for name, path in self.weights.items()}
        values |= {name: inputs[key] for name, key in self.inputs.items()}
        values |= {slot.value: gate for slot, gate in zip(self.gates, gates, strict=True)}
        for node, function, needless in self._steps:
            args = [decoded(value, values) for value in node.args]
            kwargs = {key: decoded(value, values) for key, value in node.kwargs.items()}
            if instead is not None:
                function = instead.get(node.name, function)
            values[node.name] = function(*args, **kwargs)
            if watched is not None and node.name in watched:
                watched[node.name] = values[node.name]
            for name in needless:
                del values[name]
        output = values[self.output]
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise InvalidField("program.output", "a floating-point tensor", type(output).__name__)
        return output

    def gated(self, slot: GateSlot) -> str:
        """The name of the value that the gate of a slot has multiplied.

        Raises:
            InvalidField: if nothing is multiplied by it.
        """
        gate = {slot.value}  # and the forms that it is brought into first
        for node in self.nodes:
            if gate.intersection(_names_in(node)):
                if node.operator == "aten.mul.Tensor":
                    return node.name
                gate.add(node.name)
        raise InvalidField(f"program.{slot.value}", "a gate that multiplies a value", slot.module)

    @cached_property
    def _steps(self) -> tuple[tuple[Node, Callable[..., Any], Sequence[str]], ...]:
        """Every node, its function, and the values that nothing needs after it."""
        last: dict[str, int] = {}
        for number, node in enumerate(self.nodes):
            for name in (node.name, *_names_in(node)):
                last[name] = number
        last.pop(self.output, None)
        freed: dict[int, list[str]] = {}
        for name, number in last.items():
            freed.setdefault(number, []).append(name)
        return tuple(
            (node, resolve(node.operator), freed.get(number, ()))
            for number, node in enumerate(self.nodes)
        )


def encoded(value: Any) -> Any:
    """An argument of a graph node as plain data; references, dtypes and the like are tagged.

    Raises:
        InvalidField: if there is no plain form of it.
    """
    if isinstance(value, torch.fx.Node):
        return {"value": value.name}
    if isinstance(value, (tuple, list)):
        return [encoded(part) for part in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "cpu"}  # wherever the trainer is: workers compute on the processor
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value)}
    if isinstance(value, torch.layout):
        return {"layout": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InvalidField("program.argument", "numbers, text, tensors and lists", repr(value)[:200])


def decoded(value: Any, values: Mapping[str, Any]) -> Any:
    """What :func:`encoded` encoded, with the values that its references name."""
    if isinstance(value, (tuple, list)):
        return [decoded(part, values) for part in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    return values[content] if tag == "value" else _CONSTANTS[tag][content]


def _references(value: Any) -> Iterator[str]:
    """The names of all values that an argument refers to; refuses tags that mean nothing."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _references(part)
    elif isinstance(value, dict):
        if len(value) != 1 or not all(isinstance(part, str) for part in value.values()):
            raise Malformed("program.argument", "one tag with its text", repr(value)[:200])
        ((tag, content),) = value.items()
        if tag == "value":
            yield content
        elif content not in _CONSTANTS.get(tag, {}):
            raise Malformed("program.argument", "a known constant", repr(value)[:200])


def _names_in(node: Node) -> list[str]:
    """The values that a node refers to."""
    return [name for part in (*node.args, *node.kwargs.values()) for name in _references(part)]


MIN_SAMPLES = 32
IGNORED_LABEL = -100
"""As in PyTorch's cross-entropy: positions that have no label."""


def _tensors(data: bytes, field: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Malformed(field, "a safetensors blob", str(error)[:200]) from None


def read_weights(
    data: bytes, program: Program, architecture: PrunedArchitecture
) -> dict[str, Tensor]:
    """The program's weights, each as the architecture describes it."""
    tensors = _tensors(data, "weights")
    for path in program.weights.values():
        tensor, described = tensors.get(path), architecture.tensor.get(path)
        if tensor is None:
            raise InvalidField(f"weights.{path}", "a tensor", "nothing")
        found = ("x".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."))
        if described is not None:
            expected = ("x".join(map(str, described.shape)), described.dtype)
            if found != expected:
                raise ShapeMismatch(f"weights.{path}", " ".join(expected), " ".join(found))
        if described is not None and tensor.is_floating_point():
            _require_finite(f"weights.{path}", tensor)
    return tensors


def read_held_out(
    data: bytes, program: Program, distinct: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs by name, and labels.

    Args:
        distinct: take every input once: copies prove nothing. Labels of one class are then left to
            the gate ``labels``.
    """
    tensors = _tensors(data, "held_out")
    labels = tensors.get("labels")
    if labels is None or labels.ndim == 0 or labels.dtype not in (torch.int64, torch.int32):
        found = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise InvalidField("held_out.labels", "class labels as integers", found)
    labels = labels.long()
    if len(labels) < MIN_SAMPLES:
        raise InvalidField("held_out.labels", f"at least {MIN_SAMPLES} samples", len(labels))
    known = labels[labels != IGNORED_LABEL]
    if len(known) == 0 or (not distinct and bool((known == known[0]).all())):
        found = f"only class {int(known[0])}" if len(known) else "no label at all"
        raise InvalidField("held_out.labels", "at least two classes", found)
    inputs = dict(_inputs(tensors, "inputs", program, len(labels)))
    if not distinct:
        return inputs, labels
    rows = _first_of_each(list(inputs.values()), len(labels))
    if len(rows) < MIN_SAMPLES:
        expected = f"at least {MIN_SAMPLES} samples that differ"
        raise InvalidField("held_out.inputs", expected, len(rows))
    if len(rows) == len(labels):
        return inputs, labels
    return {name: x[rows] for name, x in inputs.items()}, labels[rows]


def _first_of_each(inputs: Sequence[Tensor], samples: int) -> Tensor:
    """The samples that differ from all before them."""
    seen: set[bytes] = set()
    rows = []
    for number in range(samples):
        digest = hashlib.blake2b(digest_size=16)
        for x in inputs:
            digest.update(x[number].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        if digest.digest() not in seen:
            seen.add(digest.digest())
            rows.append(number)
    return torch.tensor(rows)


def read_calibration(data: bytes, program: Program) -> dict[str, Tensor]:
    """Calibration inputs by name; empty if the blob has none.

    Raises:
        InvalidField, ShapeMismatch, NotFinite: if there are some that are not sound.
    """
    tensors = _tensors(data, "held_out")
    counts = {len(x) for name, x in tensors.items() if name.startswith("calibration/") and x.ndim}
    if not counts:
        return {}
    samples = max(counts)
    if samples < MIN_SAMPLES:
        raise InvalidField("held_out.calibration", f"at least {MIN_SAMPLES} samples", samples)
    return dict(_inputs(tensors, "calibration", program, samples))


def _inputs(
    tensors: dict[str, Tensor], kind: str, program: Program, samples: int
) -> Iterator[tuple[str, Tensor]]:
    """What the program is called with, by name: so many samples of each."""
    for name in program.inputs.values():
        field = f"{kind}/{name}"
        tensor = tensors.get(field)
        if tensor is None or tensor.ndim == 0 or len(tensor) != samples:
            found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ShapeMismatch(f"held_out.{field}", f"{samples} samples", found)
        if tensor.is_floating_point():
            _require_finite(f"held_out.{field}", tensor)
        yield name, tensor


def _require_finite(field: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        place = [int(i) for i in (~torch.isfinite(tensor)).nonzero()[0]]
        raise NotFinite(f"{field}{place}", "a finite number", float(tensor[tuple(place)]))


def require_gates(slots: Sequence[GateSlot], architecture: PrunedArchitecture) -> None:
    """Everything that may be removed must have its gates."""
    sizes = {(slot.module, slot.dim): slot.size for slot in slots}
    for group in architecture.groups:
        for site in (*group.sites, *group.norms) if group.prunable else ():
            size = sizes.get((site.module, site.dim), 0)
            if size <= max(site.all_of(range(group.size)), default=-1):
                found = f"{size} units" if size else "no gate"
                raise InvalidField(f"program.gates.{site.module}", f"units of {group.name}", found)
    for block in architecture.blocks:
        if block.prunable and not block.removed and (block.branch, None) not in sizes:
            raise InvalidField(f"program.gates.{block.branch}", f"a gate of {block.name}", "none")

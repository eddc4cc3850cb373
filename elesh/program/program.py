"""A network as data: a list of operators, read without running anything and run by this module.

``torch.export.load`` is not used: it falls back to unrestricted pickle where tensors do not load
otherwise, and hands size expressions of the file to ``sympify``, which evaluates Python. A program
here is msgpack of names, numbers and lists (see decision 0030), its weights are safetensors.

A program computes ``outputs = f(weights, inputs, gates)``. There is one gate for every place where
removable units enter a consumer (an axis) and for every branch that can be removed whole; each is
a matrix [N, units along the axis] that multiplies what passes. A mask is a gate of ones and zeros,
and the gradient with respect to gates is the statistic that units are ranked by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgpack
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError
from torch import Tensor

from leyline import InvalidField, Malformed, TooLarge
from leyline.network.bundle import first_error
from leyline.network.parts import MAX_AXIS

from .operators import resolve

__all__ = ["DOES_NOT_RUN", "FORMAT", "GateSlot", "Node", "Program", "decoded", "encoded"]

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
        program._check()
        return program

    def _check(self) -> None:
        known = {*self.weights, *self.inputs, *(gate.value for gate in self.gates)}
        for node in self.nodes:
            resolve(node.operator)
            unknown = [name for name in _names_in(node) if name not in known]
            if unknown:
                raise InvalidField(f"program.{node.name}", "values made before it", unknown[0])
            known.add(node.name)
        if self.output not in known:
            raise InvalidField("program.output", "a value of the program", self.output)

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
        last = self._last_use
        for number, (node, function) in enumerate(self._calls):
            args = [decoded(value, values) for value in node.args]
            kwargs = {key: decoded(value, values) for key, value in node.kwargs.items()}
            if instead is not None:
                function = instead.get(node.name, function)
            values[node.name] = function(*args, **kwargs)
            if watched is not None and node.name in watched:
                watched[node.name] = values[node.name]
            for name in last.get(number, ()):
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

    @property
    def _calls(self) -> Iterator[tuple[Node, Callable[..., Any]]]:
        return ((node, resolve(node.operator)) for node in self.nodes)

    @property
    def _last_use(self) -> dict[int, list[str]]:
        """Names of values by the number of the node after which they are not needed."""
        last: dict[str, int] = {}
        for number, node in enumerate(self.nodes):
            for name in (node.name, *_names_in(node)):
                last[name] = number
        last.pop(self.output, None)
        freed: dict[int, list[str]] = {}
        for name, number in last.items():
            freed.setdefault(number, []).append(name)
        return freed


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

"""What the input of a layer is computed from, and which of its channels depend on what.

Promises: nothing is changed; the answer is read off the autograd graph of one forward pass: by
walking back through it to the layers (and parameters on the way), and by derivatives of a few
channels at a time, from there to here only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.conv import _ConvNd

from elesh.trainer.network.calls import Call, Link
from elesh.trainer.network.kinds.matrices import BareMatrix
from elesh.trainer.network.kinds.norms import Norm, norm_of
from elesh.trainer.network.layers import channel_axes, held, made_dim
from elesh.trainer.network.multihead import NATIVE

from .axes import any_along, shape_of, signed

__all__ = [
    "SOFTMAX",
    "CallByFunction",
    "Met",
    "Probe",
    "Source",
    "Sources",
    "attends",
    "calls_by_functions",
    "factors",
    "in_order",
    "leaf_of",
    "weights_used",
]

Bools = npt.NDArray[np.bool_]
TensorAxis = tuple[str, int]
"""Path of a tensor and one of its axes."""
_WEIGHTS = {"AddmmBackward0": (0, 2), "MmBackward0": (0, 1), "ConvolutionBackward0": (1, 2)}
"""Products, and which of their operands are walked through if one of them is a parameter."""
_FACTORS = {
    "AddmmBackward0": (1, 2), "MmBackward0": (0, 1), "BmmBackward0": (0, 1),
    "ConvolutionBackward0": (1,),
}  # fmt: skip
"""Products, and which of their operands may be weights."""
_LINEAR = {
    "AddmmBackward0": ((1, 2),), "MmBackward0": ((0, 1),), "ConvolutionBackward0": ((0, 1),),
}  # fmt: skip
"""Products as a layer makes them: which operand is its input, and which its weight."""
_CARRIES = ("View", "UnsafeView", "Permute", "Transpose", "Roll", "ConstantPad", "Clone", "Reshape")
_MOVES = (
    "TBackward", "Transpose", "View", "Permute", "UnsafeView", "ToCopy", "Squeeze", "Unsqueeze",
    "Clone", "ReshapeAlias",
)  # fmt: skip
"""Operations between a parameter and the product that it is a factor of."""
SPREADS = (*_MOVES, "Expand")


_FEW = 16
"""Gradients of a share of one in so many of the parameters' numbers are few."""
_FLAT = ("Relu", "Hard", "Threshold", "Clamp", "Sigmoid", "Tanh")
"""Activations that let no gradient through in places, be it by how little is kept of the pass."""
_LARGEST = ("AmaxBackward", "AminBackward")
"""Operations that let it through only where what was saved of both sides is equal."""
_BILINEAR = "BmmBackward0"
SOFTMAX = ("SoftmaxBackward0", "SafeSoftmaxBackward0")


@dataclass(frozen=True, eq=False)
class Source:
    """A layer's output, or a parameter that is used outside of a layer."""

    layer: str
    """The layer that makes it, or whose weight it is; empty for other parameters."""
    tensors: tuple[TensorAxis, ...]
    """What shrinks with its channels; of a bare parameter, every axis it has."""
    edge: Link | None = None
    axis: int = -1
    """Of the layer's output, where its channels lie."""
    parameter: nn.Parameter | None = None
    scored: bool = False
    """Whether it is met through the softmax only: queries and keys, not values."""
    norm: Norm | None = None
    """What normalises over all channels of the layer, right behind it: ``edge`` is its output."""
    normed_by: str = ""
    """The module that does."""

    @property
    def start(self) -> Any:
        """The tensors with respect to which its gradient is taken."""
        return self.parameter if self.edge is None else GradientEdge(*self.edge)

    @property
    def key(self) -> Any:
        """The same for all that is found of it."""
        return self.edge or id(self.parameter)

    @property
    def numbers(self) -> int:
        """That its gradient has."""
        if self.edge is None:
            return 0 if self.parameter is None else self.parameter.numel()
        return math.prod(shape_of(*self.edge))


@dataclass
class Met:
    """What the walk back from a layer's input met."""

    products: list[Any] = field(default_factory=list)
    """Softmax and fused attention functions."""
    bilinear: list[Any] = field(default_factory=list)
    """Products of many matrices, none of them a weight: linear attentions are made of these."""
    flat: list[Any] = field(default_factory=list)
    """Activations that are flat in places."""
    weighed: dict[Any, tuple[int, ...]] = field(default_factory=dict)
    """Products with weights that are walked to, and which of their operands are: not what the
    weights multiply."""
    sources: list[Source] = field(default_factory=list)


@dataclass(eq=False)
class Probe:
    """Asks what blocks of a value depend on: in principle, so that activations let gradients
    through where they are flat, and a softmax that is nearly one-hot."""

    link: Link
    """The value."""
    dim: int
    """The axis of its channels, which are divided evenly."""
    blocks: int
    met: Met
    """What was met behind it: some sources, at least."""
    touched: list[tuple[Source, Bools]] = field(default_factory=list)
    """[blocks, channels] of every source: whether a block depends on them. Sources that all blocks
    depend on alike are left out; ``tensors`` of parameters are narrowed to the axis along which
    blocks differ."""

    @cached_property
    def numbers(self) -> int:
        """That the gradients of all sources have."""
        return sum(source.numbers for source in self.met.sources)

    def drawn(self) -> Tensor:
        """A random gradient of the value."""
        kind, generator = self.link[0]._input_metadata[self.link[1]], torch.Generator()
        shape = list(shape_of(*self.link))
        drawn = torch.randn(shape, generator=generator.manual_seed(0))
        return drawn.to(kind.device, kind.dtype)

    def of_block(self, block: int, drawn: Tensor) -> Tensor:
        """The same with zeros but for one block."""
        width = drawn.shape[self.dim] // self.blocks
        found, window = torch.zeros_like(drawn), slice(block * width, (block + 1) * width)
        found.movedim(self.dim, -1)[..., window] = drawn.movedim(self.dim, -1)[..., window]
        return found


@dataclass
class _Round:
    """Probes that go backward together."""

    probes: list[Probe] = field(default_factory=list)
    _sources: set[Any] = field(default_factory=set)
    _numbers: int = 0

    def takes(self, probe: Probe, most: int) -> bool:
        """Whether this shares no source with the others, and all ask for ``most`` numbers."""
        fits = self._numbers + probe.numbers <= most
        return fits and self._sources.isdisjoint(source.key for source in probe.met.sources)

    def add(self, probe: Probe) -> None:
        self.probes.append(probe)
        self._sources.update(source.key for source in probe.met.sources)
        self._numbers += probe.numbers


class Sources:
    """Walks back from the inputs of layers.

    Args:
        calls: of a pass whose graph is alive, with all parameters requiring gradients.
        buffers: those that are leaves of that graph, by path.
    """

    def __init__(
        self, calls: Sequence[Call], model: nn.Module, buffers: Mapping[str, nn.Parameter]
    ) -> None:
        self._producers = {
            call.output: call
            for call in calls
            if call.output is not None and channel_axes(call.module).produces
        }
        self._known: dict[Any, Met] = {}
        self._norms = {
            call.made[0]: call
            for call in calls
            if call.made is not None and call.first is not None and call.first[1] == 0
            if call.first[0] in self._producers and call.made[0] not in self._producers
        }
        self._kinds: dict[nn.Module, Norm | None] = {}
        self._owners = {
            id(parameter): (path, module, name)
            for path, module in model.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        for full, buffer in buffers.items():
            path, _, name = full.rpartition(".")
            self._owners[id(buffer)] = path, model.get_submodule(path), name

    def behind(self, link: Link) -> Met:
        """What the value that a layer was given was made from: queries and keys first."""
        if link[0] not in self._known:
            self._known[link[0]] = self._behind(link)
        return self._known[link[0]]

    def _behind(self, link: Link) -> Met:
        met = Met()
        made: dict[int, bool] = {}
        normed: dict[int, Call] = {}
        leaves: dict[int, tuple[nn.Parameter, bool]] = {}
        seen: set[tuple[Any, bool]] = set()
        stack = [(link[0], False)]
        while stack:
            function, scored = stack.pop()
            if function is None or (function, scored) in seen:
                continue
            seen.add((function, scored))
            norm = self._norm_of(function)
            if norm is not None and norm.first is not None:
                normed[id(self._producers[norm.first[0]])] = norm
                function = norm.first[0]
            if function in self._producers:
                key = id(self._producers[function])
                made[key] = made.get(key, True) and scored
            elif hasattr(function, "variable"):
                known = leaves.get(id(function.variable))
                leaves[id(function.variable)] = (
                    function.variable,
                    scored and (not known or known[1]),
                )
            else:
                stack += self._before(function, scored, met)
        calls = [call for call in self._producers.values() if id(call) in made]
        found = [self._of_call(call, made[id(call)], normed.get(id(call))) for call in calls]
        # Queries and keys, the widest first, then values: the order of ``PruningGroup.layers``.
        widths = {one: shape_of(*one.edge)[one.axis] for one in found if one.edge is not None}
        found.sort(key=lambda one: (not one.scored, -widths[one] if one.scored else 0))
        met.sources = found
        # Weights first: their biases go along.
        weights_first = sorted(leaves.values(), key=lambda one: one[0].ndim < 2)
        met.sources += [self._of_leaf(*one) for one in weights_first if id(one[0]) in self._owners]
        return met

    def made_by(self, source: Source) -> Call | None:
        """The call that made this layer's output."""
        return None if source.edge is None else self._producers.get(source.edge[0])

    def _before(self, function: Any, scored: bool, met: Met) -> Iterator[tuple[Any, bool]]:
        name = function.name()
        fused, softmax = name.startswith("ScaledDotProduct"), name in SOFTMAX
        if (fused or softmax) and function not in met.products:
            met.products.append(function)
        if name.startswith((*_FLAT, *_LARGEST)):
            met.flat.append(function)
        operands = [source for source, _ in function.next_functions]
        if name == _BILINEAR and not any(_weight(one) is not None for one in operands):
            met.bilinear.append(function)
        walked = _WEIGHTS.get(name)
        if walked and any(
            _weight(operands[place]) is not None for place in _among(walked, operands)
        ):
            met.weighed[function] = tuple(
                place
                for place in _among(walked, operands)
                if name != "MmBackward0" or _weight(operands[place]) is not None
            )
            operands = [operands[place] for place in met.weighed[function]]
        for place, source in enumerate(operands):
            values = fused and place == 2
            yield source, scored or ((fused or softmax) and not values)

    def _norm_of(self, function: Any) -> Call | None:
        """The call of a normalisation over all channels of what a layer made, if this is its end:
        derivatives do not tell what depends on what through it."""
        call = self._norms.get(function)
        if call is None or call.first is None:
            return None
        if call.module not in self._kinds:
            self._kinds[call.module] = norm_of(call.module, tuple(shape_of(*call.first)))
        return call if self._kinds[call.module] is not None else None

    def _of_call(self, call: Call, scored: bool, norm: Call | None) -> Source:
        axes = channel_axes(call.module)
        pairs = ((n, dim) for n, dim in axes.outputs if held(call.module, n) is not None)
        own = [(self._path(call, n), dim) for n, dim in pairs]
        axis = made_dim(call.module)
        if norm is None:
            return Source(call.name, tuple(own), (call.output, 0), axis, scored=scored)
        scales = norm.module._parameters.items()
        own += [(f"{norm.name}.{n}", 0) for n, p in scales if p is not None and p.ndim == 1]
        return Source(
            call.name,
            tuple(own),
            norm.made,
            axis,
            scored=scored,
            norm=self._kinds[norm.module],
            normed_by=norm.name,
        )

    def _path(self, call: Call, attribute: str) -> str:
        """Of a tensor of a layer."""
        if not isinstance(call.module, BareMatrix):
            return f"{call.name}.{attribute}"
        path, _, name = self._owners[id(held(call.module, attribute))]
        return f"{path}.{name}".lstrip(".")

    def _of_leaf(self, parameter: nn.Parameter, scored: bool) -> Source:
        path, module, name = self._owners[id(parameter)]
        layer = path if channel_axes(module).produces and name == "weight" else ""
        own = [(f"{path}.{name}".lstrip("."), dim) for dim in range(parameter.ndim)]
        return Source(layer, tuple(own), parameter=parameter, scored=scored)

    def touched(self, probes: Iterable[Probe]) -> None:
        """Fill in what each of the probes touches. Those that share no source go backward together,
        as far as the gradients of all these are few: between what they ask about and their sources,
        they share nothing."""
        parameters = (module._parameters.get(name) for _, module, name in self._owners.values())
        most = sum(one.numel() for one in parameters if one is not None) // _FEW
        rounds: list[_Round] = []
        for probe in probes:
            at = next((one for one in rounds if one.takes(probe, most)), None)
            if at is None:
                at = _Round()
                rounds.append(at)
            at.add(probe)
        for one in rounds:
            for probe, seen in zip(one.probes, _gone_backward(one.probes), strict=True):
                probe.touched = self._told_apart(probe.met.sources, seen)

    def _told_apart(
        self, sources: Sequence[Source], seen: Sequence[Sequence[list[Bools]]]
    ) -> list[tuple[Source, Bools]]:
        """[blocks, channels] of the sources that blocks depend on in different ways, each along the
        axis that tells them best."""
        found = list[tuple[Source, Bools]]()
        known = set[TensorAxis]()
        for number, source in enumerate(sources):
            apart = list[tuple[float, int, Source, Bools]]()
            for axis, rows in enumerate(zip(*(block[number] for block in seen), strict=True)):
                matrix = np.stack(rows)
                own = source if source.parameter is None else self._narrowed(source, axis)
                if (matrix.any(0) & ~matrix.all(0)).any() and not known.issuperset(own.tensors):
                    apart.append((float(matrix.mean()), axis, own, matrix))
            if apart:  # Along the axis that tells them best: a gradient may be zero by chance.
                _, _, own, matrix = min(apart, key=lambda one: one[:2])
                known.update(own.tensors)
                found.append((own, matrix))
        return found

    def _narrowed(self, source: Source, axis: int) -> Source:
        """A parameter whose channels lie on one axis, with what goes along with it."""
        _, module, name = self._owners[id(source.parameter)]
        axes = channel_axes(module)
        if (name, axis) not in axes.outputs:
            return replace(source, layer="", tensors=source.tensors[axis : axis + 1])
        path = source.tensors[0][0].rpartition(".")[0]
        own = [(f"{path}.{one}", dim) for one, dim in axes.outputs if held(module, one) is not None]
        return replace(source, tensors=tuple(own))


def _gone_backward(probes: Sequence[Probe]) -> list[list[list[list[Bools]]]]:
    """By probe, block and source: which channels have a gradient (:func:`_along`)."""
    sources = [source for probe in probes for source in probe.met.sources]
    stops = [
        source.edge[0].register_prehook(lambda gradients: (None,) * len(gradients))
        for source in sources
        if source.edge is not None
    ]
    for probe in probes:
        stops += [one.register_hook(_only(at)) for one, at in probe.met.weighed.items()]
    functions = dict.fromkeys(f for p in probes for f in (*p.met.products, *p.met.flat))
    stops += [function.register_hook(_unsaturated(function)) for function in functions]
    drawn = [probe.drawn() for probe in probes]
    seen: list[list[list[list[Bools]]]] = [[] for _ in probes]
    try:
        for block in range(max(probe.blocks for probe in probes)):
            asked = [number for number, probe in enumerate(probes) if block < probe.blocks]
            inputs = [source.start for n in asked for source in probes[n].met.sources]
            gradients = iter(
                torch.autograd.grad(
                    [GradientEdge(*probes[number].link) for number in asked],
                    inputs,
                    [probes[number].of_block(block, drawn[number]) for number in asked],
                    retain_graph=True,
                    allow_unused=True,
                )
            )
            for number in asked:
                own = probes[number].met.sources
                seen[number].append([_along(source, next(gradients)) for source in own])
    finally:
        for stop in stops:
            stop.remove()
    return seen


def _only(places: Collection[int]) -> Callable[..., Any]:
    """A hook that lets gradients go to some operands of a function only."""

    def hook(came: tuple[Tensor | None, ...], left: tuple[Tensor | None, ...]) -> Any:
        return tuple(one if place in places else None for place, one in enumerate(came))

    return hook


def _unsaturated(function: Any) -> Callable[..., Any]:
    """A hook that makes the gradients of what went into a softmax, a fused attention or an
    activation what they would be if these were nowhere flat."""
    mixed = signed(function._saved_dim) if function.name() in SOFTMAX else None
    dims = function._saved_dim if function.name().startswith(_LARGEST) else ()
    kept = bool(dims) and function._saved_keepdim

    def hook(came: tuple[Tensor | None, ...], left: tuple[Tensor | None, ...]) -> Any:
        gradient = left[0]
        if gradient is None:  # It was stopped before.
            return None
        if mixed is not None:  # All that it divides by depends on all of these.
            return (gradient + gradient.abs().sum(mixed, keepdim=True),)
        if dims and came[0] is not None:  # All of these may be the largest.
            for dim in () if kept else sorted(signed(dim) % came[0].ndim for dim in dims):
                gradient = gradient.unsqueeze(dim)
            return (gradient.expand(came[0].shape),)
        if len(came) == 1:
            return (gradient,)
        level = gradient.abs().sum((-2, -1), keepdim=True)
        fits = [x is not None and x.shape[:-2] == gradient.shape[:-2] for x in came[:2]]
        scores = [
            torch.where(x == 0, level, x) if fit and x is not None else x
            for x, fit in zip(came, fits, strict=False)
        ]
        return (*scores, *came[2:])

    return hook


def _along(source: Source, gradient: Tensor | None) -> list[Bools]:
    """Which channels have a gradient: of a layer's output along its axis of channels, of a
    parameter along each of its axes."""
    if source.edge is None:
        assert source.parameter is not None
        shape, axes = list(source.parameter.shape), list(range(source.parameter.ndim))
    else:
        shape = list(shape_of(*source.edge))
        axes = [source.axis % len(shape)]
    if gradient is None:
        return [np.zeros(shape[axis], dtype=np.bool_) for axis in axes]
    return [any_along(gradient, axis).cpu().numpy() for axis in axes]


def _among(places: Sequence[int], operands: Sequence[Any]) -> list[int]:
    return [place for place in places if place < len(operands)]


def leaf_of(function: Any, moves: tuple[str, ...] = _MOVES) -> Tensor | None:
    """The parameter that this is, moved about at most."""
    while function is not None and not hasattr(function, "variable"):
        if not function.name().startswith(moves):
            return None
        function = function.next_functions[0][0]
    return None if function is None else function.variable


def _weight(function: Any) -> Tensor | None:
    """The same of a parameter with several axes."""
    found = leaf_of(function)
    return found if found is not None and found.ndim > 1 else None


def attends(functions: Iterable[Any]) -> bool:
    """Whether one of these functions of an autograd graph is a softmax or a fused attention, or
    multiplies many matrices (linear attention)."""
    return any(map(_weighs, functions))


def _weighs(function: Any) -> bool:
    name = function.name()
    return name in (*SOFTMAX, _BILINEAR) or name.startswith("ScaledDotProduct")


def factors(function: Any) -> Iterator[tuple[int, Tensor]]:
    """The operands of a product that are weights, each with its place."""
    for place in _FACTORS.get(function.name(), ()):
        operand = function.next_functions[place][0]
        weight = None if operand is None else _weight(operand)
        if weight is not None:
            yield place, weight


def weights_used(functions: Iterable[Any]) -> dict[int, int]:
    """By the id of every parameter that one of these functions of an autograd graph multiplies by:
    how often, all samples together. Of two parameters, the first one."""
    positions: dict[int, int] = {}
    for function in functions:
        place, weight = next(factors(function), (0, None))
        if weight is not None:
            positions[id(weight)] = positions.get(id(weight), 0) + _used(function, place, weight)
    return positions


def _used(function: Any, place: int, weight: Tensor) -> int:
    """How often a function multiplies by a weight that is one of its operands."""
    name, shape = function.name(), shape_of(function, 0)
    if name.startswith("Conv"):
        if not function._saved_transposed:
            return math.prod(shape) // max(1, shape[1])
        given = function.next_functions[0]  # Each of its positions.
        size = shape_of(*given) if given[0] is not None else function._saved_input.shape
        return math.prod(size) // max(1, size[1])
    left = _FACTORS[name] == (place, place + 1)
    used = math.prod(shape) // max(1, shape[-2 if left else -1])
    # Each of a batch has a part of the weight.
    return used // max(1, shape[0]) if name.startswith("Bmm") else used


@dataclass(frozen=True)
class CallByFunction:
    """A linear layer or a convolution whose weight a function multiplies by."""

    call: Call
    """As if the layer had been called."""
    reader: str
    """The module around it whose first input is what the weight multiplies (padded, cut into
    windows, or moved), where a mask can be put instead; else empty."""
    own_bias: bool
    """Whether nothing but its own bias is added to the product."""

    @property
    def at(self) -> str:
        """Where what it reads can be masked: the reader; else the layer itself, called instead of
        the function (:mod:`elesh.trainer.network.calling`), where that is the same; else empty."""
        callable_ = self.own_bias and isinstance(self.call.module, nn.Linear)
        return self.reader or (self.call.name if callable_ else "")


def calls_by_functions(
    calls: Sequence[Call], functions: Iterable[Any], model: nn.Module
) -> list[CallByFunction]:
    """Linear layers and convolutions whose weights functions multiply by.

    Args:
        calls: the calls of modules of a pass whose autograd graph is alive.
        functions: of that graph.
    """
    called = {one.name for one in calls}
    known = {f"{path}.out_proj" for path, m in model.named_modules() if isinstance(m, NATIVE)}
    owners = {
        id(module.weight): (path, module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, _ConvNd)) and path not in called and path not in known
    }
    found: list[CallByFunction] = []
    for function in functions if owners else ():
        for given, place in _LINEAR.get(function.name(), ()):
            operand = function.next_functions[place][0]
            conv = function.name().startswith("Conv")
            weight = _weight(operand) if conv else _transposed_weight(operand)
            path, module = owners.get(id(weight), ("", None))
            if weight is None or module is None or isinstance(module, _ConvNd) != conv:
                continue
            source = function.next_functions[given]
            links = (source,) if source[0] is not None else ()
            used = math.prod(shape_of(function, 0)) // max(1, len(weight))
            number = function._sequence_nr()
            came = links[0] if links else None
            made = (function, 0)
            call = Call(path, module, links, function, used, number, number, came, made, 0, None)
            bias = function.next_functions[2 if conv else 0][0]
            added = bias if conv or given else None
            own_bias = added is None or getattr(added, "variable", added) is module.bias
            found.append(CallByFunction(call, _holder(source, path, calls), own_bias))
    return found


def _transposed_weight(function: Any) -> Tensor | None:
    """The parameter that this is the transposed of."""
    if function is None or not function.name().startswith(("TBackward", "Transpose", "Permute")):
        return None
    leaf = function.next_functions[0][0]
    return leaf.variable if hasattr(leaf, "variable") and leaf.variable.ndim == 2 else None


def _holder(link: Link, path: str, calls: Sequence[Call]) -> str:
    """The innermost module around ``path`` whose first input is what ``link`` was made of."""
    around = {one.first: one.name for one in calls if path.startswith(f"{one.name}.")}
    width = shape_of(*link)[-1] if link[0] is not None else 0
    while link[0] is not None and not hasattr(link[0], "variable"):
        if link in around and shape_of(*link)[-1] == width:
            return around[link]
        behind = [one for one in link[0].next_functions if one[0] is not None]
        if len(behind) != 1 or not link[0].name().startswith(_CARRIES):
            return ""
        link = behind[0]
    return ""


def in_order(calls: Sequence[Call], by_functions: Sequence[Call]) -> list[Call]:
    """Both, those by functions where they came in the pass."""
    found, rest = list[Call](), sorted(by_functions, key=lambda one: one.entered)
    for one in calls:
        while rest and one.output is not None and one.output._sequence_nr() > rest[0].entered:
            found.append(rest.pop(0))
        found.append(one)
    return found + rest

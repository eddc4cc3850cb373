"""Records which layers a forward pass called, with what inputs, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from leyline import InvalidField, LayerDescriptor

from .calling import tensors_in
from .kinds.experts import is_experts, up_of
from .kinds.matrices import BareMatrix, Multiplying, bare_matrices
from .kinds.recurrent import is_recurrent
from .kinds.weight_norms import weight_of
from .layers import channel_axes, is_transposed_linear

Link = tuple[Any, int]
"""A tensor as autograd knows it: the function that made it and the number of its output."""
_ONCE = frozenset(
    kind.forward
    for kind in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
)
"""Forward passes that do nothing with what they are given but multiply it by a weight."""


@dataclass(frozen=True)
class Given:
    """What a layer that mixes channels was given."""

    rows: int
    """The size of its first axis."""
    acting: Tensor
    """[channels] bool: which are not zero throughout."""


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    name: str
    module: nn.Module
    inputs: tuple[Link, ...]
    """What came in that has a history."""
    output: Any
    """The function that made its (first) output; None if it has no history."""
    positions: int
    """How often its weight was multiplied, all samples together."""
    entered: int
    """When it began, counted in events."""
    left: int
    """When it ended."""
    first: Link | None
    """Its first tensor input, if that has a history."""
    made: Link | None
    """Its first output, if that is a tensor with a history."""
    extra_outputs: int
    """How many others it returns behind that."""
    given: Given | None
    """Of layers that mix channels, where that is asked for."""
    others: tuple[Any, ...] = ()
    """The functions that made its other outputs, of recurrent layers (their last states)."""
    packed: bool = False
    """Whether what came in was a packed sequence."""
    started: bool = False
    """Whether a recurrent layer was given first states that are not all zero."""
    further: tuple[Any, ...] = ()
    """The functions that made all that it returned behind its first output."""


class Calls:
    """While entered, notes every call of a model's modules, in order.

    Args:
        acting: from a tensor and an axis to which channels there are not zero throughout, asked of
            what layers that mix channels are given; None: nobody asks.
    """

    def __init__(
        self, model: nn.Module, acting: Callable[[Tensor, int], Tensor] | None = None
    ) -> None:
        self._matrices = bare_matrices(model)
        self._model, self._acting = model, acting
        self.modules: dict[str, nn.Module] = {**dict(model.named_modules()), **self._matrices}
        self._mixing = {
            name: dim
            for name, module in (self.modules.items() if acting else ())
            if (dim := channel_axes(module).site_dim) is not None
        }
        self._plain = {name for name, module in self.modules.items() if multiplies_once(module)}
        self._handles: list[RemovableHandle] = []
        self._clock = 0
        self._open: list[tuple[str, int, list[Tensor], list[Link | None], bool]] = []
        self.made: list[Call] = []
        self.entered: list[str] = []
        """The modules that were called, in order."""

    @property
    def place(self) -> tuple[str, int]:
        """The innermost module that is being called, and how many were called up to now."""
        return self._open[-1][0] if self._open else "", len(self.entered)

    def is_multiplied(self, x: Tensor) -> bool:
        """Whether this is what the layer that is being called was given, which does nothing with it
        but multiply by its weights: only their gradients need it."""
        if not self._open or self._open[-1][0] not in self._plain or not self._open[-1][2]:
            return False
        given = self._open[-1][2][0].untyped_storage()
        return bool(given.data_ptr() == x.untyped_storage().data_ptr())

    def __enter__(self) -> Calls:
        for name, module in self.modules.items():
            if name:
                enter, leave = self._enter(name), self._leave(name)
                self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(leave))
        if self._matrices:
            self._multiplying = Multiplying(self._matrices)
            self._multiplying.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        if self._matrices:
            self._multiplying.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def layers(self, samples: int, used: Mapping[int, int]) -> tuple[LayerDescriptor, ...]:
        """Descriptors of the modules with parameters of their own, in order of execution.

        Args:
            used: by the id of a parameter, how often it was multiplied, all samples together, as
                far as autograd knows: by a layer that was called, by functions, or by both.
        """
        positions: dict[str, int] = {}
        for call in self.made:
            positions[call.name] = positions.get(call.name, 0) + call.positions
        if "" in positions and _owns_any(self._model):
            hint = "put it into a network: torch.nn.Sequential(layer)"
            raise InvalidField("model", "a network with layers in it", self._model, hint=hint)
        paths = {id(p): path for path, p in self._model.named_parameters()}
        per_sample = {path: round(used.get(key, 0) / samples) for key, path in paths.items()}
        beside = dict(per_sample)
        # What functions multiply by weights, beside the layers that have them.
        for name, times in positions.items():
            if (weight := weight_of(self.modules[name])) is not None:
                beside[paths[id(weight)]] -= round(times / samples)
        called = tuple(
            descriptor
            for name, times in positions.items()
            if ".parametrizations." not in f".{name}." and _owns_any(self.modules[name])
            for descriptor in _descriptors(
                name, self.modules[name], round(times / samples), paths, per_sample, beside
            )
        )
        return called + tuple(self._by_functions(called, per_sample))

    def _by_functions(
        self, called: Sequence[LayerDescriptor], used: Mapping[str, int]
    ) -> Iterator[LayerDescriptor]:
        """Layers whose weights others multiply by: their own forward pass is not called."""
        known = {layer.weight for layer in called if layer.weight}
        names = {layer.name for layer in called}
        for path, _ in self._model.named_parameters():
            positions = used.get(path, 0)
            if not positions or path in known:
                continue
            owner, _, attribute = path.rpartition(".")
            kind = type(self._model.get_submodule(owner)).__name__.lower()
            name = owner if attribute == "weight" and owner not in names else path
            yield LayerDescriptor(name=name, kind=kind, weight=path, positions=positions)

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._clock += 1
            self.entered.append(name)
            given = *args, *kwargs.values()
            came, packed = tensors_in(given), any(isinstance(x, PackedSequence) for x in given)
            # Now: what works in place changes the history of its input.
            self._open.append((name, self._clock, came, [_link(x) for x in came], packed))

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._clock += 1
            while self._open and self._open[-1][0] != name:
                self._open.pop()  # It raised, and its caller went on.
            _, entered, came, links, packed = self._open.pop()
            left = tensors_in(output)
            further = _made_by(left[1:])
            recurrent = is_recurrent(module)
            links = links[:1] if recurrent else links  # Not the states.
            first = output[0] if isinstance(output, tuple) and output else output
            self.made.append(
                Call(
                    name,
                    module,
                    tuple(link for link in links if link is not None),
                    left[0].grad_fn if left else None,
                    _positions(module, came, left),
                    entered,
                    self._clock,
                    links[0] if links else None,
                    _link(first) if isinstance(first, Tensor) else None,
                    len(output) - 1 if isinstance(output, tuple) else 0,
                    self._given(name, came),
                    further if recurrent else (),
                    packed,
                    recurrent and any(map(_tells, came[1:])),
                    further,
                )
            )

        return leave

    def _given(self, name: str, came: Sequence[Tensor]) -> Given | None:
        if self._acting is None or not came or came[0].is_nested:
            return None
        dim = self._mixing.get(name)
        if name in self._matrices:  # Known once it is called.
            dim = channel_axes(self._matrices[name]).site_dim
        if dim is None:
            return None
        with torch.no_grad():
            return Given(came[0].shape[0], self._acting(came[0].detach(), dim))


def multiplies_once(module: nn.Module) -> bool:
    """Whether a layer multiplies what it is given by its weights, or by fixed statistics, and does
    nothing else with it."""
    forward = type(module).forward
    if "forward" in vars(module):
        return False
    if forward is _BatchNorm.forward:
        return not module.training and module.running_mean is not None
    return forward in _ONCE or is_transposed_linear(module)


def _tells(state: Tensor) -> bool:
    """Whether a first state is more than zeros."""
    return state.is_floating_point() and (state.requires_grad or bool(state.any()))


def _made_by(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(t.grad_fn for t in tensors if t.grad_fn is not None)


def _link(tensor: Tensor) -> Link | None:
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _positions(module: nn.Module, came: list[Tensor], left: list[Tensor]) -> int:
    if isinstance(module, _ConvTransposeNd):
        return came[0].numel() // module.in_channels
    if isinstance(module, _ConvNd):
        return left[0].numel() // module.out_channels
    if isinstance(module, nn.Linear):
        return left[0].numel() // module.out_features
    if is_transposed_linear(module):
        return left[0].numel() // left[0].shape[-1]
    if isinstance(module, BareMatrix):
        return module.times(left[0])
    if is_experts(module):  # As many as if each token's experts were spread evenly over all.
        chosen = next((x.numel() for x in came if not x.is_floating_point()), 0)
        down = module._parameters["down_proj"]
        assert down is not None
        return round(chosen / len(down))
    if is_recurrent(module):  # Every step multiplies by what reads its input and by what its state.
        return came[0].numel() // came[0].shape[-1]
    return left[0].numel() // module.embed_dim if isinstance(module, nn.MultiheadAttention) else 0


def _descriptors(
    name: str,
    module: nn.Module,
    positions: int,
    paths: Mapping[int, str],
    used: Mapping[str, int],
    beside: dict[str, int],
) -> Iterator[LayerDescriptor]:
    """One descriptor, or one for each projection of an attention module."""
    kind = type(module).__name__.lower()
    weight = weight_of(module)
    if is_recurrent(module):
        yield LayerDescriptor(name=name, kind=kind)
        for own, parameter in module._parameters.items():
            if own.startswith("weight") and parameter is not None:
                path = paths[id(parameter)]
                yield LayerDescriptor(
                    name=f"{name}.{own}", kind=kind, weight=path, positions=positions
                )
    elif is_experts(module):
        for own in ("down_proj", up_of(module)):
            path = paths[id(module._parameters[own])]
            title = name if own == "down_proj" else f"{name}.{own}"
            yield LayerDescriptor(name=title, kind=kind, weight=path, positions=positions)
    elif isinstance(module, nn.MultiheadAttention):
        # Its projections are not called as modules. One of which parts are used by themselves has
        # no positions: its products are counted one by one (:mod:`elesh.trainer.graph.proof`).
        for own, parameter in module.named_parameters():
            if parameter.ndim == 2:
                path = paths[id(parameter)]
                yield LayerDescriptor(
                    name=f"{name}.{own}", kind=kind, weight=path, positions=used.get(path, 0)
                )
    elif weight is not None and _multiplies(module):
        path = paths[id(weight)]
        times = positions + max(0, beside.pop(path, 0))  # Of several, the first layer counts it.
        yield LayerDescriptor(name=name, kind=kind, weight=path, positions=times)
    else:
        yield LayerDescriptor(name=name, kind=kind)


def _owns_any(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, or a weight that is computed from some."""
    own = any(held is not None for held in module._parameters.values())
    return own or weight_of(module) is not None


def multiplies(module: nn.Module) -> bool:
    """Whether what a module multiplies by its weights is counted when it is called."""
    return _multiplies(module) or is_recurrent(module) or is_experts(module)


def _multiplies(module: nn.Module) -> bool:
    plain = isinstance(module, (nn.Linear, _ConvNd, BareMatrix))
    return plain or is_transposed_linear(module)

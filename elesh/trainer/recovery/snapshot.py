"""Everything that training needs to continue: taken, restored, written and read.

Promises: after :meth:`Snapshot.put_back` weights, buffers, optimizer, schedulers, gradient scaler
and random states are bit for bit what they were when it was taken, and so is the structure of the
network, in this process or in a later one that built the network anew.

Trees of tensors and plain values (what ``state_dict`` gives) become bytes and come back equal in
every bit, stride and device; what cannot be written is refused by its place in the tree; nothing is
pickled, and reading runs no code. Subclasses of numbers, texts and containers become plain ones
(but for Counter, which schedulers rely on).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack
import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from elesh.observe import get_logger
from elesh.trainer.surgery.averages import Beside
from elesh.trainer.surgery.surgeon import Surgeon
from elesh.trainer.surgery.tensors import from_home, home_of, kept, replace_data
from leyline import InvalidField, Malformed, PrunedArchitecture
from leyline.errors import brief

_TUPLE, _TENSOR, _COUNTER, _INTEGER, _ARRAY, _SET, _FROZEN, _DTYPE, _DEVICE = range(9)
_PLAIN = (bool, float, str, bytes, type(None))
_INT64 = range(-(2**63), 2**63)
_log = get_logger(__name__)


def copy_tree(
    tree: Any, where: str = "state", copied: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """A copy that shares nothing with the original.

    Args:
        where: the name of the tree, for errors.
        copied: makes the copies of tensors. By default they are detached, on the CPU, and remember
            the device that they come from; :func:`put_home` brings them back there.

    Raises:
        InvalidField: naming the place of a value that is neither a tensor nor plain.
    """
    if isinstance(tree, Tensor):
        return (copied or kept)(tree)
    if isinstance(tree, np.ndarray | np.generic):
        return tree.copy()
    if isinstance(tree, bool | None | torch.dtype | torch.device):
        return tree
    plain: type[Any]
    for plain in (int, float, str, bytes):
        if isinstance(tree, plain):
            return plain(tree)
    if isinstance(tree, Mapping):
        items = {key: copy_tree(value, f"{where}.{key}", copied) for key, value in tree.items()}
        return Counter(items) if isinstance(tree, Counter) else items
    for kind in (list, tuple, set, frozenset):
        if isinstance(tree, kind):
            return kind(copy_tree(value, f"{where}.{i}", copied) for i, value in enumerate(tree))
    raise InvalidField(
        where,
        "tensors, numbers, texts and containers of these",
        type(tree).__name__,
        hint="a state_dict must hold only what can be written without pickle",
    )


def put_home(tree: Any) -> Any:
    """A copy of a copied tree with its tensors on the devices that they came from."""
    return copy_tree(tree, copied=lambda tensor: tensor.to(home_of(tensor), copy=True))


def pack_tree(tree: Any) -> tuple[bytes, bytes]:
    """A copied tree as msgpack and the safetensors that it points into."""
    tensors: dict[str, Tensor] = {}

    def refer(tensor: Tensor) -> msgpack.ExtType:
        name = str(len(tensors))
        tensors[name] = tensor.contiguous()
        strides = None if tensor.is_contiguous() else list(tensor.stride())
        return msgpack.ExtType(_TENSOR, msgpack.packb([name, strides, str(home_of(tensor))]))

    def encode(value: Any) -> Any:
        kind = type(value)
        if kind is int and value in _INT64:
            return value
        if kind is dict:
            return {encode(key): encode(item) for key, item in value.items()}
        if kind is list:
            return [encode(item) for item in value]
        if kind in _PLAIN:
            return value
        if isinstance(value, Tensor):
            return refer(value)
        code, content = _special(value)
        return msgpack.ExtType(code, msgpack.packb(encode(content)))

    body: bytes = msgpack.packb(encode(tree))
    return body, save(tensors)


def _special(value: Any) -> tuple[int, Any]:
    """The code and the content of a value that msgpack has no type for."""
    if isinstance(value, np.ndarray | np.generic):
        return _ARRAY, [value.dtype.str, list(value.shape), value.tobytes()]
    contents: dict[type, tuple[int, Callable[[Any], Any]]] = {
        tuple: (_TUPLE, list),
        Counter: (_COUNTER, dict),
        int: (_INTEGER, str),
        set: (_SET, list),
        frozenset: (_FROZEN, list),
        torch.dtype: (_DTYPE, str),
        torch.device: (_DEVICE, str),
    }
    kind = next((kind for kind in contents if isinstance(value, kind)), None)
    if kind is None:
        raise InvalidField("state", "a copied tree", type(value).__name__)
    code, content = contents[kind]
    return code, content(value)


def unpack_tree(body: bytes, tensors: bytes) -> Any:
    """The tree of :func:`pack_tree`.

    Raises:
        Malformed: if the bytes are not such a tree.
    """
    try:
        stored = load(tensors)

        def read(data: bytes) -> Any:
            return msgpack.unpackb(data, ext_hook=hook, strict_map_key=False)

        def hook(code: int, data: bytes) -> Any:
            content = read(data)
            if code == _TENSOR:
                return _tensor(stored[content[0]], *content[1:])
            return _READ[code](content)

        return read(body)
    except Exception as error:
        # Whatever the libraries raise on damaged bytes.
        raise Malformed("state", "a tree of tensors and plain values", brief(error)) from None


def _tensor(tensor: Tensor, strides: list[int] | None, home: str) -> Tensor:
    if strides is not None:
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
    return from_home(tensor, torch.device(home))


def _array(content: list[Any]) -> Any:
    dtype, shape, data = content
    array = np.frombuffer(data, np.dtype(dtype)).reshape(shape).copy()
    return array if shape else array[()]


_READ: dict[int, Callable[[Any], Any]] = {
    _TUPLE: tuple,
    _COUNTER: Counter,
    _INTEGER: int,
    _ARRAY: _array,
    _SET: set,
    _FROZEN: frozenset,
    _DTYPE: lambda name: getattr(torch, name.removeprefix("torch.")),
    _DEVICE: torch.device,
}


class Stateful(Protocol):
    """A scheduler, a gradient scaler, or whatever else keeps its state this way."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take a state in."""


@dataclass(frozen=True)
class Tracked:
    """What a snapshot is taken of: the surgeon's network and optimizer, and parts by name."""

    surgeon: Surgeon
    parts: Mapping[str, Any] = field(default_factory=dict)
    """Whatever has ``state_dict`` and ``load_state_dict``, generators, and whatever keeps copies of
    the weights: averages, dictionaries of tensors by path. Those that the surgeon follows without
    their having been named are added."""

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            copies = self.surgeon.follow(name, part)
            if not copies and not isinstance(part, torch.Generator):
                _require_stateful(name, part)
        object.__setattr__(self, "parts", {**self.parts, **self.surgeon.unnamed_copies})


@dataclass(frozen=True)
class Snapshot:
    """A point in a training run; its tensors are copies on the CPU."""

    architecture: PrunedArchitecture
    state: dict[str, Any]
    epoch: int = 0
    """The last epoch that had been trained."""

    @classmethod
    def take(cls, tracked: Tracked, epoch: int = 0) -> Snapshot:
        """A copy of the present, after ``epoch``.

        Raises:
            InvalidField: if a part's state holds what is neither a tensor nor a plain value.
        """
        surgeon = tracked.surgeon
        accelerators = [device for device in (torch.cuda,) if device.is_available()]
        state = {
            "tensors": _tensors(surgeon.model),
            "optimizer": _optimizer_state(surgeon),
            "parts": {name: _state_of(name, part, surgeon) for name, part in tracked.parts.items()},
            "random": {
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": [state for device in accelerators for state in device.get_rng_state_all()],
            },
        }
        return cls(surgeon.architecture, copy_tree(state, "training"), epoch)

    def put_back(self, tracked: Tracked, *, here: bool = False) -> None:
        """Make this the present again; masks are taken off and gradients dropped.

        Args:
            here: it was taken in this process: where the surgeon was given other optimizers since,
                these begin their state anew.

        Raises:
            InvalidField: if the parts are not those of the snapshot, or the network does not
                descend from the same original. Nothing has been changed then.
        """
        others = self._require_same_parts(tracked, here=here)
        surgeon = tracked.surgeon
        surgeon.move_to(self.architecture)
        tensors = _tensors(surgeon.model)
        for path, saved in self.state["tensors"].items():
            if path not in tensors:
                raise InvalidField(f"restore point.{path}", "a tensor of the network", "none")
            _fill(tensors[path], saved)
        groups = (len(self.state["optimizer"]), len(list(surgeon.optimizers.groups())))
        if not others:
            _set_optimizers(surgeon, self.state["optimizer"])
        for name, part in tracked.parts.items():
            _set_state(name, part, surgeon, put_home(self.state["parts"][name]), groups)
        _set_random_states(self.state["random"])

    def _require_same_parts(self, tracked: Tracked, *, here: bool) -> bool:
        """Refuse other parts and optimizers; whether the latter are others, given ``here``."""
        hint = "resume with what the restore point was taken of"
        kept, there = sorted(self.state["parts"]), sorted(tracked.parts)
        if kept != there:
            raise InvalidField("restore point.parts", str(kept), there, hint=hint)
        fault = self._other_optimizers(tracked)
        if fault and not here:
            raise InvalidField(*fault, hint=hint)
        if fault:
            place, then, now = fault
            _log.warning("optimizers begin their state anew", place=place, then=then, now=str(now))
        return bool(fault)

    def _other_optimizers(self, tracked: Tracked) -> tuple[str, str, Any] | None:
        """In what the optimizers are others: the place, what was there and what is."""
        optimizers = list(tracked.surgeon.optimizers.stateful())
        now = [len(o.param_groups) for o in optimizers]
        then = [0] * max(len(now), *(g.get("optimizer", 0) + 1 for g in self.state["optimizer"]), 0)
        for group in self.state["optimizer"]:
            then[group.get("optimizer", 0)] += 1
        # Groups may have joined since, but none may be missing.
        if len(then) > len(now) or any(a > b for a, b in zip(then, now, strict=True)):
            return "restore point.optimizer groups", str(then), now
        for group in self.state["optimizer"]:
            kind = type(optimizers[group.get("optimizer", 0)]).__name__
            if group.get("kind", kind) != kind:  # older points do not say
                return "restore point.optimizer", group["kind"], kind
        return self._others_beside(tracked, optimizers)

    def _others_beside(
        self, tracked: Tracked, optimizers: Sequence[Optimizer]
    ) -> tuple[str, str, Any] | None:
        """As :meth:`_other_optimizers`, of the parameters that are not the network's."""
        network = {**_tensors(tracked.surgeon.model), **tracked.surgeon.optimizers.masters}
        for number, optimizer in enumerate(optimizers):
            saved = [g for g in self.state["optimizer"] if g.get("optimizer", 0) == number]
            for group, then in zip(optimizer.param_groups, saved, strict=False):
                was = [tuple(tensor.shape) for tensor in then.get("beside", ())]
                now = [tuple(tensor.shape) for tensor in _beside(group, network)]
                if was != now[: len(was)]:  # some may have joined since
                    return "restore point.parameters beside the network's", str(was), now
        return None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those too that no ``state_dict`` holds, each once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _optimizer_state(surgeon: Surgeon) -> list[dict[str, Any]]:
    """The groups with their settings, the paths of their parameters, and the state of each; of
    parameters beside the network's (a loss's, another network's) the content, too."""
    tensors = {**_tensors(surgeon.model), **surgeon.optimizers.masters}
    paths = {id(tensor): path for path, tensor in tensors.items()}
    return [
        {
            "optimizer": number,
            "kind": type(optimizer).__name__,
            "settings": {key: value for key, value in group.items() if key != "params"},
            "paths": [paths.get(id(p), "") for p in group["params"]],
            "states": [dict(optimizer.state.get(p) or {}) for p in group["params"]],
            "beside": [p for p in group["params"] if id(p) not in paths],
        }
        for number, optimizer in enumerate(surgeon.optimizers.stateful())
        for group in optimizer.param_groups
    ]


def _set_optimizers(surgeon: Surgeon, groups: list[dict[str, Any]]) -> None:
    """Settings, parameters and state of the saved groups; groups that have joined since stay, and
    begin their state anew."""
    # Not by load_state_dict: that casts moments to the parameter's dtype.
    tensors = {**_tensors(surgeon.model), **surgeon.optimizers.masters}
    surgeon.optimizers.clear()
    for number, optimizer in enumerate(surgeon.optimizers.stateful()):
        saved = [group for group in groups if group.get("optimizer", 0) == number]
        for group, then in zip(optimizer.param_groups, saved, strict=False):
            own = {"params", *optimizer.defaults}  # a newer PyTorch's have more
            for key in group.keys() - then["settings"].keys() - own:
                del group[key]
            group.update(put_home(then["settings"]))
            if "paths" in then:
                group["params"][:] = _parameters(group["params"], then["paths"], tensors)
            for parameter, state in zip(group["params"], then["states"], strict=False):
                if state:
                    optimizer.state[parameter] = put_home(state)
            for parameter, content in zip(
                _beside(group, tensors), then.get("beside", ()), strict=False
            ):
                _fill(parameter, content)
    surgeon.optimizers.refresh()


def _beside(group: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The parameters of a group that are not among these tensors."""
    numbers = {id(tensor) for tensor in tensors.values()}
    return [parameter for parameter in group["params"] if id(parameter) not in numbers]


def _parameters(
    present: list[Tensor], paths: list[str], tensors: Mapping[str, Tensor]
) -> list[Tensor]:
    """The parameters with these paths, those without a path in their order, and what has joined."""
    numbers = {id(tensor) for tensor in tensors.values()}
    strange = iter([p for p in present if id(p) not in numbers])
    found = [tensors[path] if path else next(strange) for path in paths]
    known = {id(parameter) for parameter in found}
    return [*found, *(p for p in present if id(p) not in known)]


_MODULE, _COPIES, _NUMBERS = "tensors of the module", "tensors of the copies", "numbers"


def _require_stateful(name: str, part: object) -> None:
    if isinstance(part, type) or not (
        hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
    ):
        expected = (
            "something with state_dict and load_state_dict, or a copy of the weights in tensors"
        )
        raise InvalidField(f"resume.{name}", expected, type(part).__name__)


def _state_of(name: str, part: Any, surgeon: Surgeon) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    copies = [copy for copy in surgeon.copies if copy.name == name]
    if copies and isinstance(part, nn.Module):
        return {_MODULE: _tensors(part)}
    if copies and not hasattr(part, "load_state_dict"):
        numbers = part.numbers if isinstance(part, Beside) else {}
        return {_COPIES: [copy.tensors() for copy in copies], _NUMBERS: numbers}
    return part.state_dict()


def _set_state(name: str, part: Any, surgeon: Surgeon, state: Any, groups: tuple[int, int]) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(state, dict) and _MODULE in state:
        _fill_all(_tensors(part), state[_MODULE])
    elif isinstance(state, dict) and _COPIES in state:
        copies = [copy for copy in surgeon.copies if copy.name == name]
        for copy, saved in zip(copies, state[_COPIES], strict=True):
            _fill_all(copy.tensors(), saved)
        if isinstance(part, Beside):
            part.set_numbers(state[_NUMBERS])
    else:
        part.load_state_dict(_with_joined(state, part.state_dict(), *groups))
        surgeon.follow(name, part)  # it may have other tensors now


def _fill_all(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for path, content in saved.items():
        if path in tensors:
            _fill(tensors[path], content)


def _with_joined(saved: Any, present: Any, then: int, now: int) -> Any:
    """A scheduler's state with what it has for parameter groups that have joined since."""
    if not (now > then and isinstance(saved, dict) and isinstance(present, dict)):
        return saved
    state = dict(saved)
    for key, value in saved.items():
        current: Any = present.get(key)
        lists = isinstance(value, list) and isinstance(current, list)
        if lists and (len(value), len(current)) == (then, now):
            state[key] = [*value, *current[then:]]
    return state


def _set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _fill(tensor: Tensor, saved: Tensor) -> None:
    """Put content into a tensor of the model, with the layout that it had in memory."""
    content = saved.to(tensor.device)
    if tensor.shape == saved.shape and tensor.stride() != saved.stride():
        tensor.data = content.clone()
    else:
        replace_data(tensor, content.clone() if tensor.shape != saved.shape else content)

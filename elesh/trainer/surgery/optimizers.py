"""Other holders of a network's parameters: optimizers, whose state is cut or rebuilt, and the
processes that train it together.

Promises: state whose shape follows its parameter's is cut with it, factored moments
included; of a parameter with any other state (preconditioners, flat histories) all state is
dropped, so that the optimizer begins it anew, and that is said; parameter groups stay the same
objects. Wrappers (SAM, Lookahead, those of frameworks) are seen through to what they wrap, and
single precision masters of the parameters are cut like these.

A network whose parameters are sharded over processes is refused; after a cut, every
DistributedDataParallel around the network averages its gradients again, without being made anew by
the user and without a word between the processes.

State of before a cut is not loaded into an optimizer of the network after it, nor the other way
round: PyTorch compares no shapes there, and fused steps would read past the end of moments.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from elesh.trainer.network.calling import tensors_in
from elesh.trainer.network.layers import named_tensors
from elesh.trainer.network.traversal import (
    alive,
    alive_after_collecting,
    modules_in,
    parameters_in,
)
from leyline import InvalidField, PrunedArchitecture

from .lineage import lineage_of, stages
from .tensors import Cutter

Given = Any
"""One optimizer, a sequence or mapping of several, or None; each may be wrapped."""

_DEPTH = 3
"""How many wrappers are looked through."""
FRAMEWORKS = ("accelerate.", "lightning.", "pytorch_lightning.")
"""Whose wrappers only pass on to the optimizer inside."""


@dataclass(frozen=True)
class StateCut:
    """What a cut makes of one parameter's state in one optimizer."""

    optimizer: Optimizer
    parameter: Tensor
    state: dict[str, Any] | None
    """None: it is dropped, and the optimizer begins it anew."""


class Optimizers:
    """All optimizers that train one network.

    Args:
        given: what the user named.
        tensors: the network's, by path.

    Raises:
        InvalidField: if something given is, and holds, no optimizer; if its state lies on several
            processes, or in one tensor for several parameters; or if none holds a parameter of the
            network.
    """

    def __init__(self, given: Given, tensors: Mapping[str, Tensor]) -> None:
        self.all = optimizers_in(given)
        self.given = tuple(_several(given))
        """As the user steps them."""
        for optimizer in self.all:
            _require_whole(optimizer)
            require_apart(optimizer)
        self.masters = masters_of(self.all, tensors)
        """Copies of parameters that are trained in their place, by the parameters' paths."""
        trained = {path for path, t in tensors.items() if t.requires_grad}
        if self.all and trained and not self._holds(tensors):
            raise InvalidField(
                "optimizer",
                "one that trains parameters of the network",
                f"{', '.join(self.names)}: none of its parameters is the network's",
                hint="make the optimizer from model.parameters() of the network that is cut",
            )

    @property
    def names(self) -> list[str]:
        """The kinds of the optimizers."""
        return [type(optimizer).__name__ for optimizer in self.all]

    @property
    def wrappers(self) -> list[Any]:
        """What was given that is not of PyTorch or a framework, and may keep more than state."""
        known = ("torch.optim.", *FRAMEWORKS)
        found = {id(o): o for o in (*self.given, *self.all)}
        return [o for o in found.values() if not type(o).__module__.startswith(known)]

    def groups(self) -> Iterator[dict[str, Any]]:
        """The parameter groups, each once."""
        seen: set[int] = set()
        for optimizer in self.all:
            for group in optimizer.param_groups:
                if id(group) not in seen:
                    seen.add(id(group))
                    yield group

    def stateful(self) -> Iterator[Optimizer]:
        """The optimizers, each state once: a wrapper may share that of what it wraps."""
        seen: set[int] = set()
        for optimizer in self.all:
            if id(optimizer.state) not in seen:
                seen.add(id(optimizer.state))
                yield optimizer

    def cut(self, cutters: Mapping[str, Cutter], tensors: Mapping[str, Tensor]) -> list[StateCut]:
        """What becomes of the state of every tensor that is cut; nothing is changed yet."""
        found: list[StateCut] = []
        for optimizer in self.stateful():
            keys = _foreign_keys(optimizer)
            if any(keys.values()):  # a flat history of all parameters: no part of it stays
                found += [StateCut(optimizer, p, None) for p in list(optimizer.state)]
                continue
            for path, cutter in cutters.items():
                for tensor in (tensors[path], self.masters.get(path)):
                    state = None if tensor is None else optimizer.state.get(tensor)
                    if tensor is None or not state:
                        continue
                    kept = None if keys.keys() & state.keys() else _cut(state, tensor, cutter)
                    found.append(StateCut(optimizer, tensor, kept))
        return found

    def put(self, cuts: Iterable[StateCut]) -> tuple[str, ...]:
        """Put cut states in place; what has to be said of it."""
        rebuilt: dict[str, int] = {}
        for cut in cuts:
            if cut.state is None:
                cut.optimizer.state.pop(cut.parameter, None)
                name = type(cut.optimizer).__name__
                rebuilt[name] = rebuilt.get(name, 0) + 1
            else:
                cut.optimizer.state[cut.parameter] = cut.state
        self.refresh()
        return tuple(
            f"{name} begins its state of {count} parameters anew: it cannot be cut"
            for name, count in rebuilt.items()
        )

    def forget(self, gone: Iterable[Tensor]) -> None:
        """Take parameters, and the state kept of them, out."""
        numbers = {id(tensor) for tensor in gone}
        for optimizer in self.stateful():
            for parameter in [p for p in optimizer.state if id(p) in numbers]:
                del optimizer.state[parameter]
        for group in self.groups():
            group["params"][:] = [p for p in group["params"] if id(p) not in numbers]
        self.refresh()

    def clear(self) -> None:
        """Drop all state."""
        for optimizer in self.stateful():
            optimizer.state.clear()
        self.refresh()

    def refresh(self) -> None:
        """Let optimizers that remember the number of their parameters count again."""
        for optimizer in self.all:
            if isinstance(optimizer, torch.optim.LBFGS):
                _count_again(optimizer)

    def _holds(self, tensors: Mapping[str, Tensor]) -> bool:
        held = {id(p) for group in self.groups() for p in group["params"]}
        return bool(self.masters) or any(id(tensor) in held for tensor in tensors.values())


def _count_again(optimizer: torch.optim.LBFGS) -> None:
    vars(optimizer).update(_numel_cache=None, _params=optimizer.param_groups[0]["params"])


def optimizers_in(given: Given) -> tuple[Optimizer, ...]:
    """Every optimizer named, and those that they wrap, each once.

    Raises:
        InvalidField: if something given is, and holds, no optimizer.
    """
    found: dict[int, Optimizer] = {}
    for one in _several(given):
        inside = list(wrapped(one, _DEPTH))
        if not inside:
            expected = "a torch optimizer, several, or a wrapper of one"
            hint = (
                "derive yours from torch.optim.Optimizer and keep what belongs to a parameter in "
                "self.state[parameter], where a cut finds it; one that keeps nothing of a step to "
                "the next is torch.optim.SGD"
            )
            raise InvalidField("optimizer", expected, type(one).__name__, hint=hint)
        found |= {id(optimizer): optimizer for optimizer in inside}
    return tuple(found.values())


class HasBeen(Protocol):
    """Who knows what a network has looked like: a surgeon."""

    model: nn.Module

    @property
    def architectures(self) -> tuple[PrunedArchitecture, ...]:
        """All of them."""


def check_what_they_load(optimizers: Optimizers, surgeon: HasBeen) -> None:
    """Have ``load_state_dict`` of these optimizers refuse state that is of another structure of the
    network, as it was before a cut or after one, with InvalidField."""
    for optimizer in optimizers.all:
        hooks = vars(optimizer).get("_optimizer_load_state_dict_pre_hooks")
        if hooks is None:  # a wrapper that never called __init__; what it wraps has its own
            continue
        for number in [n for n, hook in hooks.items() if isinstance(hook, _FitsNow)]:
            del hooks[number]  # of another surgeon
        optimizer.register_load_state_dict_pre_hook(_FitsNow(surgeon, optimizers.masters))


class _FitsNow:
    """A hook of one optimizer, which keeps neither network nor surgeon alive."""

    def __init__(self, surgeon: HasBeen, masters: Mapping[str, Tensor]) -> None:
        self._model, self._surgeon = weakref.ref(surgeon.model), weakref.ref(surgeon)
        self._masters = masters

    def __call__(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        model, surgeon = self._model(), self._surgeon()
        lineage = None if model is None else lineage_of(model)
        if model is None or lineage is None:
            return
        known = (
            *stages(lineage.original, lineage.now.history),
            *(surgeon.architectures if surgeon else ()),
        )
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        if len(held) != len(numbers):
            if any(block.removed for each in known for block in each.blocks):
                found = f"that of {len(numbers)} parameters"
                raise _of_another_structure(f"{len(held)} parameters", found)
            return
        tensors = (*named_tensors(model).items(), *self._masters.items())
        paths = {id(tensor): path for path, tensor in tensors}
        total = sum(parameter.numel() for parameter in held)
        for number, parameter in zip(numbers, held, strict=True):
            path, loaded = paths.get(id(parameter), ""), tensors_in(state["state"].get(number, {}))
            strange = [tensor for tensor in loaded if not _follows(tensor, parameter.shape)]
            for each in known if strange else ():
                shapes = {tensor.path: tensor.shape for tensor in each.tensors}
                flat = sum(math.prod(shapes.get(paths.get(id(p), ""), p.shape)) for p in held)
                there = shapes.get(path, ())
                if any(_follows(t, there) or t.shape == (flat,) != (total,) for t in strange):
                    ours = f"{path} {tuple(parameter.shape)}"
                    raise _of_another_structure(ours, f"that of {path} {there}")


def _of_another_structure(expected: str, found: str) -> InvalidField:
    hint = (
        "load the network's weights of the same checkpoint before its optimizers' state: they "
        "bring an attached network to their structure; or go on from Elesh's restore points"
    )
    expected = f"state of the network as it is now, of {expected}"
    return InvalidField("optimizer.load_state_dict", expected, found, hint=hint)


def other_optimizers(
    model: nn.Module,
    given: Iterable[Optimizer],
    *,
    stateful: bool = False,
    ended: bool = False,
    look: Callable[[], list[Any]] | None = None,
    among: list[Any] | None = None,
) -> list[Optimizer]:
    """Optimizers, alive anywhere in this process, that hold parameters of the network and are not
    among those given. A cut would leave their state as it was, and their next step would fail.

    Args:
        stateful: only those that have state of these parameters.
        ended: those of trainings that have ended, too.
        look, among: of :func:`alive_after_collecting`, where the caller looks for other things,
            too.
    """
    mine = {id(parameter) for parameter in model.parameters()}
    known = {id(optimizer.state) for optimizer in given}  # frameworks have views of optimizers

    def others(found: Iterable[Any]) -> list[Optimizer]:
        return [
            each
            for each in found
            if isinstance(each, Optimizer)
            and (ended or each not in _LEFT)
            and id(getattr(each, "state", None)) not in known
            and any(id(p) in mine for p in _held(each, stateful))
        ]

    return alive_after_collecting(others, look or partial(alive, Optimizer), among)


_LEFT: WeakSet[Optimizer] = WeakSet()
"""Of trainings that have ended."""


def leave_others(model: nn.Module, given: Given) -> None:
    """Have all optimizers of the network but those given count as ended: a framework makes its own
    for every training, and those of the ones before are kept by their trainers."""
    mine = optimizers_in(given)
    _LEFT.difference_update(mine)
    gc.collect()
    _LEFT.update(other_optimizers(model, mine))


def begin_others_anew(
    model: nn.Module, given: Iterable[Optimizer], *, only_ended: bool = False
) -> list[str]:
    """Drop the state that optimizers which are not among those given keep of parameters that have
    other shapes now, so that their next step does not fail; their kinds.

    Args:
        only_ended: look at those of trainings that have ended, and not for others in the process:
            a cut has just been made, and is none where another one is alive.
    """
    found = list[str]()
    among = list(_LEFT) if only_ended else None
    for other in other_optimizers(model, given, stateful=True, ended=True, among=among):
        strange = [
            parameter
            for parameter, state in other.state.items()
            if not all(_follows(tensor, parameter.shape) for tensor in tensors_in(state))
        ]
        for parameter in strange:
            del other.state[parameter]
        if strange:
            if isinstance(other, torch.optim.LBFGS):
                _count_again(other)
            found.append(type(other).__name__)
    return found


def _held(optimizer: Optimizer, stateful: bool) -> list[Any]:
    if not hasattr(optimizer, "param_groups"):  # one that failed to be made
        return []
    if stateful:
        return [p for p, state in optimizer.state.items() if tensors_in(state)]
    return [p for group in optimizer.param_groups for p in group["params"]]


def masters_of(optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are trained in place of parameters, by the parameters' paths.

    These are leaves that belong to no network here, stand in the order of the trained parameters
    that no optimizer holds, and have their shapes and (rounded) values.
    """
    paths = {id(tensor): path for path, tensor in tensors.items()}
    listed = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    distinct = {id(p): p for p in listed}
    strange = [p for number, p in distinct.items() if number not in paths]
    held = {paths[number] for number in distinct if number in paths}
    free = {path: t for path, t in tensors.items() if t.requires_grad and path not in held}
    if not strange or len(strange) != len(free):
        return {}
    pairs = zip(strange, free.values(), strict=True)
    if not all(master.shape == t.shape and _rounds_to(master, t) for master, t in pairs):
        return {}
    numbers = {id(tensor) for tensor in strange}
    if any(
        id(parameter) in numbers
        for each in alive(nn.Module)
        for parameter in vars(each).get("_parameters", {}).values()
    ):
        return {}  # the parameters of another network
    return dict(zip(free, strange, strict=True))


def _rounds_to(master: Tensor, parameter: Tensor) -> bool:
    return torch.allclose(
        master.detach().to(parameter).float(), parameter.detach().float(), rtol=1e-2, atol=1e-6
    )


def _several(given: Given) -> list[Any]:
    if given is None:
        return []
    if isinstance(given, Mapping):
        return list(given.values())
    if isinstance(given, Optimizer) or not isinstance(given, Iterable):
        return [given]
    return list(given)


def wrapped(thing: Any, depth: int = _DEPTH) -> Iterator[Optimizer]:
    """An optimizer and those in its attributes, the outer ones first."""
    if isinstance(thing, Optimizer):
        yield thing
    if depth and hasattr(thing, "__dict__"):
        for value in list(vars(thing).values()):
            parts = list(value) if isinstance(value, (list, tuple)) else [value]
            for part in parts:
                if isinstance(part, Optimizer) or hasattr(part, "param_groups"):
                    yield from wrapped(part, depth - 1)


def _require_whole(optimizer: Optimizer) -> None:
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if "ZeroRedundancyOptimizer" in kinds:
        raise InvalidField(
            "optimizer",
            "one whose state is whole in this process",
            "ZeroRedundancyOptimizer, whose state lies on several",
            hint="train with the optimizer that it wraps",
        )


def require_apart(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state of a parameter a cut does not find: kept by ``id(parameter)``
    in place of the parameter, or in one flat tensor for several, beside its state.

    Raises:
        InvalidField: saying what is kept how.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    ids = {id(parameter) for group in groups for parameter in group}
    for name, kept in vars(optimizer).items():
        known = kept.items() if isinstance(kept, dict) else ()
        # Not ``key in ids`` for any key: a parameter has the hash of its id.
        by_id = [value for key, value in known if type(key) is int and key in ids]
        if any(tensor.ndim for value in by_id for tensor in tensors_in(value)):
            raise InvalidField(
                "optimizer",
                "state by parameter (optimizer.state[parameter])",
                f"{type(optimizer).__name__}: {name!r} is by id(parameter)",
                hint="neither a cut nor a restore point finds it there; use the parameter as key",
            )
    together = [*groups, [parameter for group in groups for parameter in group]]
    several = {sum(p.numel() for p in each) for each in together if len(each) > 1}
    own = {key: value for key, value in vars(optimizer).items() if key not in _OF_OPTIMIZERS}
    for held in (own, *({**group, "params": ()} for group in optimizer.param_groups)):
        for name, value in held.items():
            if isinstance(value, Tensor) and value.ndim == 1 and value.numel() in several:
                raise InvalidField(
                    "optimizer",
                    "state of each parameter by itself (optimizer.state[parameter])",
                    f"{type(optimizer).__name__}: {name!r} is one tensor for several parameters",
                    hint="a cut cannot tell which part of it is whose; use optimizer.state",
                )


_OF_OPTIMIZERS = ("param_groups", "state", "defaults")


def _foreign_keys(optimizer: Optimizer) -> dict[str, bool]:
    """Names of state that does not follow its parameter's shape, for any parameter; True where it
    is flat, one history of all parameters. A key that is foreign for one parameter is so for all:
    a preconditioner of a square weight has the weight's shape only by chance."""
    total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    found: dict[str, bool] = {}
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, Tensor):
            continue
        for key, value in state.items():
            strange = [t for t in tensors_in(value) if not _follows(t, parameter.shape)]
            if strange:
                flat = any(t.ndim == 1 and t.numel() == total > 1 for t in strange)
                found[key] = found.get(key, False) or flat
    return found


def _follows(value: Tensor, shape: Sequence[int]) -> bool:
    """Whether it has one number, a parameter's shape, or that with axes summed away to 1."""
    if value.numel() == 1:
        return True
    sizes = zip(value.shape, shape, strict=False)
    return value.ndim == len(shape) and all(ours in (1, size) for ours, size in sizes)


def _cut(state: Mapping[str, Any], parameter: Tensor, cutter: Cutter) -> dict[str, Any]:
    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.shape == parameter.shape and value.ndim:
                return cutter(value)
            return value if value.numel() == 1 else _cut_factor(value, parameter, cutter)
        if isinstance(value, dict):
            return {key: cut(part) for key, part in value.items()}
        if type(value) in (list, tuple):
            return type(value)(cut(part) for part in value)
        return value

    return {key: cut(value) for key, value in state.items()}


def _cut_factor(value: Tensor, parameter: Tensor, cutter: Cutter) -> Tensor:
    """A factored moment, cut along the axes that it has."""
    whole = cutter(value.expand(parameter.shape))
    for dim, size in enumerate(value.shape):
        if size == 1:
            whole = whole.narrow(dim, 0, 1)
    return whole.clone()


def require_whole(model: nn.Module) -> None:
    """Refuse a network that this process has only a part of.

    Raises:
        InvalidField: naming a parameter that is sharded.
    """
    hint = (
        "prune before it is sharded: cut the plain network, save it with elesh.save, and call "
        "fully_shard on the cut one; or train with DistributedDataParallel, which can be cut"
    )
    for path, module in modules_in(model).items():
        if type(module).__name__ == "FullyShardedDataParallel":
            found = f"{path or 'the network'} is a FullyShardedDataParallel"
            raise InvalidField("model", "a network that is whole in this process", found, hint=hint)
    for path, parameter in parameters_in(model).items():
        kind = type(parameter)
        sharded = kind is not nn.Parameter and any(
            base.__name__ in ("DTensor", "FlatParameter") for base in kind.__mro__
        )
        if sharded or hasattr(parameter, "ds_id"):  # DeepSpeed's ZeRO-3 leaves empty parameters
            found = f"{path} is sharded over processes ({kind.__name__})"
            raise InvalidField("model", "a network that is whole in this process", found, hint=hint)


def rebuild_reducers(model: nn.Module) -> int:
    """Let every DistributedDataParallel around the network look at its parameters again; how many.

    It hooks into autograd's nodes of parameters, which a cut replaces, and keeps buckets of their
    sizes: left alone it would let the processes drift apart without an error. What is done is what
    unpickling one does: its buckets and hooks are made anew from its module's parameters. It sends
    nothing, so that processes need not do it at the same time.
    """
    own = {id(module) for module in model.modules()}
    found = [
        each
        for each in alive(DistributedDataParallel)
        if "reducer" in vars(each) and any(id(module) in own for module in each.module.modules())
    ]
    for wrapper in found:
        _rebuild(wrapper)
    return len(found)


def _rebuild(wrapper: Any) -> None:  # its own methods have no types
    wrapper._remove_autograd_hooks()
    wrapper._module_parameters = [
        parameter
        for path, parameter in wrapper.module.named_parameters()
        if path not in wrapper.parameters_to_ignore
    ]
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    register: Any = vars(torch.distributed)["_register_comm_hook"]
    for hook, state in wrapper._comm_hooks:
        _forget_buckets(state)
        register(wrapper.reducer, state, hook)
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()


def _forget_buckets(state: object) -> None:
    """Compressing hooks (PowerSGD) keep errors and factors by bucket; the buckets are others."""
    for value in getattr(state, "__dict__", {}).values():
        if isinstance(value, dict) and all(isinstance(key, int) for key in value):
            value.clear()

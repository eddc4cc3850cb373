"""Second sets of a network's weights (EMA, SWA, teachers, copies that training updates), and how a
surgeon keeps each in step.

Promises: a copy is found by its tensors, not by its class: the paths, shapes or order of the
network's; it loses what the network loses, comes back with it, and is masked with it; a copy whose
structure is a plain list of tensors cannot lose whole layers, which is refused before one is cut.
Copies are found again where a holder has made new tensors since, as many averages do in every
update; what a wrapper of optimizers keeps beside them (the slow weights of Lookahead), or the
network in plain attributes (the weights it began with), is followed without being named.

A teacher may be part of the network, beside its student (BYOL, MoCo, DINO): a frozen part that has
the tensors of a trained part, and weights like its, loses what that part loses; what is removed of
the student names the teacher's tensors too, so that counts, histories and restore points speak of
both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elesh.trainer.network.layers import named_tensors
from elesh.trainer.network.traversal import alive, alive_after_collecting, parameters_in
from leyline import (
    GateSite,
    InvalidField,
    LayerBlock,
    PrunedArchitecture,
    PruningGroup,
    TensorSlice,
)

from .tensors import Cutter

_DEPTH = 4
"""How far into a holder's attributes copies are looked for."""


@dataclass(frozen=True)
class WeightCopy:
    """A second set of the weights of a network, or of a part of it."""

    name: str
    """What the user calls it."""
    module: nn.Module | None = None
    """The copied module; None where there are only tensors."""
    prefix: str = ""
    """The path of the part of the network that ``module`` is a copy of; empty: all of it."""
    loose: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors by the network's paths, where there is no module."""
    ordered: bool = False
    """Whether the tensors are known by their order only."""

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by the network's paths."""
        if self.module is None:
            return dict(self.loose)
        start = f"{self.prefix}." if self.prefix else ""
        return {start + path: tensor for path, tensor in named_tensors(self.module).items()}

    def get_submodule(self, path: str) -> nn.Module:
        """The copy of one of the network's modules; an unused one where there is none."""
        if self.module is None:
            return nn.Module()
        if self.prefix and path != self.prefix and not path.startswith(f"{self.prefix}."):
            return nn.Module()
        inside = path[len(self.prefix) :].removeprefix(".") if self.prefix else path
        try:
            return self.module.get_submodule(inside)
        except AttributeError:
            return nn.Module()

    def cut(
        self,
        cutters: Mapping[str, Cutter],
        solved: Mapping[str, Tensor],
        network: Mapping[str, Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """The content of every tensor after a cut; nothing is changed yet.

        Args:
            cutters: by path.
            solved: tensors of the network that are given new content before they are cut; a copy
                is moved by as much.
            network: its tensors as they are.
        """
        found = []
        for path, tensor in self.tensors().items():
            data = tensor.detach()
            if path in solved:
                shift = solved[path].detach().double() - network[path].detach().double()
                data = (data.double() + shift.to(data.device)).to(data.dtype)
            if path in cutters:
                found.append((tensor, cutters[path](data)))
            elif path in solved:
                found.append((tensor, data))
        return found


def copies_in(name: str, holder: Any, model: nn.Module) -> tuple[WeightCopy, ...]:
    """The copies of a network that a holder (an average, a callback, a dictionary) keeps.

    Looked at are modules inside the holder that have all tensors of the network, or of one of its
    parts, dictionaries by path, and lists in the order of its parameters. What has the network's
    structure but neither its weights nor the name of an average is another network.
    """
    found = all_copies_in(name, holder, model)
    sure = _AVERAGE.search(f"{name} {type(holder).__name__}") is not None and len(found) == 1
    return tuple(copy for copy in found if sure or likeness(copy, model) > ALIKE)


def all_copies_in(name: str, holder: Any, model: nn.Module) -> list[WeightCopy]:
    """Whatever in a holder has the structure of a network, or of one of its parts."""
    return list(_search(name, holder, _Network(model), set(), _DEPTH))


def unnamed_averages(
    model: nn.Module, known: Iterable[WeightCopy], among: list[Any] | None = None
) -> list[WeightCopy]:
    """Averages of this network, by their kinds, alive anywhere in this process, that were not
    named.

    A cut would not reach them, and their next update would fail. An average of another network of
    the same structure is distinguished by its weights, and by who follows it.

    Args:
        among: all that are alive, where the caller has looked; emptied if there are any, since what
            is listed is not collected.
    """
    named = {id(tensor) for copy in known for tensor in copy.tensors().values()}
    named |= {id(tensor) for tensor in named_tensors(model).values()} | kept_by_others(model)

    def averages(alive_now: Iterable[Any]) -> list[WeightCopy]:
        found, network, seen = list[WeightCopy](), None, set(named)
        for each in alive_now:
            kind = type(each).__name__
            if not named_like_an_average(kind):
                continue
            network = network or _Network(model)
            for copy in _search(kind, each, network, set(), _DEPTH):
                tensors = {id(tensor) for tensor in copy.tensors().values()}
                if not tensors & seen and likeness(copy, model) > ALIKE:
                    found.append(copy)
                seen |= tensors
        return found

    return alive_after_collecting(averages, partial(alive, named=named_like_an_average), among)


def kept_by_others(model: nn.Module) -> set[int]:
    """The tensors, by identity, of other networks that are cut in this process and of their copies:
    another run may have begun with the same weights, and this one must leave it alone."""
    others = [each for each in _FOLLOWED if each.model is not model]
    return {number for each in others for number in each.all_now()}


@lru_cache(1 << 15)
def named_like_an_average(name: str) -> bool:
    """Whether a class of this name looks like one that averages weights. Asked of every class in
    the process, at every cut."""
    return bool(_KIND.search(name))


_KIND = re.compile(r"EMA|Ema(?![a-z])|AveragedModel|MovingAverage|WeightAverag|SWA")
"""Names of classes that average weights."""
_AVERAGE = re.compile(_KIND.pattern + r"|ema|swa|averag|teacher|target|momentum|shadow|slow")
"""Names that people give to averages."""
ALIKE = 0.5
"""Two networks trained apart have matrices with a cosine near 0."""


def likeness(copy: WeightCopy, model: nn.Module) -> float:
    """The cosine between the matrices of a copy and those of the network."""
    ours, products = named_tensors(model), torch.zeros(3, dtype=torch.float64)
    for path, tensor in copy.tensors().items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            continue
        a = tensor.detach().flatten().double().cpu()
        b = ours[path].detach().flatten().double().cpu()
        products += torch.stack([a @ b, a @ a, b @ b])
    across, first, second = products.tolist()
    return 1.0 if not first * second else across / (first * second) ** 0.5


def require_layers(copies: Iterable[WeightCopy]) -> None:
    """Refuse the removal of whole layers where a copy cannot lose them.

    Raises:
        InvalidField: naming the copy.
    """
    for each in copies:
        if each.ordered:
            raise InvalidField(
                f"average.{each.name}",
                "one that knows its tensors by name",
                "a list in the order of the parameters, which would not fit without a layer's",
                hint="average with torch.optim.swa_utils.AveragedModel to remove whole layers",
            )


class _Network:
    """What copies are compared with."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.tensors = model, named_tensors(model)
        self.own = {id(module) for module in model.modules()}
        self.parts: dict[_Shapes, list[str]] = {}
        for path, module in model.named_modules():
            if not path or module._modules:
                self.parts.setdefault(shapes_of(module), []).append(path)
        self.orders = _orders(self.tensors)

    @cached_property
    def orders_of_parts(self) -> dict[_Sizes, list[list[str]]]:
        """The paths of the tensors of the network, and of its parts, by their shapes in order."""
        found: dict[_Sizes, list[list[str]]] = {}
        for prefix, module in self.model.named_modules():
            if prefix and not module._modules:
                continue
            inside = {
                p: t for p, t in self.tensors.items() if not prefix or p.startswith(f"{prefix}.")
            }
            for order in _orders(inside):
                shapes = tuple(tuple(self.tensors[path].shape) for path in order)
                found.setdefault(shapes, []).append(order)
        return found


def _orders(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The parameters, the trained ones, and all tensors, as lists keep them."""
    every = [path for path, tensor in tensors.items() if isinstance(tensor, nn.Parameter)]
    trained = [path for path in every if tensors[path].requires_grad]
    return [order for order in (every, trained, list(tensors)) if order]


_Sizes = tuple[tuple[int, ...], ...]


_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def shapes_of(module: nn.Module) -> _Shapes:
    """The tensors of a module: paths and shapes, in order."""
    return tuple((path, tuple(tensor.shape)) for path, tensor in named_tensors(module).items())


def _search(
    name: str, holder: Any, network: _Network, seen: set[int], depth: int
) -> Iterator[WeightCopy]:
    if id(holder) in seen or id(holder) in network.own:
        return
    seen.add(id(holder))
    if isinstance(holder, nn.Module):
        copy = _module_copy(name, holder, network)
        if copy is not None:
            yield copy
            return
    elif isinstance(holder, (Mapping, list, tuple)):
        copy = _loose_copy(name, holder, network)
        if copy is not None:
            yield copy
            return
    if depth and not isinstance(holder, (Tensor, str, bytes, torch.optim.Optimizer)):
        for part in _parts(holder):
            yield from _search(name, part, network, seen, depth - 1)


def _parts(holder: Any) -> list[Any]:
    if isinstance(holder, Mapping):
        return list(holder.values())
    if isinstance(holder, (list, tuple)):
        return list(holder)
    parts = list(getattr(holder, "__dict__", {}).values())
    if isinstance(holder, nn.Module):
        parts = [*holder._modules.values(), *parts]
    return [part for part in parts if not callable(part) or isinstance(part, nn.Module)]


def _module_copy(name: str, module: nn.Module, network: _Network) -> WeightCopy | None:
    """The module as a copy of the network, or of that part of it that has its tensors."""
    shapes = shapes_of(module)
    paths = network.parts.get(shapes, []) if shapes else []
    theirs = {id(tensor) for tensor in named_tensors(module).values()}
    if not paths or any(id(tensor) in theirs for tensor in network.tensors.values()):
        return None
    if "" in paths:
        return WeightCopy(name, module)
    parts = [WeightCopy(name, module, path) for path in paths]
    best = max(parts, key=lambda part: likeness(part, network.model))
    return best if likeness(best, network.model) > ALIKE else None


def _loose_copy(name: str, holder: Any, network: _Network) -> WeightCopy | None:
    if isinstance(holder, Mapping):
        named = {
            str(key).removeprefix("module."): value
            for key, value in holder.items()
            if isinstance(value, Tensor)
        }
        fits = {
            path: tensor
            for path, tensor in named.items()
            if path in network.tensors and network.tensors[path].shape == tensor.shape
        }
        if any(fits.keys() >= set(order) for order in network.orders):
            return WeightCopy(name, loose=fits)
        # Others are named otherwise, in the same order, with counters beside them.
        return _ordered(name, [t for t in named.values() if t.ndim], network)
    flat = list(_flat(holder))
    return _ordered(name, flat, network) if all(isinstance(t, Tensor) for t in flat) else None


def _ordered(name: str, listed: list[Tensor], network: _Network) -> WeightCopy | None:
    """Tensors in the order of those of the network, or of the part that they are most like."""
    shapes = tuple(tuple(tensor.shape) for tensor in listed)
    found = [
        WeightCopy(name, loose=dict(zip(order, listed, strict=True)), ordered=True)
        for order in (network.orders_of_parts.get(shapes, []) if listed else [])
    ]
    ours = {id(tensor) for tensor in network.tensors.values()}
    if not found or any(id(tensor) in ours for tensor in listed):
        return None
    return max(found, key=lambda each: likeness(each, network.model)) if found[1:] else found[0]


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


class Beside:
    """What a wrapper of optimizers has beside these, or a module beside its tensors and parts."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    @property
    def parts(self) -> dict[str, Any]:
        """By attribute; of a module, its containers only."""
        own, kinds = vars(self._owner), (Mapping, list, tuple)
        if isinstance(self._owner, nn.Module):
            return {k: v for k, v in own.items() if k not in _OF_MODULES and isinstance(v, kinds)}
        return {
            name: value
            for name, value in own.items()
            if name not in ("param_groups", "state", "defaults")
            and not isinstance(value, Optimizer)
        }

    @property
    def numbers(self) -> dict[str, Any]:
        """Counters and settings of a wrapper."""
        return {name: value for name, value in self.parts.items() if type(value) in (int, float)}

    def set_numbers(self, numbers: Mapping[str, Any]) -> None:
        """Put back what :attr:`numbers` gave."""
        vars(self._owner).update(numbers)


_WRAPPER = "optimizer "
_OF_MODULES = frozenset(vars(nn.Module()))


class Followed:
    """The copies of one network."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: dict[str, tuple[Any, tuple[WeightCopy, ...]]] = {}
        _FOLLOWED.add(self)
        own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
        for path, module in model.named_modules():
            held = Beside(module)
            if any(_holds_tensors(part, own) for part in held.parts.values()):
                self.add(f"attributes of {path or 'the network'}", held)

    def all(self) -> tuple[WeightCopy, ...]:
        """As they were last found."""
        return tuple(copy for _, copies in self._kept.values() for copy in copies)

    def all_now(self) -> set[int]:
        """The tensors of the network and of what its holders have now, by identity."""
        found = {id(tensor) for tensor in named_tensors(self.model).values()}
        for name, (holder, _) in self._kept.items():
            found.update(_objects(all_copies_in(name, _inside(holder), self.model)))
        return found

    def unnamed(self) -> dict[str, Beside]:
        """Who keeps some without having been named: wrappers of optimizers, modules."""
        return {n: holder for n, (holder, _) in self._kept.items() if isinstance(holder, Beside)}

    def add(self, name: str, holder: Any) -> bool:
        """Look for the copies that ``holder`` keeps; whether anything is other than before."""
        found = copies_in(name, _inside(holder), self.model)
        _, before = self._kept.pop(name, (None, ()))
        if found:
            self._kept[name] = (holder, found)
        return bool(found or before)

    def add_wrappers(self, wrappers: Iterable[Any], known: Collection[Tensor]) -> None:
        """Look into wrappers of optimizers, instead of those of before.

        Args:
            known: tensors that are cut already.
        """
        for name in [name for name in self._kept if name.startswith(_WRAPPER)]:
            del self._kept[name]
        numbers = {id(tensor) for tensor in known}
        for number, wrapper in enumerate(wrappers):
            name, holder = f"{_WRAPPER}{number} ({type(wrapper).__name__})", Beside(wrapper)
            self.add(name, holder)
            found = _objects(self._kept.get(name, (None, ()))[1])
            if numbers.issuperset(found):
                self._kept.pop(name, None)
            numbers.update(found)  # wrappers may share them

    def look_again(self) -> bool:
        """Find the tensors that holders have now; whether any is another object than before."""
        changed = False
        for name, (holder, before) in self._kept.items():
            now = tuple(all_copies_in(name, _inside(holder), self.model))
            if len(now) == len(before) and _objects(now) != _objects(before):
                self._kept[name], changed = (holder, now), True
        return changed


_FOLLOWED: WeakSet[Followed] = WeakSet()
"""Of all networks that are cut in this process."""


def _holds_tensors(part: Any, own: set[int], depth: int = 2) -> bool:
    """Whether a container has tensors or modules other than the network's ``own``."""
    if isinstance(part, (Tensor, nn.Module)):
        return id(part) not in own
    if not depth or not isinstance(part, (Mapping, list, tuple)):
        return False
    inside = list(part.values() if isinstance(part, Mapping) else part)[:_FEW]
    return any(_holds_tensors(each, own, depth - 1) for each in inside)


_FEW = 4
"""How many parts of a container are looked at."""


def _inside(holder: Any) -> Any:
    return holder.parts if isinstance(holder, Beside) else holder


def _objects(copies: Iterable[WeightCopy]) -> list[int]:
    return [id(tensor) for copy in copies for tensor in copy.tensors().values()]


def teachers_in(model: nn.Module) -> tuple[WeightCopy, ...]:
    """The frozen parts of a network that copy a trained part; the outermost ones."""
    if all(parameter.requires_grad for parameter in parameters_in(model).values()):
        return ()
    parts = [(path, module) for path, module in model.named_modules() if path]
    trained = [(path, module) for path, module in parts if _all(module, requires_grad=True)]
    found: list[WeightCopy] = []
    for path, module in parts:
        inside = any(path.startswith(f"{teacher.name}.") for teacher in found)
        if inside or not module._modules or not _all(module, requires_grad=False):
            continue
        shapes = shapes_of(module)
        for student, other in trained:
            if type(other) is type(module) and shapes_of(other) == shapes:
                copy = WeightCopy(path, module, student)
                if likeness(copy, model) > ALIKE:
                    found.append(copy)
                    break
    return tuple(found)


def with_teachers(
    architecture: PrunedArchitecture, teachers: Iterable[WeightCopy]
) -> PrunedArchitecture:
    """The architecture in which groups and blocks of students take their teachers' along."""
    for teacher in teachers:
        groups = {group.name: group for group in architecture.groups}
        blocks = {block.name: block for block in architecture.blocks}
        moved = _renaming(teacher)
        leading = {moved(name): name for name in (*groups, *blocks) if moved(name) != name}
        followed = leading.keys()
        architecture = PrunedArchitecture.build(
            architecture.tensors,
            architecture.layers,
            tuple(_joined(g, groups, moved) for g in groups.values() if g.name not in followed),
            blocks=tuple(_along(b, moved) for b in blocks.values() if b.name not in followed),
            products=tuple(product.renamed(leading) for product in architecture.products),
        )
    return architecture


def _renaming(teacher: WeightCopy) -> Callable[[str], str]:
    start, there = f"{teacher.prefix}.", f"{teacher.name}."

    def moved(name: str) -> str:
        return there + name[len(start) :] if name.startswith(start) else name

    return moved


def _joined(
    group: PruningGroup, groups: Mapping[str, PruningGroup], moved: Callable[[str], str]
) -> PruningGroup:
    """A student's group with the teacher's tensors, and with its sites where it is run."""
    slices: list[TensorSlice] = list(group.slices)
    for part in group.slices:
        other = part.model_copy(update={"tensor": moved(part.tensor)})
        if other not in slices:
            slices.append(other)
    other_group = groups.get(moved(group.name))
    sites: list[GateSite] = list(group.sites)
    if other_group is not None and other_group is not group:
        sites += [site for site in other_group.sites if site not in sites]
    return group.model_copy(update={"slices": tuple(slices), "sites": tuple(sites)})


def _along(block: LayerBlock, moved: Callable[[str], str]) -> LayerBlock:
    stand_ins = list(block.stand_ins)
    for part in block.stand_ins:
        other = part.model_copy(update={"module": moved(part.module)})
        if other not in stand_ins:
            stand_ins.append(other)
    tensors = dict.fromkeys([*block.tensors, *map(moved, block.tensors)])
    return block.model_copy(update={"stand_ins": tuple(stand_ins), "tensors": tuple(tensors)})


def _all(module: nn.Module, *, requires_grad: bool) -> bool:
    flags = [parameter.requires_grad for parameter in module.parameters()]
    return bool(flags) and all(flag is requires_grad for flag in flags)

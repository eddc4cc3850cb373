"""Objects that hold a network's weights, or their shapes, and were not given to its surgeon.

Promises: optimizers, averages and copies that the script keeps are found wherever they are alive in
this process, by the tensors that they hold; nothing of them is changed. Nothing may be cut while
one of them would fail afterwards. A hook on a gradient that holds a tensor of its parameter's shape
(a mask of the gradient, as sparse training has it) would; it is found, wherever it is within the
hook's closure, arguments or object.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import cosine_similarity
from torch.optim import Optimizer

from elesh.trainer.network.layers import named_tensors, require_fit
from elesh.trainer.network.traversal import alive
from leyline import ContractError, InvalidField, PrunedArchitecture

from .averages import (
    ALIKE,
    WeightCopy,
    copies_in,
    kept_by_others,
    likeness,
    named_like_an_average,
    shapes_of,
    unnamed_averages,
)
from .optimizers import other_optimizers
from .tensors import is_kept


def unnamed_average(
    model: nn.Module, known: Iterable[WeightCopy], among: list[Any] | None = None
) -> str:
    """What to do about an average of the network that is not among those known; empty if there is
    none. Nothing is cut until it is done.

    Args:
        among: all that are alive, where the caller has looked; emptied if there is one.
    """
    averages = unnamed_averages(model, known, among)
    if not averages:
        return ""
    kinds = ", ".join(average.name for average in averages)
    return (
        f"an average of the network's weights was not named: {kinds}; name "
        "it, session.resume(surgeon, ema=average) or surgeon.follow('ema', average)"
    )


class Unnamed:
    """What one network's surgeon was not given.

    Copies that the script keeps as plain modules, or as tensors in a dictionary or list (a teacher
    or an average that is moved by hand, the best weights so far), are told apart by whether they
    are updated in place while the network trains.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._digests: dict[int, tuple[weakref.ref[Any], str]] = {}
        """Of every copy as it was looked at first, by a tensor of it."""
        self._updated: set[int] = set()

    def blocks(
        self,
        architecture: PrunedArchitecture,
        optimizers: Iterable[Optimizer],
        copies: Iterable[WeightCopy],
    ) -> str:
        """Why nothing may be cut now; empty if it may.

        Modules that were put in since (adapters) are not in the architecture. An optimizer that has
        state of the network's parameters, or an average of them, that the surgeon was not given,
        would fail in its next step or update, and a gradient hook that holds a mask of the
        parameter's shape in the next backward pass.

        Args:
            optimizers: those given.
            copies: what is cut along.
        """
        look, model = functools.partial(self._alive, named_like_an_average), self._model
        found = look()
        if others := other_optimizers(model, optimizers, stateful=True, look=look, among=found):
            return (
                f"an optimizer of the network was not named: {_kinds(others)}; give the Surgeon "
                "all of them (optimizer=[first, second]), or delete what is not used"
            )
        try:
            require_fit(model, architecture)
        except ContractError as error:
            return f"{error}; after a change of its modules create Recorder and Surgeon again"
        prunable = [group for group in architecture.groups if group.prunable]
        names = {part.tensor for group in prunable for part in group.slices}
        if hooked := fixed_to_a_shape(model, names):
            return (
                f"a gradient hook of {hooked} holds a tensor of its shape, which a cut would not "
                "reach; let the hook make it of the gradient or of the parameter, as these are then"
            )
        if self._flat_average(found):
            return (
                "an average of the network's weights is kept as one vector, which a cut would not "
                "fit: keep it by parameter instead, and name it, elesh.attach(..., ema=average)"
            )
        updated = self._updated_copies(copies, found)
        if (average := unnamed_average(model, copies, found)) or not updated:
            return average
        return (
            f"a copy of the network that the script updates was not named: {updated[0].name}; "
            "name it, session.resume(surgeon, teacher=copy) or elesh.attach(..., teacher=copy)"
        )

    def updated_copies(self, copies: Iterable[WeightCopy]) -> list[WeightCopy]:
        """Copies of the network that have changed since they were first looked at, by this or
        another method.

        Args:
            copies: what is cut along.
        """
        found = self._alive()
        self._flat_average(found)
        return self._updated_copies(copies, found)

    def require_all_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse to go on beside an optimizer of the network that is not among those given.

        Raises:
            InvalidField: naming its kind.
        """
        found = self._alive()
        self._updated_copies((), found)  # those that are updated from now on are told apart
        self._flat_average(found)
        if others := other_optimizers(self._model, optimizers, look=self._alive, among=found):
            raise InvalidField(
                "optimizer",
                "every optimizer that holds parameters of the network",
                f"another one is alive: {_kinds(others)}",
                hint="give all of them, optimizer=[first, second], or delete what is not used",
            )

    def _alive(self, named: Callable[[str], bool] | None = None) -> list[Any]:
        """All optimizers, tensors and networks of this one's kind, and what has a type with such a
        name, for which all types are gone through."""
        return alive(Optimizer, Tensor, exactly=(type(self._model),), named=named)

    def _updated_copies(self, known: Iterable[WeightCopy], among: list[Any]) -> list[WeightCopy]:
        """Copies that have changed since they were first looked at.

        One that an optimizer trains is another network, one that holds still does not have to fit.

        Args:
            known: what is cut along.
            among: every module of the network's kind, every optimizer and every tensor alive.
        """
        self._digests = {n: seen for n, seen in self._digests.items() if seen[0]() is not None}
        own = {id(tensor) for tensor in named_tensors(self._model).values()}
        own |= {id(tensor) for copy in known for tensor in copy.tensors().values()}
        own |= kept_by_others(self._model) | _of_optimizers(among)
        shapes, found = shapes_of(self._model), list[WeightCopy]()
        for each in among:
            if type(each) is type(self._model) and shapes_of(each) == shapes:
                found.append(WeightCopy(type(each).__name__, each))
        found += self._in_containers(own, among)
        updated = list[WeightCopy]()
        for copy in found:
            tensors = list(copy.tensors().values())
            shared = any(id(tensor) in own for tensor in tensors)
            if not shared and likeness(copy, self._model) > ALIKE and self._has_changed(tensors):
                updated.append(copy)
        return updated

    def _in_containers(self, own: Collection[int], among: list[Any]) -> list[WeightCopy]:
        """Dictionaries and lists with a second set of the weights, but for restore points."""
        trained = [tuple(p.shape) for p in self._model.parameters() if p.requires_grad]
        shapes = set(trained)
        others = [
            (shape, each)
            for each in among
            if isinstance(each, Tensor)
            and id(each) not in own
            and each.grad_fn is None
            and not is_kept(each)
            and not isinstance(each, FakeTensor)  # the compiler's, of sizes that are not known
            and (shape := tuple(each.shape)) in shapes
        ]
        counts = Counter(shape for shape, _ in others)
        if not shapes or not shapes <= counts.keys():
            return []
        rarest = min(shapes, key=lambda shape: counts[shape])
        held = gc.get_referrers(*(each for shape, each in others if shape == rarest))
        found = list[WeightCopy]()
        for holder in held:
            if isinstance(holder, (dict, list)) and len(trained) <= len(holder) <= 9 * len(trained):
                found += copies_in(type(holder).__name__, holder, self._model)
        return found

    def _flat_average(self, among: Iterable[Any]) -> bool:
        """Whether a vector of all weights, in the parameters' order, has been updated since it was
        first looked at."""
        every = list(self._model.parameters())
        orders = [order for order in (every, [p for p in every if p.requires_grad]) if order]
        sizes = {sum(p.numel() for p in order): order for order in orders if len(order) > 1}
        own = {id(parameter) for parameter in every} | _of_optimizers(among)
        vectors = [
            each
            for each in among
            if isinstance(each, Tensor) and each.ndim == 1 and each.numel() in sizes
            if id(each) not in own and each.is_floating_point() and not is_kept(each)
        ]
        for vector in vectors:
            weights = torch.cat([p.detach().flatten() for p in sizes[vector.numel()]])
            alike = cosine_similarity(vector.detach().to(weights), weights, dim=0)
            if float(alike) > ALIKE and self._has_changed([vector]):
                return True
        return False

    def _has_changed(self, tensors: list[Tensor]) -> bool:
        """Whether they have since they were looked at first."""
        first, number = tensors[0], id(tensors[0])
        digest = repr([float(tensor.detach().double().sum()) for tensor in tensors])
        seen, was = self._digests.get(number, (None, digest))
        if seen is None or seen() is not first:  # another tensor had this number before
            self._digests[number] = (weakref.ref(first), digest)
            self._updated.discard(number)
        elif was != digest:
            self._updated.add(number)
        return number in self._updated


def _of_optimizers(among: Iterable[Any]) -> set[int]:
    """What optimizers train, its gradients, and what they keep of it."""
    found = set[int]()
    for optimizer in among:
        if isinstance(optimizer, Optimizer) and hasattr(optimizer, "param_groups"):
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            found.update(id(p) for p in trained)
            found.update(id(p.grad) for p in trained if p.grad is not None)
            kept = (each for each in optimizer.state.values() if isinstance(each, dict))
            found.update(id(tensor) for each in kept for tensor in each.values())
    return found


def _kinds(found: Iterable[Any]) -> str:
    return ", ".join(type(each).__name__ for each in found)


_HOOK_DEPTH = 3


def fixed_to_a_shape(model: nn.Module, names: Collection[str]) -> str:
    """The first of these parameters with a hook that would not fit after a cut; empty if none."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for name, parameter in model.named_parameters():
        if name in names and any(
            tensor.shape == parameter.shape and id(tensor) not in own
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")
            for hook in (getattr(parameter, kind, None) or {}).values()
            for tensor in _tensors_held(hook, _HOOK_DEPTH)
        ):
            return name
    return ""


def _tensors_held(thing: Any, depth: int) -> Iterator[Tensor]:
    """Tensors that a hook refers to."""
    if isinstance(thing, Tensor):
        yield thing
        return
    if not depth or isinstance(thing, nn.Module):
        return
    for part in _parts_of_hook(thing):
        yield from _tensors_held(part, depth - 1)


def _parts_of_hook(thing: Any) -> list[Any]:
    if isinstance(thing, FunctionType):
        return [
            *_contents(thing),
            *(thing.__defaults__ or ()),
            *(thing.__kwdefaults__ or {}).values(),
        ]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        return [thing.__func__, *getattr(thing.__self__, "__dict__", {}).values()]
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, (list, tuple)):
        return list(thing)
    return [*getattr(thing, "__dict__", {}).values()] if callable(thing) else []


def _contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # An empty cell.
            yield cell.cell_contents

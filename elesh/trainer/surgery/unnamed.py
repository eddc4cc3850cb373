"""What holds a network's weights, or their shapes, and was not given to its surgeon.

Promises: optimizers, averages and copies that the script keeps are found wherever they are alive in
this process, by the tensors that they hold; nothing of them is changed. Nothing may be cut while
one of them would fail afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.optim import Optimizer

from elesh.trainer.network.layers import named_tensors, require_fit
from elesh.trainer.network.state import alive, fixed_to_a_shape
from leyline import ContractError, InvalidField, PrunedArchitecture

from .averages import (
    ALIKE,
    WeightCopy,
    averages_weights,
    kept_by_others,
    likeness,
    shapes_of,
    unnamed_averages,
)
from .optimizers import other_optimizers

__all__ = ["Unnamed", "unnamed_average"]


def unnamed_average(
    model: nn.Module, known: Iterable[WeightCopy], among: Iterable[Any] | None = None
) -> str:
    """What to do about an average of the network that is not among those known; empty if there is
    none. Nothing is cut until it is done.

    Args:
        among: all that are alive, where the caller has looked.
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

    Copies that the script keeps as plain modules (a teacher that is moved by hand, the best weights
    so far) are told apart by whether they are updated while the network trains.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._digests: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._updated: WeakSet[nn.Module] = WeakSet()

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
        found = self._alive()
        if others := other_optimizers(self._model, optimizers, stateful=True, among=found):
            return (
                f"an optimizer of the network was not named: {_kinds(others)}; give the Surgeon "
                "all of them (optimizer=[first, second]), or delete what is not used"
            )
        try:
            require_fit(self._model, architecture)
        except ContractError as error:
            return f"{error}; after a change of its modules make Recorder and Surgeon anew"
        prunable = [group for group in architecture.groups if group.prunable]
        names = {part.tensor for group in prunable for part in group.slices}
        if hooked := fixed_to_a_shape(self._model, names):
            return (
                f"a gradient hook of {hooked} holds a tensor of its shape, which a cut would not "
                "reach; let the hook make it of the gradient or of the parameter, as these are then"
            )
        updated = self._updated_copies(copies, found)
        if (average := unnamed_average(self._model, copies, found)) or not updated:
            return average
        return (
            f"a copy of the network that the script updates was not named: {_kinds(updated[:1])}; "
            "name it, session.resume(surgeon, teacher=copy) or elesh.attach(..., teacher=copy)"
        )

    def updated_copies(self, copies: Iterable[WeightCopy]) -> list[nn.Module]:
        """Copies of the network, kept as plain modules, that have changed since they were first
        looked at, by this or another method.

        Args:
            copies: what is cut along.
        """
        return self._updated_copies(copies, self._alive())

    def require_all_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse to go on beside an optimizer of the network that is not among those given.

        Raises:
            InvalidField: naming its kind.
        """
        found = self._alive()
        self._updated_copies((), found)  # those that are updated from now on are told apart
        if others := other_optimizers(self._model, optimizers, among=found):
            raise InvalidField(
                "optimizer",
                "every optimizer that holds parameters of the network",
                f"another one is alive: {_kinds(others)}",
                hint="give all of them, optimizer=[first, second], or delete what is not used",
            )

    def _alive(self) -> list[Any]:
        """All optimizers, averages and networks of this one's kind."""
        own = type(self._model)
        return alive(lambda k: k is own or issubclass(k, Optimizer) or averages_weights(k))

    def _updated_copies(self, known: Iterable[WeightCopy], among: list[Any]) -> list[nn.Module]:
        """Copies that have changed since they were first looked at.

        One that an optimizer trains is another network, one that holds still does not have to fit.

        Args:
            known: what is cut along.
            among: every module of the network's kind, and every optimizer, that is alive.
        """
        own = {id(tensor) for tensor in named_tensors(self._model).values()}
        own |= {id(tensor) for copy in known for tensor in copy.tensors().values()}
        own |= kept_by_others(self._model)
        trained = {
            id(parameter)
            for optimizer in among
            if isinstance(optimizer, Optimizer)
            for group in vars(optimizer).get("param_groups", ())
            for parameter in group["params"]
        }
        shapes, found = shapes_of(self._model), list[nn.Module]()
        for each in among:
            if type(each) is not type(self._model):
                continue
            tensors = named_tensors(each)
            held = {id(tensor) for tensor in tensors.values()}
            if shapes_of(each) != shapes or held & (own | trained):
                continue
            if likeness(WeightCopy("", each), self._model) <= ALIKE:
                continue
            digest = repr([float(tensor.detach().double().sum()) for tensor in tensors.values()])
            if self._digests.setdefault(each, digest) != digest:
                self._updated.add(each)
            if each in self._updated:
                found.append(each)
        return found


def _kinds(found: Iterable[Any]) -> str:
    return ", ".join(type(each).__name__ for each in found)

"""The second sets of the weights that a surgeon follows, each by the name of who keeps it.

Promises: they are found again where a holder has made new tensors since, as many averages do in
every update; what a wrapper of optimizers keeps beside them (the slow weights of Lookahead), or the
network in plain attributes (the weights it began with), is followed without being named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .averages import WeightCopy, all_copies_in, copies_in

__all__ = ["Beside", "Followed"]


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
        self._model = model
        self._kept: dict[str, tuple[Any, tuple[WeightCopy, ...]]] = {}
        own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
        for path, module in model.named_modules():
            held = Beside(module)
            if any(_holds_tensors(part, own) for part in held.parts.values()):
                self.add(f"attributes of {path or 'the network'}", held)

    def all(self) -> tuple[WeightCopy, ...]:
        """As they were last found."""
        return tuple(copy for _, copies in self._kept.values() for copy in copies)

    def unnamed(self) -> dict[str, Beside]:
        """Who keeps some without having been named: wrappers of optimizers, modules."""
        return {n: holder for n, (holder, _) in self._kept.items() if isinstance(holder, Beside)}

    def add(self, name: str, holder: Any) -> bool:
        """Look for the copies that ``holder`` keeps; whether anything is other than before."""
        found = copies_in(name, _inside(holder), self._model)
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
            now = tuple(all_copies_in(name, _inside(holder), self._model))
            if len(now) == len(before) and _objects(now) != _objects(before):
                self._kept[name], changed = (holder, now), True
        return changed


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

"""The sample of every row where a network picks rows: experts that read some tokens each.

Promises: rows are followed from the inputs of a pass, by the indices that code picks them with,
through whatever treats them one by one, until they are put back; nothing is changed. Where that
cannot be followed, it is said (:meth:`Rows.knows`), and nothing is guessed. Networks that pick no
rows are looked at once, and never again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from .calling import tensors_in

_PICKS: dict[Any, int] = {
    Tensor.__getitem__: 1, torch.index_select: 2, Tensor.index_select: 2,
}  # fmt: skip
"""Functions that pick rows, and where their indices are among the arguments."""
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_PARTS = (
    torch.split, torch.chunk, torch.tensor_split, torch.split_with_sizes,
    Tensor.split, Tensor.chunk, Tensor.tensor_split, Tensor.split_with_sizes,
)  # fmt: skip
_PUTS = ("index_add", "index_put", "index_copy", "scatter", "index_fill", "setitem")
_MOVES = ("transpose", "permute", "swapaxes", "movedim", "t", "T", "mT")
_SHAPES = ("view", "reshape", "flatten", "unflatten")

_PICKING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def remember_picking(model: nn.Module, picks: bool) -> None:
    """Say whether a network picks rows."""
    _PICKING[model] = picks


def picks_rows(model: nn.Module) -> bool:
    """Whether a network picks rows, or that is not known yet."""
    return _PICKING.get(model, True)


def spread(x: Tensor, owners: Tensor, samples: int) -> Tensor:
    """[samples * P, ...]: rows by their samples, with zeros where one has fewer than P."""
    counts = torch.bincount(owners, minlength=samples)
    most = max(1, int(counts.max()))
    order = torch.argsort(owners, stable=True)
    begins = torch.cumsum(counts, 0) - counts
    places = torch.arange(len(order), device=order.device) - begins[owners[order]]
    made = x.new_zeros(samples * most, *x.shape[1:])
    made[owners[order] * most + places] = x[order]
    return made


class Rows(TorchFunctionMode):
    """Follows the rows of every pass of a network, once put on it.

    Args:
        samples: asks how many samples the next pass has.
    """

    def __init__(self, model: nn.Module, samples: Callable[[], int]) -> None:
        super().__init__()
        self._model, self._ask = model, samples
        self._samples, self._picked = 1, False
        self._known: Any = WeakTensorKeyDictionary()
        """Of tensors that come of the inputs: the sample of each row; None: equal shares in their
        order; ``_LOST``: not known."""

    def put_on(self) -> list[RemovableHandle]:
        """Follow rows in every pass until these handles are removed."""
        before = self._model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        return [before, self._model.register_forward_hook(self._end, always_call=True)]

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._samples = max(1, self._ask())
        self._known.clear()
        for x in tensors_in([*args, *kwargs.values()]):
            if x.ndim and len(x) == self._samples:
                self._known[x] = None
        self.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        remember_picking(self._model, self._picked)

    def of(self, x: Tensor) -> Tensor | None:
        """[rows] the sample of each; None where they are in equal shares, in order."""
        found = self._known.get(x)
        return found if isinstance(found, Tensor) else None

    def knows(self, x: Tensor) -> bool:
        """Whether that is known."""
        found = self._known.get(x, _LOST)
        return found is None or isinstance(found, Tensor)

    def same(self, made: Tensor, x: Tensor) -> None:
        """Say that rows are those of another tensor."""
        if x in self._known:
            self._known[made] = self._known[x]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        made = func(*args, **given)
        if isinstance(made, Tensor):
            if made.ndim and made is not (args[0] if args else None):
                self._follow(func, made, args, given)
        elif isinstance(made, (tuple, list)):
            self._follow_all(func, made, args, given)
        return made

    def _follow_all(self, func: Any, made: Sequence[Any], args: Any, given: Any) -> None:
        parts = [part for part in made if isinstance(part, Tensor) and part.ndim]
        dim = given.get("dim", args[2] if len(args) > 2 else 0)
        if func not in _PARTS or dim != 0:
            for part in parts:
                self._follow(func, part, args, given)
            return
        owners = self._owners(args[0]) if args else None
        if owners is not None:
            for part, own in zip(parts, torch.split(owners, [len(x) for x in parts]), strict=True):
                self._put(part, own)

    def _follow(self, func: Any, made: Tensor, args: Any, given: Any) -> None:
        if func in _PICKS and args and args[0] in self._known:
            where = _PICKS[func]
            index = args[where] if len(args) > where else given.get("index")
            first = where == 1 or (args[1] if len(args) > 1 else given.get("dim")) == 0
            if first and index is not None and self._pick(made, args[0], index):
                return
        came = [x for x in _flat((args, given)) if x in self._known]
        if not came:
            return
        name = getattr(func, "__name__", "")
        if "pack" in name:
            return self._put(made, _LOST)
        if func in _JOINS and given.get("dim", args[1] if len(args) > 1 else 0) == 0:
            owners = [self._owners(x) for x in args[0]]
            whole = [one for one in owners if one is not None]
            self._put(made, torch.cat(whole) if len(whole) == len(owners) else _LOST)
        elif any(part in name for part in _PUTS):
            self.same(made, args[0])
        else:
            owners = self._among(name, made, came)
            axis = self._moved(made, args[0]) if owners is _LOST and args else None
            self._put(made, owners if axis is None else _Along(axis) if axis else None)

    def _among(self, name: str, made: Tensor, came: Sequence[Tensor]) -> Any:
        """Whose rows an operation on all rows makes."""
        uneven = [(x, own) for x in came if isinstance(own := self._known[x], Tensor)]
        if name not in _MOVES:
            for _, own in uneven:
                if len(own) == len(made):
                    return own
            if name in _SHAPES and uneven:
                own = uneven[0][1]
                if len(own) and len(made) % len(own) == 0:
                    return own.repeat_interleave(len(made) // len(own))
        even = any(self._known[x] is None for x in came)
        return None if even and not uneven and len(made) % self._samples == 0 else _LOST

    def _moved(self, made: Tensor, x: Any) -> int | None:
        """Which axis of a view has the samples in order (queries, keys and values that are moved to
        the front, and taken apart there); None where that is not known."""
        known = self._known.get(x, _LOST) if isinstance(x, Tensor) else _LOST
        axis = 0 if known is None else known.axis if isinstance(known, _Along) else -1
        if axis < 0 or made._base is not (x if x._base is None else x._base):
            return None
        at = x.shape[axis], x.stride(axis)
        places = [n for n in range(made.ndim) if (made.shape[n], made.stride(n)) == at]
        return places[0] if len(places) == 1 else None

    def _pick(self, made: Tensor, x: Tensor, index: Any) -> bool:
        """Follow rows that are picked by their numbers; whether they were."""
        first = index[0] if isinstance(index, tuple) and index else index
        if first is None or first is Ellipsis or isinstance(first, int):
            return False
        if isinstance(first, slice):
            if first == slice(None) or (self._known[x] is None and len(x) == self._samples):
                return False
            chosen = torch.arange(len(x))[first]
        else:
            chosen = torch.as_tensor(first).cpu()
            if chosen.dtype == torch.bool:
                chosen = chosen.nonzero()[:, 0] if chosen.ndim else chosen.new_zeros(0).long()
        owners = self._owners(x)
        if chosen.ndim != 1 or len(chosen) != len(made) or owners is None:
            return False
        self._picked = True
        self._put(made, owners[chosen.long()])
        return True

    def _owners(self, x: Tensor) -> Tensor | None:
        """The sample of each row of a tensor; None where that is not known."""
        if not self.knows(x):
            return None
        found = self._known[x]
        if isinstance(found, Tensor):
            return found
        if len(x) % self._samples:
            return None
        return torch.arange(self._samples).repeat_interleave(len(x) // self._samples)

    def _put(self, made: Tensor, owners: Any) -> None:
        if isinstance(owners, Tensor) and len(made) and len(made) % self._samples == 0:
            even = torch.arange(self._samples).repeat_interleave(len(made) // self._samples)
            owners = None if torch.equal(owners, even) else owners
        self._known[made] = owners


@dataclass(frozen=True)
class _Along:
    """Samples lie in order along this axis."""

    axis: int


_LOST = object()


def _flat(values: Any) -> Iterator[Tensor]:
    """Tensors among the arguments of a function."""
    parts: Iterable[Any] = values.values() if isinstance(values, dict) else values
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, (tuple, list, dict)):
            yield from _flat(part)

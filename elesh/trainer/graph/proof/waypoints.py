"""Compares two runs of a network piece by piece, at the inputs of the layers that mix channels.

In the first run what enters every such layer is remembered. In the second it is compared with
what enters now, and then replaced by it: so every piece of the network is judged by itself, all
faults show in one run, and small differences do not add up on the way. What leaves a layer that
loses no outputs is treated in the same way, so that what is chosen by it afterwards (boxes of a
detector, experts) is chosen alike in both runs.

Promises: where no fault is found and the outputs are equal, the two runs compute the same: every
value of the second follows from values that were equal. Afterwards no hook is left.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elesh.trainer.network.calling import replace_inputs

__all__ = ["SHAPES", "TOLERANCE", "Fault", "Guards", "Waypoints", "apart"]

Ints = npt.NDArray[np.int64]
TOLERANCE = 1e-4
"""Allowed difference, as a share of the largest value (single precision)."""
SHAPES = "the outputs' shapes differ"
_MOST_STREAMS = 3
"""That a layer reads one width in."""


@dataclass(frozen=True)
class Fault:
    """A place where the two runs differ, or where the second failed."""

    place: str
    """The module at whose input, or inside which; empty: the outputs, or unknown."""
    reason: str


@dataclass(frozen=True)
class _Seen:
    """What entered a layer: only the channels that are kept, as a mask leaves zeros of the rest."""

    kept: Tensor
    lost: Mapping[int, Ints]
    shape: tuple[int, ...]
    shared: bool = False
    """Whether layers called one after the other were given the same, which is kept once."""

    def without(self, lost: Mapping[int, Ints]) -> Tensor:
        """All of it but for these channels, by axis."""
        return self.kept if lost is self.lost else narrowed(self._whole(), lost)

    def _whole(self) -> Tensor:
        found = self.kept
        for dim, indices in self.lost.items():
            shape = list(found.shape)
            shape[dim] = self.shape[dim]
            found = found.new_zeros(shape).index_copy_(
                dim, _left(shape[dim], indices).to(found.device), found
            )
        return found


@dataclass
class Waypoints:
    """Remembers, then compares.

    Args:
        mixing: the layers that mix channels, by name.
    """

    mixing: Mapping[str, nn.Module]
    faults: list[Fault] = field(default_factory=list)
    _seen: dict[tuple[str, int], _Seen] = field(default_factory=dict)
    _made: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _calls: Counter[str] = field(default_factory=Counter)
    _order: list[str] = field(default_factory=list)
    """The layers that were called, in order."""
    _handles: list[RemovableHandle] = field(default_factory=list)
    lost: Callable[[str], Mapping[int, Ints]] = lambda place: {}
    """By axis, which channels of a module's input are not there in the second run, and in the
    first one masked."""
    gone: Callable[[], Collection[tuple[int, Ints]]] = lambda: ()
    """Of every group that loses units: how many it has, and which go."""
    shrinking: Collection[str] = ()
    """Layers that lose outputs in the second run."""
    unjudged: set[str] = field(default_factory=set)
    """Places after which nothing is compared."""
    last: str = ""
    """The layer that was called last."""

    def remember(self) -> None:
        """Remember what enters the layers from now on. Masks must be on already."""
        self._hook(self._remembered, self._kept)

    def compare(self) -> None:
        """Compare from now on, and put in what was remembered."""
        self._hook(self._compared, self._equal)

    @property
    def made_calls(self) -> int:
        """How many calls of layers there were up to now."""
        return len(self._order)

    def rewind(self, count: int) -> None:
        """What followed after so many calls of layers is called again."""
        self._calls.subtract(self._order[count:])
        del self._order[count:]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forget(self) -> None:
        """Let go of what was remembered."""
        self._seen.clear()
        self._made.clear()

    def _hook(
        self, treat: Callable[[str, int, Tensor], Tensor], left: Callable[[str, Tensor], Tensor]
    ) -> None:
        self.close()
        self._calls, self._order, self.last = Counter(), [], ""

        def hook_of(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                self._calls[name] += 1
                self._order.append(name)
                self.last = name
                first = self._calls[name] * _MOST_STREAMS
                numbers = itertools.count(first)
                return replace_inputs(module, args, kwargs, lambda x: treat(name, next(numbers), x))

            return hook

        def after(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                return left(name, output) if isinstance(output, Tensor) else output

            return hook

        for name, module in self.mixing.items():
            handle = module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
            self._handles.append(handle)
            if name not in self.shrinking:
                self._handles.append(module.register_forward_hook(after(name)))

    def _remembered(self, name: str, number: int, x: Tensor) -> Tensor:
        lost = {} if x.is_nested else self.lost(name)
        kept = narrowed(x.detach(), lost) if lost else x.detach().clone()
        seen = _Seen(kept, lost, tuple(x.shape) if lost else ())
        last = next(reversed(self._seen), None)
        if last is not None and _same(self._seen[last].kept, kept):
            # As queries, keys and values read one tensor.
            self._seen[last] = replace(self._seen[last], shared=True)
            seen = replace(seen, kept=self._seen[last].kept, shared=True)
        self._seen[name, number] = seen
        return x

    def _compared(self, name: str, number: int, x: Tensor) -> Tensor:
        seen = self._seen.get((name, number))
        if seen is None:
            return x
        expected = self._fitted(seen.without(self.lost(name)), x)
        if name not in self.unjudged and (difference := apart([expected], [x])):
            self.faults.append(Fault(name, difference))
        # A layer may write over what it is given, of which another one has none.
        return expected.clone() if seen.shared else expected

    def _kept(self, name: str, y: Tensor) -> Tensor:
        self._made[name, self._calls[name]] = y.detach().clone()
        return y

    def _equal(self, name: str, y: Tensor) -> Tensor:
        expected = self._made.get((name, self._calls[name]))
        if expected is None or name in self.unjudged:
            return y
        expected = self._fitted(expected, y)
        if difference := apart([expected], [y]):
            self.faults.append(Fault(name, difference))
            return y
        return expected.clone()

    def _fitted(self, expected: Tensor, found: Tensor) -> Tensor:
        """``expected`` without the units that are positions here: on another axis than the layer's
        channels (tokens are mixed on a transposed map), or rows (heads of each sample)."""
        if expected.ndim != found.ndim or expected.shape == found.shape:
            return expected
        axes = [d for d in range(found.ndim) if expected.shape[d] != found.shape[d]]
        for size, lost in self.gone() if len(axes) == 1 else ():
            (axis,) = axes
            times, over = divmod(expected.shape[axis], size)
            if not over and found.shape[axis] == times * (size - len(lost)):
                every = np.arange(times)[:, None] * size + lost
                fitted = narrowed(expected, {axis: every.reshape(-1)})
                if not apart([fitted], [found]):
                    return fitted
        return expected


class Guards:
    """Modules whose failing is noted: what is to blame is taken back, and they are called again.

    Args:
        amend: from a module's path to whether anything was taken back because it failed.
        points: what compares meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Collection[str],
        amend: Callable[[str, Exception], bool],
        points: Waypoints,
    ) -> None:
        self._model, self._paths, self._amend, self._points = model, paths, amend, points
        self._wrapped: list[nn.Module] = []

    def __enter__(self) -> Guards:
        for path in self._paths:
            module = self._model.get_submodule(path)
            if "forward" not in vars(module):
                self._wrapped.append(module)
                vars(module)["forward"] = self._guarded(path, module.forward)
        return self

    def __exit__(self, *error: object) -> None:
        for module in self._wrapped:
            vars(module).pop("forward", None)

    def _guarded(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            before = self._points.made_calls
            while True:
                try:
                    return forward(*args, **kwargs)
                except Exception as error:  # Whatever the user's network raises is the finding.
                    if not self._amend(path, error):
                        raise
                    self._points.rewind(before)

        return guarded


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return alike and not (one.is_nested or other.is_nested) and torch.equal(one, other)


def apart(masked: Sequence[Tensor], cut: Sequence[Tensor]) -> str:
    """How two runs' values differ; empty if they do not."""
    if [tensor.shape for tensor in masked] != [tensor.shape for tensor in cut]:
        return SHAPES
    for a, b in zip(masked, cut, strict=True):
        if not a.numel():
            continue
        # The largest value, not a norm, which takes eight times as long.
        scale, most = (x.abs().max().item() for x in (a, a - b))
        if not (math.isfinite(most) and most <= TOLERANCE * scale):
            return f"by {most:.3g} where outputs reach {scale:.3g}"
    return ""


def narrowed(tensor: Tensor, lost: Mapping[int, Ints], in_place: bool = False) -> Tensor:
    """The tensor without the indices that are lost, by axis.

    Args:
        in_place: whether what is left may lie where it was, as far as it lies side by side.
    """
    for dim, indices in lost.items():
        left = _left(tensor.shape[dim], indices)
        if in_place and len(left) and int(left[-1]) - int(left[0]) == len(left) - 1:
            tensor = tensor.narrow(dim, int(left[0]), len(left))
        else:
            tensor = tensor.index_select(dim, left.to(tensor.device))
    return tensor


def _left(size: int, lost: Ints) -> Tensor:
    """The indices but for those that are lost; many tensors lose the same."""
    return _without(size, np.asarray(lost, dtype=np.int64).tobytes())


@lru_cache(256)
def _without(size: int, lost: bytes) -> Tensor:
    left = np.ones(size, dtype=np.bool_)
    left[np.frombuffer(lost, dtype=np.int64)] = False
    return torch.from_numpy(left.nonzero()[0])

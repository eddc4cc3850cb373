"""What a network answers while the caller evaluates it, and what it costs that answers move.

Half a point of accuracy is less than one of a hundred validation samples, but outputs say more than
whether an answer is right: how near it was to another one, and how far a cut moves it. The caller's
own ``evaluate`` shows both, without a pass of its own and without labels.

Promises: the network and the evaluation are left alone; outputs of other samples, or of the same
ones in another order, are not compared; what is kept is bounded, however much is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from elesh.trainer.network.calling import main_output, tensors_in

_ROWS, _ELEMENTS = 4096, 2**20
"""So many samples' outputs are kept at most, evenly spread over the evaluation, and so many
numbers of them."""
_LOOKED_AT = 64
"""Numbers of every input tensor by which it is known again."""
_OTHERS = 16
"""Every sample is tried with the changes of so many samples."""
_TEMPERATURES = 1e-3, 1e3
"""Between which outputs are scaled until they are as sure as they are right."""
_BISECTIONS = 20


@dataclass(frozen=True)
class Answers:
    """Outputs of one evaluation."""

    logits: Tensor
    """[S, C] float32."""
    shown: tuple[Tensor, ...]
    """Some numbers of every input, in the order of the calls."""

    def beside(self, other: Answers) -> bool:
        """Whether both are of the same samples in the same order."""
        return (
            self.logits.shape == other.logits.shape
            and len(self.shown) == len(other.shown)
            and all(map(torch.equal, self.shown, other.shown))
        )


class Shown:
    """Hooks that see what a network is called with, and what it answers: samples are counted, those
    that copies of the network are called with, too; scripts pickle it as well, and such a one
    counts for itself."""

    _not_followed = True

    def __init__(self, model: nn.Module) -> None:
        self._shapes = _shapes(model)
        self.count = 0
        self.of_before = False
        """Whether it was called with parameters of other shapes than it had."""
        self._shown: list[Tensor] = []
        self._parts: list[Tensor] = []
        self._every, self._seen = 1, 0
        self._sound = True

    @classmethod
    @contextmanager
    def by(cls, model: nn.Module) -> Iterator[Self]:
        """What the network is shown in the block."""
        seen = cls(model)
        with (
            model.register_forward_pre_hook(seen._called, with_kwargs=True),
            model.register_forward_hook(seen._answered),
        ):
            yield seen

    @property
    def answers(self) -> Answers | None:
        """The outputs; None where they are not one row of at least two finite numbers a sample."""
        if not self._sound or not self._parts:
            return None
        logits = torch.cat(self._parts)
        return Answers(logits, tuple(self._shown)) if bool(logits.isfinite().all()) else None

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.of_before |= _shapes(module) != self._shapes
        tensors = [x for x in tensors_in([*args, *kwargs.values()]) if x.ndim]
        self.count += max(map(len, tensors), default=0)
        for x in tensors if self._sound else ():
            flat = x.detach().reshape(-1)
            self._shown.append(flat[:: max(1, len(flat) // _LOOKED_AT)].cpu())

    def _answered(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._sound:
            return
        found = main_output(output) if tensors_in(output) else None
        width = found.shape[1] if found is not None and found.ndim == 2 else 0
        self._sound = width > 1 and (not self._parts or self._parts[0].shape[1] == width)
        if found is None or not self._sound:
            self._parts, self._shown = [], []
            return
        first = -self._seen % self._every
        self._seen += len(found)
        self._parts.append(found.detach()[first :: self._every].float().cpu())
        while sum(map(len, self._parts)) > min(_ROWS, max(_ELEMENTS // width, 1)):
            self._parts, self._every = [torch.cat(self._parts)[::2]], 2 * self._every

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in model.parameters()]


@dataclass(frozen=True)
class Moved:
    """What a change of a network did to its answers."""

    drop: float
    """Expected drop of accuracy, on these samples and others of their kind."""
    error: float
    """Its standard error, as these samples are some of many."""
    share: float
    """Of these samples, whose answer is another one."""


def moved(before: Answers | None, now: Answers | None, accuracy: float) -> Moved | None:
    """What a change costs, by the outputs of the same samples before and after it.

    How often each class is right is told by the outputs before: their softmax, at the temperature
    at which it is right as often as the network is (Guo et al. 2017, "On Calibration of Modern
    Neural Networks", section 4). The drop is what the answers lose by that. Each sample is tried
    with its own change, which tells without bias, and with those of others, which tells with less
    noise: how many are near to another answer, and how far changes go, takes few samples to know.
    The mean of both counts. Outputs that only shrink or grow answer the same.

    Args:
        accuracy: of the network before.

    Returns:
        None where the two cannot be compared.
    """
    if before is None or now is None or not before.beside(now) or not 0 <= accuracy <= 1:
        return None
    logits, change = before.logits, _as_sure(now.logits, before.logits) - before.logits
    right, count = _calibrated(logits, accuracy), len(logits)
    first, answers = logits.argmax(1), (logits + change).argmax(1)
    own = _of(right, first) - _of(right, answers)
    steps = range(0, count, max(1, count // _OTHERS))
    others = [_of(right, (logits + change.roll(step, 0)).argmax(1)).mean() for step in steps]
    drop = (own.mean() + _of(right, first).mean() - sum(others) / len(others)) / 2
    error = float(own.std(correction=0)) / (2 * math.sqrt(count))
    return Moved(float(drop), error, float((answers != first).double().mean()))


def _as_sure(logits: Tensor, before: Tensor) -> Tensor:
    """The outputs by a factor, nearest to what they were."""
    now, then = (x - x.mean(1, keepdim=True) for x in (logits, before))
    size = float(now.square().sum())
    factor = float((now * then).sum()) / size if size else 0.0
    return logits * factor if factor > 0 else logits


def _calibrated(logits: Tensor, accuracy: float) -> Tensor:
    """[S, C] probabilities of classes that are right as often as the network is."""
    low, high = map(math.log, _TEMPERATURES)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        sure = float((logits / math.exp(middle)).softmax(1).amax(1).mean())
        low, high = (middle, high) if sure > accuracy else (low, middle)
    return (logits / math.exp(low)).softmax(1).double()


def _of(right: Tensor, answers: Tensor) -> Tensor:
    return right.gather(1, answers[:, None])[:, 0]

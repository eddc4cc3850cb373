"""Further evidence on a cut beside the accuracy and loss of the caller's ``evaluate``: the
network's answers meanwhile, the loss of Elesh's own samples, and the time of a call.

Half a point of accuracy is less than one of a hundred validation samples, but outputs say more than
whether an answer is right: how near it was to another one, and how far a cut moves it. The caller's
own ``evaluate`` shows both, without a pass of its own and without labels. And what it says may be
constant, saturated or made up.

Promises: the network and the evaluation are left as they were, random states included; outputs of
other samples, or of the same ones in another order, are not compared, and what is kept of them is
bounded, however much is evaluated; a rise of the loss that chance explains is none; labels that are
no classes of the network's outputs, as its answers show as well, say nothing, and nothing is made
of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from elesh.observe import span
from elesh.program.program import IGNORED_LABEL
from elesh.trainer.calibration.losses import class_axis, class_labels
from elesh.trainer.network.calling import (
    call,
    device_of,
    example_of,
    first_samples,
    main_output,
    map_tensors,
    tensors_in,
    timed_call,
)
from elesh.trainer.network.state import Uncompiled, evaluated, preserve_state, preserved
from leyline import InvalidField

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
        self._shapes = [parameter.shape for parameter in model.parameters()]
        self._weights = list(map(_some, model.parameters()))
        self.count = 0
        self.of_before = False
        """Whether it was called with parameters of other shapes than it had."""
        self.as_it_is = False
        """Whether it was called, first with the parameters that it had."""
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
        if not self.count:
            own = list(map(_some, module.parameters()))
            self.as_it_is = len(own) == len(self._weights) and all(
                map(torch.equal, own, self._weights)
            )
        self.of_before |= [parameter.shape for parameter in module.parameters()] != self._shapes
        tensors = [x for x in tensors_in([*args, *kwargs.values()]) if x.ndim]
        self.count += max(map(len, tensors), default=0)
        for x in tensors if self._sound else ():
            self._shown.append(_some(x))

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


def _some(x: Tensor) -> Tensor:
    """A copy of some numbers of a tensor, by which it is known again."""
    flat = x.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _LOOKED_AT)].to("cpu", copy=True)


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
    logits = before.logits
    outputs, then = (x - x.mean(1, keepdim=True) for x in (now.logits, logits))
    size = float(outputs.square().sum())
    factor = float((outputs * then).sum()) / size if size else 0.0
    # The outputs by the factor that brings them nearest to what they were.
    change = (now.logits * factor if factor > 0 else now.logits) - logits
    right, count = _calibrated(logits, accuracy), len(logits)
    each = torch.arange(count)
    first, answers = logits.argmax(1), (logits + change).argmax(1)
    own = right[each, first] - right[each, answers]
    steps = range(0, count, max(1, count // _OTHERS))
    others = [right[each, (logits + change.roll(step, 0)).argmax(1)].mean() for step in steps]
    drop = (own.mean() + right[each, first].mean() - sum(others) / len(others)) / 2
    error = float(own.std(correction=0)) / (2 * math.sqrt(count))
    return Moved(float(drop), error, float((answers != first).double().mean()))


def _calibrated(logits: Tensor, accuracy: float) -> Tensor:
    """[S, C] probabilities of classes that are right as often as the network is."""
    low, high = map(math.log, _TEMPERATURES)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        sure = float((logits / math.exp(middle)).softmax(1).amax(1).mean())
        low, high = (middle, high) if sure > accuracy else (low, middle)
    return (logits / math.exp(low)).softmax(1).double()


_ERRORS = 2.0
"""Standard errors of the mean rise, over samples, by which it is more than chance."""
_REMEMBERED = 32
"""Samples by which a network is known to answer as another one does."""
_ROUNDING = 1e-3
"""Of the outputs' deviation: what mask and cut may differ by, added up in another order."""


class OwnSamples:
    """The cross-entropy of some samples, before a cut and under its mask.

    Args:
        batches: (inputs, labels) pairs, at least one; labels are classes or shares of them.
        limit: by which it may rise, in nats a label.
    """

    def __init__(self, model: nn.Module, batches: Sequence[tuple[Any, Any]], limit: float) -> None:
        self._model, self._batches, self._limit = model, batches, limit
        self._before: Tensor | None = None
        self._even_odds = 0.0
        """The loss of a network that finds all classes as likely."""
        self._answers: list[Tensor] = []

    def before(self) -> None:
        """Measure the network as it is. Outputs that are no logits (an embedding, trained by
        another loss) mostly have a cross-entropy above that of even odds, which says nothing."""
        found = self._losses()
        if found is None or not bool(torch.isfinite(found).all()):
            return
        if float(found.median()) < self._even_odds:
            self._before = found

    def rose(self) -> str:
        """Why the network, as it is now, is not good enough; empty if it is."""
        if self._before is None:
            return ""
        now = self._losses()
        if now is None or not bool(torch.isfinite(now).all()):
            return "outputs on Elesh's own samples are not finite,"
        rises = now - self._before
        count, mean = len(rises), float(rises.mean())
        error = float(rises.std()) / math.sqrt(count) if count > 1 else math.inf
        if not mean - _ERRORS * error > 0 or mean <= self._limit:
            return ""
        was = float(self._before.mean())
        return (
            f"loss of {count} of Elesh's own samples {was:.4g} rose to {was + mean:.4g}, more than "
            f"{self._limit:g},"
        )

    def answers(self) -> Answers | None:
        """What the network, as it is now, answers to the samples; None as of :class:`Shown`."""
        device = device_of(self._model)
        with (
            preserve_state(self._model, 0),
            torch.no_grad(),
            Shown.by(self._model) as shown,
        ):
            for inputs, _ in self._batches:
                call(self._model, map_tensors(lambda x: x.to(device), inputs))
        return shown.answers

    def remember(self, *, comparable: bool) -> None:
        """Keep what the network, as it is now, answers to a few of the samples; nothing where
        several processes train, each of which would judge by its own.

        Args:
            comparable: whether the cut network may be judged by whether it answers the same; else
                nothing is kept.
        """
        alone = not (dist.is_available() and dist.is_initialized())
        self._answers = self._outputs() if comparable and alone else []

    def as_remembered(self) -> bool:
        """Whether it still answers the same, but for rounding; not if nothing was kept."""
        if not self._answers:
            return False
        with span("compare cut"):
            now, then = self._outputs(), self._answers
            return len(now) == len(then) and all(map(_same, now, then))

    def _outputs(self) -> list[Tensor]:
        """What the network answers to a few of the samples."""
        device, (inputs, _) = device_of(self._model), self._batches[0]
        with preserve_state(self._model, 0), torch.no_grad():
            few = first_samples(inputs, _REMEMBERED)
            output = call(self._model, map_tensors(lambda x: x.to(device), few))
            return [x.double() for x in tensors_in(output)]

    def _losses(self) -> Tensor | None:
        """[N] float64, of samples with a label that counts; None where labels are no classes."""
        device, parts = device_of(self._model), list[Tensor]()
        with span("own samples"), preserve_state(self._model, 0), torch.no_grad():
            for inputs, labels in self._batches:
                output = call(self._model, map_tensors(lambda x: x.to(device), inputs))
                try:
                    logits = main_output(output).float()
                    parts.append(_each(logits, labels))
                except InvalidField:
                    return None
                self._even_odds = math.log(logits.shape[class_axis(logits, labels)])
        found = torch.cat(parts) if parts else torch.zeros(0)
        return found if len(found) else None


def _same(now: Tensor, then: Tensor) -> bool:
    if now.shape != then.shape:
        return False
    return bool((now - then).abs().max() <= _ROUNDING * then.std(correction=0))


def _each(logits: Tensor, labels: Any) -> Tensor:
    """[N] the mean cross-entropy of a sample's labels that count."""
    labels = class_labels(logits, labels.to(logits.device) if hasattr(labels, "to") else labels)
    axis = class_axis(logits, labels)
    shares = labels.is_floating_point()
    counts = labels.sum(axis) > 0 if shares else labels != IGNORED_LABEL
    target = labels.to(logits.dtype).movedim(axis, 1) if shares else labels
    losses = functional.cross_entropy(logits.movedim(axis, 1), target, reduction="none")
    losses, counts = losses.reshape(len(losses), -1), counts.reshape(len(losses), -1)
    known = counts.any(1)
    means: Tensor = (losses * counts).sum(1)[known] / counts.sum(1)[known]
    means = means.double().cpu()
    return means


_CALLS = 3
"""Of each rank of several: a call may wait for the others."""
_SECONDS, _MOST_CALLS = 0.015, 30
"""Of a process alone: at most so long and so often, as long as it gets quicker by this share."""
_QUICKER = 0.02


def call_seconds(network: nn.Module) -> float | None:
    """Seconds of a call in evaluation mode with the batch that the network was measured with: those
    that the thread computed (others on the machine change them little), on other devices those by
    the clock. The quickest call counts, until three more are no quicker. None if there is no such
    batch, or it does not run (any more). Nothing of the network changes."""
    inputs = example_of(network)
    if inputs is None:
        return None
    try:
        with preserved(network), Uncompiled(network), torch.no_grad():
            evaluated(network)
            clock = time.thread_time if device_of(network).type == "cpu" else time.perf_counter
            timed = timed_call(network, inputs, clock)
            best = timed(_CALLS)
            if dist.is_available() and dist.is_initialized():
                return best
            rounds = min(int(_SECONDS / max(best, 1e-7)), _MOST_CALLS) // _CALLS
            for _ in range(rounds - 1):
                before, best = best, min(best, timed(_CALLS))
                if best > (1 - _QUICKER) * before:
                    break
            return best
    except Exception:  # it is a figure for people: nothing hangs on it
        return None

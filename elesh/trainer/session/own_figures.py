"""What Elesh itself measures of a network around a cut, beside the caller's ``evaluate``, whose
accuracy may be constant, saturated or made up: the loss of its own samples, and the time of a call.

Promises: the network is left as it was, random states included; a rise that chance explains is
none; labels that are no classes of the network's outputs, as its answers show as well, say nothing,
and nothing is made of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

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
    main_output,
    map_tensors,
    timed_call,
)
from elesh.trainer.network.state import preserve_state
from leyline import InvalidField

_ERRORS = 2.0
"""Standard errors of the mean rise, over samples, by which it is more than chance."""


class OwnSamples:
    """The cross-entropy of some samples, before a cut and under its mask.

    Args:
        batches: (inputs, labels) pairs; labels are classes or shares of them.
        limit: by which it may rise, in nats a label.
    """

    def __init__(self, model: nn.Module, batches: Sequence[tuple[Any, Any]], limit: float) -> None:
        self._model, self._batches, self._limit = model, batches, limit
        self._before: Tensor | None = None
        self._even_odds = 0.0
        """The loss of a network that finds all classes as likely."""

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
        with preserve_state(network, 0), torch.no_grad():
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

"""Measures how well a network does, and decides whether a cut may stay.

Promises: labels that do not belong to the inputs are noticed before anything is cut; a cut stays
only if the accuracy that was measured after it, weights as they then are, is within the limit; the
network is left as it was found (training flags, buffers, random generators).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from elesh.program.measure import judged
from elesh.safety.measured_gates import Outcomes, accuracy_drop, loss_increase
from elesh.trainer import Evaluation
from elesh.trainer.calibration.losses import Loss, class_labels
from elesh.trainer.network.calling import call, device_of, main_output, map_tensors
from elesh.trainer.network.state import preserve_state
from leyline import InvalidField

from .samples import Batch

Evaluate = Callable[[], Evaluation | tuple[float, float]]
"""The user's own evaluation of the network: accuracy (0 to 1) and loss."""
_CONFIDENCE, _DRAWS = 0.95, 1000
_ERRORS = 3.0
"""Standard errors beyond which a difference is no chance."""
_SLACK = 0.05
"""Training samples (augmented, perhaps) need not be exactly as easy as validation data."""


def require_no_arguments(evaluate: Evaluate) -> None:
    """Refuse an ``evaluate`` that cannot be called as it will be.

    Raises:
        InvalidField: if it has to be given something, such as the network.
    """
    try:
        inspect.signature(evaluate).bind()
    except TypeError as error:
        hint = "evaluate=lambda: evaluate(model)"
        raise InvalidField("evaluate", "to take nothing", error, hint=hint) from None
    except ValueError:  # Some that are written in C have no signature.
        pass


def evaluated(found: Evaluation | tuple[float, float]) -> Evaluation:
    """What the user's own evaluation returned.

    Raises:
        InvalidField: if it is neither an Evaluation nor a pair of numbers.
    """
    if isinstance(found, Evaluation):
        return found
    try:
        accuracy, loss = map(float, found)
    except (TypeError, ValueError):
        expected = "an elesh.Evaluation or a pair (accuracy, loss)"
        raise InvalidField("evaluate()", expected, found) from None
    return Evaluation(accuracy, loss)


@dataclass(frozen=True)
class Limits:
    """What all cuts together may cost, against the network as it was given."""

    accuracy_drop: float
    loss_increase: float | None = None


class Judge(Protocol):
    """Says how the network does now, and whether that is good enough."""

    before: Evaluation
    """Of the network as it was given."""
    data: str
    """What it is measured on, for people."""

    def now(self) -> tuple[Evaluation, str]:
        """How the network does, and why that is not good enough; empty where it is."""


@dataclass
class Validation:
    """Judges by the user's own evaluation."""

    model: nn.Module
    evaluate: Evaluate
    limits: Limits
    data: str = "evaluate()"
    before: Evaluation = field(init=False)

    def __post_init__(self) -> None:
        self.before = self._measured()
        if not math.isfinite(self.before.accuracy):
            raise InvalidField("evaluate()", "a finite accuracy", self.before.accuracy)

    def now(self) -> tuple[Evaluation, str]:
        """By the figures as they are: the user's data is as large as it is meant to be."""
        found = self._measured()
        drop = self.before.accuracy - found.accuracy
        return found, _fault(self.limits, drop, found.loss - self.before.loss, "")

    def _measured(self) -> Evaluation:
        flags = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            found = self.evaluate()
        finally:
            for module, training in flags:
                module.training = training
        return evaluated(found)


@dataclass
class HeldOut:
    """Judges by samples that nothing was measured on, each against itself before the cuts."""

    model: nn.Module
    batches: Sequence[Batch]
    limits: Limits
    loss: Loss | None = None
    data: str = field(init=False)
    before: Evaluation = field(init=False)

    def __post_init__(self) -> None:
        try:
            self.outcomes = outcomes(self.model, self.batches, self.loss)
        except Exception as error:
            if self.loss is None:
                raise
            hint = (
                "holding out a fifth of the samples may have separated some that belong together "
            )
            hint += "(pairs): pass evaluate, and nothing is held out"
            raise InvalidField("loss", "to take held-out samples", error, hint=hint) from error
        self.before = _evaluation(self.outcomes)
        self.data = f"{len(self.outcomes.losses)} held-out samples"

    def require_enough(self) -> None:
        """Raise an InvalidField if the limit is one that so few samples can never prove."""
        samples, limit = len(self.outcomes.losses), self.limits.accuracy_drop
        unchanged = accuracy_drop(self.outcomes, self.outcomes, _CONFIDENCE, _DRAWS)[2]
        if unchanged > limit:
            hint = f"{samples} held-out samples cannot prove a drop below {unchanged:.3f}: "
            hint += "pass more batches, or evaluate"
            raise InvalidField("max_accuracy_drop", f"at least {unchanged:.3f}", limit, hint=hint)

    def now(self) -> tuple[Evaluation, str]:
        """By the upper confidence bound: few samples prove little."""
        after = outcomes(self.model, self.batches, self.loss)
        if not np.isfinite(after.losses).all():
            return _evaluation(after), "outputs are not finite"
        drop = -math.inf
        if len(after.correct):
            drop = accuracy_drop(self.outcomes, after, _CONFIDENCE, _DRAWS)[2]
        increase = loss_increase(self.outcomes, after, _CONFIDENCE, _DRAWS)[2]
        return _evaluation(after), _fault(self.limits, drop, increase, " (95% bound)")


def _evaluation(found: Outcomes) -> Evaluation:
    return Evaluation(found.accuracy if len(found.correct) else math.nan, found.loss)


def _fault(limits: Limits, drop: float, increase: float, how: str) -> str:
    if not drop <= limits.accuracy_drop:
        return f"accuracy falls by {drop:.4f}{how}, limit {limits.accuracy_drop:g}"
    if limits.loss_increase is not None and not increase <= limits.loss_increase:
        return f"loss increases by {increase:.4g}{how}, limit {limits.loss_increase:g}"
    return ""


def outcomes(model: nn.Module, batches: Sequence[Batch], loss: Loss | None) -> Outcomes:
    """Losses of all samples and, for classes, which answers are right.

    Args:
        loss: one's own; nothing is then known to be right or wrong.

    Raises:
        NotFinite, ShapeMismatch, InvalidField: if outputs or labels are not those of a classifier.
    """
    seen, device = Seen(loss), device_of(model)
    with preserve_state(model, 0), torch.no_grad():
        for inputs, labels in batches:
            output = call(model, map_tensors(lambda x: x.to(device), inputs))
            seen.add(output, map_tensors(lambda x: x.to(device), labels))
    return seen.outcomes


@dataclass
class Seen:
    """What a network answered to some batches, one after another."""

    loss: Loss | None = None
    _parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def add(self, output: Any, labels: Any) -> None:
        """Take in what the model returned for a batch, and the labels, on its device.

        Raises:
            NotFinite, ShapeMismatch, InvalidField: if they are not those of a classifier.
        """
        first = sum(len(part[0]) for part in self._parts)
        if self.loss is not None:
            nothing = np.zeros(0, dtype=np.int64)
            losses = _each(self.loss(output, labels))
            self._parts.append((losses, nothing.astype(np.bool_), nothing, nothing))
        else:
            logits = main_output(output).detach().float()
            labels = class_labels(logits, labels)
            self._parts.append(judged(logits.cpu(), labels.cpu(), first))

    @property
    def outcomes(self) -> Outcomes:
        """Of all samples."""
        return Outcomes(*(np.concatenate(columns) for columns in zip(*self._parts, strict=True)))


def _each(losses: torch.Tensor) -> np.ndarray:
    """[N] one loss a sample (or one for all of them)."""
    values = losses.detach().double().cpu()
    return values.reshape(len(values), -1).sum(1).numpy() if values.ndim else values[None].numpy()


def require_labels_fit(found: Outcomes, evaluation: Evaluation | None) -> None:
    """That labels belong to their inputs: a network that has learned them does better than one that
    always answers the most frequent class, and about as well as the user's own evaluation says.

    Args:
        found: of the network as it was given.
        evaluation: what the user's own evaluation said, if there is one.

    Raises:
        InvalidField: if it does not. Nothing is measured on such labels.
    """
    where, count = "batches: labels", len(found.labels)
    if not count:
        raise InvalidField(where, "at least one that is not ignored", "none")
    if (only := found.labels.min()) == found.labels.max():
        hint = "is the data sorted by class? shuffle it, then take several hundred samples"
        raise InvalidField(where, "at least two classes", f"only class {only}", hint=hint)
    accuracy = found.accuracy
    chance = float(np.bincount(found.labels).max()) / count
    error = math.sqrt(max(accuracy * (1 - accuracy), 1 / count) / count)
    shown = f"{accuracy:.1%} right of {count}"
    hint = "do the labels belong to these inputs, in this order? is the network trained?"
    if accuracy - _ERRORS * error <= chance:
        expected = f"labels that the network predicts better than chance ({chance:.1%} right)"
        raise InvalidField(where, expected, shown, hint=hint)
    if evaluation is not None and accuracy + _ERRORS * error + _SLACK < evaluation.accuracy:
        expected = f"about the accuracy that evaluate() returns ({evaluation.accuracy:.1%})"
        raise InvalidField(where, expected, shown, hint=hint)

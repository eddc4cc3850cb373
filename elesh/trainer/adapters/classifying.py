"""Accuracy and loss of a classifier, and whether its labels can show a difference."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn

from elesh.trainer.calibration.losses import class_axis
from elesh.trainer.network.calling import Pair, call, device_of, main_output, map_tensors
from elesh.trainer.session.apply import Evaluation
from leyline import InvalidField


def require_several(name: str, classes: Collection[int]) -> None:
    """Refuse labels that are all of one class: any cut may then look harmless.

    Raises:
        InvalidField: naming it.
    """
    if len(classes) < 2:
        found = f"only class {next(iter(classes))}" if classes else "no label that counts"
        hint = "is the data sorted by class? shuffle it, then take several hundred samples"
        raise InvalidField(f"{name}: labels", "at least two classes", found, hint=hint)


@torch.no_grad()
def classification(network: nn.Module, batches: Iterable[Pair]) -> Evaluation:
    """Accuracy and mean cross-entropy of logits [N, classes], or of each position of sequences
    [N, T, classes] and images [N, classes, H, W]; negative labels are not counted."""
    device, right, loss, count = device_of(network), 0, 0.0, 0
    for inputs, labels in batches:
        logits = main_output(call(network, map_tensors(lambda x: x.to(device), inputs))).float()
        labels = labels.to(device)
        logits = logits.movedim(class_axis(logits, labels), 1)
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        counted = labels >= 0
        right += int(((logits.argmax(1) == labels) & counted).sum())
        count += int(counted.sum())
    return Evaluation(right / max(count, 1), loss / max(count, 1))

"""Measures the importance of attention heads: masks each in turn on the samples where it matters
most.

Promises: masking costs no more than ``PASSES`` forward passes over all samples, or one
sample a head; afterwards no mask is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from elesh.trainer.network.calling import (
    Batches,
    Inputs,
    batch_size,
    call,
    main_output,
    map_tensors,
    packed_in,
    tensors_in,
)
from elesh.trainer.surgery.masks import Masks
from leyline import PrunedArchitecture, PruningGroup

from .losses import margins

PASSES = 1
"""What masking all heads one at a time may cost together, in forward passes over all samples."""
_ROWS = 16
"""So many samples run at once at most, where no batch has more: copies of a few, each with another
head masked, cost less together than by themselves."""
_NUMBERS, _TOKENS = 1 << 18, 1 << 10
"""And so many numbers, or tokens, of which each may come out as a whole dictionary."""
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def most_doubtful(known: Doubles, heads: int) -> Ints:
    """The samples of the smallest margins, rising, as many as can be afforded for each head.

    That is where a movement of the outputs changes the loss in a way that no derivative tells;
    far from the border the loss is flat or a straight line.

    Args:
        known: [N] the samples' margins.
    """
    count = min(len(known), max(1, PASSES * len(known) // heads))
    return np.sort(np.argsort(np.abs(known), kind="stable")[:count])


def masked_loss_increases(
    model: nn.Module,
    architecture: PrunedArchitecture,
    groups: Sequence[PruningGroup],
    batches: Batches,
    rows: Ints,
    known: Doubles,
) -> dict[str, Doubles]:
    """[n, H] by group: by how much the loss of each sample rises when a head is masked, in nats.

    Args:
        batches: with one label a sample.
        rows: [n] numbers of the samples, counted through all batches.
        known: [n] their margins with nothing masked.
    """
    parts = _parts(batches, rows)
    plain = np.logaddexp(0, known)
    heads = [(group.name, head) for group in groups for head in range(group.size)]
    several = 1
    if len(parts) == 1 and not any(group.norms for group in groups):
        at_once = _rows(parts[0])
        largest = max(batch_size(inputs) for inputs, _ in batches) if at_once else 0
        several = max(1, max(largest, at_once) // max(1, len(rows)))
    masks, found = Masks(model), dict[tuple[str, int], Doubles]()
    try:
        for tried in _batched(heads, several):
            if len(tried) == 1:
                masks.set(architecture, {name: [head] for name, head in tried})
            else:
                masks.set_parts(architecture, [(name, [head]) for name, head in tried])
            losses = _losses(model, [_repeated(part, len(tried)) for part in parts])
            found |= zip(tried, losses.reshape(len(tried), -1) - plain, strict=True)
    finally:
        masks.clear()
    return {g.name: np.stack([found[g.name, h] for h in range(g.size)], 1) for g in groups}


def _batched(heads: Sequence[tuple[str, int]], size: int) -> Iterator[list[tuple[str, int]]]:
    left = iter(heads)
    while found := list(islice(left, size)):
        yield found


def _rows(part: Any) -> int:
    """How many samples like these run at once, each with a head of its own masked, where no batch
    has more; 0 where it cannot be told which tensors count samples."""
    size, inputs, labels = batch_size(part[0]), tensors_in(part[0]), tensors_in(part[1])
    if packed_in(part) is not None or not labels or {len(inputs[0]), len(labels[0])} != {size}:
        return 0
    elements = inputs[0].numel() // size
    return min(_ROWS, (_NUMBERS if inputs[0].is_floating_point() else _TOKENS) // elements)


def _repeated(part: Any, times: int) -> Any:
    """A batch so many times over."""
    size = batch_size(part[0])

    def repeated(tensor: Tensor) -> Tensor:
        alike = tensor.ndim and len(tensor) == size
        return torch.cat([tensor] * times) if alike else tensor

    return part if times == 1 else map_tensors(repeated, part)


def _parts(batches: Batches, rows: Ints) -> list[tuple[Inputs, Any]]:
    """The batches, reduced to the samples ``rows``; what is left of several is one batch, where it
    fits: calls of a few samples cost as much as those of many."""
    parts: list[tuple[Inputs, Any]] = []
    start, largest = 0, max((batch_size(inputs) for inputs, _ in batches), default=0)
    for inputs, labels in batches:
        size = batch_size(inputs)
        own = torch.from_numpy(rows[(rows >= start) & (rows < start + size)] - start)
        start += size

        def taken(tensor: Tensor, own: Tensor = own, size: int = size) -> Tensor:
            whole = tensor.ndim == 0 or tensor.shape[0] != size
            return tensor if whole else tensor[own.to(tensor.device)]

        if len(own):
            part = map_tensors(taken, inputs), map_tensors(taken, labels)
            joined = _joined(parts[-1], part, largest) if parts else None
            parts[-1:] = [*parts[-1:], part] if joined is None else [joined]
    return parts


def _joined(one: Any, other: Any, largest: int) -> Any:
    """Two batches as one; None where they are not alike but for their sizes, or too large."""
    ours, theirs = tensors_in(one), tensors_in(other)
    count, more = batch_size(one[0]), batch_size(other[0])
    alike = all(
        a.ndim and len(a) == count and len(b) == more and a.shape[1:] == b.shape[1:]
        for a, b in zip(ours, theirs, strict=False)
    )
    if not alike or count + more > largest or _frame(one) != _frame(other):
        return None
    joined = (torch.cat(pair) for pair in zip(ours, theirs, strict=True))
    return map_tensors(lambda _: next(joined), one)


def _frame(batch: Any) -> str:
    """What a batch has beside its tensors."""
    return repr(map_tensors(lambda tensor: tensor.new_zeros(()), batch))


def _losses(model: nn.Module, batches: Batches) -> Doubles:
    """[n]: the cross-entropy of every sample."""
    found = [np.zeros(0)]
    with torch.no_grad():
        for inputs, labels in batches:
            odds = margins(main_output(call(model, inputs)).float(), labels)
            found.append(np.logaddexp(0, odds.double().cpu().numpy()))
    return np.concatenate(found)

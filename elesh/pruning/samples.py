"""The samples for pruning: each counted once, some of them held out.

Promises: the same batches give the same split; a sample that comes twice is taken once, so that no
copy of it is judged by what another copy has taught; a few samples with a little noise on them are
not taken for many; reading a loader leaves it, and all random states, as they were.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from elesh.trainer.calibration.given import as_taken
from elesh.trainer.network.calling import (
    Inputs,
    batch_size,
    call,
    device_of,
    first_samples,
    joined,
    main_output,
    map_tensors,
    tensors_in,
)
from elesh.trainer.network.calling import Pair as Batch
from elesh.trainer.network.state import preserve_state, preserved
from leyline import InvalidField

__all__ = ["LEAST", "MOST", "Batch", "Samples", "divided", "pair", "require_no_copies"]

LEAST = 32
"""So many different samples are needed to measure anything, and as many again to hold out."""
MOST = 1024
"""So many different samples are taken at most: whole data sets may be passed."""
_HELD_OUT = 5
"""One sample in so many is held out."""
_CLOSE, _POSITIONS = 0.01, 1024
"""Samples are copies but for a little noise if they are nearer to each other than this share of how
far samples lie apart, by so many of their numbers."""
_FAR = (2.0, 4.0)
"""Of how far samples lie apart: noise by which other classes are looked for."""
_TABLE = 2
"""Axes of a table's rows."""
_ENOUGH = 64
"""Of few samples, rather so many are held out, but never more than half."""


@dataclass(frozen=True)
class Samples:
    """Batches of different samples."""

    calibration: tuple[Batch, ...]
    """What the network is measured on."""
    held_out: tuple[Batch, ...]
    """What cuts are judged by; none of the calibration."""
    different: int
    """How many there are of both."""
    repeated: int
    """How many more came, as copies of these."""

    def taken_by(self, model: nn.Module) -> Samples:
        """The same in the network's own dtype, where it takes no other."""
        calibration = tuple(as_taken(model, self.calibration))
        return replace(
            self, calibration=calibration, held_out=tuple(as_taken(model, self.held_out))
        )


def divided(batches: Iterable[Batch], *, hold_out: bool, measured: int | None = None) -> Samples:
    """The batches without copies, and, where that is asked for, a part of them held out.

    Args:
        hold_out: a fifth of them.
        measured: so many samples are measured on, unless each is but a row of numbers: of more,
            as many are held out beside them.

    Reading ends with the batch that has the last sample needed, or where :data:`MOST` in a row are
    copies.

    Raises:
        InvalidField: if there are too few different samples, or a batch is no pair.
    """
    with preserved(nn.Module(), batches):
        found, distinct, total = _read(_apart_from_training(batches))
    least = 2 * LEAST if hold_out else LEAST
    count = min(distinct, MOST)
    if count < least:
        copies = f" ({total} with copies)" if total > count else ""
        expected = f"at least {least} different samples"
        raise InvalidField("batches", expected, f"{count}{copies}")
    if (apart := _apart([(inputs, size, new) for inputs, _, size, new in found], least)) < least:
        copies = f"{apart} ({count} with copies that differ by less than {_CLOSE:.0%})"
        raise InvalidField("batches", f"at least {least} different samples", copies)
    every = max(2, min(_HELD_OUT, count // _ENOUGH)) if hold_out else 0
    if every and measured is not None and not _are_rows(found[0][0]):
        spare = max(count / every, min(measured, count - measured))
        every = min(every, max(2, math.ceil(count / spare)))
    calibration: list[Batch] = []
    held_out: list[Batch] = []
    place = 0
    for inputs, labels, size, new in found:
        kept = [row for n, row in enumerate(new, place) if not every or n % every]
        out = [row for n, row in enumerate(new, place) if every and n % every == 0]
        place += len(new)
        for rows, part in ((kept, calibration), (out, held_out)):
            if rows:
                part.append((_rows(inputs, rows, size), _rows(labels, rows, size)))
    return Samples(tuple(calibration), tuple(held_out), count, total - distinct)


def _are_rows(inputs: Inputs) -> bool:
    """Whether a sample is a row of a table: numbers, one behind the other."""
    return all(x.is_floating_point() and x.ndim <= _TABLE for x in tensors_in(inputs))


def _apart_from_training(batches: Iterable[Batch]) -> Iterable[Batch]:
    """A loader with workers of its own: those that stay draw numbers for the training's epochs."""
    if not isinstance(batches, DataLoader):
        return batches
    apart = copy.copy(batches)
    vars(apart)["_iterator"] = None
    return apart


def _read(
    batches: Iterable[Batch],
) -> tuple[list[tuple[Inputs, Any, int, list[int]]], int, int]:
    """Batches (inputs, labels, size, rows of new samples) up to :data:`MOST` different samples; how
    many different ones there were, and how many of all."""
    found: list[tuple[Inputs, Any, int, list[int]]] = []
    seen, total, in_vain = set[bytes](), 0, 0
    for number, batch in enumerate(batches):
        inputs, labels = pair(f"batches[{number}]", batch)
        size = batch_size(inputs)
        new = [row for row in range(size) if not _known(inputs, row, size, seen)]
        total += size
        in_vain = 0 if new else in_vain + size
        if new:
            new = new[: MOST - sum(len(rows) for *_, rows in found)]
            found.append((inputs, labels, size, new))
        if len(seen) >= MOST or in_vain >= MOST:  # loaders of training may never end
            break
    return found, len(seen), total


def pair(name: str, batch: Any) -> Batch:
    """A batch as inputs and labels.

    Raises:
        InvalidField: by ``name``, if it is something else (a single sample of a data set), or its
            tensors are not dense.
    """
    if isinstance(batch, Sequence) and len(batch) == 2:
        if isinstance(batch[1], (int, float)) or getattr(batch[1], "ndim", None) == 0:
            hint = "give the data set in batches: torch.utils.data.DataLoader(data, batch_size=64)"
            raise InvalidField(name, "a batch of samples", "one sample, with one label", hint=hint)
        for tensor in tensors_in(batch[0]):
            if tensor.layout is not torch.strided or tensor.is_nested:
                kind = "nested" if tensor.is_nested else str(tensor.layout)
                hint = "give dense ones: tensor.to_dense(), or padded samples with a mask"
                raise InvalidField(name, "dense tensors", kind, hint=hint)
        return batch[0], batch[1]
    hint = "for loaders of dictionaries: elesh.trainer.adapters.hugging_face.labelled"
    raise InvalidField(name, "a pair (inputs, labels)", batch, hint=hint)


def _known(inputs: Inputs, row: int, size: int, seen: set[bytes]) -> bool:
    """Whether a sample came before; it has then been seen."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors_in(inputs):
        if tensor.ndim and len(tensor) == size:
            own = tensor[row].detach().cpu().contiguous()
            digest.update(own.view(-1).view(torch.uint8).numpy().tobytes())
    key = digest.digest()
    known = key in seen
    seen.add(key)
    return known


def require_no_copies(model: nn.Module, samples: Samples) -> None:
    """That samples are not a few with noise on them, however much, as far as that can be seen: they
    fall into fewer clusters than the network tells classes apart, every cluster apart from the
    others and of one label, and far from the samples the network answers with other classes. One
    that does not has learned no others: its head has more outputs than there are classes.

    Raises:
        InvalidField: if they do.
    """
    batches = (*samples.calibration, *samples.held_out)
    labels = [labels for _, labels in batches]
    numbers = _numbers([(inputs, batch_size(inputs), None) for inputs, _ in batches])
    if numbers is None or not all(isinstance(x, Tensor) and x.ndim == 1 for x in labels):
        return
    with preserve_state(model, 0), torch.no_grad():
        device = device_of(model)
        logits = main_output(call(model, map_tensors(lambda x: x.to(device), batches[0][0])))
    known = torch.cat([x.cpu() for x in labels])
    if logits.ndim != 2 or known.is_floating_point() or len(known) != len(numbers):
        return
    classes = logits.shape[1]
    there = set(known.tolist())
    if (
        len(there) < classes
        and 0 < (clusters := _clusters(numbers, known)) < classes
        and _answers_others(model, batches, there)
    ):
        found = f"{len(numbers)} that look like {clusters} repeated with noise, or missing classes"
        hint = (
            "shuffle the data, then take several hundred samples of all classes; if there are no "
            "more classes, give the network's head as many outputs as there are classes"
        )
        expected = f"samples of more than {clusters} of {classes} classes"
        raise InvalidField("batches", expected, found, hint=hint)


def _answers_others(model: nn.Module, batches: Sequence[Batch], classes: set[int]) -> bool:
    """Whether the network answers with other classes than these where samples are moved by noise
    of twice and four times what they differ from each other by."""
    device, draw = device_of(model), torch.Generator().manual_seed(0)
    joint = map_tensors(lambda x: x.to(device), joined(batches)[0])
    several = batch_size(joint)

    def moved(x: Tensor, by: float) -> Tensor:
        if not x.is_floating_point() or not x.ndim or len(x) != several:
            return x
        noise = torch.randn(x.shape, generator=draw).to(x)
        return x + by * x.float().std(0, keepdim=True).to(x.dtype) * noise

    answers = list[Tensor]()
    with preserve_state(model, 0), torch.no_grad():
        for by in _FAR:
            far = map_tensors(functools.partial(moved, by=by), joint)
            answers.append(main_output(call(model, first_samples(far, _ENOUGH * 4))).argmax(1))
    others = [answer not in classes for answer in torch.cat(answers).tolist()]
    return sum(others) > len(others) * _CLOSE


def _clusters(numbers: Tensor, labels: Tensor) -> int:
    """Into how few clusters samples fall, each of one label, and its samples nearer to each other
    than half of how far clusters lie apart (single linkage); 0 where they do not."""
    far = torch.cdist(numbers, numbers)
    nearest, link = far[0].clone(), torch.zeros(len(far), dtype=torch.long)
    inside = torch.zeros(len(far), dtype=torch.bool)
    inside[0] = True
    edges = list[tuple[float, int, int]]()
    for _ in range(len(far) - 1):  # the shortest tree that holds all samples (Prim)
        new = int(nearest.masked_fill(inside, math.inf).argmin())
        edges.append((float(nearest[new]), int(link[new]), new))
        inside[new] = True
        nearer = far[new] < nearest
        link[nearer], nearest = new, torch.minimum(nearest, far[new])
    edges.sort()
    for count in range(2, LEAST):  # without its longest branches it falls into clusters
        cluster = _components(len(far), edges[: len(far) - count])
        same = cluster[:, None] == cluster[None]
        pure = not bool((same & (labels[:, None] != labels[None])).any())
        if pure and float(far[same].mean()) < float(far[~same].mean()) / 2:
            return count
    return 0


def _components(count: int, edges: Sequence[tuple[float, int, int]]) -> Tensor:
    """[count] the number of the component that each node is in."""
    found = torch.arange(count)
    for _, a, b in edges:
        found[found == found[b]] = int(found[a])
    return found


def _numbers(found: Sequence[tuple[Inputs, int, Sequence[int] | None]]) -> Tensor | None:
    """[N, D] some of the numbers of every sample; None where numbers do not tell samples apart
    (tokens), or samples are of different shapes.

    Args:
        found: inputs, samples in them, and the rows that count; None: all.
    """
    parts = list[Tensor]()
    for inputs, size, rows in found:
        own = [x for x in tensors_in(inputs) if x.ndim and len(x) == size]
        if not own or not all(x.is_floating_point() for x in own):
            return None
        chosen = list(range(size) if rows is None else rows)
        flat = torch.cat([x[chosen].detach().flatten(1).float().cpu() for x in own], 1)
        parts.append(flat[:, :: max(1, flat.shape[1] // _POSITIONS)])
    return None if len({part.shape[1] for part in parts}) > 1 else torch.cat(parts)


def _apart(found: Sequence[tuple[Inputs, int, Sequence[int]]], enough: int) -> int:
    """How many samples lie apart from each other, counted up to ``enough``; what numbers do not
    tell counts as apart."""
    samples = _numbers(found)
    if samples is None:
        return enough
    samples -= samples.mean(0)
    drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    some = samples[drawn[:256]]
    radius = _CLOSE * float(torch.quantile(torch.cdist(some, some).flatten(), 0.9))
    apart = samples[:1]
    for sample in samples[1:]:
        if len(apart) >= enough:
            break
        if not bool((torch.cdist(sample[None], apart) < radius).any()):
            apart = torch.cat([apart, sample[None]])
    return len(apart)


def _rows(value: Any, rows: Sequence[int], size: int) -> Any:
    """Some samples of a batch's tensors; what does not count samples is passed on."""
    if len(rows) == size:
        return value

    def chosen(tensor: Tensor) -> Tensor:
        counts = tensor.ndim > 0 and len(tensor) == size
        return tensor[torch.tensor(rows, device=tensor.device)] if counts else tensor

    return map_tensors(chosen, value)

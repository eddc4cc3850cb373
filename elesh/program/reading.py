"""Weights and held-out samples of a checkpoint's network: checked against what they claim to be.

Nothing here runs the network. What is wrong is a named error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from leyline import InvalidField, Malformed, NotFinite, PrunedArchitecture, ShapeMismatch

from .program import GateSlot, Program

__all__ = [
    "IGNORED_LABEL",
    "MIN_SAMPLES",
    "read_calibration",
    "read_held_out",
    "read_weights",
    "require_gates",
]

MIN_SAMPLES = 32
IGNORED_LABEL = -100
"""As in PyTorch's cross-entropy: positions that have no label."""


def _tensors(data: bytes, field: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Malformed(field, "a safetensors blob", str(error)[:200]) from None


def read_weights(
    data: bytes, program: Program, architecture: PrunedArchitecture
) -> dict[str, Tensor]:
    """The program's weights, each as the architecture describes it."""
    tensors = _tensors(data, "weights")
    for path in program.weights.values():
        tensor, described = tensors.get(path), architecture.tensor.get(path)
        if tensor is None:
            raise InvalidField(f"weights.{path}", "a tensor", "nothing")
        found = ("x".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."))
        if described is not None:
            expected = ("x".join(map(str, described.shape)), described.dtype)
            if found != expected:
                raise ShapeMismatch(f"weights.{path}", " ".join(expected), " ".join(found))
        if described is not None and tensor.is_floating_point():
            _require_finite(f"weights.{path}", tensor)
    return tensors


def read_held_out(
    data: bytes, program: Program, distinct: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs by name, and labels.

    Args:
        distinct: take every input once: copies prove nothing.
    """
    tensors = _tensors(data, "held_out")
    labels = tensors.get("labels")
    if labels is None or labels.ndim == 0 or labels.dtype not in (torch.int64, torch.int32):
        found = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise InvalidField("held_out.labels", "class labels as integers", found)
    labels = labels.long()
    if len(labels) < MIN_SAMPLES:
        raise InvalidField("held_out.labels", f"at least {MIN_SAMPLES} samples", len(labels))
    known = labels[labels != IGNORED_LABEL]
    if len(known) == 0 or bool((known == known[0]).all()):
        found = f"only class {int(known[0])}" if len(known) else "no label at all"
        raise InvalidField("held_out.labels", "at least two classes", found)
    inputs = dict(_inputs(tensors, "inputs", program, len(labels)))
    if not distinct:
        return inputs, labels
    rows = _first_of_each(list(inputs.values()), len(labels))
    if len(rows) < MIN_SAMPLES:
        expected = f"at least {MIN_SAMPLES} samples that differ"
        raise InvalidField("held_out.inputs", expected, len(rows))
    if len(rows) == len(labels):
        return inputs, labels
    return {name: x[rows] for name, x in inputs.items()}, labels[rows]


def _first_of_each(inputs: Sequence[Tensor], samples: int) -> Tensor:
    """The samples that differ from all before them."""
    seen: set[bytes] = set()
    rows = []
    for number in range(samples):
        digest = hashlib.blake2b(digest_size=16)
        for x in inputs:
            digest.update(x[number].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        if digest.digest() not in seen:
            seen.add(digest.digest())
            rows.append(number)
    return torch.tensor(rows)


def read_calibration(data: bytes, program: Program) -> dict[str, Tensor]:
    """Calibration inputs by name; empty if the blob has none.

    Raises:
        InvalidField, ShapeMismatch, NotFinite: if there are some that are not sound.
    """
    tensors = _tensors(data, "held_out")
    counts = {len(x) for name, x in tensors.items() if name.startswith("calibration/") and x.ndim}
    if not counts:
        return {}
    samples = max(counts)
    if samples < MIN_SAMPLES:
        raise InvalidField("held_out.calibration", f"at least {MIN_SAMPLES} samples", samples)
    return dict(_inputs(tensors, "calibration", program, samples))


def _inputs(
    tensors: dict[str, Tensor], kind: str, program: Program, samples: int
) -> Iterator[tuple[str, Tensor]]:
    """What the program is called with, by name: so many samples of each."""
    for name in program.inputs.values():
        field = f"{kind}/{name}"
        tensor = tensors.get(field)
        if tensor is None or tensor.ndim == 0 or len(tensor) != samples:
            found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ShapeMismatch(f"held_out.{field}", f"{samples} samples", found)
        if tensor.is_floating_point():
            _require_finite(f"held_out.{field}", tensor)
        yield name, tensor


def _require_finite(field: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        place = [int(i) for i in (~torch.isfinite(tensor)).nonzero()[0]]
        raise NotFinite(f"{field}{place}", "a finite number", float(tensor[tuple(place)]))


def require_gates(slots: Sequence[GateSlot], architecture: PrunedArchitecture) -> None:
    """Everything that may be removed must have its gates."""
    sizes = {(slot.module, slot.dim): slot.size for slot in slots}
    for group in architecture.groups:
        for site in (*group.sites, *group.norms) if group.prunable else ():
            size = sizes.get((site.module, site.dim), 0)
            if size <= max(site.all_of(range(group.size)), default=-1):
                found = f"{size} units" if size else "no gate"
                raise InvalidField(f"program.gates.{site.module}", f"units of {group.name}", found)
    for block in architecture.blocks:
        if block.prunable and not block.removed and (block.branch, None) not in sizes:
            raise InvalidField(f"program.gates.{block.branch}", f"a gate of {block.name}", "none")

"""The exported network on its held-out samples: how well it does with some parts masked.

Everything that is wrong with program, weights or samples is a named error before the first cut is
measured. The same parts masked give the same figures: one thread, fixed portions, seeded
directions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from elesh.safety import Entry
from elesh.safety.paired import Outcomes
from leyline import (
    GateSite,
    InvalidField,
    Level,
    Malformed,
    NetworkExport,
    NotFinite,
    PrunedArchitecture,
    ShapeMismatch,
)

from .confine import confined
from .program import GateSlot, Program

__all__ = ["Bench", "Measurement", "TooSlow"]

MIN_SAMPLES = 32
_PORTION = 256
_FLOW_SAMPLES = 256
"""Samples whose gradients are followed: the norm needs no more."""
_IGNORED_LABEL = -100
"""As in PyTorch's cross-entropy: positions that have no label."""
_SEED = 1


def _load_what_is_lazy() -> None:
    """PyTorch opens some of its files at first use, which it could not while confined."""
    x = torch.ones(1, 2, requires_grad=True)
    functional.cross_entropy(x, torch.zeros(1, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]


_load_what_is_lazy()


class TooSlow(Exception):
    """Measuring would take longer than the window allows."""


@dataclass(frozen=True)
class Measurement:
    """How the network does with some parts masked."""

    outcomes: Outcomes
    gradients: Mapping[str, Tensor]
    """Of the outputs along seeded directions, by parameter."""


class Bench:
    """One checkpoint's network with its held-out samples.

    Args:
        network: the blobs of the checkpoint.
        architecture: what the blobs claim to be.
        deadline: by ``time.monotonic``; measuring stops with :class:`TooSlow` there.

    Raises:
        ContractError: naming what is wrong with program, weights or held-out samples.
    """

    def __init__(
        self, network: NetworkExport, architecture: PrunedArchitecture, deadline: float
    ) -> None:
        self._architecture, self._deadline = architecture, deadline
        self._program = Program.read(network.program)
        if self._program.model_hash != architecture.model_hash:
            raise InvalidField(
                "program.model_hash", architecture.model_hash, self._program.model_hash
            )
        self._weights = _weights(network.weights, self._program, architecture)
        self._inputs, self._labels = _held_out(network.held_out, self._program)
        self._slot = {(slot.module, slot.dim): n for n, slot in enumerate(self._program.gates)}
        _require_gates(self._program.gates, architecture)

    @property
    def samples(self) -> int:
        """Held-out samples."""
        return len(self._labels)

    def measure(self, entries: Sequence[Entry]) -> Measurement:
        """The network with the units and layers of ``entries`` masked.

        Raises:
            TooSlow: when the deadline has passed.
            NotFinite, ShapeMismatch: if its outputs are not finite or fit no labels.
        """
        outcomes = self.outcomes(entries)
        with confined():
            return Measurement(outcomes, self._gradients(self._mask(entries)))

    def outcomes(self, entries: Sequence[Entry]) -> Outcomes:
        """The same without the gradients: a third of the time."""
        mask = self._mask(entries)
        with confined(), torch.no_grad():
            parts = [
                _judged(self._run(mask, rows), self._labels[rows], int(rows[0]))
                for rows in self._portions(self.samples)
            ]
        return Outcomes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def products(self, site: GateSite, indices: Sequence[int], rows: Tensor) -> Tensor:
        """[K, K] float64: products of what passes some indices of a site's axis, summed over the
        samples ``rows`` and positions, nothing masked."""
        slot = self._program.gates[self._slot[site.module, site.dim]]
        name = self._program.gated(slot)
        total = torch.zeros(len(indices), len(indices), dtype=torch.float64)
        with confined(), torch.no_grad():
            for part in torch.split(rows, self._program.batch or _PORTION):
                seen = {name: torch.zeros(0)}
                self._run(self._mask(()), part, seen)
                flat = seen[name].movedim(site.dim, -1).flatten(0, -2)[:, list(indices)].double()
                total += flat.T @ flat
        return total

    def flow_change(
        self, before: Measurement, after: Measurement, entries: Sequence[Entry]
    ) -> float:
        """By which share the norm of the gradients changed, in the parameters that stay."""
        gone = self._tensors_gone(entries)
        squares = [0.0, 0.0]
        for path, whole in before.gradients.items():
            for number, gradient in enumerate((whole, after.gradients[path])):
                left = gradient.clone()
                for dim, indices in gone.get(path, ()):
                    left = left * 0 if dim is None else left.index_fill(dim, indices, 0)
                squares[number] += float(left.double().square().sum())
        return abs((squares[1] / squares[0]) ** 0.5 - 1) if squares[0] > 0 else 0.0

    def _tensors_gone(self, entries: Sequence[Entry]) -> dict[str, list[tuple[int | None, Tensor]]]:
        """By parameter, the indices along a dimension that go, or None for all of it."""
        gone: dict[str, list[tuple[int | None, Tensor]]] = {}
        for level, name, unit in entries:
            if level is Level.LAYER:
                for path in self._architecture.block[name].tensors:
                    gone.setdefault(path, []).append((None, torch.zeros(0)))
                continue
            for part in self._architecture.group[name].slices:
                indices = torch.tensor(list(part.of(unit)))
                gone.setdefault(part.tensor, []).append((part.dim, indices))
        return gone

    def _mask(self, entries: Sequence[Entry]) -> list[Tensor]:
        """[size] of ones and zeros for every gate."""
        gates = [torch.ones(slot.size) for slot in self._program.gates]
        for level, name, unit in entries:
            if level is Level.LAYER:
                gates[self._slot[self._architecture.block[name].branch, None]][:] = 0
                continue
            for site in self._architecture.group[name].sites:
                gates[self._slot[site.module, site.dim]][list(site.of(unit))] = 0
        return gates

    def _portions(self, samples: int) -> Iterator[Tensor]:
        size = self._program.batch or _PORTION
        for start in range(0, samples, size):
            if time.monotonic() > self._deadline:
                raise TooSlow
            yield torch.arange(start, min(start + size, samples))

    def _run(
        self,
        mask: Sequence[Tensor],
        rows: Tensor,
        watched: MutableMapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Outputs of some samples, in single precision."""
        count = len(rows)
        if self._program.batch:  # it takes just so many: fill up from the first again
            rows = rows[torch.arange(self._program.batch) % count]
        inputs = {name: x[rows] for name, x in self._inputs.items()}
        gates = [gate.expand(len(rows), -1) for gate in mask]
        outputs = self._program.run(self._weights, inputs, gates, watched)
        if len(outputs) != len(rows):
            raise ShapeMismatch("program.output", f"{len(rows)} samples", tuple(outputs.shape))
        return outputs[:count].float()

    def _gradients(self, mask: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients of seeded random projections of the outputs, summed over samples.

        Directions of different samples are independent, so the expected square of the sum is the
        sum over samples of the squared gradients.
        """
        paths = [path for path in self._trained if path in self._weights]
        totals = {path: torch.zeros_like(self._weights[path]) for path in paths}
        generator = torch.Generator().manual_seed(_SEED)
        leaves = [self._weights[path].requires_grad_() for path in paths]
        try:
            for rows in self._portions(min(self.samples, _FLOW_SAMPLES)):
                outputs = self._run(mask, rows)
                directions = torch.randn(outputs.shape, generator=generator)
                found = torch.autograd.grad((outputs * directions).sum(), leaves, allow_unused=True)
                for path, gradient in zip(paths, found, strict=True):
                    if gradient is not None:
                        totals[path] += gradient
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
        return totals

    @property
    def _trained(self) -> list[str]:
        """Paths of the parameters that can have gradients."""
        floats = ("float16", "bfloat16", "float32", "float64")
        return [
            t.path
            for t in self._architecture.tensors
            if t.kind == "parameter" and t.dtype in floats
        ]


def _judged(
    outputs: Tensor, labels: Tensor, first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Losses, hits, labels and sample numbers of a portion that begins with sample ``first``."""
    if not torch.isfinite(outputs).all():
        raise NotFinite("outputs on the held-out samples", "finite numbers", "NaN or infinity")
    logits = outputs.movedim(_class_axis(outputs, labels), -1)
    classes = logits.shape[-1]
    logits, flat = logits.reshape(-1, classes), labels.reshape(-1)
    known = flat != _IGNORED_LABEL
    if known.any() and not 0 <= int(flat[known].min()) <= int(flat[known].max()) < classes:
        found = f"{int(flat[known].min())} to {int(flat[known].max())}"
        raise InvalidField("held_out.labels", f"classes from 0 to {classes - 1}", found)
    losses = functional.cross_entropy(logits, flat, reduction="none", ignore_index=_IGNORED_LABEL)
    sample = torch.arange(len(labels)).repeat_interleave(flat.numel() // len(labels))
    return (
        losses.double().reshape(len(labels), -1).sum(1).numpy(),
        (logits.argmax(-1) == flat)[known].numpy(),
        flat[known].numpy(),
        (sample[known] + first).numpy(),
    )


def _class_axis(outputs: Tensor, labels: Tensor) -> int:
    """Where the classes lie: the axis without which outputs have the labels' shape."""
    shape = list(outputs.shape)
    for axis in (1, outputs.ndim - 1):
        if 0 < axis < outputs.ndim and shape[:axis] + shape[axis + 1 :] == list(labels.shape):
            return axis
    raise ShapeMismatch(
        "held_out.labels",
        f"the shape of the outputs {tuple(outputs.shape)} without their classes",
        tuple(labels.shape),
        hint="only class labels can be verified",
    )


def _tensors(data: bytes, field: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Malformed(field, "a safetensors blob", str(error)[:200]) from None


def _weights(data: bytes, program: Program, architecture: PrunedArchitecture) -> dict[str, Tensor]:
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


def _held_out(data: bytes, program: Program) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs by name, and labels."""
    tensors = _tensors(data, "held_out")
    labels = tensors.get("labels")
    if labels is None or labels.ndim == 0 or labels.dtype not in (torch.int64, torch.int32):
        found = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise InvalidField("held_out.labels", "class labels as integers", found)
    labels = labels.long()
    if len(labels) < MIN_SAMPLES:
        raise InvalidField("held_out.labels", f"at least {MIN_SAMPLES} samples", len(labels))
    known = labels[labels != _IGNORED_LABEL]
    if len(known) == 0 or bool((known == known[0]).all()):
        found = f"only class {int(known[0])}" if len(known) else "no label at all"
        raise InvalidField("held_out.labels", "at least two classes", found)
    inputs: dict[str, Tensor] = {}
    for name in program.inputs.values():
        tensor = tensors.get(f"inputs/{name}")
        if tensor is None or tensor.ndim == 0 or len(tensor) != len(labels):
            found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ShapeMismatch(f"held_out.inputs/{name}", f"{len(labels)} samples", found)
        if tensor.is_floating_point():
            _require_finite(f"held_out.inputs/{name}", tensor)
        inputs[name] = tensor
    return inputs, labels


def _require_finite(field: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        place = [int(i) for i in (~torch.isfinite(tensor)).nonzero()[0]]
        raise NotFinite(f"{field}{place}", "a finite number", float(tensor[tuple(place)]))


def _require_gates(slots: Sequence[GateSlot], architecture: PrunedArchitecture) -> None:
    """Everything that may be removed must have its gates."""
    sizes = {(slot.module, slot.dim): slot.size for slot in slots}
    for group in architecture.groups:
        for site in group.sites if group.prunable else ():
            size = sizes.get((site.module, site.dim), 0)
            if size <= max(site.all_of(range(group.size)), default=-1):
                found = f"{size} units" if size else "no gate"
                raise InvalidField(f"program.gates.{site.module}", f"units of {group.name}", found)
    for block in architecture.blocks:
        if block.prunable and not block.removed and (block.branch, None) not in sizes:
            raise InvalidField(f"program.gates.{block.branch}", f"a gate of {block.name}", "none")

"""Runs the exported network on its held-out samples: its figures with some parts masked, and how
its units then change the logit gaps.

Everything that is wrong with program, weights or samples is a named error before the first cut is
measured. The same parts masked give the same figures: one thread, fixed portions, seeded directions
and positions. :class:`LogitGapMeter` measures again, with some units gone, what the recorder
measures once for a checkpoint (ARCHITECTURE, "What we rank by").

While a program runs, the process can open nothing: the kernel's limits of this process are lowered
around the run: no new file, pipe or socket (``RLIMIT_NOFILE``), no byte written to a file
(``RLIMIT_FSIZE``), no new process or thread (``RLIMIT_NPROC``; not for root). So there is no
network and no disk, without privileges or namespaces. Memory and processor time are the worker's to
limit. This is no sandbox against machine code, which could raise the limits again. Programs bring
none; they are data, and these limits are the second wall.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from elesh.safety import Entry, LogitGaps
from elesh.safety.measured_gates import Outcomes
from leyline import (
    GateSite,
    InvalidField,
    Level,
    NetworkExport,
    NotFinite,
    PrunedArchitecture,
    PruningGroup,
    ShapeMismatch,
)

from .program import (
    IGNORED_LABEL,
    Program,
    read_calibration,
    read_held_out,
    read_weights,
    require_gates,
)
from .refit import BatchNorm, Estimate, Refit, batch_norms, moved_statistic

_NOTHING = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC)


@contextlib.contextmanager
def confined() -> Iterator[None]:
    """Nothing can be opened, written or started inside; what is open stays usable for reading.

    The hard limits stay, so that the process gets its own limits back at the end.
    """
    before = [(limit, resource.getrlimit(limit)) for limit in _NOTHING]
    try:
        for limit, (_, hard) in before:
            resource.setrlimit(limit, (0, hard))
        yield
    finally:
        for limit, pair in before:
            resource.setrlimit(limit, pair)


_PORTION = 256
_FLOW_SAMPLES = 256
"""Samples whose gradients are followed: the norm needs no more."""
_STATISTICS = 256
"""Calibration samples by which batch statistics move, as many as in the trainer's own check."""
_SEED = 1


def _load_what_is_lazy() -> None:
    """PyTorch opens some of its files at first use, which it could not while confined. Wherever
    this is imported: a script may be in ``no_grad``."""
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        x = torch.ones(1, 2, requires_grad=True)
        torch.autograd.backward(functional.cross_entropy(x, torch.zeros(1, dtype=torch.long)))


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
        distinct: take every held-out input once.

    Attributes:
        deadline: by ``time.monotonic``; measuring stops with :class:`TooSlow` there.

    Raises:
        ContractError: naming what is wrong with program, weights or held-out samples.
    """

    def __init__(
        self, network: NetworkExport, architecture: PrunedArchitecture, distinct: bool = False
    ) -> None:
        self._architecture, self.deadline = architecture, math.inf
        self._network = network
        self._program = Program.read(network.program)
        if self._program.model_hash != architecture.model_hash:
            raise InvalidField(
                "program.model_hash", architecture.model_hash, self._program.model_hash
            )
        self._weights = read_weights(network.weights, self._program, architecture)
        self._inputs, self._labels = read_held_out(network.held_out, self._program, distinct)
        self.samples = len(self._labels)
        """Held-out samples."""
        self.slots = {(slot.module, slot.dim): n for n, slot in enumerate(self._program.gates)}
        """The number of each gate, by module and axis (None for a branch)."""
        self._calibration: dict[str, Tensor] | None = None
        self.refit: Refit | None = None
        """Where set, weights are refitted whenever parts are masked."""
        self._before: dict[str, Tensor] = {}
        """Batch statistics of the calibration inputs, with nothing masked."""
        require_gates(self._program.gates, architecture)

    def calibration(self) -> dict[str, Tensor]:
        """Inputs by name that no cut is judged on; empty if the checkpoint carries none.

        Raises:
            ContractError: if they are not sound.
        """
        if self._calibration is None:
            self._calibration = read_calibration(self._network.held_out, self._program)
        return self._calibration

    def measure(self, entries: Sequence[Entry]) -> Measurement:
        """The network with the units and layers of ``entries`` masked.

        Raises:
            TooSlow: when the deadline has passed.
            NotFinite, ShapeMismatch: if its outputs are not finite or fit no labels.
        """
        with self._refitted(entries):
            outcomes = self._outcomes(entries)
            with confined():
                return Measurement(outcomes, self._gradients(self.gates(entries)))

    def outcomes(self, entries: Sequence[Entry]) -> Outcomes:
        """As :meth:`measure`, without the gradients: a third of the time."""
        with self._refitted(entries):
            return self._outcomes(entries)

    def refitting(self, skip: Collection[str], batch_statistics: bool = False) -> Refit:
        """What refits the network's weights, from its calibration inputs.

        Args:
            skip: consumers that keep their weights.
            batch_statistics: those of batch normalisations move along.

        Raises:
            ContractError: if there are none.
            TooSlow: when the deadline has passed.
        """
        inputs = self.calibration()
        if not inputs:
            hint = "Exporter.export(..., calibration=inputs)"
            raise InvalidField("held_out.calibration", "inputs to refit by", "none", hint=hint)
        slots = [slot for slot in self._program.gates if slot.dim is not None]
        names = {slot: self._program.gated(slot) for slot in slots}
        sums: dict[tuple[str, int], tuple[Tensor, Tensor, int]] = {}
        with confined(), torch.no_grad():
            for rows in self.portions(len(next(iter(inputs.values())))):
                seen = dict.fromkeys(names.values(), torch.zeros(0))
                self.run(inputs, rows, self.gates(()), seen)
                for slot, name in names.items():
                    assert slot.dim is not None
                    key = slot.module, slot.dim
                    sums[key] = _added(sums.get(key), seen[name].movedim(slot.dim, -1))
        means = {
            key: (first / count, second / count, count)
            for key, (first, second, count) in sums.items()
        }
        norms = batch_norms(self._program) if batch_statistics else ()
        return Refit(self._program, self._architecture, self._weights, means, skip, norms)

    @contextlib.contextmanager
    def _refitted(self, entries: Sequence[Entry]) -> Iterator[None]:
        """Inside, the weights are those of the network without ``entries``."""
        whole = self._weights
        norms = self.refit.norms if self.refit is not None else ()
        if self.refit is not None and entries:
            before = self._statistics(norms, ()) if norms and not self._before else self._before
            self._before, self._weights = before, {**whole, **self.refit.of(entries)}
            if norms and any(level is not Level.LAYER for level, _, _ in entries):
                self._weights |= self._moved_statistics(norms, entries)
        try:
            yield
        finally:
            self._weights = whole

    def _moved_statistics(
        self, norms: tuple[BatchNorm, ...], entries: Sequence[Entry]
    ) -> dict[str, Tensor]:
        """Running statistics with ``entries`` masked: moved as those of the calibration inputs."""
        after, variances = self._statistics(norms, entries), {norm.variance for norm in norms}
        moved = {
            path: moved_statistic(
                self._weights[path], self._before[path], own, variance=path in variances
            ).to(self._weights[path].dtype)
            for path, own in after.items()
            if path in self._before
        }
        return {path: value for path, value in moved.items() if torch.isfinite(value).all()}

    def _statistics(
        self, norms: tuple[BatchNorm, ...], entries: Sequence[Entry]
    ) -> dict[str, Tensor]:
        """Those of the calibration inputs, in the network as it is with ``entries`` masked."""
        estimate, gates, inputs = Estimate(norms), self.gates(entries), self.calibration()
        largest = 0
        with confined(), torch.no_grad():
            for rows in self.portions(min(len(next(iter(inputs.values()))), _STATISTICS)):
                largest = max(largest, len(rows))
                if len(rows) < 2 or 2 * len(rows) < largest:
                    continue
                self.run(inputs, rows, gates, instead=estimate.instead())
                estimate.portions += 1
        return estimate.means()

    def _outcomes(self, entries: Sequence[Entry]) -> Outcomes:
        mask = self.gates(entries)
        with confined(), torch.no_grad():
            parts = [
                judged(self.run(self._inputs, rows, mask)[0], self._labels[rows], int(rows[0]))
                for rows in self.portions(self.samples)
            ]
        return Outcomes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def products(self, site: GateSite, indices: Sequence[int], rows: Tensor) -> Tensor:
        """[K, K] float64: products of what passes some indices of a site's axis, summed over the
        samples ``rows`` and positions, nothing masked."""
        name = self._program.gated(self._program.gates[self.slots[site.axis]])
        total = torch.zeros(len(indices), len(indices), dtype=torch.float64)
        with confined(), torch.no_grad():
            for part in torch.split(rows, self._program.batch or _PORTION):
                seen = {name: torch.zeros(0)}
                self.run(self._inputs, part, self.gates(()), seen)
                flat = seen[name].movedim(site.dim, -1).flatten(0, -2)[:, list(indices)].double()
                total += flat.T @ flat
        return total

    def flow_change(
        self, before: Measurement, after: Measurement, entries: Sequence[Entry]
    ) -> float:
        """By which share the norm of the gradients changed, in the parameters that stay."""
        # By parameter, the indices along a dimension that go, or None for all of it.
        gone: dict[str, list[tuple[int | None, Tensor]]] = {}
        for level, name, unit in entries:
            if level is Level.LAYER:
                for path in self._architecture.block[name].tensors:
                    gone.setdefault(path, []).append((None, torch.zeros(0)))
                continue
            for part in self._architecture.group[name].slices:
                indices = torch.tensor(list(part.of(unit)))
                gone.setdefault(part.tensor, []).append((part.dim, indices))
        squares = [0.0, 0.0]
        for path, whole in before.gradients.items():
            for number, gradient in enumerate((whole, after.gradients[path])):
                left = gradient.clone()
                for dim, indices in gone.get(path, ()):
                    left = left * 0 if dim is None else left.index_fill(dim, indices, 0)
                squares[number] += float(left.double().square().sum())
        return abs((squares[1] / squares[0]) ** 0.5 - 1) if squares[0] > 0 else 0.0

    def gates(self, masked: Sequence[Entry], halved: Sequence[Entry] = ()) -> list[Tensor]:
        """[size] for every gate: zeros where parts are masked, one half where ``halved``."""
        gates = [torch.ones(slot.size) for slot in self._program.gates]
        for entries, value in ((halved, 0.5), (masked, 0.0)):
            for level, name, unit in entries:
                if level is Level.LAYER:
                    gates[self.slots[self._architecture.block[name].branch, None]][:] = value
                    continue
                group = self._architecture.group[name]
                # Statistics of a normalisation jump with what is kept: halved, it sees all.
                for site in (*group.sites, *(group.norms if value == 0.0 else ())):
                    gates[self.slots[site.axis]][list(site.of(unit))] = value
        return gates

    def class_axis(self, outputs: Tensor) -> int:
        """Where the classes lie in ``outputs`` of any number of samples."""
        return _class_axis(outputs, (len(outputs), *self._labels.shape[1:]))

    def portions(self, samples: int) -> Iterator[Tensor]:
        size = self._program.batch or _PORTION
        for start in range(0, samples, size):
            if time.monotonic() > self.deadline:
                raise TooSlow
            yield torch.arange(start, min(start + size, samples))

    def run(
        self,
        inputs: Mapping[str, Tensor],
        rows: Tensor,
        mask: Sequence[Tensor],
        watched: MutableMapping[str, Tensor] | None = None,
        instead: Mapping[str, Callable[..., Any]] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Outputs of some samples, in single precision, and the gates they went through: for every
        slot [samples or more, size], what is beyond the samples only fills up."""
        count = len(rows)
        if self._program.batch:  # it takes just so many: fill up from the first again
            rows = rows[torch.arange(self._program.batch) % count]
        taken = {name: x[rows] for name, x in inputs.items()}
        gates = [gate.expand(len(rows), -1) for gate in mask]
        if torch.is_grad_enabled():
            gates = [gate.clone().requires_grad_() for gate in gates]
        outputs = self._program.run(self._weights, taken, gates, watched, instead)
        if len(outputs) != len(rows):
            raise ShapeMismatch("program.output", f"{len(rows)} samples", tuple(outputs.shape))
        return outputs[:count].float(), gates

    def _gradients(self, mask: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients of seeded random projections of the outputs, summed over samples.

        Directions of different samples are independent, so the expected square of the sum is the
        sum over samples of the squared gradients.
        """
        floats = ("float16", "bfloat16", "float32", "float64")
        parameters = [t for t in self._architecture.tensors if t.kind == "parameter"]
        paths = [t.path for t in parameters if t.dtype in floats and t.path in self._weights]
        totals = {path: torch.zeros_like(self._weights[path]) for path in paths}
        generator = torch.Generator().manual_seed(_SEED)
        leaves = [self._weights[path].requires_grad_() for path in paths]
        try:
            for rows in self.portions(min(self.samples, _FLOW_SAMPLES)):
                outputs, _ = self.run(self._inputs, rows, mask)
                directions = torch.randn(outputs.shape, generator=generator)
                found = torch.autograd.grad((outputs * directions).sum(), leaves, allow_unused=True)
                for path, gradient in zip(paths, found, strict=True):
                    if gradient is not None:
                        totals[path] += gradient
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
        return totals


def _added(past: tuple[Tensor, Tensor, int] | None, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Sums of inputs and of their products over all but the last dimension, in float64."""
    flat = x.flatten(0, -2).float()
    first, second = flat.sum(0).double(), (flat.T @ flat).double()
    if past is None:
        return first, second, len(flat)
    return past[0] + first, past[1] + second, past[2] + len(flat)


def judged(outputs: Tensor, labels: Tensor, first: int) -> tuple[np.ndarray, ...]:
    """Losses, hits, labels, sample numbers and answers of a portion from sample ``first`` on."""
    if not torch.isfinite(outputs).all():
        raise NotFinite("outputs on the held-out samples", "finite numbers", "NaN or infinity")
    logits = outputs.movedim(_class_axis(outputs, labels.shape), -1)
    classes = logits.shape[-1]
    logits, flat = logits.reshape(-1, classes), labels.reshape(-1)
    known = flat != IGNORED_LABEL
    if known.any() and not 0 <= int(flat[known].min()) <= int(flat[known].max()) < classes:
        found = f"{int(flat[known].min())} to {int(flat[known].max())}"
        raise InvalidField("held_out.labels", f"classes from 0 to {classes - 1}", found)
    losses = functional.cross_entropy(logits, flat, reduction="none", ignore_index=IGNORED_LABEL)
    sample = torch.arange(len(labels)).repeat_interleave(flat.numel() // len(labels))
    return (
        losses.double().reshape(len(labels), -1).sum(1).numpy(),
        (logits.argmax(-1) == flat)[known].numpy(),
        flat[known].numpy(),
        (sample[known] + first).numpy(),
        logits.argmax(-1)[known].numpy(),
    )


def _class_axis(outputs: Tensor, labels: Sequence[int]) -> int:
    """Where the classes lie: the axis without which outputs have the ``labels``' shape."""
    shape = list(outputs.shape)
    for axis in (1, outputs.ndim - 1):
        if 0 < axis < outputs.ndim and shape[:axis] + shape[axis + 1 :] == list(labels):
            return axis
    raise ShapeMismatch(
        "held_out.labels",
        f"the shape of the outputs {tuple(outputs.shape)} without their classes",
        tuple(labels),
        hint="only class labels can be verified",
    )


_GAPS_SEED = 2
_SAMPLES = 512
"""More are not looked at."""
_POSITIONS = 4
"""Answers looked at of a sample that has many (tokens, pixels), each for a backward pass."""

Floats = npt.NDArray[np.float32]


class LogitGapMeter:
    """Measures one checkpoint's network under masks.

    Args:
        bench: the network.
        inputs: calibration inputs by name.

    Raises:
        TooSlow, ContractError: as :meth:`Bench.measure` does; so do calls.
    """

    def __init__(
        self, bench: Bench, architecture: PrunedArchitecture, inputs: dict[str, Tensor]
    ) -> None:
        self._bench, self._inputs = bench, inputs
        self._groups = [group for group in architecture.groups if group.prunable]
        self._samples = min(_SAMPLES, len(next(iter(inputs.values()))))
        generator = torch.Generator().manual_seed(_GAPS_SEED)
        with confined(), torch.no_grad():
            answers = []
            for rows in bench.portions(self._samples):
                logits = self._logits(rows, bench.gates(()))[0]
                answers.append(_answers(logits, generator))
        self._places, self._answers = (torch.cat(part) for part in zip(*answers, strict=True))

    def __call__(self, masked: Sequence[Entry], halved: Sequence[Entry] = ()) -> LogitGaps:
        """The network with ``masked`` gone and the gates of ``halved`` at one half."""
        gates, margins, moves = self._bench.gates(masked, halved), [], []
        with confined():
            for rows in self._bench.portions(self._samples):
                found = self._of_portion(rows, gates)
                margins.append(found[0])
                moves.append(found[1])
        names = [group.name for group in self._groups]
        return LogitGaps(
            np.concatenate(margins),
            {name: np.concatenate([part[n] for part in moves]) for n, name in enumerate(names)},
        )

    def _of_portion(self, rows: Tensor, mask: Sequence[Tensor]) -> tuple[Floats, list[Floats]]:
        """Margins of a portion's rows, and by group what its units move them by."""
        logits, gates = self._logits(rows, mask)
        places, answers = self._places[rows], self._answers[rows]
        chosen = logits.gather(1, places[:, :, None].expand(-1, -1, logits.shape[2]))
        odds = _logit_gaps(chosen, answers)
        if not torch.isfinite(odds).all():
            raise NotFinite("outputs on calibration samples", "finite margins", "NaN or infinity")
        found, last = [], odds.shape[1] - 1
        for n in range(odds.shape[1]):
            along = odds[:, n].sum()
            slopes = torch.autograd.grad(along, gates, retain_graph=n < last, allow_unused=True)
            found.append([self._owned(slopes, group, len(rows)) for group in self._groups])
        flat = odds.detach().T.flatten().numpy()
        return flat, [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _logits(self, rows: Tensor, mask: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[samples, positions, classes], and the gates they went through."""
        outputs, gates = self._bench.run(self._inputs, rows, mask)
        logits = outputs.movedim(self._bench.class_axis(outputs), -1)
        return logits.reshape(len(rows), -1, logits.shape[-1]), gates

    def _owned(self, slopes: Sequence[Tensor | None], group: PruningGroup, samples: int) -> Floats:
        """[samples, size]: the sum over the places where the units of a group enter."""
        total = torch.zeros(samples, group.size)
        for site in group.sites:
            slope = slopes[self._bench.slots[site.axis]]
            if slope is not None:
                owned = slope[:samples, site.all_of(range(group.size))]
                total += owned.reshape(samples, group.size, -1).sum(2)
        return total.numpy()


def _answers(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[samples, P] some positions of every sample, and what the network answers there."""
    samples, positions, _ = logits.shape
    drawn = torch.rand(samples, positions, generator=generator)
    places = drawn.argsort(1)[:, :_POSITIONS]
    return places, logits.argmax(2).gather(1, places)


def _logit_gaps(logits: Tensor, answers: Tensor) -> Tensor:
    """[samples, P]: log of the odds against the answers, from [samples, P, classes]."""
    rivals = logits.scatter(2, answers[:, :, None], -torch.inf).logsumexp(2)
    return rivals - logits.gather(2, answers[:, :, None])[:, :, 0]

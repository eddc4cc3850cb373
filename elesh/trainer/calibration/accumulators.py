"""Sums over calibration samples, from which a checkpoint's statistics are made.

Promises: everything but the projections is a sum over samples (projections are rows), so tallies
of parts of the samples add up to the tally of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit
from torch import Tensor, nn

from elesh.program.refit import Normalised
from elesh.trainer.network.gates import Axis
from elesh.trainer.network.kinds.matrices import layer_at, weight_path
from elesh.trainer.network.layers import channel_axes, named_tensors
from elesh.trainer.positions import positions_drawn, positions_to_read
from leyline import (
    ChannelImportanceData,
    GateSite,
    GateStatistics,
    HeadImportanceData,
    Level,
    PruningGroup,
)
from leyline.network.parts import Span

from .behind_norms import behind_norm

ACTIVE = 1e-3
"""Activations of a larger magnitude count as active."""
CORRELATED_SAMPLES = 512
"""Samples that correlations are computed from; the cost is quadratic in channels."""

_LARGEST = float(np.finfo(np.float16).max)
_AT_ONCE = 1 << 15
"""Numbers of a matrix that are worked on at a time."""

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]
Sums = Mapping[Axis, Tensor]


def by_unit(values: Tensor, span: Span, size: int) -> Tensor:
    """``[..., C]`` along an axis to ``[..., size, width]`` by the units that own the indices."""
    if span.indices is None:
        chosen = values[..., span.start : span.start + size * span.width]
    else:
        chosen = values[..., _listed(span.indices).to(values.device)]
    return chosen.reshape(*chosen.shape[:-1], size, span.width)


@lru_cache(1024)
def _listed(indices: tuple[int, ...]) -> Tensor:
    """[n]: asked again and again for the few that a network has."""
    return torch.tensor(indices)


class Entered(Protocol):
    """Sums over samples and positions of what entered consumers, by axis."""

    rows: dict[Axis, int]
    first: dict[Axis, Tensor]
    second: dict[Axis, Tensor]


@dataclass
class AxisTally:
    """How often the channels of one axis were active."""

    elements: int = 0
    """Activations seen of every channel."""
    active: Doubles | None = None

    def see(self, x: Tensor, dim: int) -> None:
        """Count the activations of one call."""
        rest = [d for d in range(x.ndim) if d != dim % x.ndim]
        active = (x.abs() > ACTIVE).sum(rest).cpu().double().numpy()
        self.active = active if self.active is None else self.active + active
        self.elements += x.numel() // x.shape[dim]


def inner_products(second: Tensor, site: GateSite, size: int, *, by_element: bool) -> Tensor:
    """The inner products of the units at a site, from those of all channels of its axis.

    Args:
        second: [C, C].
        by_element: [W, W] of all their channels; else [size, size], in float64 summed over a unit's
            width.
    """
    indices, width = site.indices, site.width
    if by_element or width == 1:
        if indices is None:
            chosen = slice(site.start, site.start + size * width)
            return second[chosen, chosen]
        listed = _listed(indices).to(second.device)
        return second[listed[:, None], listed]
    found = second.new_zeros((size, size), dtype=torch.float64)
    for place in range(width):  # Those of different places of two units are not asked for.
        if indices is None:
            own = slice(site.start + place, site.start + size * width, width)
            found += second[own, own]
        else:
            listed = _listed(indices[place::width]).to(second.device)
            found += second[listed[:, None], listed]
    return found


@dataclass
class InputTally:
    """Sums over samples of what enters one consumer, and of the slopes there. Products of a single
    call stay in float32: there may be millions of them, and most of the time goes into going
    through them."""

    steady: Doubles | float = 0.0
    """Squares of the means over a sample's positions, as often as it has positions."""
    summed: Floats | None = None
    """[W, W] of the slopes' sums over a sample's positions."""
    left: Floats | None = None
    """[W, W] of their deviations from the mean over the positions; None: nothing."""
    both: Floats | None = None
    """[2, W, W]: where these two lie, as long as there was a single call."""
    calls: int = 0

    def see(self, x: Tensor, gradient: Tensor, share: float, samples: int | None) -> None:
        """Take in activations and their gradients, [samples, positions, W].

        Args:
            share: of the positions that the moments of what enters are summed over.
            samples: that there will be in all, where that is known.
        """
        positions, width = gradient.shape[1:]
        self.steady = self.steady + share * positions * _doubles(x.mean(1).square().sum(0))
        total = gradient.sum(1)
        self.both = None if self.calls else np.empty((2, width, width), np.float32)
        into = (None, None) if self.both is None else self.both
        summed = _squares(total, into[0])
        self.summed = _added(self.summed, summed)
        count = positions_to_read(positions, width, samples)
        read = positions_drawn(positions, count, self.calls)
        self.calls += 1
        if positions == 1:  # Its own mean: nothing is left.
            return
        if read is None:
            left = _squares(gradient, into[1])
            torch.from_numpy(left).sub_(torch.from_numpy(summed), alpha=1 / positions)
        else:
            apart = gradient[:, read.to(gradient.device)] - total[:, None] / positions
            left = _squares(apart, into[1])
            left *= positions / len(read)
        self.left = _added(self.left, left)

    def put(
        self,
        into: Mapping[str, Floats],
        samples: int,
        entered: tuple[int, Doubles, Floats],
        centred: bool,
        norms: Collection[Normalised] = (),
    ) -> None:
        """Fill in the fields of one site: ``input_moments`` and so on.

        Args:
            into: where to, by name.
            entered: how many samples times positions; sums over them of what enters, [W], and of
                its products, [W, W].
            centred: the consumer can take up a constant.
            norms: over all units of the group.
        """
        rows, first, second = entered
        raw = first / rows
        means = raw * centred
        found = {name: np.empty(part.shape) for name, part in into.items()} if norms else into
        found["input_means"][:] = means
        found["sample_moments"][:] = np.asarray(self.steady) / rows - means**2
        if second.dtype == np.float32 and found is into:  # As exact as the sums are.
            whole = torch.from_numpy(found["input_moments"])
            torch.div(torch.from_numpy(second), rows, out=whole)
            if centred:
                own = torch.from_numpy(means).float()
                whole.addr_(own, own, alpha=-1)
        else:
            for some in _rows_at_once(second):
                moments = np.divide(second[some], rows, dtype=np.float64)
                if centred:
                    moments -= np.outer(means[some], means)
                found["input_moments"][some] = moments
        for slopes, sums in zip(found["input_slopes"], (self.summed, self.left), strict=True):
            if sums is None:
                slopes[:] = 0
            else:
                np.divide(sums, samples, out=slopes, casting="same_kind")
        if norms:
            for name, values in behind_norm(found, raw, norms).items():
                into[name][:] = values


def _doubles(values: Tensor) -> Doubles:
    found: Doubles = values.double().cpu().numpy()
    return found


def _squares(values: Tensor, into: Floats | None = None) -> Floats:
    """[W, W]: sums of products over all but the last dimension, in float32; ``into`` there."""
    rows = values.reshape(-1, values.shape[-1])
    if into is None:
        found: Floats = (rows.T @ rows).float().cpu().numpy()  # Under autocast, too.
        return found
    if rows.dtype == torch.float32 and rows.device.type == "cpu":
        with torch.no_grad():
            torch.mm(rows.T, rows, out=torch.from_numpy(into))
    else:
        into[:] = _squares(values)
    return into


def _added(past: Floats | None, new: Floats) -> Floats:
    """The sum, in float64 where there are several summands."""
    return new if past is None else np.add(past, new, dtype=np.float64)


def _rows_at_once(matrix: Floats) -> Iterator[slice]:
    """Some rows after the others: so many that what is made of them stays in the cache."""
    step = max(1, _AT_ONCE // max(1, matrix.shape[-1]))
    for start in range(0, len(matrix), step):
        yield slice(start, start + step)


@dataclass
class GroupTally:
    """The sums of one group; C units."""

    group: PruningGroup
    projections: list[npt.NDArray[np.float32]] = field(default_factory=list)
    first: Doubles = field(init=False)
    second: Doubles = field(init=False)
    sensitivity: Doubles = field(init=False)
    """Magnitudes of the gate gradients of the true-label loss."""
    taylor: dict[Axis, Doubles] = field(default_factory=dict)
    rise: Doubles = field(init=False)
    moves: list[npt.NDArray[np.float16]] = field(default_factory=list)
    margins: list[npt.NDArray[np.float32]] = field(default_factory=list)
    loss_increases: list[Doubles] = field(default_factory=list)
    """Of heads, the rows that ``rise`` is the sum of, so that some can be measured better."""
    rise_error: Doubles | None = None
    """Standard errors of the mean rise, where units were masked."""
    derived: int = 0
    """Samples that the loss's derivatives are sums over: all, or the first ones."""
    rated: int = 0
    """Samples that ``rise`` is a sum over and that ``moves`` and ``margins`` have."""
    gram: Tensor | None = None
    shared: tuple[int, Tensor] | None = None
    """Rows and inner products of the first site's axis, where others have summed them up."""
    inputs: dict[int, InputTally] = field(default_factory=dict)
    """By number of the site, where input moments are measured."""
    gram_rows: int = 0
    """Samples times positions times width behind ``gram``."""

    def __post_init__(self) -> None:
        self.first, self.second, self.rise, self.sensitivity = np.zeros((4, self.group.size))

    @property
    def first_axis(self) -> Axis:
        """The axis of the group's first site."""
        return self.group.sites[0].axis

    def gate(self, sums: Sums, samples: int) -> Doubles:
        """``[N, C]``: the gate gradients of the units, summed over their sites."""
        total = torch.zeros(samples, self.group.size, dtype=torch.float64)
        for site in self.group.sites:
            if site.axis in sums:
                units = by_unit(sums[site.axis], site, self.group.size)
                total += units.sum(-1, dtype=torch.float64)
        return total.numpy()

    def project(self, projections: Sums, samples: int) -> None:
        """Take in one batch of projections."""
        self.projections.append(self.gate(projections, samples).astype(np.float32))

    def add(self, projections: Sums, true: Sums, sizes: Sums, sampled: Sums, samples: int) -> None:
        """Take in one batch: sums of the three backward passes."""
        self.project(projections, samples)
        gradients = self.gate(true, samples)
        self.first += gradients.sum(0)
        self.sensitivity += np.abs(gradients).sum(0)
        self.second += np.square(self.gate(sampled, samples)).sum(0)
        self.derived += samples
        self._add_sizes(sizes)

    def add_logit_gaps(
        self, projections: Sums, moves: Sums, sizes: Sums, rivals: Sums, margins: Doubles
    ) -> None:
        """Take in one batch of samples with margins m [N], whose loss is ``softplus(m)``.

        A removal moves the outputs by about minus J, hence the margin to ``m - M + V / 2``: M its
        gate gradient, V the variance of J over the wrong classes.

        Args:
            moves: sums of the backward pass of the margins.
            sizes: of the loss, as in :meth:`add`.
            rivals: sums of the backward pass along ``rival_direction``, the square root of V.
        """
        samples = len(margins)
        self.project(projections, samples)
        move = self.gate(moves, samples)
        variance = np.square(self.gate(rivals, samples))
        m = margins[:, None]
        wrong = expit(m)
        self.first += (wrong * move).sum(0)
        self.sensitivity += (wrong * np.abs(move)).sum(0)
        self.second += (wrong * (1 - wrong) * move**2 + wrong * variance).sum(0)
        rise = np.logaddexp(0, m - move + variance / 2) - np.logaddexp(0, m)
        self.rise += rise.sum(0)
        if self.group.level is Level.HEAD:
            self.loss_increases.append(rise)
        self.derived += samples
        self.rated += samples
        self.moves.append(np.clip(move, -_LARGEST, _LARGEST).astype(np.float16))
        self.margins.append(margins.astype(np.float32))
        self._add_sizes(sizes)

    @property
    def logit_gaps_of_all(self) -> Doubles:
        """[M]: the margins of the samples that have the loss's derivatives."""
        return np.concatenate(self.margins).astype(np.float64)

    def measured(self, rows: npt.NDArray[np.int64], loss_increases: Doubles) -> None:
        """Take measured rises [n, C] of the samples ``rows`` [n] in place of the predicted."""
        all_loss_increases = np.concatenate(self.loss_increases)
        all_loss_increases[rows] = loss_increases
        self.rise = all_loss_increases.sum(0)
        self.rise_error = all_loss_increases.std(0) / math.sqrt(len(all_loss_increases))

    def _add_sizes(self, sizes: Sums) -> None:
        for site in self.group.sites:
            axis = site.axis
            if axis in sizes:
                size = by_unit(sizes[axis].double(), site, self.group.size).sum(-1).numpy()
                self.taylor[axis] = self.taylor[axis] + size if axis in self.taylor else size

    def correlate(self, x: Tensor) -> None:
        """Take in activations at the group's first site."""
        site = self.group.sites[0]
        rows = by_unit(x.movedim(site.dim, -1).float(), site, self.group.size)
        rows = rows.transpose(-1, -2).reshape(-1, self.group.size)
        gram = rows.T @ rows
        self.gram_rows += len(rows)
        self.gram = gram if self.gram is None else self.gram + gram

    def enter(
        self, axis: Axis, x: Tensor, gradient: Tensor, samples: int, of: int | None = None
    ) -> None:
        """Take in activations and gradients at an axis, for the input moments.

        What channels have several of (a map that is flattened) counts as positions; the elements
        of a head are inputs of their own.

        Args:
            samples: of this batch.
            of: so many in all, where that is known.
        """
        channels = x.shape[axis[1]]
        positions = x.numel() // (len(x) * channels)
        share = positions_to_read(positions, channels, of) / positions
        for number, site in enumerate(self.group.sites):
            if site.axis != axis:
                continue
            inputs, slopes = (self._by_position(site, values, samples) for values in (x, gradient))
            self.inputs.setdefault(number, InputTally()).see(inputs, slopes, share, of)

    def _by_position(self, site: GateSite, values: Tensor, samples: int) -> Tensor:
        """[samples, positions, W] of what is at a site."""
        units = by_unit(values.detach().movedim(site.dim, -1).float(), site, self.group.size)
        if self.group.level is Level.CHANNEL:
            return units.transpose(-1, -2).reshape(samples, -1, self.group.size)
        return units.reshape(samples, -1, self.group.size * site.width)

    def gates(
        self,
        samples: int,
        entered: Entered | None = None,
        constants: Collection[Axis] = (),
        norms: Collection[Normalised] = (),
    ) -> GateStatistics:
        """The gate statistics of all samples.

        Args:
            entered: what entered the consumers, where slopes were looked at.
            constants: axes whose consumers can take up a constant: input moments are about means.
            norms: over all units of the group.
        """
        if not any(norm.kind == "layer" for norm in norms):
            norms = ()  # Others change nothing of what is measured.
        rated = self.rated > 0 and self.rated == self.derived
        return GateStatistics(
            layer_name=self.group.name,
            projections=np.concatenate(self.projections),
            first_order=single(self.first / max(self.derived, 1)),
            second_order=single(self.second / max(self.derived, 1)),
            removal_rise=single(self.rise / self.rated) if rated else None,
            removal_error=None if self.rise_error is None else single(self.rise_error),
            moves=np.concatenate(self.moves) if rated else None,
            margins=np.concatenate(self.margins) if rated else None,
            **self._input_moments(samples, entered, constants, norms),
        )

    def _input_moments(
        self,
        samples: int,
        entered: Entered | None,
        constants: Collection[Axis],
        norms: Collection[Normalised],
    ) -> dict[str, Any]:
        """The input moments of all sites, where they were measured at each, and a head has as many
        channels at each: they make up one array. Asked once: their sums are not kept."""
        sites = self.group.sites
        if entered is None or not self.inputs or len(self.inputs) < len(sites):
            return {}
        if self.group.level is not Level.CHANNEL and len({site.width for site in sites}) > 1:
            return {}  # The analysis ranks without them, and its decision says so.
        width = self.group.size
        if self.group.level is not Level.CHANNEL:
            width *= sites[0].width
        found = {
            "input_moments": np.empty((len(sites), width, width), np.float32),
            "input_means": np.empty((len(sites), width), np.float32),
            "sample_moments": np.empty((len(sites), width), np.float32),
        }
        # That of a single site is what its sums lie in: most are so, and large.
        own = self.inputs[0].both if len(sites) == 1 and not norms else None
        shape = (len(sites), 2, width, width)
        found["input_slopes"] = np.empty(shape, np.float32) if own is None else own[None]
        for number, site in enumerate(sites):
            at = {name: values[number] for name, values in found.items()}
            sums, centred = self._entered(entered, site), site.axis in constants
            # What it is made of is let go: its memory is the next one's.
            self.inputs.pop(number).put(at, samples, sums, centred, norms)
        return found

    def _entered(self, entered: Entered, site: GateSite) -> tuple[int, Doubles, Floats]:
        """Rows, sums and inner products of what enters at one site."""
        axis, size, by_element = (
            site.axis,
            self.group.size,
            self.group.level is not Level.CHANNEL,
        )
        rows = entered.rows[axis] * (1 if by_element else site.width)
        first = by_unit(entered.first[axis], site, size)
        first = first.flatten() if by_element else first.sum(-1)
        second = inner_products(entered.second[axis], site, size, by_element=by_element)
        return rows, _doubles(first), second.cpu().numpy()

    def channels(self, axes: Mapping[Axis, AxisTally], magnitude: Doubles) -> ChannelImportanceData:
        """The importance vectors of all samples."""
        size = self.group.size
        taylor, active, elements = np.zeros(size), np.zeros(size), 0
        gram, rows = self._gram()
        for site in self.group.sites:
            axis = axes[site.axis]
            owned = axis.elements * site.width
            if site.axis in self.taylor:
                taylor += self.taylor[site.axis] / owned
            active += by_unit(torch.from_numpy(axis.active), site, size).sum(-1).numpy()
            elements += owned
        return ChannelImportanceData(
            layer_name=self.group.name,
            taylor_importance=single(taylor),
            magnitude_importance=single(magnitude),
            activation_frequency=single(active / elements),
            channel_correlations=None if gram is None else cosines(gram),
            mean_square=None if gram is None else single(_doubles(gram.diagonal()) / rows),
        )

    def _gram(self) -> tuple[Tensor | None, int]:
        """Inner products of the units' activations at the first site, and the rows behind them."""
        if self.shared is None:
            return self.gram, self.gram_rows
        (rows, second), site, size = self.shared, self.group.sites[0], self.group.size
        gram = inner_products(second, site, size, by_element=False)
        gram = gram if self.gram is None else gram + self.gram.double().cpu()
        return gram, rows * site.width + self.gram_rows

    def heads(self, patterns: Mapping[str, Any]) -> HeadImportanceData:
        """The head statistics of all samples, with the fields of the attention patterns."""
        return HeadImportanceData(
            layer_name=self.group.name,
            gradient_sensitivity=single(self.sensitivity / max(self.derived, 1)),
            **patterns,
        )

    def unreached(self, axes: Mapping[Axis, AxisTally]) -> str:
        """The first consumer that was never called, or with no rows; empty if there is none."""
        sites = self.group.sites
        return next((site.module for site in sites if not axes[site.axis].elements), "")


def magnitudes(model: nn.Module, groups: Iterable[PruningGroup]) -> dict[str, Doubles]:
    """``[C]`` by group: the L2 norm of all the weights that produce each unit."""
    tensors = named_tensors(model)
    found: dict[str, Doubles] = {}
    for group in groups:
        produced = {
            (weight_path(layer, module, attribute), dim)
            for layer in group.layers
            for module in (layer_at(model, layer),)
            for attribute, dim in channel_axes(module).outputs[:1]
        }
        squares = np.zeros(group.size)
        for part in group.slices:
            if (part.tensor, part.dim) in produced:
                weight = tensors[part.tensor].detach().float().square()
                norms = weight.sum([d for d in range(weight.ndim) if d != part.dim]).cpu().double()
                squares += by_unit(norms, part, group.size).sum(-1).numpy()
        found[group.name] = np.sqrt(squares)
    return found


def cosines(gram: Tensor) -> npt.NDArray[np.float32]:
    """Cosine similarities from inner products; a silent channel resembles only itself."""
    inner = gram.detach().cpu()
    norms = inner.diagonal().double().sqrt()
    scales = torch.where(norms == 0, 1.0, 1 / norms)
    if inner.dtype != torch.float64:
        inner, scales = inner.float(), scales.float()
    found = (inner * scales).mul_(scales[:, None]).clamp_(-1.0, 1.0).float()
    own = found.diagonal()
    own.copy_(torch.where(own.isnan(), own, 1.0))
    cosines: npt.NDArray[np.float32] = found.numpy()
    return cosines


def single(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return values.astype(np.float32, copy=False)

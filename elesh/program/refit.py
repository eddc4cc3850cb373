"""Refits the exported network's weights after a cut, as the trainer does.

Ridge least squares say what some inputs of a consumer tell of the others, from their covariance.
Refitted weights send on almost what was sent before, not just that. Over many layers the small
differences add up, and batch normalisations keep the statistics of another network: those are moved
by what the cut does to the statistics of the calibration samples, as the trainer does.

Promises: float64; the ridge bounds the condition number of what is solved by ``1 + C / RIDGE``; the
prediction is never worse than zeros on the rows that were measured. Worker and trainer refit by the
same function, from inputs that the consumers see on the checkpoint's calibration samples; nothing
of the held-out samples is used; what is no linear map of its inputs keeps its weights. Statistics
of samples follow the trainer's rule (:mod:`elesh.trainer.surgery.reconstruction.after_cut`): means
over portions of what normalisations see when they normalise by the portion itself; small portions
are left out; statistics that are no finite numbers stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from elesh.safety import Entry
from leyline import Level, NormKind, NormSite, PrunedArchitecture

from .program import Node, Program

RIDGE = 1e-4
"""Least ridge strength, as a share of the kept channels' mean second moment."""
_FEW_ROWS, _FEW_RIDGE = 2, 1e-2
"""With fewer rows than this an unknown, the ridge is at least so strong: such a fit would follow
the samples, not the network."""


_LEAST = 1e-3
"""Gains that are smaller than so much of the largest tell nothing of what was normalised."""
_ALIKE = 1e-2
"""How far from its definition what leaves a normalisation may be (what it adds to the variance)."""


@dataclass(frozen=True)
class Predictor:
    """``x_lost ~ coefficients @ x_kept + constant``."""

    lost: Tensor
    """Behind a normalisation all channels: there what is kept changes, too."""
    kept: Tensor
    coefficients: Tensor
    """[R, K] float64."""
    constant: Tensor
    """[R] float64."""


@dataclass(frozen=True)
class Normalised:
    """Channels that leave a normalisation over all of them: ``x = gain * u + offset``, u of mean
    square 1 and, behind a layer normalisation, of mean 0 at every position.

    One of them less, and the others change: mean and variance are then taken over those that stay.
    What their joint mean of 0 says of the lost one is lost with it.
    """

    kind: Literal["layer", "rms"]
    gain: Tensor
    """[C] float64, nowhere zero."""
    offset: Tensor
    """[C] float64."""

    @classmethod
    def of(
        cls,
        kind: NormKind,
        size: int,
        gain: Tensor | None,
        offset: Tensor | None,
    ) -> Normalised | None:
        """A normalisation over ``size`` channels with these parameters, where it has some; None if
        they are no gain and offset of that many channels, a gain is next to zero, or the channels
        are not normalised position by position."""
        if kind != "layer" and kind != "rms":
            return None
        found = torch.ones(size) if gain is None else gain.detach().cpu()
        shift = torch.zeros(size) if offset is None else offset.detach().cpu()
        if found.shape != (size,) or shift.shape != (size,):
            return None
        if not found.abs().min() > _LEAST * found.abs().max():
            return None
        return cls(kind, found.double(), shift.double())

    def after(self, means: Tensor, squares: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """[K, C] and [K]: the affine map from all channels to the kept ones as they are without
        the others. How much the scale differs from position to position is left out.

        Args:
            means: [C].
            squares: [C, C], not centred.
        """
        count, size = len(kept), len(self.gain)
        chosen = torch.zeros(count, size, dtype=torch.float64)
        chosen[torch.arange(count), kept] = 1.0
        centred = chosen - chosen.mean(0) if self.kind == "layer" else chosen
        about = squares - torch.outer(means, self.offset) - torch.outer(self.offset, means)
        plain = (about + torch.outer(self.offset, self.offset)) / torch.outer(self.gain, self.gain)
        variance = float(((centred @ plain) * centred).sum()) / count
        scale = variance**-0.5 if variance > 0 else 1.0
        linear = scale * self.gain[kept, None] * centred / self.gain
        return linear, self.offset[kept] - linear @ self.offset


def normalised_by(means: Tensor, squares: Tensor, norms: Iterable[Normalised]) -> Normalised | None:
    """Which of some normalisations these channels come from; None if from none of them.

    Args:
        means, squares: [C] and [C, C] float64 of the channels.
    """
    for norm in norms:
        if norm.gain.shape != means.shape:
            continue
        variances = squares.diagonal() - 2 * means * norm.offset + norm.offset**2
        level = float((variances / norm.gain**2).mean())
        if abs(level - 1) > _ALIKE:
            continue
        if norm.kind == "rms":
            return norm
        inverse = 1 / norm.gain
        mean = float(inverse @ (squares @ inverse) - (inverse @ means) ** 2) / len(inverse) ** 2
        if abs(mean) < _ALIKE**2:
            return norm
    return None


def predict_lost(
    means: Tensor,
    squares: Tensor,
    lost: Iterable[int],
    constant: bool,
    ridge: float = RIDGE,
    rows: int = 0,
    norm: Normalised | None = None,
) -> Predictor:
    """The ridge least squares prediction of lost channels from the kept ones.

    Args:
        means: [C] float64; used where a ``constant`` is allowed, which is then not penalised.
        squares: [C, C] float64, not centred.
        ridge: as a share of the kept channels' mean second moment (variance, with a constant).
        rows: behind the moments; 0: not known, taken for many.
        norm: that the channels come from.
    """
    gone = torch.tensor(sorted(set(lost)), dtype=torch.int64)
    stays = torch.ones(len(means), dtype=torch.bool)
    stays[gone] = False
    kept = stays.nonzero().flatten()
    share = max(ridge, _FEW_RIDGE) if 0 < rows < _FEW_ROWS * len(kept) else ridge
    if norm is not None and len(kept):
        return _predict_normalised(means, squares, kept, constant, share, norm)
    inner = squares - torch.outer(means, means) if constant else squares
    among, across = inner[kept][:, kept], inner[gone][:, kept]
    coefficients = _solved(among, across, share)
    offset = means[gone] - coefficients @ means[kept]
    return Predictor(gone, kept, coefficients, offset if constant else torch.zeros_like(offset))


def _predict_normalised(
    means: Tensor,
    squares: Tensor,
    kept: Tensor,
    constant: bool,
    share: float,
    norm: Normalised,
) -> Predictor:
    """Predict, from the kept channels as they are after the cut, what all channels lost by it."""
    linear, shift = norm.after(means, squares, kept)
    left = linear @ means + shift
    if constant:
        inner = squares - torch.outer(means, means)
        among, across = linear @ inner @ linear.T, inner @ linear.T
    else:
        crossed = torch.outer(linear @ means, shift)
        among = linear @ squares @ linear.T + crossed + crossed.T + torch.outer(shift, shift)
        across = squares @ linear.T + torch.outer(means, shift)
    across[kept] -= among
    coefficients = _solved(among, across, share)
    offset = means - coefficients @ left
    offset[kept] -= left
    everything = torch.arange(len(means))
    return Predictor(
        everything, kept, coefficients, offset if constant else torch.zeros_like(offset)
    )


def _solved(among: Tensor, across: Tensor, share: float) -> Tensor:
    """[R, K]: ridge least squares coefficients."""
    strength = share * float(among.diagonal().mean()) if len(among) else 0.0
    if not strength > 0:  # Nothing but silence stays.
        return torch.zeros_like(across)
    damped = among + strength * torch.eye(len(among), dtype=among.dtype)
    found: Tensor = torch.linalg.solve(damped, across.T).T
    return found


def without_inputs(
    weight: Tensor,
    bias: Tensor | None,
    dim: int,
    groups: int,
    means: Tensor,
    squares: Tensor,
    lost: Iterable[int],
    *,
    rows: int = 0,
    norm: Normalised | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A consumer's weight and bias, float64, refitted to do without lost inputs.

    Args:
        bias: None where there is none, or no constant may be added.
        dim: the weight's dimension that counts inputs.
        groups: of a convolution; each can only make up for its own inputs from its own.
        others: see :func:`predict_lost`.
    """
    if groups == 1:
        solved = predict_lost(means, squares, lost, bias is not None, RIDGE, rows, norm)
        return _spread(weight, bias, dim, solved)
    gone, size = torch.tensor(sorted(lost)), len(means) // groups
    weights, biases = list[Tensor](), list[Tensor]()
    parts = [None] * groups if bias is None else bias.chunk(groups)
    for number, (own, part) in enumerate(zip(weight.chunk(groups), parts, strict=True)):
        at = slice(number * size, (number + 1) * size)
        inside = gone[gone // size == number] - at.start
        among = means[at], squares[at, at], inside.tolist()
        solved = predict_lost(*among, part is not None, RIDGE, rows)
        refitted, shifted = _spread(own, part, dim, solved)
        weights.append(refitted)
        biases += [] if shifted is None else [shifted]
    return torch.cat(weights), torch.cat(biases) if biases else None


def _spread(
    weight: Tensor, bias: Tensor | None, dim: int, solved: Predictor
) -> tuple[Tensor, Tensor | None]:
    """A consumer's weight and bias with the lost inputs spread over the kept ones, float64.

    Args:
        dim: the weight's dimension that counts inputs.
        bias: None where there is none, or no constant may be added.
    """
    whole = weight.detach().double().cpu().movedim(dim, 0)
    lost = whole[solved.lost]
    whole = whole.index_add(0, solved.kept, torch.tensordot(solved.coefficients.T, lost, 1))
    if bias is None:
        return whole.movedim(0, dim), None
    # Taps of a kernel all see the constant: [R, out, *kernel] to [out].
    taps = lost.flatten(2).sum(2) if lost.ndim > 2 else lost
    shift = torch.tensordot(solved.constant, taps, 1)
    return whole.movedim(0, dim), bias.detach().double().cpu() + shift


_OPERATOR = "aten.batch_norm.default"
_TRAINING, _EPSILON = 5, 7
"""Where its arguments say that it is training, and have what is added to the variance."""


@dataclass(frozen=True)
class BatchNorm:
    """A normalisation by running statistics."""

    node: str
    """Name of the value that it makes."""
    mean: str
    """Path of its running mean."""
    variance: str
    """Path of its running variance."""


def batch_norms(program: Program) -> tuple[BatchNorm, ...]:
    """The batch normalisations whose running statistics the program has as weights."""
    return tuple(found for node in program.nodes if (found := _batch_norm(program, node)))


def _batch_norm(program: Program, node: Node) -> BatchNorm | None:
    if node.operator != _OPERATOR or len(node.args) <= _EPSILON:
        return None
    if node.args[_TRAINING] is not False:
        return None
    names = [arg.get("value") if isinstance(arg, dict) else None for arg in node.args[3:5]]
    mean, variance = (program.weights.get(name or "") for name in names)
    if mean is None or variance is None:
        return None
    return BatchNorm(node.name, mean, variance)


def moved_statistic(running: Tensor, before: Tensor, after: Tensor, *, variance: bool) -> Tensor:
    """A running statistic after a change, as it was and moved by what the change did to the same
    samples' own. Some hundred samples know that far better than they know the statistic itself.

    Args:
        running: [C] means or variances, before the change.
        before, after: [C] the same of the samples.
        variance: by what factor it moves, where there was any; else by how much.
    """
    if not variance:
        return running + (after - before)
    factor = after / before.clamp_min(torch.finfo(before.dtype).tiny)
    return torch.where(before > 0, running * factor, running + after)


@dataclass
class Estimate:
    """Sums over the portions of one pass."""

    norms: tuple[BatchNorm, ...]
    sums: dict[str, Tensor] = field(default_factory=dict)
    portions: int = 0

    def instead(self) -> dict[str, Callable[..., Any]]:
        """What is to be called in place of each normalisation, by its value's name."""
        return {norm.node: partial(self._normalised, norm) for norm in self.norms}

    def means(self) -> dict[str, Tensor]:
        """The statistics by path."""
        return {path: total / max(self.portions, 1) for path, total in self.sums.items()}

    def _normalised(self, norm: BatchNorm, *args: Any) -> Tensor:
        x, weight, bias, mean, variance = args[:5]
        mean, variance = torch.zeros_like(mean), torch.ones_like(variance)
        made = nn.functional.batch_norm(
            x, mean, variance, weight, bias, training=True, momentum=1.0, eps=args[_EPSILON]
        )
        for path, value in ((norm.mean, mean.float()), (norm.variance, variance.float())):
            self.sums[path] = self.sums[path] + value if path in self.sums else value
        return made


@dataclass(frozen=True)
class Consumer:
    """What reads the units at one gate: a linear layer or a convolution."""

    weight: str
    """Path of its weight."""
    dim: int
    """The weight's dimension that counts inputs."""
    bias: str | None
    """Path of its bias, where a constant input is the same as a larger bias everywhere."""
    groups: int = 1
    """Of a convolution."""


def consumer_of(program: Program, module: str) -> Consumer | None:
    """What the program does with the weight of ``module``; None if that is no linear map of all
    that enters, so that there is nothing to refit."""
    path = f"{module}.weight"
    names = {name for name, own in program.weights.items() if own == path}
    found = [
        node
        for node in program.nodes
        for part in (*node.args, *node.kwargs.values())
        if isinstance(part, dict) and part.get("value") in names
    ]
    if len(found) == 1:
        node = found[0]
        kind = node.operator.split(".")[1]
        if kind == "linear":
            return Consumer(path, 1, _path(program, node, 2))
        if kind in ("conv1d", "conv2d", "conv3d"):
            bias = None if _pads(node) else _path(program, node, 2)
            return Consumer(path, 1, bias, _groups(node))
        if kind.startswith("conv_transpose"):
            return Consumer(path, 0, None)
        if kind == "addmm" and _value(node, 2) in names:
            return Consumer(path, 0, _path(program, node, 0))
        if kind in ("mm", "matmul") and _value(node, 1) in names:
            return Consumer(path, 0, None)
    return None


@dataclass
class Refit:
    """Refits the consumers of cuts of one program.

    Args:
        inputs: by gate (module, axis): means [C], second moments [C, C] and rows of what enters.
        skip: consumers that keep their weights.
        norms: batch normalisations whose running statistics move along with refitting.
    """

    program: Program
    architecture: PrunedArchitecture
    weights: Mapping[str, Tensor]
    inputs: Mapping[tuple[str, int], tuple[Tensor, Tensor, int]]
    skip: Collection[str] = ()
    norms: tuple[BatchNorm, ...] = ()

    def of(self, entries: Sequence[Entry]) -> dict[str, Tensor]:
        """The refitted weights, by path, once the units of ``entries`` are gone."""
        lost: dict[tuple[str, int], set[int]] = {}
        norms: dict[tuple[str, int], dict[str, NormSite]] = {}
        layers = {name for level, name, _ in entries if level is Level.LAYER}
        dead = {path for name in layers for path in self.architecture.block[name].tensors}
        for level, name, unit in entries:
            if level is Level.LAYER:
                continue
            for site in self.architecture.group[name].sites:
                lost.setdefault((site.module, site.dim), set()).update(site.of(unit))
                over = {norm.module: norm for norm in self.architecture.group[name].norms}
                norms.setdefault((site.module, site.dim), {}).update(over)
        found: dict[str, Tensor] = {}
        for (module, dim), gone in lost.items():
            if module in self.skip or f"{module}.weight" in dead:
                continue
            consumer = consumer_of(self.program, module)
            if consumer is None:
                continue
            means, squares, rows = self.inputs[module, dim]
            norm, sites = None, norms[module, dim].values()
            if sites:
                norm = normalised_by(means, squares, self._normalised(sites, len(means)))
            weight = self.weights[consumer.weight]
            bias = None if consumer.bias is None else self.weights[consumer.bias]
            how = consumer.dim, consumer.groups
            refitted, shifted = without_inputs(
                weight, bias, *how, means, squares, gone, rows=rows, norm=norm
            )
            if torch.isfinite(refitted).all():
                found[consumer.weight] = refitted.to(weight.dtype).contiguous()
                if consumer.bias is not None and bias is not None and shifted is not None:
                    found[consumer.bias] = shifted.to(bias.dtype)
        return found

    def _normalised(self, sites: Iterable[NormSite], size: int) -> list[Normalised]:
        """The normalisations at some sites, as far as they are over ``size`` channels."""
        found = []
        for site in sites:
            gain, offset = (self.weights.get(f"{site.module}.{x}") for x in ("weight", "bias"))
            found.append(Normalised.of(site.kind, size, gain, offset))
        return [norm for norm in found if norm is not None]


def _groups(node: Node) -> int:
    """How many groups a convolution has."""
    return int(node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1))


def _pads(node: Node) -> bool:
    """Whether a convolution pads its input with zeros."""
    padding = node.args[4] if len(node.args) > 4 else node.kwargs.get("padding", 0)
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def _value(node: Node, place: int) -> str | None:
    """The name of the value that an argument refers to."""
    given = node.args[place] if place < len(node.args) else None
    if given is None and place == 2:
        given = node.kwargs.get("bias")
    return given.get("value") if isinstance(given, dict) else None


def _path(program: Program, node: Node, place: int) -> str | None:
    name = _value(node, place)
    return None if name is None else program.weights.get(name)

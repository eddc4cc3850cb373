"""Ridge least squares: what some inputs of a consumer say of the others, from their covariance.

Promises: float64; the ridge bounds the condition number of what is solved by ``1 + C / RIDGE``; the
prediction is never worse than zeros on the rows that were measured. Worker and trainer refit by
this one function.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["RIDGE", "Normalised", "Predictor", "normalised_by", "predict_lost", "spread"]

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
    What they say of the lost one by having mean 0 together they do not say any more.
    """

    kind: Literal["layer", "rms"]
    gain: Tensor
    """[C] float64, nowhere zero."""
    offset: Tensor
    """[C] float64."""

    @classmethod
    def of(
        cls, kind: Literal["layer", "rms"], size: int, gain: Tensor | None, offset: Tensor | None
    ) -> Normalised | None:
        """A normalisation over ``size`` channels with these parameters, where it has some; None if
        they are no gain and offset of that many channels, or a gain is next to zero."""
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
        inverse = 1 / norm.gain
        mean = float(inverse @ (squares - torch.outer(means, means)) @ inverse) / len(inverse) ** 2
        if norm.kind == "rms" or abs(mean) < _ALIKE**2:
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
    """Of what all channels were beyond what the kept ones are after the cut, from the latter."""
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


def spread(
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

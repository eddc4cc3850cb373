"""Ridge least squares: what some inputs of a consumer say of the others, from their covariance.

Promises: float64; the ridge bounds the condition number of what is solved by ``1 + C / RIDGE``; the
prediction is never worse than zeros on the rows that were measured. Worker and trainer refit by
this one function.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RIDGE", "Predictor", "predict_lost", "spread"]

RIDGE = 1e-4
"""Least ridge strength, as a share of the kept channels' mean second moment."""
_FEW_ROWS, _FEW_RIDGE = 2, 1e-2
"""With fewer rows than this an unknown, the ridge is at least so strong: such a fit would follow
the samples, not the network."""


@dataclass(frozen=True)
class Predictor:
    """``x_lost ~ coefficients @ x_kept + constant``."""

    lost: Tensor
    kept: Tensor
    coefficients: Tensor
    """[R, K] float64."""
    constant: Tensor
    """[R] float64."""


def predict_lost(
    means: Tensor,
    squares: Tensor,
    lost: Iterable[int],
    constant: bool,
    ridge: float = RIDGE,
    rows: int = 0,
) -> Predictor:
    """The ridge least squares prediction of lost channels from the kept ones.

    Args:
        means: [C] float64; used where a ``constant`` is allowed, which is then not penalised.
        squares: [C, C] float64, not centred.
        ridge: as a share of the kept channels' mean second moment (variance, with a constant).
        rows: behind the moments; 0: not known, taken for many.
    """
    gone = torch.tensor(sorted(set(lost)), dtype=torch.int64)
    stays = torch.ones(len(means), dtype=torch.bool)
    stays[gone] = False
    kept = stays.nonzero().flatten()
    inner = squares - torch.outer(means, means) if constant else squares
    among, across = inner[kept][:, kept], inner[gone][:, kept]
    share = max(ridge, _FEW_RIDGE) if 0 < rows < _FEW_ROWS * len(kept) else ridge
    strength = share * float(among.diagonal().mean()) if len(kept) else 0.0
    if not strength > 0:  # Nothing but silence stays.
        coefficients = torch.zeros_like(across)
    else:
        damped = among + strength * torch.eye(len(kept), dtype=among.dtype)
        coefficients = torch.linalg.solve(damped, across.T).T
    offset = means[gone] - coefficients @ means[kept]
    return Predictor(gone, kept, coefficients, offset if constant else torch.zeros_like(offset))


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

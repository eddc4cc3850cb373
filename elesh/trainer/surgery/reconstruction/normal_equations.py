"""Ridge least squares, with a ridge that helps on samples not used for the solution.

Promises: a change of coefficients is given only where it brings the outputs nearer on the half of
the samples that it was not solved on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGES = (1e-2, 1e-1)
"""Strengths of the ridge that are tried, as shares of the inputs' mean second moment; the first
that does any good is taken."""
_BLOCK = 128
"""Columns of the normal equations that are multiplied at a time."""


@dataclass
class NormalEquations:
    """Sums of one half of the samples; products in float32 within a chunk, sums in float64."""

    among: Tensor
    """[K, K]; what lies above the diagonal may be missing."""
    across: Tensor
    """[K, C]."""
    rows: int = 0

    @classmethod
    def empty(cls, inputs: int, outputs: int) -> NormalEquations:
        """Those of nothing."""
        return cls(
            torch.zeros(inputs, inputs, dtype=torch.float64),
            torch.zeros(inputs, outputs, dtype=torch.float64),
        )

    def see(self, rows: Tensor, missing: Tensor) -> None:
        """Take in [N, K] inputs and [N, C] of what the outputs lack. Where there is a coefficient
        more, it is that of a constant input."""
        inputs = rows.shape[1]
        for first in range(0, inputs, _BLOCK):  # Of a symmetric matrix one side is enough.
            own = slice(first, min(first + _BLOCK, inputs))
            self.among[first:inputs, own] += (rows[:, first:].T @ rows[:, own]).double().cpu()
        self.across[:inputs] += (rows.T @ missing).double().cpu()
        if len(self.among) > inputs:
            totals = rows.sum(0).double().cpu()
            self.among[-1, :inputs] += totals
            self.among[-1, -1] += len(rows)
            self.across[-1] += missing.sum(0).double().cpu()
        self.rows += len(rows)

    def single(self) -> NormalEquations:
        """The same in float32, which is enough to choose by."""
        return NormalEquations(self.among.float(), self.across.float(), self.rows)

    def gain(self, change: Tensor) -> float:
        """How much the squared error falls, by a change of the coefficients."""
        found = self.whole @ change
        return float((change * (2 * self.across - found)).sum())

    @property
    def whole(self) -> Tensor:
        """[K, K]: both sides of ``among``."""
        lower = self.among.tril()
        return lower + lower.tril(-1).T


def solved_by_halves(first: NormalEquations, second: NormalEquations) -> Tensor | None:
    """[K, C]: the change of the coefficients, by the first ridge that does any good on the half
    that it was not solved on; None where none does."""
    if not first.rows or not second.rows:
        return None
    some, others = first.single(), second.single()
    best = next((ridge for ridge in _RIDGES if others.gain(_ridge(some, ridge)) > 0), None)
    if best is None:
        return None
    both = NormalEquations(first.among + second.among, first.across + second.across)
    return _ridge(both, best)


def _ridge(sums: NormalEquations, ridge: float) -> Tensor:
    squares = sums.among.diagonal()
    heard = squares[squares > 0]  # Masked inputs are none: a cut one is solved alike.
    strength = ridge * float(heard.mean()) if len(heard) else 0.0
    damped = sums.among.clone()
    damped.diagonal().add_(max(strength, 1e-30))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return torch.full_like(sums.across, float("nan"))
    return torch.cholesky_solve(sums.across, factor)

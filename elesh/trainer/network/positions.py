"""Which positions of a feature map second moments are summed over.

A map of 56 x 56 has 3136 positions a sample, and neighbours are much alike: the second moments of
C channels need no half million rows. Promises: of what a least-squares fit is made from, at least
64 rows for every channel are read, or all there are (the fit then errs by a hundredth of its
residual beyond the best); positions are spread evenly over the map, one drawn from each stretch
of it, so that no row or column is preferred; the same call draws the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["input_positions", "positions_drawn", "slope_positions"]

_ROWS, _LEAST = 64, 32
"""For every channel of what enters; of every sample."""
_SLOPE_ROWS, _LEAST_SLOPES = 4096, 8
"""Of slopes, in all: costs are quadratic forms in their second moments, and err by the square root
of 2 / rows whatever the number of channels."""


def input_positions(positions: int, channels: int, samples: int | None) -> int:
    """At how many of a sample's ``positions`` inputs are read.

    Args:
        channels: that the second moments are of.
        samples: that there are in all; None: not known, and all positions are read.
    """
    return _enough(positions, _ROWS * channels, _LEAST, samples)


def slope_positions(positions: int, samples: int | None) -> int:
    """At how many of a sample's ``positions`` slopes are read."""
    return _enough(positions, _SLOPE_ROWS, _LEAST_SLOPES, samples)


def _enough(positions: int, rows: int, least: int, samples: int | None) -> int:
    if samples is None:
        return positions
    enough = max(least, math.ceil(rows / samples))
    return enough if 2 * enough <= positions else positions


def positions_drawn(positions: int, count: int, draw: int) -> Tensor | None:
    """[count]: the positions to read, rising; None: all of them.

    Args:
        draw: calls of other numbers draw others.
    """
    if count == positions:
        return None
    within = torch.rand(count, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
    drawn = (torch.arange(count) + within) * (positions / count)
    return drawn.long().clamp_(max=positions - 1)

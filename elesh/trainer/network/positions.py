"""Which positions of a feature map second moments are summed over.

A map of 56 x 56 has 3136 positions a sample, and neighbours are much alike: the second moments of
C channels need no half million rows. Promises: with what is looked at of every sample there are at
least 64 rows for every channel (a least-squares fit of C channels then errs by a hundredth of its
residual beyond the best), or all there are; positions are spread evenly over the map, each drawn
from its own stretch, so that no row or column of it is preferred; the same call draws the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["positions_read", "positions_to_read"]

_ROWS = 64
"""For every channel."""
_LEAST = 64
"""Of every sample."""


def positions_to_read(positions: int, channels: int, samples: int | None) -> int:
    """How many of a sample's ``positions`` are looked at.

    Args:
        channels: that the second moments are of.
        samples: that there are in all; None: not known, and all positions are looked at.
    """
    if samples is None:
        return positions
    enough = max(_LEAST, math.ceil(_ROWS * channels / samples))
    return enough if 2 * enough <= positions else positions


def positions_read(positions: int, channels: int, samples: int | None, draw: int) -> Tensor | None:
    """[k]: the positions to look at, rising; None: all of them.

    Args:
        draw: calls of other numbers draw others.
    """
    count = positions_to_read(positions, channels, samples)
    if count == positions:
        return None
    within = torch.rand(count, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
    drawn = (torch.arange(count) + within) * (positions / count)
    return drawn.long().clamp_(max=positions - 1)

"""The positions of a feature map over which second moments are summed.

A map of 56 x 56 has 3136 positions a sample, and neighbours are much alike: the second moments of
C channels need no half million rows. Promises: at least 64 rows for every channel are read, or all
there are (a least-squares fit then errs by a hundredth of its residual beyond the best); maps of up
to 64 positions are read whole; positions are spread evenly over a map, one drawn from each stretch
of it, so that no row or column is preferred; the same call draws the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROWS, _LEAST = 64, 32
"""For every channel; of every sample."""


def positions_to_read(positions: int, channels: int, samples: int | None) -> int:
    """At how many of a sample's ``positions`` channels are read: all, where fewer would not save
    more than half.

    Args:
        channels: that the second moments are of.
        samples: that there are in all; None: not known, and all positions are read.
    """
    if samples is None:
        return positions
    enough = max(_LEAST, math.ceil(_ROWS * channels / samples))
    return enough if 2 * enough < positions else positions


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

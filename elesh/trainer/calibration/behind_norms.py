"""Input moments of units that pass a normalisation over all of them, as the analysis needs them.

Behind a layer normalisation the channels have mean 0 together, so each is, exactly, what the others
leave over: its residual given the others would be nothing, and every one of them free. But without
it the normalisation takes its mean over those that stay. So the analysis gets (u: channels before
gain and offset)

- moments in which the common mean of all u is unknown: a constant of large variance is added to
  all of them, so that only differences between channels predict anything;
- slopes along what is left of a residual once the mean over all channels is taken away again.

The residual of differences, weighed with these, is what the outputs lose. Promises: units that pass
no such normalisation keep their moments bit for bit; rms normalisations change nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from elesh.program.refit import Normalised, normalised_by

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]
_UNKNOWN = 4.0
"""Variance of the added constant, in that of a channel: as the analysis' ridge is a share of the
mean moment, more would damp what is predicted."""


def behind_norm(
    fields: Mapping[str, Floats], raw: Doubles, norms: Iterable[Normalised]
) -> dict[str, Floats]:
    """The fields of one site (``input_moments`` and so on), for where its inputs come from.

    Args:
        fields: of W inputs, one a unit.
        raw: [W] means over samples and positions, whether or not the consumer takes up a constant.
        norms: over all units of the group.
    """
    found = dict(fields)
    moments, centre = fields["input_moments"], fields["input_means"]
    squares = torch.from_numpy(moments + np.outer(centre, centre))
    norm = normalised_by(torch.from_numpy(raw), squares, norms)
    if norm is None or norm.kind != "layer":
        return found
    gain = norm.gain.numpy()
    common = _UNKNOWN * np.outer(gain, gain)
    diagonal = moments.diagonal()
    grown = np.divide(
        diagonal + common.diagonal(), diagonal, out=np.ones_like(diagonal), where=diagonal > 0
    )
    found["input_moments"] = moments + common
    found["sample_moments"] = fields["sample_moments"] * grown
    found["input_slopes"] = np.stack([_left_over(one, gain) for one in fields["input_slopes"]])
    return found


def _left_over(slopes: Floats, gain: Doubles) -> Doubles:
    """``L' S L`` with L what takes the mean over all u away: ``1 - outer(gain, 1 / gain) / W``."""
    share = 1 / gain / len(gain)
    rows = slopes - np.outer(share, gain @ slopes)
    rows -= np.outer(rows @ gain, share)
    return rows

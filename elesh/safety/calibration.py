"""How far predictions of the loss rise are off in one run, from cuts that were only measured.

Pure. In the preparation phase nothing is cut, but where a checkpoint carries its network, cuts that
might be proposed later are predicted and measured. Where nothing can be measured later, their ratio
says how much too low a prediction may be (decision 0062).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from elesh.settings import VerificationSettings
from leyline import LossFactor, WouldBeCut

__all__ = ["calibrated"]

VERSION = 1
_LEAST_NATS = 1e-3
"""Of a prediction: the ratio to a smaller one is noise."""
_DECILE = -1
"""The ninth of nine: nine of ten measured rises are below the prediction times it."""
_AT_MOST = 2.0
"""Times the default; a run whose predictions are worse than that shows that in its measurements."""


def calibrated(cuts: Iterable[WouldBeCut], settings: VerificationSettings) -> LossFactor | None:
    """The run's own factor; None while too few of its cuts tell anything, or the settings ask for
    none. Between 1 and twice the default."""
    least = settings.calibration_measurements
    ratios = [c.measured / c.predicted for c in cuts if c.predicted >= _LEAST_NATS]
    if not least or len(ratios) < max(2, least):
        return None
    high = statistics.quantiles(ratios, n=10, method="inclusive")[_DECILE]
    factor = min(max(high, 1.0), _AT_MOST * settings.predicted_loss_factor)
    return LossFactor(version=VERSION, factor=round(factor, 3), measurements=len(ratios))

"""The measurements of one group over the newest checkpoints, and what follows from them.

Promises: the state is a function of the set of (epoch, row) that was added, whatever the order
and however often; every figure runs over the checkpoints in the order of their epochs, sums in
float64, elementwise, so that it is the same for every thread count.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elesh.analysis.candidates import Doubles, Floats
from leyline import Conflict

__all__ = ["Counts", "History", "Recent"]

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recent:
    """Figures over each unit's newest checkpoints; all [M, C], NaN where there are none."""

    latest: Doubles
    slope: Doubles
    """Least-squares slope over the checkpoint's place in the history: change a checkpoint."""
    variance: Doubles
    """Population variance."""


class History:
    """At most ``limit`` rows [M, C] float32 of M metrics of C units, the newest epochs kept.

    A unit that is not there at a checkpoint is NaN in its row. Rows lie in the order of arrival
    and are read in the order of their epochs; memory grows to ``4 * limit * M * C`` bytes.
    """

    def __init__(self, metrics: int, units: int, limit: int) -> None:
        self.limit = limit
        self.shape = (metrics, units)
        self._epochs: list[int] = []
        self._places: dict[int, int] = {}
        self._rows: Floats = np.empty((0, *self.shape), np.float32)

    @property
    def epochs(self) -> tuple[int, ...]:
        """Epochs of the rows, rising."""
        return tuple(self._epochs)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self._rows.nbytes

    def row(self, epoch: int) -> Floats:
        """[M, C]: the row of an epoch that is there (a view)."""
        return np.asarray(self._rows[self._places[epoch]])

    def rows(self) -> Iterator[Floats]:
        """All rows, oldest first."""
        return map(self.row, self._epochs)

    def check(self, epoch: int, row: Floats) -> bool:
        """Whether the row would be taken: not if it is there already or older than all of a full
        history.

        Raises:
            Conflict: if the epoch holds another row.
        """
        if epoch in self._places:
            known = self.row(epoch)
            if np.array_equal(known, row, equal_nan=True):
                return False
            metric, unit = np.argwhere(~((known == row) | (np.isnan(known) & np.isnan(row))))[0]
            raise Conflict(
                f"epoch {epoch}, metric {metric}, unit {unit}",
                f"{known[metric, unit]:.9g} as before",
                f"{row[metric, unit]:.9g}",
                hint="one epoch has one measurement; nothing was changed",
            )
        return len(self._epochs) < self.limit or epoch > self._epochs[0]

    def add(self, epoch: int, row: Floats) -> bool:
        """Take the row if :meth:`check` says so, in place of the oldest where the history is full;
        returns whether it was taken."""
        if not self.check(epoch, row):
            return False
        if len(self._epochs) == self.limit:
            place = self._places.pop(self._epochs.pop(0))
        else:
            place = len(self._epochs)
            self._reserve(place + 1)
        self._rows[place] = row
        self._places[epoch] = place
        insort(self._epochs, epoch)
        return True

    def _reserve(self, rows: int) -> None:
        if rows > len(self._rows):
            grown = np.empty((min(self.limit, max(8, 2 * len(self._rows))), *self.shape), "f4")
            grown[: len(self._rows)] = self._rows
            self._rows = grown

    def counts(self) -> Counts:
        """[C]: at how many checkpoints each unit was there."""
        present = np.zeros(self.shape[1], np.int64)
        for row in self.rows():
            present += ~np.isnan(row[0])
        return present

    def ema(self, momentum: float) -> Doubles:
        """[M, C]: exponential moving average over each unit's checkpoints, NaN without any.

        Kingma and Ba, "Adam" (2015), section 3: ``m <- momentum * m + (1 - momentum) * x``,
        divided at the end by ``1 - momentum^n``, n being the unit's checkpoints in the history.
        """
        average = np.zeros(self.shape)
        for row in self.rows():
            present = ~np.isnan(row)
            step = (1 - momentum) * (row - average)
            np.add(average, step, out=average, where=present)
        weight = 1 - momentum ** self.counts().astype(np.float64)
        return np.asarray(
            np.divide(average, weight, out=np.full(self.shape, np.nan), where=weight > 0)
        )

    def recent(self, window: int) -> Recent:
        """Figures over the newest ``window`` checkpoints of each unit.

        A unit's own newest ones, so that a unit that was cut keeps its figures. One pass from the
        newest row back, with Welford's updates (Technometrics 1962): exact for constants, no loss
        by cancellation.
        """
        seen = np.zeros(self.shape)
        latest = np.full(self.shape, np.nan)
        mean_x, mean_y, var_x, var_y, cov = (np.zeros(self.shape) for _ in range(5))
        for x, epoch in zip(range(0, -len(self._epochs), -1), reversed(self._epochs), strict=True):
            if (seen >= window).all():
                break
            row = self.row(epoch)
            take = ~np.isnan(row) & (seen < window)
            y = np.where(take, row, 0).astype(np.float64)
            np.copyto(latest, y, where=take & (seen == 0))
            seen += take
            share = np.divide(take, seen, out=np.zeros(self.shape), where=seen > 0)
            dx, dy = (x - mean_x) * take, (y - mean_y) * take
            mean_x += dx * share
            mean_y += dy * share
            var_x += dx * (x - mean_x)
            var_y += dy * (y - mean_y)
            cov += dx * (y - mean_y)
        slope = np.divide(cov, var_x, out=np.zeros(self.shape), where=var_x > 0)
        variance = np.divide(var_y, seen, out=np.zeros(self.shape), where=seen > 0)
        never = seen == 0
        return Recent(latest, np.where(never, np.nan, slope), np.where(never, np.nan, variance))

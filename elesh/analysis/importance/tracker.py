"""ImportanceTracker: how the importance of channels, heads and layers changes over checkpoints.

Promises: the state is a function of the set of measurements that were observed, those of the newest
500 epochs of every group: late, repeated and reordered ones give the same bytes. Every figure runs
over the checkpoints in the order of their epochs, sums in float64, elementwise, so that it is the
same for every thread count. An epoch that comes again with other values is a named error and
changes nothing; one older than a full history is dropped. Units go by their original numbers, so
that history survives pruning.

Everything here is exact: units are few (10^3 to 10^6), so every value is kept, in dense arrays of
float32. Single parameters are not few: for them there is :mod:`elesh.analysis.sketch.count_min`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from elesh.analysis.candidates import Doubles, Floats
from elesh.analysis.sketch.count_min import require_format
from leyline import (
    ChannelImportanceData,
    CheckpointBundle,
    Conflict,
    InvalidField,
    Level,
    Malformed,
    PruningGroup,
    ShapeMismatch,
)
from leyline.arrays import pack_arrays, require_finite, unpack_arrays

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recent:
    """Figures over each unit's newest checkpoints; all [M, C], NaN where there are none."""

    latest: Doubles
    slope: Doubles
    """Least-squares slope over the checkpoint's place in the history: change a checkpoint."""
    variance: Doubles
    """Population variance."""


class MetricHistory:
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
            if place == len(self._rows):
                grown = np.empty((min(self.limit, max(8, 2 * place)), *self.shape), "f4")
                grown[:place] = self._rows
                self._rows = grown
        self._rows[place] = row
        self._places[epoch] = place
        insort(self._epochs, epoch)
        return True

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


METRICS: Mapping[Level, tuple[str, ...]] = {
    Level.CHANNEL: ("taylor", "magnitude", "frequency"),
    Level.HEAD: ("entropy", "diversity", "gradient"),
    Level.LAYER: ("taylor", "gradient_flow", "similarity"),
}
"""What is tracked of a unit of each level, in the order of the rows."""
MOMENTUM = 0.99
WINDOW = 50
"""Checkpoints that trend and variance look back."""
_FORMAT, _VERSION = "elesh.importance-tracker", "1"
_MAX_EPOCH = 10**10
_SPLIT = 1 << 20
"""Epochs cross as two float32 numbers, exactly: the multiples of this and the rest."""

_Key = tuple[Level, str]
_Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Track:
    """One metric of a group's units; arrays [C] in the group's current numbering.

    A unit that was never measured has count 0 and NaN everywhere else.
    """

    count: Counts
    """Checkpoints in the history at which the unit was there."""
    latest: Doubles
    """Its newest value."""
    ema: Doubles
    """Exponential moving average, momentum 0.99 a checkpoint, debiased, over the history."""
    trend: Doubles
    """Slope of the linear regression over its newest 50 checkpoints, a checkpoint; 0 for one."""
    variance: Doubles
    """Population variance over the same window."""

    @property
    def stability(self) -> Doubles:
        """1 / (1 + variance), 0 to 1 (FACTS, "Importance").

        It means something only for metrics on a scale near 1, such as shares of the largest of
        the group: for values of 1e-5 it is 1 whatever they do.
        """
        return np.asarray(1 / (1 + self.variance))


def channel_metrics(data: ChannelImportanceData) -> dict[str, Floats]:
    """The tracked metrics of a channel group's statistics."""
    return {
        "taylor": data.taylor_importance,
        "magnitude": data.magnitude_importance,
        "frequency": data.activation_frequency,
    }


class ImportanceTracker:
    """Histories of the metrics of :data:`METRICS` by level and group.

    Memory: at most ``12 * history`` bytes a unit (three metrics of float32).

    Args:
        history: checkpoints kept a group (``importance_history_epochs`` of the settings).
    """

    def __init__(self, history: int = 500) -> None:
        if history < 1:
            raise InvalidField("tracker.history", "at least 1 checkpoint", history)
        self.history = history
        self._groups: dict[_Key, MetricHistory] = {}

    def observe(self, epoch: int, group: PruningGroup, values: Mapping[str, npt.ArrayLike]) -> bool:
        """Take the measurements of a group at an epoch; returns whether the state changed.

        Args:
            group: as it is at this epoch; only name, level, ``origin`` and ``original_size`` count.
            values: every metric of the group's level, [C] each, in current numbering, finite.

        Raises:
            Conflict: if the epoch was observed with other values or other units.
            InvalidField, ShapeMismatch, NotFinite: naming the group and metric that is wrong.
        """
        if not 0 <= epoch < _MAX_EPOCH:
            raise InvalidField("epoch", f"from 0 to {_MAX_EPOCH - 1}", epoch)
        row = _row(group, values)
        key = (group.level, group.name)
        known = self._groups.get(key)
        if known is None:
            known = MetricHistory(row.shape[0], row.shape[1], self.history)
        elif known.shape != row.shape:
            raise ShapeMismatch(_name(key), f"{known.shape[1]} original units", group.original_size)
        try:
            taken = known.add(epoch, row)
        except Conflict as error:
            raise error.inside(_name(key)) from None
        self._groups[key] = known
        return taken

    def epochs(self, group: PruningGroup) -> tuple[int, ...]:
        """The epochs in a group's history, rising; empty for a group that was never observed."""
        known = self._groups.get((group.level, group.name))
        return known.epochs if known is not None else ()

    def track(self, group: PruningGroup) -> dict[str, Track]:
        """What is known of a group's units, by metric.

        Raises:
            InvalidField: if the group was never observed.
        """
        known, units = self._known(group), list(group.origin)
        count, ema, recent = known.counts()[units], known.ema(MOMENTUM), known.recent(WINDOW)
        return {
            metric: Track(
                count=count,
                latest=recent.latest[m, units],
                ema=ema[m, units],
                trend=recent.slope[m, units],
                variance=recent.variance[m, units],
            )
            for m, metric in enumerate(METRICS[group.level])
        }

    def merge(self, other: ImportanceTracker) -> None:
        """Take everything that ``other`` holds, as if it had been observed here.

        The other may keep another number of checkpoints (the setting was changed while the run
        went on); the newest of them stay, as many as this one keeps.

        Raises:
            Conflict, ShapeMismatch: if they disagree on an epoch or a group; nothing was changed.
        """
        for key, theirs in other._groups.items():
            mine = self._groups.get(key)
            if mine is None:
                continue
            if mine.shape != theirs.shape:
                raise ShapeMismatch(_name(key), f"shape {mine.shape}", f"shape {theirs.shape}")
            try:
                for epoch in theirs.epochs:
                    mine.check(epoch, theirs.row(epoch))
            except Conflict as error:
                raise error.inside(_name(key)) from None
        for key, theirs in other._groups.items():
            mine = self._groups.setdefault(key, MetricHistory(*theirs.shape, self.history))
            for epoch in theirs.epochs:
                mine.add(epoch, theirs.row(epoch))

    def to_bytes(self) -> bytes:
        """Safetensors, the same bytes for the same state.

        For each group ``<level>/<name>/``: ``epochs`` [n, 2] float32, ``values`` [n, M, C] float32
        by rising epoch and original unit, ``present`` [n, C] float16 (1 where the unit was there;
        values are 0 elsewhere).
        """
        rows = {key: (own.epochs, np.stack(list(own.rows()))) for key, own in self._groups.items()}
        return _packed(rows, self.history)

    @classmethod
    def of_epochs(cls, run_id: str, blobs: Mapping[int, bytes], history: int) -> ImportanceTracker:
        """The tracker of a run, by what was kept of its epochs (:func:`measurements_of`).

        Raises:
            ContractError: if a blob is not what it should be, or contradicts another.
        """
        tracker = cls(history)
        for epoch, blob in sorted(blobs.items()):
            tracker.merge(cls.from_bytes(blob, field=f"history.{run_id}.{epoch}"))
        return tracker

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, field: str = "tracker") -> ImportanceTracker:
        """The tracker that :meth:`to_bytes` wrote.

        Raises:
            ContractError: naming the tensor of the blob that is not what it should be.
        """
        arrays, metadata = unpack_arrays(data, field=field)
        require_format(metadata, _FORMAT, _VERSION, field)
        limit = metadata.get("history", "")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 10):
            raise Malformed(f"{field}.__metadata__.history", "a number of checkpoints", limit)
        tracker = cls(int(limit))
        by_group: dict[_Key, _Arrays] = {}
        for name, array in arrays.items():
            level, _, rest = name.partition("/")
            group, _, part = rest.rpartition("/")
            if level not in METRICS or not group or part not in ("epochs", "values", "present"):
                raise Malformed(f"{field}.{name}", "<level>/<group>/<epochs|values|present>", name)
            by_group.setdefault((Level(level), group), {})[part] = array
        for key, parts in by_group.items():
            tracker._groups[key] = _read_history(f"{field}.{_name(key)}", key[0], parts, int(limit))
        return tracker

    def _known(self, group: PruningGroup) -> MetricHistory:
        known = self._groups.get((group.level, group.name))
        if known is None:
            raise InvalidField(
                f"tracker.{group.level}/{group.name}", "a group that was observed", ""
            )
        if known.shape[1] != group.original_size:
            where = f"tracker.{group.level}/{group.name}"
            raise ShapeMismatch(where, f"{known.shape[1]} original units", group.original_size)
        return known


def _name(key: _Key) -> str:
    return f"{key[0]}/{key[1]}"


def _row(group: PruningGroup, values: Mapping[str, npt.ArrayLike]) -> Floats:
    """[M, original size] float32: the values in original numbering, NaN for units that are gone."""
    metrics = METRICS.get(group.level)
    if metrics is None:
        levels = ", ".join(METRICS)
        raise InvalidField(f"{group.name}.level", f"one of {levels}", str(group.level))
    if set(values) != set(metrics):
        raise InvalidField(f"{group.name}.values", f"the metrics {', '.join(metrics)}", [*values])
    row = np.full((len(metrics), group.original_size), np.nan, np.float32)
    units = list(group.origin)
    for m, metric in enumerate(metrics):
        wide = np.asarray(values[metric], dtype=np.float64)
        where = f"{group.name}/{metric}"
        if wide.shape != (group.size,):
            raise ShapeMismatch(where, f"shape {(group.size,)}", f"shape {wide.shape}")
        with np.errstate(over="ignore"):
            # Adding 0 makes -0 a 0: what compares as equal must be the same bytes.
            narrow = wide.astype(np.float32) + np.float32(0)
        require_finite(where, narrow)
        row[m, units] = narrow
    return row


def _read_history(field: str, level: Level, parts: _Arrays, limit: int) -> MetricHistory:
    """The history of one group of a blob."""
    if parts.keys() != {"epochs", "values", "present"}:
        raise Malformed(field, "epochs, values and present", sorted(parts))
    epochs, values, present = parts["epochs"], parts["values"], parts["present"]
    metrics = len(METRICS[level])
    if values.ndim != 3 or values.dtype != np.float32 or values.shape[1] != metrics:
        raise ShapeMismatch(f"{field}/values", f"[n, {metrics}, C] float32", _kind(values))
    count, _, units = values.shape
    if not 1 <= count <= limit:
        raise ShapeMismatch(f"{field}/values", f"1 to {limit} checkpoints", count)
    if epochs.shape != (count, 2) or epochs.dtype != np.float32:
        raise ShapeMismatch(f"{field}/epochs", f"[{count}, 2] float32", _kind(epochs))
    if present.shape != (count, units) or not np.isin(present, (0, 1)).all():
        raise ShapeMismatch(f"{field}/present", f"[{count}, {units}] of 0 and 1", _kind(present))
    require_finite(f"{field}/values", values)
    history = MetricHistory(metrics, units, limit)
    numbers = _epochs(field, epochs)
    rows = np.where(present[:, None, :] == 1, values + np.float32(0), np.float32(np.nan))
    for epoch, row in zip(numbers, rows, strict=True):
        history.add(epoch, row)
    return history


def _epochs(field: str, parts: npt.NDArray[Any]) -> list[int]:
    """The rising epochs of a blob."""
    require_finite(f"{field}/epochs", parts)
    whole = (parts == np.floor(parts)) & (parts >= 0) & (parts < _SPLIT)
    if not whole.all():
        raise InvalidField(f"{field}/epochs", f"whole numbers below {_SPLIT}", parts[~whole][0])
    numbers = [int(high) * _SPLIT + int(low) for high, low in parts]
    if any(a >= b for a, b in pairwise(numbers)) or numbers[-1] >= _MAX_EPOCH:
        raise InvalidField(f"{field}/epochs", f"rising epochs below {_MAX_EPOCH}", numbers)
    return numbers


def _kind(array: npt.NDArray[Any]) -> str:
    return f"{array.shape} {array.dtype}"


def measurements_of(bundle: CheckpointBundle, history: int) -> bytes:
    """What the history keeps of this one checkpoint: what a tracker that has observed it alone
    writes (:meth:`ImportanceTracker.to_bytes`).

    Channel groups with the three metrics of their statistics; other levels carry theirs in their
    own decisions.

    Raises:
        InvalidField, ShapeMismatch, NotFinite: as :meth:`ImportanceTracker.observe`.
    """
    groups = {name: bundle.architecture.group[name] for name in bundle.channels}
    rows = {
        (Level.CHANNEL, name): ([bundle.metadata.epoch], _row(group, channel_metrics(data))[None])
        for (name, group), data in zip(groups.items(), bundle.channels.values(), strict=True)
        if group.level is Level.CHANNEL
    }
    return _packed(rows, history)


def _packed(groups: Mapping[_Key, tuple[Sequence[int], Floats]], history: int) -> bytes:
    """The epochs of groups, and their rows [n, M, original size] with NaN for units that are gone,
    as safetensors."""
    arrays: _Arrays = {}
    for key, (epochs, rows) in groups.items():
        absent = np.isnan(rows)
        parts = np.array([divmod(epoch, _SPLIT) for epoch in epochs], np.float32)
        arrays[f"{_name(key)}/epochs"] = parts
        arrays[f"{_name(key)}/values"] = np.where(absent, np.float32(0), rows)
        arrays[f"{_name(key)}/present"] = (~absent[:, 0]).astype(np.float16)
    metadata = {"format": _FORMAT, "version": _VERSION, "history": str(history)}
    return pack_arrays(arrays, metadata)

"""A Count-Min sketch of importance: sums by key in bounded memory that never underestimate.

Promises: :meth:`CountMinSketch.estimate` is at least the exact sum of what was added (decayed and
merged as asked), always, rounding included; the same keys fall into the same cells on every
machine and in every process; a blob that is read back answers as the sketch that wrote it.

Why it stands beside the exact arrays of :mod:`elesh.analysis.importance.tracker`: channels, heads
and layers are few, and their history is kept exactly. Single parameters (10^8 and more) are not
few. Since an estimate is never below the truth, "the estimate is below the marking threshold"
proves that the true value is, so that masks made from it are one-sided safe: crowded cells hide
parameters that could go, never the other way round. At 100,000 x 10, log-normal values of 100,000
keys come out 0.6% too high on average, of 200,000 keys 21%, of a million ten times:
:attr:`CountMinSketch.bound` says how far off they may be, and under a million keys an exact array
is no larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from elesh.analysis.candidates import Doubles, Floats, Ints
from leyline import InvalidField, Malformed, NotFinite, ShapeMismatch, TooLarge, UnsupportedVersion
from leyline.arrays import pack_arrays, require_finite, unpack_arrays

Keys = npt.NDArray[np.uint64]

MAX_BYTES = 500_000_000
"""The most that the cells of one sketch take (float32)."""
_MAX_TOTAL = 1e38
"""Totals stay under this, so that no cell overflows float32."""
_MAX_BATCH = 1 << 27
"""Keys a call: so many float64 roundings stay under half of float32's last place."""
_CHUNK = 1 << 15
"""Keys mixed at a time, so that the intermediate values stay in the cache."""
_FORMAT, _VERSION = "elesh.count-min-sketch", "1"

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def splitmix64(states: Keys) -> Keys:
    """[K] uint64: one step of the SplitMix64 generator from each state, modulo 2^64.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), with
    Stafford's constants: a bijection, and every bit of the result depends on every bit of the
    state. Unlike Python's ``hash()`` it is the same in every process.
    """
    z = states + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return np.asarray(z ^ (z >> np.uint64(31)))


def element_keys(identity: str, indices: npt.ArrayLike) -> Keys:
    """[K] uint64: the keys of elements ``indices`` (flat, >= 0) of what ``identity`` names.

    Args:
        identity: 16 hex digits: ``ParameterIdentifier.identifier`` or ``leyline.stable_hash``.

    Elements of one tensor never share a key; two tensors of n elements share some with
    probability n / 2^63.
    """
    return np.asarray(np.asarray(indices, dtype=np.uint64) + np.uint64(int(identity, 16)))


@dataclass(frozen=True)
class ErrorBound:
    """An estimate exceeds the true sum by at most ``error``, but for a share ``delta`` of keys.

    From Cormode and Muthukrishnan, "An improved data stream summary" (2005), theorem 1; it asks
    for pairwise independent rows, which the seeded mixing stands in for. The upward rounding of
    the float32 cells comes on top: at most 2^-22 of the cell a call of add, merge or decay.
    """

    epsilon: float
    """e / width."""
    delta: float
    """exp(-depth)."""
    total: float
    """Sum of everything added, decayed as the cells were."""

    @property
    def error(self) -> float:
        """epsilon * total, in the unit of the values."""
        return self.epsilon * self.total


class CountMinSketch:
    """Sums of non-negative values by 64-bit key in ``depth`` rows of ``width`` cells.

    Plain, without "conservative update": that would break merging and decay, which are linear.

    Raises:
        InvalidField: if a size or the seed is out of range.
        TooLarge: if the cells would take more than 500 MB.
    """

    def __init__(self, width: int = 100_000, depth: int = 10, *, seed: int = 0) -> None:
        if width < 1 or depth < 1:
            raise InvalidField("sketch", "width and depth of at least 1", (width, depth))
        if not 0 <= seed < 1 << 64:
            raise InvalidField("sketch.seed", "an unsigned 64-bit number", seed)
        if 4 * width * depth > MAX_BYTES:
            raise TooLarge("sketch", f"at most {MAX_BYTES} bytes of cells", 4 * width * depth)
        self.width, self.depth, self.seed = width, depth, seed
        self.total = 0.0
        self._cells: Floats = np.zeros((depth, width), np.float32)
        steps = np.arange(depth, dtype=np.uint64)
        self._row_seeds = splitmix64(steps * _GAMMA + np.uint64(seed))

    @classmethod
    def offline(cls, parameters: int, *, seed: int = 0) -> CountMinSketch:
        """A worker's sketch: width max(100000, P / 100), depth 10, at most 500 MB.

        Over 1.25 * 10^9 parameters the limit holds the width; :attr:`bound` tells what that costs.
        """
        depth = max(10, math.ceil(math.log(1 / 0.0001)))
        return cls.sized(parameters, 100_000, depth, seed=seed)

    @classmethod
    def runtime(cls, parameters: int, *, seed: int = 0) -> CountMinSketch:
        """A trainer's sketch: width max(10000, P / 1000), depth 7, at most 500 MB."""
        depth = max(7, math.ceil(math.log(1 / 0.001)))
        return cls.sized(parameters, 10_000, depth, share=1000, seed=seed)

    @classmethod
    def sized(
        cls, parameters: int, width: int, depth: int, *, share: int = 100, seed: int = 0
    ) -> CountMinSketch:
        """A sketch of ``width`` cells a row, or P / ``share`` if that is more; at most 500 MB."""
        if parameters < 0:
            raise InvalidField("parameters", "a number >= 0", parameters)
        wide = max(width, -(-parameters // share))
        return cls(min(wide, MAX_BYTES // (4 * depth)), depth, seed=seed)

    @property
    def nbytes(self) -> int:
        """Bytes of the cells."""
        return self._cells.nbytes

    @property
    def bound(self) -> ErrorBound:
        """How far estimates may be above the truth now."""
        return ErrorBound(math.e / self.width, math.exp(-self.depth), self.total)

    def add(self, keys: Keys, values: npt.ArrayLike) -> None:
        """Add ``values`` [K] (finite, >= 0) to their ``keys`` [K] uint64; keys may repeat.

        Takes 8 bytes a key and 20 a column of working memory; nothing has changed if it raises.

        Raises:
            ShapeMismatch: if the keys are no uint64 vector or the values do not match them.
            NotFinite, InvalidField: naming the first value that is not finite or is negative.
            TooLarge: for more than 2^27 keys a call, or a total over 1e38.
        """
        _require_keys(keys)
        if len(keys) > _MAX_BATCH:
            raise TooLarge("sketch.keys", f"at most {_MAX_BATCH} a call", len(keys))
        amounts = np.asarray(values, dtype=np.float64)
        if amounts.shape != keys.shape:
            raise ShapeMismatch("sketch.values", f"shape {keys.shape}", f"shape {amounts.shape}")
        require_finite("sketch.values", amounts)
        if amounts.size and amounts.min() < 0:
            place = int(amounts.argmin())
            raise InvalidField(f"sketch.values[{place}]", "a number >= 0", float(amounts[place]))
        with np.errstate(over="ignore"):
            self.total = _checked_total(self.total + float(amounts.sum()))
        for row, seed in zip(self._cells, self._row_seeds, strict=True):
            added = np.bincount(self._columns(keys, seed), weights=amounts, minlength=self.width)
            np.copyto(row, _above(row + added), where=added > 0)

    def estimate(self, keys: Keys) -> Doubles:
        """[K] float64: for each key at least the sum that was added to it.

        Raises:
            ShapeMismatch: if the keys are no uint64 vector.
        """
        _require_keys(keys)
        least = np.full(keys.shape, np.inf, np.float32)
        for row, seed in zip(self._cells, self._row_seeds, strict=True):
            np.minimum(least, row[self._columns(keys, seed)], out=least)
        return least.astype(np.float64)

    def shares_below(self, value: float) -> tuple[float, ...]:
        """For each row the share of cells that hold less than ``value``."""
        return tuple(float(np.count_nonzero(row < value)) / self.width for row in self._cells)

    def decay(self, factor: float) -> None:
        """Multiply everything added so far, the total included, by ``factor`` in (0, 1].

        Raises:
            InvalidField: for any other factor.
        """
        if not 0 < factor <= 1:
            raise InvalidField("sketch.decay", "a factor over 0 and up to 1", factor)
        if factor == 1:
            return
        self.total *= factor
        for row in self._cells:
            np.copyto(row, _above(row * np.float64(factor)), where=row > 0)

    def merge(self, other: CountMinSketch) -> None:
        """Add what ``other`` holds, as if its keys had been added here.

        Raises:
            ShapeMismatch, InvalidField: if width, depth or seed differ: cells would not match.
            TooLarge: if the total exceeds 1e38.
        """
        if (self.depth, self.width) != (other.depth, other.width):
            expected, found = f"{self.depth} x {self.width}", f"{other.depth} x {other.width}"
            raise ShapeMismatch("sketch", f"{expected} cells", f"{found} cells")
        if self.seed != other.seed:
            raise InvalidField("sketch.seed", str(self.seed), other.seed)
        self.total = _checked_total(self.total + other.total)
        for mine, theirs in zip(self._cells, other._cells, strict=True):
            together = _above(mine + theirs.astype(np.float64))
            np.copyto(mine, np.where(mine > 0, together, theirs), where=theirs > 0)

    def to_bytes(self) -> bytes:
        """Safetensors: ``cells`` [depth, width] float32; total and seed in the metadata."""
        return pack_arrays(
            {"cells": self._cells},
            {
                "format": _FORMAT,
                "version": _VERSION,
                "seed": str(self.seed),
                "total": self.total.hex(),
            },
        )

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, field: str = "sketch") -> CountMinSketch:
        """The sketch that :meth:`to_bytes` wrote.

        Raises:
            ContractError: naming what is wrong with the blob (format, version, shape or a value).
        """
        arrays, metadata = unpack_arrays(data, field=field)
        require_format(metadata, _FORMAT, _VERSION, field)
        cells = arrays.get("cells")
        if arrays.keys() != {"cells"} or cells is None or cells.ndim != 2:
            raise Malformed(field, "one tensor: cells [depth, width]", sorted(arrays))
        if cells.dtype != np.float32:
            raise ShapeMismatch(f"{field}.cells", "float32", str(cells.dtype))
        require_finite(f"{field}.cells", cells)
        if cells.size and cells.min() < 0:
            raise InvalidField(f"{field}.cells", "numbers >= 0", float(cells.min()))
        seed, total = _numbers(metadata, field)
        depth, width = cells.shape
        sketch = cls(width, depth, seed=seed)
        sketch.total = total
        sketch._cells[:] = cells
        return sketch

    def _columns(self, keys: Keys, row_seed: np.uint64) -> Ints:
        """[K]: the cell of each key in the row of ``row_seed``.

        The high half of the hash times the width, shifted: as even as a remainder to within
        width / 2^32, and quicker (Lemire, "Fast random integer generation in an interval", 2019).
        """
        columns = np.empty(keys.shape, np.int64)
        width, half = np.uint64(self.width), np.uint64(32)
        for start in range(0, len(keys), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            hashes = splitmix64(keys[chunk] ^ row_seed)
            columns[chunk] = ((hashes >> half) * width) >> half
        return columns


def require_format(metadata: dict[str, str], form: str, version: str, field: str) -> None:
    """Refuse a blob of another kind or of a version that this build does not know.

    Raises:
        Malformed, UnsupportedVersion: naming what was found.
    """
    if metadata.get("format") != form:
        raise Malformed(f"{field}.__metadata__.format", form, metadata.get("format"))
    if metadata.get("version") != version:
        raise UnsupportedVersion(f"{field}.__metadata__.version", version, metadata.get("version"))


def _above(values: npt.NDArray[Any]) -> Floats:
    """The next float32 above float64 values: more than all the roundings that led to them."""
    return np.asarray(np.nextafter(values.astype(np.float32), np.float32(np.inf)))


def _checked_total(total: float) -> float:
    if total > _MAX_TOTAL:
        raise TooLarge("sketch.total", f"at most {_MAX_TOTAL:g}", total)
    return total


def _require_keys(keys: Keys) -> None:
    if keys.dtype != np.uint64 or keys.ndim != 1:
        raise ShapeMismatch("sketch.keys", "[K] uint64", f"{keys.shape} {keys.dtype}")


def _numbers(metadata: dict[str, str], field: str) -> tuple[int, float]:
    """Seed and total of a blob."""
    try:
        seed, total = int(metadata["seed"]), float.fromhex(metadata["total"])
    except (KeyError, ValueError, OverflowError):
        raise Malformed(f"{field}.__metadata__", "seed and total", metadata) from None
    if not math.isfinite(total):
        raise NotFinite(f"{field}.__metadata__.total", "a finite number", total)
    if not 0 <= total <= _MAX_TOTAL:
        raise InvalidField(f"{field}.__metadata__.total", f"from 0 to {_MAX_TOTAL:g}", total)
    return seed, total

"""Data-parallel training: merges the bundles of all ranks into one.

Every rank measures its own calibration samples (``Recorder(..., seed=rank)``) and one of them
gathers the bundles, as files or as blobs, and publishes the merged one.

Promises: means are weighted by samples and taken in float64; rows of samples are put one after
another, in the order of the ranks. So however samples are shared out, what is merged is what one
rank would have measured, up to a rounding to float32 for each rank. Ratios and cosines of
attention patterns and of gradient flow are no sums: there the mean over ranks is an estimate. So
it is with second moments of large maps, of which every rank reads some positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from elesh.trainer.surgery.reconstruction.after_cut import merged_covariance
from leyline import (
    ChannelImportanceData,
    CheckpointBundle,
    GateStatistics,
    HeadImportanceData,
    IdentityMismatch,
    InvalidField,
    LayerStatistics,
)

from .accumulators import CORRELATED_SAMPLES
from .recorder import MeasuredCheckpoint

_Array = npt.NDArray[Any]
_M = TypeVar("_M", ChannelImportanceData, GateStatistics, LayerStatistics, HeadImportanceData)
Rule = Literal["mean", "error", "rows", "same", "correlations", "mean_square", "moments"]

RULES: Mapping[str, Rule] = {
    "taylor_importance": "mean",
    "magnitude_importance": "same",
    "activation_frequency": "mean",
    "channel_correlations": "correlations",
    "mean_square": "mean_square",
    "projections": "rows",
    "moves": "rows",
    "margins": "rows",
    "input_moments": "moments",
    "input_means": "mean",
    "sample_moments": "moments",
    "input_slopes": "mean",
    "first_order": "mean",
    "second_order": "mean",
    "removal_rise": "mean",
    "removal_error": "error",
    "taylor": "mean",
    "gradient_flow": "mean",
    "similarity": "mean",
    "gradient_sensitivity": "mean",
    "entropy": "mean",
    "entropy_bound": "mean",
    "diversity": "mean",
}
"""How each field of the statistics is merged: means by samples, their errors, rows one after
another, what is the same on all ranks, correlations by the inner products that they stand for, and
moments with what the ranks' means differ by."""


def merge_ranks(bundles: Sequence[CheckpointBundle]) -> CheckpointBundle:
    """One bundle of all samples of ``bundles``, whose metadata is the first one's.

    So is the input covariance that measured checkpoints keep, where every rank has one.

    Raises:
        InvalidField: if there is no bundle, or ranks measured different layers or fields.
        IdentityMismatch: if ranks measured different networks or took labels differently.
    """
    if not bundles:
        raise InvalidField("bundles", "at least one", "none")
    first = bundles[0]
    for other in bundles[1:]:
        _require_alike(first, other)
    samples = [bundle.metadata.samples for bundle in bundles]
    metadata = first.metadata.model_copy(update={"samples": sum(samples)})

    def merged(of: Callable[[CheckpointBundle], Mapping[str, _M]]) -> dict[str, _M]:
        # What some rank's samples did not reach is left alone.
        shared = [name for name in of(first) if all(name in of(b) for b in bundles)]
        return {name: _merged([of(b)[name] for b in bundles], samples) for name in shared}

    together = replace(
        first,
        metadata=metadata,
        channels=merged(lambda bundle: bundle.channels),
        gates=merged(lambda bundle: bundle.gates),
        layers=merged(lambda bundle: bundle.layers),
        heads=merged(lambda bundle: bundle.heads),
    )
    if not isinstance(together, MeasuredCheckpoint):
        return together
    known = [b.covariance for b in bundles if isinstance(b, MeasuredCheckpoint) and b.covariance]
    whole = len(known) == len(bundles)
    return replace(together, covariance=merged_covariance(known) if whole else None)


def _require_alike(first: CheckpointBundle, other: CheckpointBundle) -> None:
    for field in ("model_hash", "epoch", "run_id", "labels"):
        ours, theirs = getattr(first.metadata, field), getattr(other.metadata, field)
        if ours != theirs:
            raise IdentityMismatch(f"metadata.{field}", str(ours), str(theirs))
    if set(first.layers) != set(other.layers):
        differ = sorted(set(first.layers) ^ set(other.layers))
        raise InvalidField("layers", "the same layers on every rank", differ)


def _merged(items: Sequence[_M], samples: Sequence[int]) -> _M:
    """The statistics of one group or layer on all ranks."""
    kind = type(items[0])
    fields: dict[str, Any] = {"layer_name": items[0].layer_name}
    for name in kind.model_fields:
        values = [getattr(item, name) for item in items]
        if name == "layer_name" or all(value is None for value in values):
            continue
        if any(value is None for value in values):
            where = f"{items[0].layer_name}/{name}"
            raise InvalidField(where, "on every rank or on none", "some of them")
        fields[name] = _MERGE[RULES[name]](values, samples, items)
    return kind(**fields)


def _mean(values: Sequence[_Array], samples: Sequence[int], _: Sequence[Any]) -> _Array:
    weighted = zip(values, samples, strict=True)
    total = sum(value.astype(np.float64) * count for value, count in weighted)
    return np.asarray(total / max(sum(samples), 1)).astype(np.float32)


def _error(values: Sequence[_Array], samples: Sequence[int], _: Sequence[Any]) -> _Array:
    """The standard error of a mean, from those of its parts."""
    weighted = zip(values, samples, strict=True)
    total = sum(np.square(value.astype(np.float64) * count) for value, count in weighted)
    return np.asarray(np.sqrt(total) / max(sum(samples), 1)).astype(np.float32)


def _rows(values: Sequence[_Array], samples: Sequence[int], _: Sequence[Any]) -> _Array:
    return np.concatenate(values)


def _same(values: Sequence[_Array], samples: Sequence[int], items: Sequence[Any]) -> _Array:
    for value in values[1:]:
        if not np.allclose(value, values[0], rtol=1e-5):
            name = items[0].layer_name
            raise IdentityMismatch(f"{name}/magnitude_importance", "the same weights", "others")
    return values[0]


def _correlated(samples: Sequence[int]) -> list[int]:
    """How many samples of each rank its correlations were computed from."""
    return [min(count, CORRELATED_SAMPLES) for count in samples]


def _mean_square(values: Sequence[_Array], samples: Sequence[int], _: Sequence[Any]) -> _Array:
    return _mean(values, _correlated(samples), _)


def _correlations(values: Sequence[_Array], samples: Sequence[int], items: Sequence[Any]) -> _Array:
    """Cosines of all samples; where ranks do not tell mean squares, the mean of their cosines."""
    counts = _correlated(samples)
    squares = [item.mean_square for item in items]
    if any(square is None for square in squares):
        return _mean(values, counts, items)
    inner = np.zeros(values[0].shape)
    for value, square, count in zip(values, squares, counts, strict=True):
        norms = np.sqrt(square.astype(np.float64))
        inner += count * value.astype(np.float64) * np.outer(norms, norms)
    norms = np.sqrt(np.diag(inner))
    norms[norms == 0] = 1.0
    cosines = inner / np.outer(norms, norms)
    np.fill_diagonal(cosines, 1.0)
    return np.asarray(np.clip(cosines, -1.0, 1.0), dtype=np.float32)


def _moments(values: Sequence[_Array], samples: Sequence[int], items: Sequence[Any]) -> _Array:
    """Second moments about the merged means, of full matrices or of diagonals."""
    means = [np.asarray(item.input_means, dtype=np.float64) for item in items]
    middle = np.average(means, axis=0, weights=samples)
    about = []
    for value, mean in zip(values, means, strict=True):
        far = mean - middle
        spread = far**2 if value.ndim == far.ndim else far[:, :, None] * far[:, None, :]
        about.append(value + spread)
    return _mean(about, samples, items)


_MERGE: Mapping[Rule, Callable[[Sequence[_Array], Sequence[int], Sequence[Any]], _Array]] = {
    "mean": _mean,
    "error": _error,
    "rows": _rows,
    "same": _same,
    "correlations": _correlations,
    "mean_square": _mean_square,
    "moments": _moments,
}

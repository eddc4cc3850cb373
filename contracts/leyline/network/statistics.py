"""The trainer's measurements at a checkpoint: importance vectors, correlations, gate statistics.

Messages here hold arrays; on the wire they are tensors of a safetensors blob, named
``<layer_name>/<field>`` (see :mod:`leyline.network.bundle`). All values are finite: NaN is refused.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, model_validator

from leyline.arrays import Array, require_finite
from leyline.base import Message, Name
from leyline.errors import InvalidField, ShapeMismatch

_LARGEST_COSINE = 1.01  # rounding of float16 included


class _ArrayMessage(Message):
    model_config = ConfigDict(arbitrary_types_allowed=True)


class ChannelImportanceData(_ArrayMessage):
    """Channel statistics of one coupled group (section 4.2); C channels, each finite.

    ``layer_name`` is the name of the group in the architecture.
    """

    contract_of: ClassVar[str] = "Kasmina to Elesh"

    layer_name: Name
    """Name of the group in the architecture."""
    taylor_importance: Array
    """[C], >= 0: mean over samples and positions of ``|gradient * activation|``."""
    magnitude_importance: Array
    """[C], >= 0: L2 norm of all the weights that produce the channel."""
    activation_frequency: Array
    """[C], 0 to 1: share of activations with magnitude above 1e-3."""
    channel_correlations: Array | None = None
    """[C, C]: cosine similarity of the channels' activations over samples and positions."""
    mean_square: Array | None = None
    """[C], >= 0: mean square of the same activations. With it, the correlations that data-parallel
    ranks measured merge exactly."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        count = self.taylor_importance.shape[0] if self.taylor_importance.ndim else 0
        vectors = ["taylor_importance", "magnitude_importance", "activation_frequency"]
        if self.mean_square is not None:
            vectors.append("mean_square")
        for field in vectors:
            values: npt.NDArray[Any] = getattr(self, field)
            where = f"{self.layer_name}/{field}"
            _require_shape(where, values, (count,))
            require_finite(where, values)
            if values.size and values.min() < 0:
                raise InvalidField(where, "numbers >= 0", float(values.min()))
        if self.activation_frequency.size and self.activation_frequency.max() > 1:
            raise InvalidField(
                f"{self.layer_name}/activation_frequency",
                "at most 1",
                float(self.activation_frequency.max()),
            )
        if self.channel_correlations is not None:
            _require_shape(
                f"{self.layer_name}/channel_correlations", self.channel_correlations, (count, count)
            )
            require_finite(f"{self.layer_name}/channel_correlations", self.channel_correlations)
            cosines = self.channel_correlations
            largest = float(max(cosines.max(initial=0), -cosines.min(initial=0)))
            if largest > _LARGEST_COSINE:
                where = f"{self.layer_name}/channel_correlations"
                raise InvalidField(where, "cosines from -1 to 1", largest)
        return self

    @property
    def size(self) -> int:
        """Number of channels C."""
        return len(self.taylor_importance)


class HeadImportanceData(_ArrayMessage):
    """Head statistics of one attention layer (section 4.3); H units, each finite.

    A unit is a head; where several query heads share keys and values, it is all heads of one
    key/value head, and its pattern is theirs one after the other. What is made from attention
    weights is absent where those cannot be seen.
    """

    contract_of: ClassVar[str] = "Kasmina to Elesh"

    layer_name: Name
    """Name of the group in the architecture."""
    gradient_sensitivity: Array
    """[H], >= 0: mean over samples of the magnitude of the head's gate gradient (Michel 2019)."""
    entropy: Array | None = None
    """[H], >= 0: mean over samples and queries of the pattern's entropy, in nats."""
    entropy_bound: Array | None = None
    """[H]: the entropy if every key that got any weight had got the same (causal masks count)."""
    diversity: Array | None = None
    """[H], 0 to ln 2: mean Jensen-Shannon divergence of the pattern from the other heads', in
    nats, over samples and queries; 0 where there is no other head."""
    similarity: Array | None = None
    """[H, H]: cosine similarity of the patterns over samples, queries and keys."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        count = self.size
        shapes = {"similarity": (count, count)}
        for field in PATTERN_FIELDS:
            if (getattr(self, field) is None) != (self.entropy is None):
                raise InvalidField(f"{self.layer_name}/{field}", "all or none of the patterns'", "")
        for field in ("gradient_sensitivity", *PATTERN_FIELDS):
            values: npt.NDArray[Any] | None = getattr(self, field)
            if values is None:
                continue
            where = f"{self.layer_name}/{field}"
            _require_shape(where, values, shapes.get(field, (count,)))
            require_finite(where, values)
            lowest, highest = _HEAD_LIMITS.get(field, (0.0, math.inf))
            for found in (values.min(initial=lowest), values.max(initial=lowest)):
                if not lowest <= found <= highest:
                    raise InvalidField(where, f"from {lowest} to {highest}", float(found))
        return self

    @property
    def size(self) -> int:
        """Number of units H."""
        return len(self.gradient_sensitivity) if self.gradient_sensitivity.ndim else 0


PATTERN_FIELDS = ("entropy", "entropy_bound", "diversity", "similarity")
"""What is made from attention weights: all there or none."""
_HEAD_LIMITS = {"similarity": (-_LARGEST_COSINE, _LARGEST_COSINE), "diversity": (0.0, 0.7)}


class GateStatistics(_ArrayMessage):
    """Gate gradients of one group over N calibration samples (ARCHITECTURE, "What we rank by").

    The gate of a unit multiplies everything that the unit sends to its consumers.
    """

    contract_of: ClassVar[str] = "Kasmina to Elesh"

    layer_name: Name
    """Name of the group in the architecture."""
    projections: Array
    """[N, C]: G, the sum over positions of activation times d(v . output)/d(activation), with one
    seeded Gaussian direction v a sample, centred where outputs are logits."""
    first_order: Array
    """[C]: mean over samples of the gate gradient of the true-label loss (signed)."""
    second_order: Array
    """[C]: mean over samples of the squared gate gradient of the loss with labels sampled from
    the model's own predictions (the Fisher diagonal of the gates)."""
    removal_rise: Array | None = None
    """[C]: predicted increase of the true-label loss, in nats, if this unit alone is removed: the
    mean over samples, where the trainer predicts better than to second order."""
    removal_error: Array | None = None
    """[C]: standard error of ``removal_rise`` over the samples. Only there where units were masked
    one at a time: on the samples nearest to the border it is then measured, not predicted."""
    moves: Array | None = None
    """[M, C], of the first M samples: gate gradients of the margins: the removal of a set moves a
    sample's margin by about minus the sum of its columns. There with ``margins``."""
    margins: Array | None = None
    """[M]: log of the odds against each sample's true label, so that its loss is
    ``softplus(margin)``; the same in every group. Absent where a sample has no single label."""
    input_moments: Array | None = None
    """[S, W, W]: at each of the group's S sites, the second moments of what enters there about
    ``input_means``, means over samples and positions. W is C; for heads C times the width of a
    head, unit after unit. Only measured where weights are reconstructed, with the next three."""
    input_means: Array | None = None
    """[S, W]: the means there, where the consumer can take up a constant; else zeros."""
    sample_moments: Array | None = None
    """[S, W]: second moments about ``input_means`` of the means over a sample's positions: how much
    of an input's moment is the same at all of them."""
    input_slopes: Array | None = None
    """[S, 2, W, W]: second moments of d(v . output)/d(activation) there, means over samples: of its
    sum over a sample's positions, and, summed over positions, of its deviation from their mean."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.projections.ndim != 2:
            raise ShapeMismatch(f"{self.layer_name}/projections", "[N, C]", self.projections.shape)
        count = self.projections.shape[1]
        rows = ["first_order", "second_order"]
        if self.removal_rise is not None:
            rows.append("removal_rise")
        if self.removal_error is not None:
            rows.append("removal_error")
            if self.removal_rise is None:
                where = f"{self.layer_name}/removal_rise"
                raise InvalidField(where, "a rise where its error is given", None)
        for field in rows:
            _require_shape(f"{self.layer_name}/{field}", getattr(self, field), (count,))
        checked = ["projections", *rows]
        if (self.moves is None) != (self.margins is None):
            raise InvalidField(f"{self.layer_name}/moves", "moves and margins, or neither", "one")
        if self.moves is not None and self.margins is not None:
            seen = min(len(self.margins), len(self.projections))
            _require_shape(f"{self.layer_name}/margins", self.margins, (seen,))
            _require_shape(f"{self.layer_name}/moves", self.moves, (seen, count))
            checked += ["moves", "margins"]
        checked += self._check_inputs(count)
        for field in checked:
            require_finite(f"{self.layer_name}/{field}", getattr(self, field))
        return self

    def _check_inputs(self, count: int) -> list[str]:
        """The fields of the input moments that are there, of the right shapes."""
        given = [field for field in INPUT_FIELDS if getattr(self, field) is not None]
        if given and len(given) < len(INPUT_FIELDS):
            missing = next(field for field in INPUT_FIELDS if field not in given)
            where = f"{self.layer_name}/{missing}"
            raise InvalidField(where, f"all of {', '.join(INPUT_FIELDS)}, or none", "some of them")
        if self.input_means is not None:
            means = self.input_means
            if means.ndim != 2 or not means.shape[1] or means.shape[1] % count:
                where = f"{self.layer_name}/input_means"
                raise ShapeMismatch(where, f"[S, a multiple of {count}]", means.shape)
            sites, width = means.shape
            shapes = {
                "input_moments": (sites, width, width),
                "sample_moments": (sites, width),
                "input_slopes": (sites, 2, width, width),
            }
            for field, shape in shapes.items():
                _require_shape(f"{self.layer_name}/{field}", getattr(self, field), shape)
        return given


INPUT_FIELDS = ("input_moments", "input_means", "sample_moments", "input_slopes")
"""What weight reconstruction needs: all there or none."""


class LayerStatistics(_ArrayMessage):
    """What one block (a removable layer) does, over N calibration samples.

    Its gate multiplies the branch's contribution: ``out = stream + gate * branch``.
    """

    contract_of: ClassVar[str] = "Kasmina to Elesh"

    layer_name: Name
    """Name of the block in the architecture."""
    taylor: Array
    """[1], >= 0: mean over samples of the magnitude of the gate gradient of the true-label loss."""
    gradient_flow: Array
    """[1], 0 to 1: of the norms of the loss's gradient at the stream before and after the block,
    the smaller as a share of the larger; 1 if the identity path carries all of it."""
    similarity: Array
    """[1], -1 to 1: cosine of the stream before and after the block, uncentred, mean over samples
    and positions (1 - Block Influence of ShortGPT, Men et al. 2024)."""
    projections: Array
    """[N]: gate gradients of the random projections, as in GateStatistics."""
    first_order: Array
    """[1]: mean over samples of the gate gradient of the true-label loss (signed)."""
    second_order: Array
    """[1]: mean over samples of the squared gate gradient of the sampled-label loss."""
    removal_rise: Array | None = None
    """[1]: predicted increase of the true-label loss, in nats, if this block alone is removed: the
    mean over samples. There with ``removal_error``, where samples have margins."""
    removal_error: Array | None = None
    """[1], >= 0: its standard error over the samples."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.projections.ndim != 1:
            raise ShapeMismatch(f"{self.layer_name}/projections", "[N]", self.projections.shape)
        require_finite(f"{self.layer_name}/projections", self.projections)
        if (self.removal_rise is None) != (self.removal_error is None):
            where = f"{self.layer_name}/removal_error"
            raise InvalidField(where, "a rise and its error, or neither", "one")
        for field, low, high in (
            ("taylor", 0.0, np.inf),
            ("gradient_flow", 0.0, _LARGEST_COSINE),
            ("similarity", -_LARGEST_COSINE, _LARGEST_COSINE),
            ("first_order", -np.inf, np.inf),
            ("second_order", 0.0, np.inf),
            ("removal_rise", -np.inf, np.inf),
            ("removal_error", 0.0, np.inf),
        ):
            if field.startswith("removal") and getattr(self, field) is None:
                continue
            where, values = f"{self.layer_name}/{field}", getattr(self, field)
            _require_shape(where, values, (1,))
            require_finite(where, values)
            if not low <= values[0] <= high:
                raise InvalidField(where, f"a number from {low:g} to {high:g}", float(values[0]))
        return self


def _require_shape(field: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ShapeMismatch(field, f"shape {shape}", f"shape {array.shape}")
    if array.dtype not in (np.float32, np.float16):
        raise ShapeMismatch(field, "float32 or float16", str(array.dtype))

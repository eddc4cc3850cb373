"""Settings: the design document's YAML block, with environment variables over it.

Promises: the document's block loads unchanged (``1GB``, ``1e-8`` and all); every figure has the
document's default; an unknown key or an impossible value is an error that names file, line and
key. Order of precedence: arguments, environment (``ELESH_...``, nested by ``__``), file, defaults.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableVariable

from leyline.decisions import Phase

from ._settings_file import SettingsError, explain, read_block

__all__ = ["Settings", "SettingsError", "workers_needed"]

_S = TypeVar("_S", bound=BaseModel)


def _require_sum_one(section: _S, *names: str) -> _S:
    total = sum(getattr(section, name) for name in names)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"{' + '.join(names)} must be 1, not {total:g}")
    return section


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number or a text is expected here, not true or false")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )
    _types = field_validator("*", mode="before")(_no_boolean)


class ChannelAnalysis(_Section):
    """How channels are scored and selected."""

    taylor_weight: float = Field(default=0.5, ge=0, le=1)
    magnitude_weight: float = Field(default=0.3, ge=0, le=1)
    frequency_weight: float = Field(default=0.2, ge=0, le=1)
    redundancy_threshold: float = Field(default=0.95, gt=0, le=1)
    min_channels_per_layer: int = Field(default=16, ge=1)
    scorer: Literal["auto", "output_projection", "multi_metric", "magnitude"] = "auto"
    schedule: Literal["polynomial", "linear", "exponential"] = "polynomial"
    safety_margin: float = Field(default=0.1, ge=0, lt=1)
    round_to: int = Field(default=1, ge=1)
    max_predicted_shift: float = Field(default=0.2, gt=0)
    """Highest predicted mean squared movement of the outputs, as a share of their own mean
    square, that is approved on the prediction alone. Measured on two nets: .1 cost at most .6
    points of accuracy, .35 cost about one."""

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> Self:
        return _require_sum_one(self, "taylor_weight", "magnitude_weight", "frequency_weight")


class AttentionAnalysis(_Section):
    """How attention heads are scored and selected."""

    entropy_weight: float = Field(default=0.3, ge=0, le=1)
    diversity_weight: float = Field(default=0.3, ge=0, le=1)
    gradient_weight: float = Field(default=0.4, ge=0, le=1)
    similarity_threshold: float = Field(default=0.95, gt=0, le=1)
    min_heads_per_layer: int = Field(default=2, ge=1)
    safety_margin: float = Field(default=0.15, ge=0, lt=1)

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> Self:
        return _require_sum_one(self, "entropy_weight", "diversity_weight", "gradient_weight")


class LayerAnalysis(_Section):
    """When a whole layer may go."""

    taylor_threshold: float = Field(default=0.001, ge=0)
    similarity_threshold: float = Field(default=0.95, gt=0, le=1)
    skip_potential_threshold: float = Field(default=0.8, ge=0, le=1)
    max_layer_removal_ratio: float = Field(default=0.2, ge=0, le=1)


class SafetySchedule(_Section):
    """Lengths of the phases in epochs, and the share of channels that each may have removed."""

    validation_epochs: int = Field(default=30, ge=0)
    conservative_epochs: int = Field(default=30, ge=0)
    moderate_epochs: int = Field(default=30, ge=0)
    aggressive_epochs: int = Field(default=30, ge=0)
    conservative_limit: float = Field(default=0.05, ge=0, le=1)
    moderate_limit: float = Field(default=0.10, ge=0, le=1)
    aggressive_limit: float = Field(default=0.20, ge=0, le=1)

    @model_validator(mode="after")
    def _limits_rise(self) -> Self:
        if not self.conservative_limit <= self.moderate_limit <= self.aggressive_limit:
            raise ValueError("conservative_limit <= moderate_limit <= aggressive_limit must hold")
        return self

    @property
    def boundaries(self) -> tuple[tuple[Phase, int], ...]:
        """Each phase that ends, with its last epoch (epochs count from 1)."""
        lengths = (
            (Phase.PREPARATION, self.validation_epochs),
            (Phase.CONSERVATIVE, self.conservative_epochs),
            (Phase.MODERATE, self.moderate_epochs),
            (Phase.AGGRESSIVE, self.aggressive_epochs),
        )
        last, ends = 0, []
        for phase, length in lengths:
            last += length
            ends.append((phase, last))
        return tuple(ends)

    @property
    def total_epochs(self) -> int:
        """Epochs until the last pruning phase has ended."""
        return self.boundaries[-1][1]


class RollbackTriggers(_Section):
    """Accuracy drops at which the trainer rolls a decision back."""

    channel_accuracy_drop: float = Field(default=0.02, ge=0, le=1)
    head_accuracy_drop: float = Field(default=0.03, ge=0, le=1)
    layer_accuracy_drop: float = Field(default=0.05, ge=0, le=1)


class StructuredPruning(_Section):
    """The structured pruning block of the design document."""

    channel_analysis: ChannelAnalysis = ChannelAnalysis()
    attention_analysis: AttentionAnalysis = AttentionAnalysis()
    layer_analysis: LayerAnalysis = LayerAnalysis()
    safety_schedule: SafetySchedule = SafetySchedule()
    rollback_triggers: RollbackTriggers = RollbackTriggers()


class AccuracyTarget(_Section):
    """One accuracy target: its metric and the figure to reach."""

    metric: str
    target: float


class AccuracyTargets(_Section):
    """The document's accuracy targets."""

    channel_importance_ranking: AccuracyTarget = AccuracyTarget(metric="kendall_tau", target=0.90)
    attention_redundancy_detection: AccuracyTarget = AccuracyTarget(
        metric="cosine_similarity_precision", target=0.95
    )
    layer_skip_potential: AccuracyTarget = AccuracyTarget(
        metric="gradient_flow_preservation", target=0.85
    )
    structured_pruning_accuracy: AccuracyTarget = AccuracyTarget(
        metric="MAPE_vs_Taylor", target=0.03
    )


class BreakerSettings(_Section):
    """When a level's circuit breaker opens and how it recovers."""

    failures: int = Field(default=3, ge=1)
    recovery_seconds: float = Field(default=30.0, gt=0)


class BusSettings(_Section):
    """How workers and trainers meet on Redis."""

    url: str = ""
    """Redis URL; empty: the embedded server."""
    partition: str = Field(default="main", pattern=r"^[A-Za-z0-9_\-]{1,32}$")
    lease_seconds: float = Field(default=15.0, gt=0)
    max_deliveries: int = Field(default=4, ge=1)
    blob_ttl_seconds: int = Field(default=7200, ge=60)
    record_ttl_seconds: int = Field(default=7 * 86400, ge=60)
    stream_length: int = Field(default=100_000, ge=100)
    max_blob_bytes: ByteSize = Field(default=ByteSize(2 << 30), ge=1)
    blob_folder: str = ""
    """Folder whose files ``file:`` references may name; empty: none."""


class WorkerSettings(_Section):
    """Limits of one worker."""

    window_seconds: float = Field(default=300.0, gt=0)
    """The checkpoint window: an analysis that takes longer is stopped."""
    memory_limit: ByteSize = Field(default=ByteSize(4 << 30), ge=1 << 20)
    drain_seconds: float = Field(default=30.0, gt=0)
    threads: int = Field(default=1, ge=1)


_NO_PART_IN_DECISIONS = {
    "analysis_workers_per_gpu",
    "layers_per_worker",
    "analysis_timeout",
    "analysis_cache_size",
    "parallel_analysis_threads",
    "accuracy_targets",
    "breaker",
    "bus",
    "worker",
}


class Settings(BaseSettings):
    """Everything that can be set. ``Settings.load(path)`` reads a file; ``Settings()`` does not."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix="ELESH_",
        env_nested_delimiter="__",
        validate_default=True,
        allow_inf_nan=False,
    )
    _types = field_validator("*", mode="before")(_no_boolean)

    analysis_workers_per_gpu: int = Field(default=4, ge=1)
    layers_per_worker: int = Field(default=8, ge=1)
    sketch_width: int = Field(default=100_000, ge=1)
    sketch_depth: int = Field(default=10, ge=1)
    importance_history_epochs: int = Field(default=500, ge=1)
    structured_pruning: StructuredPruning = StructuredPruning()
    analysis_timeout: float = Field(default=300.0, gt=0)
    marking_threshold: float = Field(default=1e-8, ge=0)
    confidence_threshold: float = Field(default=0.95, ge=0, le=1)
    analysis_cache_size: ByteSize = Field(default=ByteSize(10**9), ge=0)
    parallel_analysis_threads: int = Field(default=16, ge=1)
    statistical_samples: int = Field(default=10_000, ge=1)
    accuracy_targets: AccuracyTargets = AccuracyTargets()
    breaker: BreakerSettings = BreakerSettings()
    bus: BusSettings = BusSettings()
    worker: WorkerSettings = WorkerSettings()

    @classmethod
    def load(cls, path: str | Path | None = None, **over: Any) -> Settings:
        """Settings from a YAML file (top-level key ``elesh``), environment and arguments.

        Raises:
            SettingsError: naming file, line and key of the first thing that is wrong.
        """
        node, values = read_block(Path(path)) if path is not None else (None, {})
        try:
            environment = EnvSettingsSource(cls)()
            return cls(**_merged(_merged(values, environment), over))
        except UnreadableVariable as error:
            raise SettingsError(f"environment: {error}: {error.__cause__}") from None
        except ValidationError as error:
            layers = {"argument": over, "environment": environment}
            raise SettingsError(explain(cls, error, layers, path, node)) from None

    @property
    def analysis_hash(self) -> str:
        """First 16 hex digits of SHA-256 over everything that can change a decision."""
        relevant = self.model_dump_json(exclude=_NO_PART_IN_DECISIONS)
        return hashlib.sha256(relevant.encode()).hexdigest()[:16]


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, section by section."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def workers_needed(parameters: int, rate: int, seconds: float, levels: int) -> int:
    """The design document's scaling formula: W >= ceil(P / (R * T * L)), at least one.

    Args:
        parameters: P, of the network.
        rate: R, parameters that a worker analyses in a second.
        seconds: T, the checkpoint window.
        levels: L, levels of analysis.
    """
    return max(1, math.ceil(parameters / (rate * seconds * levels)))

"""Settings: the design document's YAML block, with environment variables over it.

Promises: the document's block loads unchanged (``1GB``, ``1e-8`` and all); every figure has the
document's default; an unknown key or an impossible value is an error that names file, line and
key. Order of precedence: arguments, environment (``ELESH_...``, nested by ``__``), file, defaults.
The sections are in :mod:`.pruning` (the document's) and :mod:`.operation` (ours).
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from pathlib import Path
from typing import Any

from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableVariable

from ._base import no_boolean
from ._file import SettingsError, explain, read_block
from .advice import retired_keys, without_constants
from .operation import (
    AuditSettings,
    BreakerSettings,
    BusSettings,
    ConsoleSettings,
    ObserveSettings,
    SecuritySettings,
    TrainerSettings,
    WorkerSettings,
)
from .pruning import (
    AccuracyTarget,
    AccuracyTargets,
    AttentionAnalysis,
    ChannelAnalysis,
    CutLimits,
    LayerAnalysis,
    PhaseLimits,
    RollbackTriggers,
    SafetySchedule,
    StructuredPruning,
    VerificationSettings,
)

__all__ = [
    "AccuracyTarget",
    "AccuracyTargets",
    "AttentionAnalysis",
    "AuditSettings",
    "BreakerSettings",
    "BusSettings",
    "ChannelAnalysis",
    "ConsoleSettings",
    "CutLimits",
    "LayerAnalysis",
    "ObserveSettings",
    "PhaseLimits",
    "RollbackTriggers",
    "SafetySchedule",
    "SecuritySettings",
    "Settings",
    "SettingsError",
    "StructuredPruning",
    "TrainerSettings",
    "WorkerSettings",
    "VerificationSettings",
    "workers_needed",
]

_NO_PART_IN_DECISIONS = {
    "audit",
    "analysis_workers_per_gpu",
    "layers_per_worker",
    "analysis_timeout",
    "analysis_cache_size",
    "parallel_analysis_threads",
    "accuracy_targets",
    "breaker",
    "console",
    "bus",
    "observe",
    "trainer",
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
        use_attribute_docstrings=True,
    )
    _types = field_validator("*", mode="before")(classmethod(no_boolean))

    analysis_workers_per_gpu: int = Field(default=4, ge=1)
    """Workers that ``elesh plan --gpus`` advises for each GPU that trains."""
    layers_per_worker: int = Field(default=8, ge=1)
    """Groups in one part of a level, if the level is split (statistics over 1 GiB)."""
    sketch_width: int = Field(default=100_000, ge=1)
    """Cells in each row of the Count-Min sketch of single parameters; at least a hundredth of their
    number is used."""
    sketch_depth: int = Field(default=10, ge=1)
    """Rows of that sketch."""
    importance_history_epochs: int = Field(
        default=500, ge=1, json_schema_extra={"unit": "checkpoints"}
    )
    """Number of checkpoints of a run whose importance is kept, for trends and stability."""
    structured_pruning: StructuredPruning = StructuredPruning()
    """Channels, heads, layers, the schedule and the rollback triggers."""
    analysis_timeout: float = Field(default=300.0, gt=0, json_schema_extra={"unit": "s"})
    """The checkpoint window. An analysis that takes longer is stopped, and a fallback of the
    failure table answers."""
    marking_threshold: float = Field(default=1e-8, ge=0)
    """Single parameters whose importance is certainly below this are masked."""
    confidence_threshold: float = Field(default=0.95, ge=0, le=1)
    """Minimum confidence for masks of single parameters; below it none are made."""
    analysis_cache_size: ByteSize = Field(default=ByteSize(10**9), ge=0)
    """Maximum size of a run's importance history in Redis."""
    parallel_analysis_threads: int = Field(default=16, ge=1)
    """Maximum threads of one analysis; a worker uses ``worker.threads``, up to this."""
    statistical_samples: int = Field(default=10_000, ge=1)
    """Number of single parameters whose exact importance checks the masks."""
    accuracy_targets: AccuracyTargets = AccuracyTargets()
    """What ``elesh validate`` measures a checkpoint against."""
    breaker: BreakerSettings = BreakerSettings()
    """Circuit breakers."""
    bus: BusSettings = BusSettings()
    """Redis."""
    trainer: TrainerSettings = TrainerSettings()
    """The training script's side."""
    worker: WorkerSettings = WorkerSettings()
    """One worker's limits."""
    audit: AuditSettings = AuditSettings()
    """The audit log."""
    console: ConsoleSettings = ConsoleSettings()
    """The web console."""
    verification: VerificationSettings = VerificationSettings()
    """What is measured before a cut is approved."""
    observe: ObserveSettings = ObserveSettings()
    """Traces, health and metrics."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_constants(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Keys that became constants are warned of, wherever they come from."""
        left = dict(given)
        for key, reason in without_constants(left).items():
            does = "is retired and changes nothing, the next version refuses it"
            warnings.warn(f"setting {key} {does}: {reason}", FutureWarning, stacklevel=3)
        return left

    @classmethod
    def load(cls, path: str | Path | None = None, **over: Any) -> Settings:
        """Settings from a YAML file (top-level key ``elesh``), environment and arguments.

        A retired key is warned of (FutureWarning, once).

        Raises:
            SettingsError: naming file, line and key of the first thing that is wrong.
        """
        node, values = read_block(Path(path)) if path is not None else (None, {})
        try:
            environment = EnvSettingsSource(cls)()
            given = _merged(_merged(values, environment), over)
            loaded = cls(**given)
        except UnreadableVariable as error:
            raise SettingsError(f"environment: {error}: {error.__cause__}") from None
        except ValidationError as error:
            layers = {"argument": over, "environment": environment}
            raise SettingsError(explain(cls, error, layers, path, node)) from None
        for key, reason in retired_keys(loaded):
            text = f"setting {key} is retired, the next version refuses it: {reason}"
            warnings.warn(text, FutureWarning, stacklevel=2)
        return loaded

    @classmethod
    def in_force(cls, given: Settings | str | Path | None = None) -> Settings:
        """Settings as they are, those of a file, or (None) of the file that ``ELESH_SETTINGS``
        names, as every ``elesh`` command has them; without one, the defaults.

        Raises:
            SettingsError: as :meth:`load`.
        """
        if isinstance(given, Settings):
            return given
        if given is not None and not isinstance(given, (str, Path)):
            expected = "expected Settings or the name of a file; Settings.model_validate({...})"
            raise SettingsError(f"settings: {expected} makes them, found {type(given).__name__}")
        return cls.load(given or os.environ.get("ELESH_SETTINGS") or None)

    @property
    def window_seconds(self) -> float:
        """The checkpoint window: the document's ``analysis_timeout``, or the worker's if less."""
        return min(self.worker.window_seconds or self.analysis_timeout, self.analysis_timeout)

    @property
    def threads(self) -> int:
        """Threads of one analysis: the worker's, up to ``parallel_analysis_threads``."""
        return min(self.worker.threads, self.parallel_analysis_threads)

    @property
    def analysis_json(self) -> str:
        """Everything that can change a decision, as JSON."""
        return self.model_dump_json(exclude=_NO_PART_IN_DECISIONS)

    @property
    def analysis_hash(self) -> str:
        """First 16 hex digits of SHA-256 over :attr:`analysis_json`."""
        return hashlib.sha256(self.analysis_json.encode()).hexdigest()[:16]


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

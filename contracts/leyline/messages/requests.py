"""Requests of a coordinator: structural analyses (4.1) and legacy parameter analyses (4.4)."""

from __future__ import annotations

import operator
from datetime import timedelta
from typing import Annotated, ClassVar, Self

from pydantic import Field, WithJsonSchema, model_validator

from leyline.base import (
    Duration,
    Epoch,
    Fraction,
    Identifier,
    Label,
    Message,
    ModelHash,
    NonNegative,
    is_none,
)
from leyline.errors import IdentityMismatch
from leyline.identity import Level, RequestKey, RequestKeyText
from leyline.network.architecture import PrunedArchitecture

from .checkpoint import BlobRef, CheckpointMetadata
from .parameters import AnalysisParameters, PerformanceRequirements

Window = Annotated[
    Duration,
    Field(gt=timedelta(0), le=timedelta(minutes=5)),
    WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 300}),
]
"""The checkpoint window: more than nothing, at most five minutes."""


class StructuralAnalysisRequest(Message):
    """Asks for a decision on a checkpoint whose statistics are at hand (section 4.1)."""

    contract_of: ClassVar[str] = "Emrakul to Elesh"

    request_id: Identifier
    idempotency_key: RequestKeyText
    """``<epoch>:<model_hash>:<request_id>``; the decision's key adds the level."""
    current_architecture: PrunedArchitecture
    parameters: AnalysisParameters = AnalysisParameters()
    requirements: PerformanceRequirements = PerformanceRequirements()
    timeout: Window = timedelta(minutes=5)
    """The checkpoint window in seconds, at most five minutes."""
    metadata: CheckpointMetadata
    """The checkpoint that the statistics belong to."""
    statistics: BlobRef
    """Safetensors: ChannelImportanceData of every group."""
    gates: BlobRef | None = None
    """Safetensors: GateStatistics of every group, where measured."""
    layers: BlobRef | None = Field(default=None, exclude_if=is_none)
    """Safetensors: LayerStatistics of every block, where measured; left out where not."""
    heads: BlobRef | None = Field(default=None, exclude_if=is_none)
    """Safetensors: HeadImportanceData of every attention layer, where measured; left out where
    not."""
    program: BlobRef | None = Field(default=None, exclude_if=is_none)
    """Msgpack: the network as a graph of operators with gates, so that cuts can be measured."""
    weights: BlobRef | None = Field(default=None, exclude_if=is_none)
    """Safetensors: the parameters and buffers of the program, by path."""
    held_out: BlobRef | None = Field(default=None, exclude_if=is_none)
    """Safetensors: inputs and labels that no statistic was measured on."""
    levels: tuple[Level, ...] = (Level.CHANNEL,)
    """What may be removed."""

    @model_validator(mode="after")
    def _key_is_of_this_request(self) -> Self:
        key = RequestKey.parse(self.idempotency_key)
        expected = RequestKey(self.metadata.epoch, self.metadata.model_hash, self.request_id)
        if key != expected:
            raise IdentityMismatch("idempotency_key", str(expected), str(key))
        return self


class AnalysisRequest(Message):
    """Parameter analysis with its thresholds (legacy, preserved)."""

    contract_of: ClassVar[str] = "Emrakul to Elesh"

    request_id: Identifier
    epoch: Epoch
    model_hash: ModelHash
    run_id: Label = Field(default="", exclude_if=operator.not_)
    """The training run that asks, where there is one."""
    importance: BlobRef
    """Encoded ImportanceData."""
    ranks: tuple[BlobRef, ...] = Field(default=(), exclude_if=operator.not_)
    """The same of the other data-parallel ranks; all are merged."""
    marking_threshold: NonNegative = 1e-8
    """Parameters whose importance is surely below it are marked."""
    confidence_threshold: Fraction = 0.95
    """Masks of less confidence are not made."""
    statistical_samples: int = Field(default=10_000, ge=1)
    """Samples behind the confidence."""
    timeout: Window = timedelta(minutes=5)

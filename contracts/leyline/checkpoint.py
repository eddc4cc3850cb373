"""The event that starts everything: a training run has reached a checkpoint."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .architecture import PrunedArchitecture
from .base import Count, Epoch, Identifier, MaybeNaN, Message, ModelHash, Moment, Name, Sha256, Text
from .identity import Level
from .parameters import AnalysisParameters

MAX_BLOB_BYTES = 2 << 30


class BlobRef(Message):
    """Claim check of a blob: fetched by ``uri``, at most ``size`` bytes, verified by digest."""

    uri: Name
    size: int = Field(ge=0, le=MAX_BLOB_BYTES)
    sha256: Sha256
    codec: Literal["safetensors", "msgpack", "raw"] = "safetensors"
    expires: Moment | None = None


class CheckpointMetadata(Message):
    """Checkpoint coordination: which run, when, and how well the network does."""

    run_id: Identifier
    checkpoint_id: Identifier
    epoch: Epoch
    model_hash: ModelHash
    step: Count = 0
    created_at: Moment | None = None
    accuracy: MaybeNaN | None = None
    """Held-out accuracy that the trainer measured, 0 to 1, if it did."""
    loss: MaybeNaN | None = None
    samples: Count = 0
    """Calibration samples behind the statistics."""
    labels: Literal["sampled", "true", "none"] = "sampled"
    """Where the second-order statistics' labels came from."""
    seed: Count = 0
    note: Text = ""


class CheckpointReady(Message):
    """A checkpoint was saved and its statistics can be fetched."""

    contract_of: ClassVar[str] = "Tolaria to Elesh"

    metadata: CheckpointMetadata
    architecture: PrunedArchitecture
    statistics: BlobRef
    """Safetensors: ChannelImportanceData of every group."""
    gates: BlobRef | None = None
    """Safetensors: GateStatistics of every group, where the trainer measured them."""
    levels: tuple[Level, ...] = (Level.CHANNEL,)
    parameters: AnalysisParameters = AnalysisParameters()

"""The event that starts an analysis: a training run has reached a checkpoint."""

from __future__ import annotations

import operator
from typing import ClassVar, Literal

from pydantic import Field

from leyline.base import (
    Count,
    Epoch,
    Identifier,
    MaybeNaN,
    Message,
    ModelHash,
    Moment,
    Name,
    NonNegative,
    Sha256,
    Text,
    is_none,
)
from leyline.identity import Level
from leyline.network.architecture import PrunedArchitecture

from .parameters import AnalysisParameters

MAX_BLOB_BYTES = 2 << 30


class BlobRef(Message):
    """Claim check of a blob: fetched by ``uri``, at most ``size`` bytes, verified by digest."""

    uri: Name
    """Where the blob is; the scheme must be allowed by the reader."""
    size: int = Field(ge=0, le=MAX_BLOB_BYTES)
    """Bytes; checked before reading."""
    sha256: Sha256
    """Digest of the content, in lower-case hex; checked while reading."""
    codec: Literal["safetensors", "msgpack", "raw"] = "safetensors"
    expires: Moment | None = None
    """From when on the blob may be gone."""
    sealed: ModelHash | None = Field(default=None, exclude_if=is_none)
    """The architecture that it is encrypted for, where it is; size and digest are of the sealed
    bytes."""


class PreflightCheck(Message):
    """What one check of a run's preflight found."""

    name: Text
    result: Literal["ok", "failed", "not_run"]
    """``not_run``: it had nothing to work on, as the detail says."""
    detail: Text = ""
    seconds: NonNegative = 0.0


class CheckpointMetadata(Message):
    """Checkpoint coordination: which run, when, and how well the network does."""

    run_id: Identifier
    checkpoint_id: Identifier
    """Becomes the decision id of the idempotency key."""
    epoch: Epoch
    model_hash: ModelHash
    """Hash of the architecture (:class:`PrunedArchitecture`)."""
    step: Count = 0
    """Optimizer steps so far."""
    created_at: Moment | None = None
    accuracy: MaybeNaN | None = None
    """Held-out accuracy that the trainer measured, 0 to 1, if it did."""
    loss: MaybeNaN | None = None
    """Held-out loss that the trainer measured, in nats a sample, if it did."""
    samples: Count = 0
    """Calibration samples behind the statistics."""
    distinct: Count | None = Field(default=None, exclude_if=is_none)
    """How many of these differ from each other, where some are copies."""
    labels: Literal["sampled", "true", "none"] = "sampled"
    """Where the second-order statistics' labels came from."""
    seed: Count = 0
    """Seed of the random directions and sampled labels."""
    note: Text = ""
    held_back: Text = Field(default="", exclude_if=operator.not_)
    """What the trainer did not do for this checkpoint, and why; empty where it did all."""
    preflight: tuple[PreflightCheck, ...] | None = Field(default=None, exclude_if=is_none)
    """What the run's preflight found, in the first checkpoint of a run; left out where none was."""


class CheckpointReady(Message):
    """A checkpoint was saved and its statistics can be fetched."""

    contract_of: ClassVar[str] = "Tolaria to Elesh"

    metadata: CheckpointMetadata
    architecture: PrunedArchitecture
    statistics: BlobRef
    """Safetensors: ChannelImportanceData of every group."""
    gates: BlobRef | None = None
    """Safetensors: GateStatistics of every group, where the trainer measured them."""
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
    parameters: AnalysisParameters = AnalysisParameters()

"""Parameter-level messages of section 4.4, preserved beside the structured ones."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from .base import Count, Epoch, Finite, Fraction, Message, ModelHash, NonNegative, Text
from .checkpoint import BlobRef
from .errors import InvalidField
from .identity import DecisionKey, IdempotencyKey, Level, ParameterIdentifier

MaskKind = Literal["channel", "head", "layer", "unstructured"]


class ImportanceData(Message):
    """Importance statistics accumulated at a checkpoint, as sketches in a blob."""

    contract_of: ClassVar[str] = "Kasmina to Elesh"

    epoch: Epoch
    model_hash: ModelHash
    parameters: tuple[ParameterIdentifier, ...]
    """The tensors that were tracked, one sketch each."""
    sketch_width: int = Field(ge=1)
    sketch_depth: int = Field(ge=1, le=64)
    sketches: BlobRef
    """Safetensors: ``<identifier>/counters`` [depth, width] and ``<identifier>/total`` [1]."""


class ParameterMask(Message):
    """The mask of one tensor: ``ceil(elements / 8)`` bytes, highest bit first, 1 = keep."""

    parameter: ParameterIdentifier
    kind: MaskKind = "unstructured"
    bits: bytes
    """One bit for each element in row-major order."""
    marked: Count
    """Elements to remove."""
    confidence: Fraction

    @model_validator(mode="after")
    def _bits_fit(self) -> Self:
        size = (math.prod(self.parameter.shape) + 7) // 8
        if len(self.bits) != size:
            raise InvalidField("bits", f"{size} bytes", f"{len(self.bits)} bytes")
        return self


class PruningMasks(Message):
    """Masks with their confidence; settled once a key at level ``parameter``."""

    contract_of: ClassVar[str] = "Elesh to Emrakul"

    idempotency_key: DecisionKey
    masks: tuple[ParameterMask, ...]
    marking_threshold: NonNegative
    """Below which an element is marked."""
    confidence: Fraction

    @model_validator(mode="after")
    def _key_is_of_parameters(self) -> Self:
        key = IdempotencyKey.parse(self.idempotency_key)
        if key.level is not Level.PARAMETER:
            raise InvalidField("idempotency_key", "level parameter", key.level.value)
        return self


class MaskApplication(Message):
    """Validated masks to embed in the checkpoint."""

    contract_of: ClassVar[str] = "Emrakul to Kasmina"

    idempotency_key: DecisionKey
    masks: BlobRef
    """Encoded PruningMasks."""
    validated_by: Text = ""
    """Who validated them."""


class AnalysisReport(Message):
    """Results of an analysis and what to do in the next cycle."""

    contract_of: ClassVar[str] = "Elesh to Emrakul"

    idempotency_key: DecisionKey
    analysed: Count
    """Parameters looked at."""
    marked: Count
    """Parameters marked for removal."""
    error_bound: Finite
    """Bound of the sketches' overestimation, in units of importance."""
    confidence: Fraction
    recommendations: tuple[Text, ...] = ()

"""Parameter-level messages of section 4.4, preserved beside the structured ones.

One Count-Min sketch holds the importance of every element of every tracked tensor; ranks of a
data-parallel run each send their own, and the worker merges them. Masks too large for a message
travel as a blob.
"""

from __future__ import annotations

import math
import operator
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from leyline.base import (
    Count,
    Epoch,
    Finite,
    Fraction,
    Message,
    ModelHash,
    NonNegative,
    Text,
    is_none,
)
from leyline.errors import InvalidField
from leyline.identity import DecisionKey, IdempotencyKey, Level, ParameterIdentifier

from .checkpoint import BlobRef

MaskKind = Literal["channel", "head", "layer", "unstructured"]


class ImportanceData(Message):
    """Importance statistics accumulated at a checkpoint, as sketches in a blob."""

    contract_of: ClassVar[str] = "Kasmina to Elesh"

    epoch: Epoch
    model_hash: ModelHash
    parameters: tuple[ParameterIdentifier, ...]
    """The tensors that were tracked; all their elements are in the one sketch."""
    sketch_width: int = Field(ge=1)
    sketch_depth: int = Field(ge=1, le=64)
    sketches: BlobRef
    """Safetensors: ``cells`` [depth, width]; format, version, seed and total in the metadata."""
    samples: BlobRef | None = Field(default=None, exclude_if=is_none)
    """Safetensors: ``<identifier>`` [k], exact importance of sampled elements, where kept; which
    elements follows from identifier and number, the same on every rank."""


class ParameterMask(Message):
    """The mask of one tensor: ``ceil(elements / 8)`` bytes, highest bit first, 1 = keep."""

    parameter: ParameterIdentifier
    kind: MaskKind = "unstructured"
    bits: bytes
    """One bit for each element in row-major order; empty where the masks are packed in a blob."""
    marked: Count
    """Elements to remove."""
    confidence: Fraction

    @property
    def size(self) -> int:
        """Bytes of the mask."""
        return (math.prod(self.parameter.shape) + 7) // 8

    @model_validator(mode="after")
    def _bits_fit(self) -> Self:
        if self.bits and len(self.bits) != self.size:
            raise InvalidField("bits", f"{self.size} bytes", f"{len(self.bits)} bytes")
        if self.marked > math.prod(self.parameter.shape):
            raise InvalidField("marked", f"at most {math.prod(self.parameter.shape)}", self.marked)
        return self


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
    expected_recall: Fraction | None = Field(default=None, exclude_if=is_none)
    """Share of the elements below the threshold that the sketch is expected to show as such."""
    samples: Count = Field(default=0, exclude_if=operator.not_)
    """Elements whose exact importance the masks were checked against."""


class PruningMasks(Message):
    """Masks with their confidence; committed once a key at level ``parameter``."""

    contract_of: ClassVar[str] = "Elesh to Emrakul"

    idempotency_key: DecisionKey
    masks: tuple[ParameterMask, ...]
    marking_threshold: NonNegative
    """Below which an element is marked."""
    confidence: Fraction
    packed: BlobRef | None = Field(default=None, exclude_if=is_none)
    """The bits of all masks, one after another in the order of ``masks``, where they are too many
    for a message."""

    @model_validator(mode="after")
    def _key_is_of_parameters(self) -> Self:
        key = IdempotencyKey.parse(self.idempotency_key)
        if key.level is not Level.PARAMETER:
            raise InvalidField("idempotency_key", "level parameter", key.level.value)
        return self

    @model_validator(mode="after")
    def _bits_are_somewhere(self) -> Self:
        for number, mask in enumerate(self.masks):
            size = mask.size if self.packed is None else 0
            if len(mask.bits) != size:
                where = "none, they are packed" if self.packed else f"{size} bytes"
                raise InvalidField(f"masks[{number}].bits", where, f"{len(mask.bits)} bytes")
        return self


class MaskApplication(Message):
    """Validated masks to embed in the checkpoint."""

    contract_of: ClassVar[str] = "Emrakul to Kasmina"

    idempotency_key: DecisionKey
    masks: BlobRef
    """Encoded PruningMasks."""
    validated_by: Text = ""
    """Who validated them."""

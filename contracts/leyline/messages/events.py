"""Reports while and after things happen: telemetry, outcomes, breakers, refusals."""

from __future__ import annotations

import operator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from leyline.base import (
    Count,
    Epoch,
    Finite,
    Fraction,
    Identifier,
    Label,
    MaybeNaN,
    Message,
    ModelHash,
    Moment,
    Name,
    NonNegative,
    Text,
    is_none,
    sorted_items,
)
from leyline.identity import DecisionKey, Level

from .decisions import GateResult, Outcome

Figures = Annotated[dict[Name, MaybeNaN], Field(max_length=64), AfterValidator(sorted_items)]
"""Named figures; NaN means unknown."""


class AnalysisMetrics(Message):
    """Performance of one analysis."""

    duration_seconds: NonNegative
    """Wall-clock time of the analysis."""
    channels: Count = 0
    """Units looked at, by level."""
    heads: Count = 0
    layers: Count = 0
    peak_memory_bytes: Count = 0
    """Highest resident memory of the compute child."""
    input_bytes: Count = 0
    """Bytes of blobs read."""


class TelemetryEvent(Message):
    """One step of one analysis, by one worker."""

    contract_of: ClassVar[str] = "Elesh to Nissa"

    step: Literal[
        "received",
        "fetched",
        "analysed",
        "settled",
        "duplicate",
        "conflict",
        "lost",
        "failed",
        "dead_letter",
        "fallback",
        "planned",
        "stored",
        "handed_over",
        "retried",
        "reclaimed",
        "validated",
    ]
    worker_id: Name
    idempotency_key: Label = ""
    """Of what was worked on, where known."""
    run_id: Label = ""
    epoch: Epoch | None = None
    at: Moment
    metrics: AnalysisMetrics | None = None
    figures: Figures = Field(default_factory=dict)
    """Named figures of the step; NaN means unknown."""
    detail: Text = ""


class BreakerTransition(Message):
    """A circuit breaker changed its state."""

    contract_of: ClassVar[str] = "Elesh to Nissa"

    run_id: Identifier
    level: Level
    before: Literal["closed", "open", "half_open"]
    after: Literal["closed", "open", "half_open"]
    failures: Count
    """Consecutive failures counted."""
    reason: Text
    at: Moment


CutFallback = Literal[
    "not_reconstructed",
    "statistics_not_estimated",
    "layers_not_solved",
    "outputs_not_matched",
    "answers_not_compared",
]
"""What reads the kept units was not refitted; batch statistics stayed; layers were refitted by the
covariance alone; a table's outputs were not matched; what the cut costs was told by accuracy and
loss alone, and not by how the network's answers moved."""


class PruningOutcome(Message):
    """What became of a decision on the trainer's side; feeds the breakers."""

    contract_of: ClassVar[str] = "Kasmina to Elesh"

    idempotency_key: DecisionKey
    run_id: Identifier
    epoch: Epoch
    result: Literal["applied", "rolled_back", "refused", "rejected"]
    """``rejected``: Elesh did not approve; ``refused``: the trainer did not take it. A cut that is
    watched afterwards has two outcomes: ``applied`` at once, then either ``applied`` again with
    nothing left to watch, or ``rolled_back``."""
    accuracy_before: MaybeNaN | None = None
    """Held-out accuracy, 0 to 1."""
    accuracy_masked: MaybeNaN | None = None
    """The same with the decision's mask on."""
    loss_before: MaybeNaN | None = None
    """Held-out loss in nats a sample."""
    loss_masked: MaybeNaN | None = None
    """The same with the decision's mask on."""
    parameters_before: Count = 0
    parameters_after: Count = 0
    detail: Text = ""
    accuracy_after: MaybeNaN | None = Field(default=None, exclude_if=is_none)
    """Held-out accuracy after the cut: just after it, or at the report that ended its watch."""
    loss_after: MaybeNaN | None = Field(default=None, exclude_if=is_none)
    """Held-out loss after the cut, in nats a sample."""
    latency_before: NonNegative | None = Field(default=None, exclude_if=is_none)
    """Seconds of a call of the network before the cut, with a batch of its calibration on the
    trainer's machine: on a processor those that the calling thread computed."""
    latency_after: NonNegative | None = Field(default=None, exclude_if=is_none)
    """The same of the network that is left, just after the cut."""
    watched: Count | None = Field(default=None, exclude_if=is_none)
    """Reports of accuracy that the cut must still stand; until 0 it is monitored."""
    shortened_to: Fraction | None = Field(default=None, exclude_if=is_none)
    """The share of the decision's units and layers that went, where all of them cost more at once
    than the trainer allows."""
    fallbacks: tuple[CutFallback, ...] = Field(default=(), exclude_if=operator.not_)
    """What the cut went without, though the decision or the trainer's settings have it; ``detail``
    says why."""
    rolled_back_epoch: Epoch | None = Field(default=None, exclude_if=is_none)
    """The epoch at which a cut was taken back that had been made before."""
    undone_with: DecisionKey | None = Field(default=None, exclude_if=is_none)
    """The decision whose rollback took this later cut along; it is not to blame itself. Its own key
    where a lost restore point undid it."""


class StructuralValidationResult(Message):
    """Safety validation of a structural modification."""

    contract_of: ClassVar[str] = "Elesh to Urabrask"

    idempotency_key: DecisionKey
    outcome: Outcome
    gates: tuple[GateResult, ...]
    accuracy_retention: Fraction | None = None
    """Accuracy after as a share of that before."""
    gradient_flow_change: Finite | None = None
    """Relative change of the gradient norm."""


class RecompilationRequest(Message):
    """The architecture changed physically: compiled forms of it are stale."""

    contract_of: ClassVar[str] = "Kasmina to Tezzeret"

    run_id: Identifier
    epoch: Epoch
    idempotency_key: DecisionKey
    model_hash_before: ModelHash
    model_hash_after: ModelHash
    reason: Literal["cut", "rollback"] = Field(default="cut", exclude_if=lambda r: r == "cut")
    """Why it changed; after a rollback the earlier form is the present one again."""
    parameters_before: Count | None = Field(default=None, exclude_if=is_none)
    parameters_after: Count | None = Field(default=None, exclude_if=is_none)
    macs_before: Count | None = Field(default=None, exclude_if=is_none)
    """Multiply-accumulates of one sample."""
    macs_after: Count | None = Field(default=None, exclude_if=is_none)


class OperatorAction(Message):
    """Something that a person did to the fleet by hand: who, what, why."""

    contract_of: ClassVar[str] = "operators to Elesh"

    action: Literal["redrive", "drop", "breaker_reset", "breaker_trip"]
    subject: Name
    """What it was done to: the entry of a dead letter, or ``<run>:<level>`` of a breaker."""
    operator: Name
    """Who did it, as far as is known: user and host, or the console."""
    at: Moment
    reason: Text = ""
    outcome: Text = ""
    """What came of it, for example the entry that a dead letter was redriven as."""


class Attempt(Message):
    """One delivery of an entry that did not end it."""

    cause: Literal["crash", "exception", "handover"]
    """``crash``: the lease ran out; ``exception``: the worker failed and went on; ``handover``: the
    worker was drained before it began (not counted as a delivery)."""
    worker_id: Name
    at: Moment
    detail: Label = ""


class DeadLetter(Message):
    """A message that could not be served, with its original bytes and the reason."""

    contract_of: ClassVar[str] = "Elesh to operators"

    stream: Name
    """The stream that the message stood in, by its short name."""
    entry_id: Name
    """Its entry there."""
    error_code: Name
    """Stable name of the class of error, for alerts."""
    field: Text = ""
    """The offending field, where there is one."""
    reason: Text
    """The whole error as one line: field, expected, found."""
    deliveries: Count
    """How often it had been delivered."""
    worker_id: Name
    """Who gave it up."""
    at: Moment
    original: Annotated[dict[str, bytes], AfterValidator(sorted_items)]
    """The fields of the stream entry as they were."""
    idempotency_key: Label = ""
    traceparent: Annotated[str, AfterValidator(lambda text: text[:512])] = ""
    """W3C trace context of the message, cut: a dead letter is written whatever came."""
    history: tuple[Attempt, ...] = Field(default=(), exclude_if=operator.not_)
    """Earlier deliveries that did not end it, oldest first, at most the last sixteen."""

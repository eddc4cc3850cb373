"""One fixed example of every message, for the golden vectors and the schema tests.

The figures belong together: a concat network of two convolutions with a linear head that has lost
one channel already, at its checkpoint of epoch 31, whose decision removes one channel more.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Literal

import numpy as np

import leyline as ll

_AT = datetime(2025, 1, 14, 12, 0, 0, 250_000, tzinfo=UTC)
_TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def _original() -> ll.PrunedArchitecture:
    """A convolution ``a`` beside a convolution ``b``, concatenated, flattened, then ``fc``."""
    shapes: tuple[tuple[str, tuple[int, ...], Literal["parameter", "buffer"]], ...] = (
        ("a.weight", (4, 1, 3, 3), "parameter"),
        ("a_bn.running_mean", (4,), "buffer"),
        ("b.weight", (3, 1, 3, 3), "parameter"),
        ("fc.weight", (2, 28), "parameter"),
    )
    tensors = tuple(
        ll.TensorDescriptor(path=path, shape=shape, dtype="float32", kind=kind)
        for path, shape, kind in shapes
    )
    layers = (
        ll.LayerDescriptor(name="a", kind="conv2d", weight="a.weight", positions=64),
        ll.LayerDescriptor(name="b", kind="conv2d", weight="b.weight", positions=64),
        ll.LayerDescriptor(name="fc", kind="linear", weight="fc.weight", positions=1),
    )
    first = ll.PruningGroup(
        name="a",
        layers=("a",),
        original_size=4,
        origin=(0, 1, 2, 3),
        slices=(
            ll.TensorSlice(tensor="a.weight", dim=0),
            ll.TensorSlice(tensor="a_bn.running_mean", dim=0),
            ll.TensorSlice(tensor="fc.weight", dim=1, width=4),
        ),
        sites=(ll.GateSite(module="fc", dim=-1, width=4),),
    )
    second = ll.PruningGroup(
        name="b",
        layers=("b",),
        original_size=3,
        origin=(0, 1, 2),
        slices=(
            ll.TensorSlice(tensor="b.weight", dim=0),
            ll.TensorSlice(tensor="fc.weight", dim=1, width=4, indices=tuple(range(16, 28))),
        ),
        sites=(ll.GateSite(module="fc", dim=-1, start=16, width=4),),
        prunable=False,
        reason="kept by hand",
    )
    return ll.PrunedArchitecture.build(tensors, layers, (first, second))


ARCHITECTURE = _original().without({"a": [1]}, epoch=30, key="30:0123456789abcdef:ck-30:channel")
KEY = ll.IdempotencyKey(31, ARCHITECTURE.model_hash, "ck-31", ll.Level.CHANNEL)
_PARAMETER_KEY = str(KEY.at(ll.Level.PARAMETER))
_AFTER = ARCHITECTURE.without({"a": [1]}, epoch=31, key=str(KEY))

METADATA = ll.CheckpointMetadata(
    run_id="digits-7",
    checkpoint_id="ck-31",
    epoch=31,
    model_hash=ARCHITECTURE.model_hash,
    step=1240,
    created_at=_AT,
    accuracy=0.985,
    loss=0.0625,
    samples=3,
    seed=7,
)
_PARAMETERS = ll.AnalysisParameters(target_ratio=0.25, ignored_layers=("b",))


def _blob(name: str, codec: str = "safetensors") -> ll.BlobRef:
    digest = hashlib.sha256(name.encode()).hexdigest()
    expires = _AT + timedelta(hours=2)
    return ll.BlobRef.model_validate(
        {"uri": f"redis:{name}", "size": 512, "sha256": digest, "codec": codec, "expires": expires}
    )


STATISTICS: tuple[
    ll.ChannelImportanceData, ll.GateStatistics, ll.LayerStatistics, ll.HeadImportanceData
] = (
    ll.ChannelImportanceData(
        layer_name="a",
        taylor_importance=np.array([0.5, 0.25, 0.125], np.float32),
        magnitude_importance=np.array([1.5, 1.25, 1.0], np.float32),
        activation_frequency=np.array([1.0, 0.5, 0.75], np.float32),
        channel_correlations=np.array(
            [[1.0, 0.5, -0.25], [0.5, 1.0, 0.0], [-0.25, 0.0, 1.0]], np.float16
        ),
    ),
    ll.GateStatistics(
        layer_name="a",
        projections=np.array([[0.5, -0.5, 2.0], [1.0, 0.25, -1.0]], np.float32),
        first_order=np.array([-0.5, 0.0, 0.5], np.float32),
        second_order=np.array([0.25, 0.0, 0.25], np.float32),
    ),
    ll.LayerStatistics(
        layer_name="stage.0",
        taylor=np.array([0.0005], np.float32),
        gradient_flow=np.array([0.75], np.float32),
        similarity=np.array([0.96875], np.float32),
        projections=np.array([0.5, -0.25], np.float32),
        first_order=np.array([-0.00025], np.float32),
        second_order=np.array([0.0625], np.float32),
    ),
    ll.HeadImportanceData(
        layer_name="a",
        gradient_sensitivity=np.array([0.5, 0.0, 0.5], np.float32),
        entropy=np.array([1.5, 0.25, 1.0], np.float32),
        entropy_bound=np.array([1.75, 1.75, 1.75], np.float32),
        diversity=np.array([0.125, 0.5, 0.25], np.float32),
        similarity=np.array([[1.0, 0.25, 0.5], [0.25, 1.0, 0.125], [0.5, 0.125, 1.0]], np.float32),
    ),
)
"""Each is a blob of its own in the vectors."""


def _decision() -> ll.StructuralPruningDecision:
    target = ll.ChannelPruningTarget(
        layer_name="a",
        channel_indices=(1,),
        original_indices=(2,),
        importance=(0.03125,),
        redundancy_pairs=(ll.Redundancy(kept=0, removed=1, similarity=0.96875),),
        channels_before=3,
        channels_after=2,
        spared=(ll.SparedUnit(index=2, cost=0.5, reason="quota"),),
    )
    statistics = ll.PruningStatistics(
        scorer="output_projection",
        parameters_before=ARCHITECTURE.parameters,
        parameters_after=_AFTER.parameters,
        macs_before=ARCHITECTURE.macs,
        macs_after=_AFTER.macs,
        channels_before=6,
        channels_after=5,
        channels_original=7,
        quota=1,
        phase_limit=0.3,
        cumulative_ratio=0.2857142857142857,
        predicted_shift=0.015625,
        predicted_shift_error=0.0078125,
        samples=3,
    )
    gate = ll.GateResult(
        name="accuracy", passed=True, measured=0.985, limit=0.02, detail="held out"
    )
    return ll.StructuralPruningDecision(
        idempotency_key=str(KEY),
        run_id=METADATA.run_id,
        epoch=31,
        model_hash=ARCHITECTURE.model_hash,
        channels=(target,),
        statistics=statistics,
        safety=ll.SafetyValidation(
            outcome=ll.Outcome.GO, phase=ll.Phase.CONSERVATIVE, gates=(gate,), confidence=0.95
        ),
        approved_for_application=True,
        fallbacks=(ll.Fallback(rung="basic importance", reason="no gates were measured"),),
        ignored=(("b", "kept by hand"),),
        settings_hash="00112233445566ff",
        elesh_version="0.1.0",
    )


def _asked() -> list[ll.Message]:
    """What coordinators and trainers send to Elesh."""
    request_key = ll.RequestKey(31, ARCHITECTURE.model_hash, "rq-1")
    return [
        ll.CheckpointReady(
            metadata=METADATA,
            architecture=ARCHITECTURE,
            statistics=_blob("statistics"),
            gates=_blob("gates"),
            parameters=_PARAMETERS,
        ),
        ll.StructuralAnalysisRequest(
            request_id="rq-1",
            idempotency_key=str(request_key),
            current_architecture=ARCHITECTURE,
            parameters=_PARAMETERS,
            requirements=ll.PerformanceRequirements(max_predicted_loss_rise=0.05),
            timeout=timedelta(seconds=150),
            metadata=METADATA,
            statistics=_blob("statistics"),
            levels=(ll.Level.CHANNEL, ll.Level.HEAD),
        ),
        ll.AnalysisRequest(
            request_id="rq-2",
            epoch=31,
            model_hash=ARCHITECTURE.model_hash,
            importance=_blob("importance"),
        ),
        ll.ImportanceData(
            epoch=31,
            model_hash=ARCHITECTURE.model_hash,
            parameters=(
                ll.ParameterIdentifier(path="a.weight", shape=(3, 1, 3, 3), dtype="float32"),
            ),
            sketch_width=100_000,
            sketch_depth=10,
            sketches=_blob("sketches"),
        ),
        ll.PruningOutcome(
            idempotency_key=str(KEY),
            run_id=METADATA.run_id,
            epoch=31,
            result="applied",
            accuracy_before=0.985,
            accuracy_masked=0.98,
            parameters_before=ARCHITECTURE.parameters,
            parameters_after=_AFTER.parameters,
        ),
    ]


def _masks() -> list[ll.Message]:
    """The parameter level (section 4.4)."""
    mask = ll.ParameterMask(
        parameter=ll.ParameterIdentifier(path="fc.bias", shape=(10,), dtype="float32"),
        bits=bytes([0b11110111, 0b11000000]),
        marked=1,
        confidence=0.97,
    )
    return [
        ll.PruningMasks(
            idempotency_key=_PARAMETER_KEY, masks=(mask,), marking_threshold=1e-8, confidence=0.97
        ),
        ll.AnalysisReport(
            idempotency_key=_PARAMETER_KEY,
            analysed=10,
            marked=1,
            error_bound=1e-4,
            confidence=0.97,
            recommendations=("widen the sketch",),
        ),
        ll.MaskApplication(
            idempotency_key=_PARAMETER_KEY, masks=_blob("masks", "msgpack"), validated_by="urabrask"
        ),
    ]


def _shared() -> list[ll.Message]:
    """What workers hand each other."""
    plan = str(KEY.at(ll.Level.JOINT))
    return [
        ll.AnalysisItem(plan=plan, level=ll.Level.CHANNEL, shard=1, shards=2),
        ll.JoinItem(plan=plan),
    ]


def _told() -> list[ll.Message]:
    """What Elesh and the trainer tell others."""
    return [
        ll.TelemetryEvent(
            step="analysed",
            worker_id="worker-1",
            idempotency_key=str(KEY),
            run_id=METADATA.run_id,
            epoch=31,
            at=_AT,
            metrics=ll.AnalysisMetrics(duration_seconds=0.5, channels=6, input_bytes=512),
            figures={"quota": 1.0},
        ),
        ll.BreakerTransition(
            run_id=METADATA.run_id,
            level=ll.Level.CHANNEL,
            before="closed",
            after="open",
            failures=3,
            reason="third failure in a row",
            at=_AT,
        ),
        ll.StructuralValidationResult(
            idempotency_key=str(KEY),
            outcome=ll.Outcome.GO,
            gates=(ll.GateResult(name="connectivity", passed=True),),
            accuracy_retention=0.995,
        ),
        ll.RecompilationRequest(
            run_id=METADATA.run_id,
            epoch=31,
            idempotency_key=str(KEY),
            model_hash_before=ARCHITECTURE.model_hash,
            model_hash_after=_AFTER.model_hash,
        ),
        ll.DeadLetter(
            stream="checkpoints",
            entry_id="1736856000250-0",
            error_code="malformed",
            field="envelope",
            reason="envelope: expected msgpack within limits, found incomplete input",
            deliveries=1,
            worker_id="worker-1",
            at=_AT,
            original={"envelope": b"\x81\xa1", "traceparent": _TRACE.encode()},
            traceparent=_TRACE,
        ),
        _audited(),
        ll.OperatorAction(
            action="drop",
            subject="1736856000250-0",
            operator="jo@station-7",
            at=_AT,
            reason="sent by mistake",
        ),
    ]


def _audited() -> ll.AuditEntry:
    decision = _decision()
    return ll.AuditEntry(
        number=1,
        previous=ll.GENESIS,
        event=ll.AuditEvent(
            kind="decision",
            action="approved",
            actor="elesh",
            at=_AT,
            subject=decision.idempotency_key,
            run_id=METADATA.run_id,
            epoch=31,
            source="decisions/1736856000250-0",
            digest=hashlib.sha256(ll.encode(decision)).hexdigest(),
            figures={"units": 1.0},
            gates=decision.safety.gates,
            fallbacks=decision.fallbacks,
        ),
    )


MESSAGES: dict[str, ll.Message] = {
    type(message).__name__: message
    for message in (*_asked(), _decision(), *_masks(), *_shared(), *_told())
}
"""An example of every message of the catalogue, by its type's name."""

ENVELOPE = ll.wrap(
    MESSAGES["CheckpointReady"],
    source="tolaria",
    priority=ll.Priority.HIGH,
    event_id="00000000000000000000000000000031",
    run_id=METADATA.run_id,
    epoch=31,
    correlation_id="rq-1",
    sequence=31,
    deadline=_AT + timedelta(minutes=5),
    now=_AT,
)

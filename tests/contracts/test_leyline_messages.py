"""Messages survive the wire unchanged, whatever they hold; and types on the wire are strict."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types as at
import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import AllowInfNan, StringConstraints
from pydantic.fields import FieldInfo

import leyline as ll
from contracts import examples
from leyline import identity

ALL = {**examples.MESSAGES, "EventEnvelope": examples.ENVELOPE}
PARTS: tuple[type[ll.Message], ...] = (
    *ll.MESSAGES.values(),
    ll.EventEnvelope,
    *(
        kind
        for kind in vars(ll).values()
        if isinstance(kind, type) and issubclass(kind, ll.Message)
    ),
)
hashes = st.from_regex(r"[0-9a-f]{16}", fullmatch=True)
identifiers = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}", fullmatch=True)
epochs = st.integers(0, 10**10 - 1)
decision_keys = st.builds(
    ll.IdempotencyKey, epochs, hashes, identifiers, st.sampled_from(list(ll.Level))
)

special: dict[Any, st.SearchStrategy[Any]] = {}
"""Messages whose fields hang together."""


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type within its stated bounds."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        metadata = [m for a in args[1:] for m in (a.metadata if isinstance(a, FieldInfo) else [a])]
        return of_plain(args[0], metadata)
    if origin in (Union, UnionType):
        return st.one_of(*(st.none() if arg is type(None) else of_type(arg) for arg in args))
    if origin is Literal:
        return st.sampled_from(args)
    return of_plain(hint, [])


def of_plain(kind: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Values of a plain type with the constraints of its annotation."""
    low: Any = next((m.ge for m in metadata if isinstance(m, at.Ge)), None)
    high: Any = next((m.le for m in metadata if isinstance(m, at.Le)), None)
    below: Any = next((m.lt for m in metadata if isinstance(m, at.Lt)), None)
    text = next((m for m in metadata if isinstance(m, StringConstraints)), StringConstraints())
    nan = any(isinstance(m, AllowInfNan) and m.allow_inf_nan for m in metadata)
    origin = get_origin(kind)
    if get_args(identity.DecisionKey)[1] in metadata:
        return decision_keys.map(str)
    if kind is datetime:
        return st.datetimes(
            datetime(1970, 1, 1), timezones=st.just(UTC), allow_imaginary=False
        ).map(lambda moment: moment.replace(fold=0))
    if kind is float:
        return st.floats(low, high, allow_nan=nan, allow_infinity=nan and low is high is None)
    if kind is int:
        return st.integers(low or 0, below - 1 if below else high or 2**62)
    if kind is str and text.pattern:
        return st.from_regex(str(text.pattern).removesuffix("$"), fullmatch=True)
    if kind is str:
        return st.text(min_size=text.min_length or 0, max_size=30)
    if kind is timedelta:
        return st.integers(1, 300_000_000).map(lambda us: timedelta(microseconds=us))
    if origin is tuple and get_args(kind)[-1] is ...:
        fewest = next((m.min_length for m in metadata if isinstance(m, at.MinLen)), 0)
        return st.lists(of_type(get_args(kind)[0]), min_size=fewest, max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(of_type, get_args(kind)))
    if origin is dict:
        return st.dictionaries(*map(of_type, get_args(kind)), max_size=3)
    if kind in (bool, bytes):
        return st.booleans() if kind is bool else st.binary(max_size=30)
    if issubclass(kind, ll.WireEnum):
        return st.sampled_from(list(kind))
    return special[kind] if kind in special else built(kind)


def built(kind: type[ll.Message], **fixed: Any) -> st.SearchStrategy[Any]:
    """Messages of a type, all fields given."""
    hints = get_type_hints(kind, include_extras=True)
    drawn = {}
    for name, field in kind.model_fields.items():
        hint = Annotated[hints[name], field] if field.metadata else hints[name]
        given_one = fixed.get(name)
        drawn[name] = of_type(hint) if given_one is None else given_one
    return st.builds(kind, **drawn)


@st.composite
def channel_targets(draw: st.DrawFn) -> ll.ChannelPruningTarget:
    units = sorted(draw(st.sets(st.integers(0, 99), min_size=1, max_size=4)))
    aligned = {
        "channel_indices": st.just(tuple(units)),
        "original_indices": st.just(tuple(2 * unit for unit in units)),
        "importance": st.just((0.5,) * len(units)),
        "channels_before": st.just(100),
        "channels_after": st.just(100 - len(units)),
    }
    return draw(built(ll.ChannelPruningTarget, **aligned))  # type: ignore[no-any-return]


@st.composite
def head_targets(draw: st.DrawFn) -> ll.AttentionHeadTarget:
    heads = sorted(draw(st.sets(st.integers(0, 15), min_size=1, max_size=4)))
    fixed = {
        "head_indices": st.just(tuple(heads)),
        "original_indices": st.sampled_from([(), tuple(heads)]),
        "heads_before": st.just(16),
        "heads_after": st.just(16 - len(heads)),
    }
    return draw(built(ll.AttentionHeadTarget, **fixed))  # type: ignore[no-any-return]


@st.composite
def masks(draw: st.DrawFn) -> ll.ParameterMask:
    shape = draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
    size = (math.prod(shape) + 7) // 8
    identifier = ll.ParameterIdentifier(
        path=draw(st.text(min_size=1)), shape=shape, dtype="float16"
    )
    bits = st.binary(min_size=size, max_size=size)
    marked = st.integers(0, math.prod(shape))
    fixed = {"parameter": st.just(identifier), "bits": bits, "marked": marked}
    return draw(built(ll.ParameterMask, **fixed))  # type: ignore[no-any-return]


@st.composite
def packed_masks(draw: st.DrawFn) -> ll.PruningMasks:
    packed = draw(st.none() | of_type(ll.BlobRef))
    made = draw(st.lists(masks(), max_size=3))
    if packed is not None:
        made = [mask.model_copy(update={"bits": b""}) for mask in made]
    key = draw(decision_keys).at(ll.Level.PARAMETER)
    fixed = {
        "idempotency_key": st.just(str(key)),
        "masks": st.just(tuple(made)),
        "packed": st.just(packed),
    }
    return draw(built(ll.PruningMasks, **fixed))  # type: ignore[no-any-return]


@st.composite
def intervals(draw: st.DrawFn) -> ll.Interval:
    low, high = sorted(draw(st.tuples(*[st.floats(-1e9, 1e9)] * 2)))
    return ll.Interval(low=low, high=high)


@st.composite
def latencies(draw: st.DrawFn) -> ll.LayerLatency:
    outputs = sorted(draw(st.sets(st.integers(0, 99), min_size=1, max_size=3)))
    inputs = sorted(draw(st.sets(st.integers(0, 99), max_size=3)))
    count = len(outputs) * (len(inputs) or 1)
    return ll.LayerLatency(
        layer=draw(st.text(min_size=1)),
        outputs=tuple(outputs),
        inputs=tuple(inputs),
        seconds=tuple(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))),
    )


@st.composite
def budgets(draw: st.DrawFn) -> ll.Budget:
    resource = draw(st.sampled_from(["parameters", "macs", "memory", "latency"]))
    table = built(ll.LatencyTable) if resource == "latency" else st.none()
    return ll.Budget(resource=resource, at_most=draw(st.floats(0, 1)), latency=draw(table))


@st.composite
def decisions(draw: st.DrawFn) -> ll.StructuralPruningDecision:
    key, approved = draw(decision_keys), draw(st.booleans())
    safety = built(ll.SafetyValidation, outcome=st.just(ll.Outcome.GO) if approved else None)
    fixed = {
        "idempotency_key": st.just(str(key)),
        "epoch": st.just(key.epoch),
        "model_hash": st.just(key.model_hash),
        "safety": safety,
        "approved_for_application": st.just(approved),
        "rejection_reason": st.just("") if approved else st.text(min_size=1),
    }
    return draw(built(ll.StructuralPruningDecision, **fixed))  # type: ignore[no-any-return]


@st.composite
def analysis_requests(draw: st.DrawFn) -> ll.StructuralAnalysisRequest:
    metadata = draw(built(ll.CheckpointMetadata))
    name = draw(identifiers)
    fixed = {
        "metadata": st.just(metadata),
        "request_id": st.just(name),
        "idempotency_key": st.just(str(ll.RequestKey(metadata.epoch, metadata.model_hash, name))),
    }
    return draw(built(ll.StructuralAnalysisRequest, **fixed))  # type: ignore[no-any-return]


special[ll.PrunedArchitecture] = st.just(examples.ARCHITECTURE)
special[ll.ChannelPruningTarget] = channel_targets()
special[ll.AttentionHeadTarget] = head_targets()
special[ll.ParameterMask] = masks()
special[ll.PruningMasks] = packed_masks()
special[ll.Interval] = intervals()
special[ll.LayerLatency] = latencies()
special[ll.Budget] = budgets()
special[ll.StructuralPruningDecision] = decisions()
special[ll.StructuralAnalysisRequest] = analysis_requests()


@pytest.mark.parametrize("name", sorted(ll.MESSAGES))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.slow
def test_any_message_comes_back_as_it_was_sent_and_gives_the_same_bytes(
    name: str, data: st.DataObject
) -> None:
    kind = ll.MESSAGES[name]
    message = data.draw(special[kind] if kind in special else built(kind))
    envelope = ll.wrap(message, source="test", epoch=3)
    sent = ll.encode(envelope)
    received = ll.unwrap(ll.read_envelope(sent))
    assert type(received) is kind
    assert repr(received) == repr(message)  # not ==, since an unknown figure is NaN
    assert (
        ll.encode(
            ll.wrap(
                received,
                source="test",
                epoch=3,
                event_id=envelope.event_id,
                now=envelope.created_at,
            )
        )
        == sent
    )


def test_every_message_type_has_an_example_and_a_sender_and_a_receiver() -> None:
    assert set(examples.MESSAGES) == set(ll.MESSAGES)
    for kind in ll.MESSAGES.values():
        sender, _, receiver = kind.contract_of.partition(" to ")
        assert sender
        assert receiver


def floats_in(hint: Any) -> list[bool | None]:
    """For each float in a type: may it be NaN? None where no policy is stated."""
    if get_origin(hint) is Annotated:
        kind, *metadata = get_args(hint)
        policies = [m.allow_inf_nan for m in metadata if isinstance(m, AllowInfNan)]
        return [policies[0] if policies else None] if kind is float else floats_in(kind)
    return [None] if hint is float else [p for arg in get_args(hint) for p in floats_in(arg)]


@pytest.mark.parametrize("kind", sorted(set(PARTS), key=str), ids=lambda kind: kind.__name__)
def test_every_float_states_whether_it_may_be_nan(kind: type[ll.Message]) -> None:
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if name in kind.model_fields:
            assert None not in floats_in(hint), f"{kind.__name__}.{name}"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all floats in a decoded message."""
    if isinstance(value, float):
        return [path]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [place for key, item in items for place in places(item, (*path, key))]


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A decoded message with one value replaced."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = with_value(copy[path[0]], path[1:], new)
    return copy


UNKNOWN_ALLOWED = {"accuracy", "loss", "accuracy_before", "accuracy_masked"}


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_by_name_but_where_a_figure_may_be_unknown(
    name: str, bad: float
) -> None:
    plain = msgpack.unpackb(ll.encode(ALL[name]))
    for path in places(plain):
        data = msgpack.packb(with_value(plain, path, bad))
        if path[-1] in UNKNOWN_ALLOWED or "figures" in path:
            ll.decode(type(ALL[name]), data)
            continue
        with pytest.raises(ll.ContractError) as caught:
            ll.decode(type(ALL[name]), data)
        assert str(path[-1]) in caught.value.field


@pytest.mark.parametrize("value", ["3", 3.0, True, b"3", None, [3], {"a": 3}])
def test_an_epoch_that_is_no_integer_is_refused_by_name(value: object) -> None:
    plain = msgpack.unpackb(ll.encode(examples.METADATA))
    with pytest.raises(ll.InvalidField) as caught:
        ll.decode(ll.CheckpointMetadata, msgpack.packb(plain | {"epoch": value}))
    assert caught.value.field == "CheckpointMetadata.epoch"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"epoch": -1}, "epoch"),
        ({"epoch": 10**10}, "epoch"),
        ({"run_id": 7}, "run_id"),
        ({"run_id": b"digits"}, "run_id"),
        ({"run_id": "digits\n"}, "run_id"),
        ({"model_hash": "0123456789ABCDEF"}, "model_hash"),
        ({"accuracy": "0.5"}, "accuracy"),
        ({"accuracy": True}, "accuracy"),
        ({"labels": "guessed"}, "labels"),
        ({"created_at": 1736856000}, "created_at"),
        ({"created_at": "2025-01-14T12:00:00"}, "created_at"),
        ({"created_at": "9999-12-31T23:59:59-14:00"}, "created_at"),
        ({"created_at": "yesterday"}, "created_at"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_not_as_the_contract_says_is_refused_by_the_fields_name(
    change: dict[str, Any], field: str
) -> None:
    plain = msgpack.unpackb(ll.encode(examples.METADATA))
    with pytest.raises(ll.InvalidField) as caught:
        ll.decode(ll.CheckpointMetadata, msgpack.packb(plain | change))
    assert caught.value.field == f"CheckpointMetadata.{field}"


def test_a_missing_field_is_refused_by_name() -> None:
    plain = msgpack.unpackb(ll.encode(examples.METADATA))
    del plain["run_id"]
    with pytest.raises(ll.InvalidField, match=r"CheckpointMetadata\.run_id: expected this field"):
        ll.decode(ll.CheckpointMetadata, msgpack.packb(plain))


def test_an_unknown_level_is_refused_by_name() -> None:
    plain = msgpack.unpackb(ll.encode(examples.MESSAGES["CheckpointReady"]))
    with pytest.raises(ll.InvalidField) as caught:
        ll.decode(ll.CheckpointReady, msgpack.packb(plain | {"levels": ["neuron"]}))
    assert caught.value.field == "CheckpointReady.levels.0"
    assert "channel, head, layer" in caught.value.expected
    assert "neuron" in caught.value.found


def test_an_integer_serves_where_a_float_is_asked_for() -> None:
    plain = msgpack.unpackb(ll.encode(examples.METADATA))
    read = ll.decode(ll.CheckpointMetadata, msgpack.packb(plain | {"accuracy": 1}))
    assert read.accuracy == 1.0
    assert isinstance(read.accuracy, float)


def test_times_are_kept_in_utc_and_need_an_offset() -> None:
    east = datetime(2025, 1, 14, 14, 0, tzinfo=timezone(timedelta(hours=2)))
    there = examples.METADATA.model_dump() | {"created_at": east}
    assert str(ll.CheckpointMetadata(**there).created_at) == "2025-01-14 12:00:00+00:00"
    with pytest.raises(ValueError, match="offset"):
        ll.CheckpointMetadata(**there | {"created_at": datetime(2025, 1, 14)})


@pytest.mark.parametrize("seconds", [0, -1, 300.1, math.nan, math.inf, 1e300, True, "30", "PT30S"])
def test_a_window_is_more_than_nothing_and_at_most_five_minutes(seconds: object) -> None:
    plain = msgpack.unpackb(ll.encode(examples.MESSAGES["AnalysisRequest"]))
    with pytest.raises(ll.ContractError) as caught:
        ll.decode(ll.AnalysisRequest, msgpack.packb(plain | {"timeout": seconds}))
    assert caught.value.field == "AnalysisRequest.timeout"


def test_equal_figures_are_equal_bytes_in_whatever_order_they_were_given() -> None:
    event = examples.MESSAGES["TelemetryEvent"].model_dump()
    one = ll.TelemetryEvent(**event | {"figures": {"a": 1.0, "b": 2.0}})
    other = ll.TelemetryEvent(**event | {"figures": {"b": 2.0, "a": 1.0}})
    assert ll.encode(one) == ll.encode(other)


def test_a_request_key_must_be_that_of_the_request() -> None:
    request = examples.MESSAGES["StructuralAnalysisRequest"].model_dump()
    with pytest.raises(ll.IdentityMismatch) as caught:
        ll.StructuralAnalysisRequest(**request | {"request_id": "another"})
    assert caught.value.field == "idempotency_key"


def test_a_decision_is_approved_or_has_a_reason_never_both() -> None:
    decision = examples.MESSAGES["StructuralPruningDecision"].model_dump()
    for change in ({"rejection_reason": "no"}, {"approved_for_application": False}):
        with pytest.raises(ll.InvalidField, match="rejection_reason"):
            ll.StructuralPruningDecision(**decision | change)


def test_errors_stay_one_short_printable_line_whatever_was_found() -> None:
    error = ll.InvalidField("a\nb\x1b[2J" + "x" * 10**6, "y\n" * 10**6, ["\ud800" * 10**6])
    assert len(str(error)) < 4000
    assert str(error).isprintable()
    str(error).encode()
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "..." in ll.InvalidField("field", "less", deep).found
    while deep:  # freed level by level: the interpreter's own way recurses
        deep = deep.pop()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"channel_indices": (1, 0), "original_indices": (2, 0)}, "channel_indices"),
        ({"channel_indices": (1, 1), "original_indices": (2, 2)}, "channel_indices"),
        ({"channel_indices": (3,)}, "channel_indices"),
        ({"channel_indices": ()}, "channel_indices"),
        ({"channels_after": 3}, "channels_after"),
        ({"original_indices": ()}, "original_indices, importance"),
        ({"importance": (0.5, 0.5)}, "original_indices, importance"),
    ],
)
def test_a_target_whose_figures_do_not_fit_is_refused_by_name(
    changes: dict[str, Any], field: str
) -> None:
    decision = examples.MESSAGES["StructuralPruningDecision"]
    assert isinstance(decision, ll.StructuralPruningDecision)
    plain = msgpack.unpackb(ll.encode(decision.channels[0])) | changes
    with pytest.raises(ll.InvalidField) as caught:
        ll.decode(ll.ChannelPruningTarget, msgpack.packb(plain))
    assert caught.value.field.removeprefix("ChannelPruningTarget.") == field


def test_heads_to_remove_are_told_once_in_order_and_counted() -> None:
    target = {"layer_name": "a", "head_indices": [0, 2], "heads_before": 4, "heads_after": 2}
    assert ll.decode(ll.AttentionHeadTarget, msgpack.packb(target)).head_indices == (0, 2)
    for change in (
        {"head_indices": [2, 0]},
        {"head_indices": [0, 4]},
        {"heads_after": 3},
        {"original_indices": [1]},
    ):
        with pytest.raises(ll.InvalidField):
            ll.decode(ll.AttentionHeadTarget, msgpack.packb(target | change))


def test_a_dead_letter_is_written_whatever_trace_context_and_fields_came() -> None:
    dead_letter = examples.MESSAGES["DeadLetter"].model_dump()
    original = {f"{i}" * 600: b"" for i in range(100)}
    written = ll.DeadLetter(**dead_letter | {"traceparent": "x" * 10**6, "original": original})
    assert ll.decode(ll.DeadLetter, ll.encode(written)) == written
    assert written.traceparent == "x" * 512

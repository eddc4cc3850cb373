"""Whatever bytes arrive: a message, or an error that says what is wrong. Nothing else, ever."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

import leyline as ll
from contracts import examples
from leyline import codec

ALL = {**examples.MESSAGES, "EventEnvelope": examples.ENVELOPE}
SENT = ll.encode(examples.ENVELOPE)


def envelope_with(**changes: Any) -> bytes:
    """The example envelope with fields replaced; a field that is ``...`` is left out."""
    plain = msgpack.unpackb(SENT) | changes
    return bytes(msgpack.packb({key: value for key, value in plain.items() if value is not ...}))


def test_a_newer_version_is_refused_by_name_before_anything_else_is_read() -> None:
    data = envelope_with(schema_version=2, payload=..., created_at=None, of_tomorrow={"a": [1]})
    with pytest.raises(ll.UnsupportedVersion) as caught:
        ll.read_envelope(data)
    assert caught.value.field == "envelope.schema_version"
    assert caught.value.expected == "1 to 1"
    assert caught.value.found == "2"
    assert "upgrade this side" in caught.value.hint


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None, [1], 2**63])
def test_a_version_that_nobody_wrote_is_refused_by_name(version: object) -> None:
    with pytest.raises(ll.UnsupportedVersion):
        ll.read_envelope(envelope_with(schema_version=version))


@pytest.mark.parametrize("data", [b"\x01", b"\x80", b"\xc0", b"\x90", b"\xa1a"])
def test_what_has_no_version_is_malformed(data: bytes) -> None:
    with pytest.raises(ll.Malformed, match="schema_version"):
        ll.read_envelope(data)


def test_an_unknown_message_type_is_refused_by_name() -> None:
    strange = ll.read_envelope(envelope_with(payload_type="Nonsense", event_type="Nonsense"))
    with pytest.raises(ll.UnknownType) as caught:
        ll.unwrap(strange)
    assert caught.value.field == "envelope.payload_type"
    assert "CheckpointReady" in caught.value.expected


def test_an_envelope_whose_two_types_differ_is_refused() -> None:
    with pytest.raises(ll.UnknownType, match="event_type"):
        ll.unwrap(ll.read_envelope(envelope_with(event_type="PruningOutcome")))


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ll.InvalidField, match=r"envelope\.of_tomorrow: expected no field"):
        ll.read_envelope(envelope_with(of_tomorrow=1))


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


HOSTILE = {
    "empty": b"",
    "truncated": SENT[:-1],
    "trailing bytes": SENT + b"\x00",
    "nested lists": nested(400),
    "nested beyond the unpacker": nested(100_000),
    "nested maps": b"\x81\xa1a" * 400 + b"\xc0",
    "a list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "a string of 4 GB": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 GB": b"\xc6\xff\xff\xff\xff",
    "an extension of 4 GB": b"\xc9\xff\xff\xff\xff\x05",
    "an extension": msgpack.packb(msgpack.ExtType(5, b"abc")),
    "an empty extension": b"\xc7\x00\x05",
    "a timestamp": msgpack.packb(msgpack.Timestamp(1, 1)),
    "an empty timestamp": b"\xc7\x00\xff",
    "a reserved byte": b"\xc1",
    "integer keys": b"\x81\x01\x02",
    "a key twice": b"\x82\xa1a\x01\xa1a\x02",
    "a list as a key": b"\x81\x90\x01",
    "a surrogate": b"\x81\xa1a\xa3\xed\xa0\x80",
    "no UTF-8": b"\x81\xa1a\xa2\xff\xff",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_msgpack_is_a_named_error(name: str) -> None:
    with pytest.raises((ll.Malformed, ll.TooLarge)):
        ll.read_envelope(HOSTILE[name])
    with pytest.raises((ll.Malformed, ll.TooLarge)):
        ll.decode(ll.CheckpointReady, HOSTILE[name])


def test_extension_types_are_refused_by_name() -> None:
    inside = b"\x81\xa3uri" + HOSTILE["an empty extension"]
    with pytest.raises(ll.Malformed, match="expected no msgpack extension types, found 5"):
        ll.decode(ll.BlobRef, inside)


def test_byte_strings_as_keys_are_refused() -> None:
    with pytest.raises(ll.ContractError):
        ll.decode(ll.BlobRef, msgpack.packb({b"uri": "a", b"size": 1, b"sha256": "0" * 64}))


def test_a_message_over_the_limit_is_refused_before_it_is_parsed_and_never_sent() -> None:
    with pytest.raises(ll.TooLarge, match="8388608"):
        ll.read_envelope(b"\xc0" * (codec.MAX_MESSAGE_BYTES + 1))
    dead_letter = examples.MESSAGES["DeadLetter"].model_dump()
    large = ll.DeadLetter(
        **dead_letter | {"original": {"envelope": bytes(codec.MAX_MESSAGE_BYTES)}}
    )
    with pytest.raises(ll.TooLarge):
        ll.encode(large)


def test_nesting_is_allowed_up_to_its_limit() -> None:
    with pytest.raises(ll.Malformed):  # well-formed but no map
        ll.decode(ll.BlobRef, nested(codec.MAX_DEPTH))
    with pytest.raises(ll.TooLarge, match="16 levels"):
        ll.decode(ll.BlobRef, nested(codec.MAX_DEPTH + 1))


def test_declared_lengths_make_no_room_before_their_items_are_there() -> None:
    """A thousand nested lists that each declare a million items: refused without the gigabytes."""
    lists = b"\xdd\x00\x0f\xff\xff" * 1000
    program = (
        "import resource, sys, leyline as ll\n"
        f"data = {lists!r} + bytes(8_000_000 - {len(lists)})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: ll.read_envelope(data)\n"
        "except ll.ContractError: pass\n"
        "else: sys.exit('was read')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 200 << 20


def read(kind: type[ll.Message], data: bytes) -> None:
    """Decode ``data``; contract errors are fine if they can be told, anything else is not."""
    with contextlib.suppress(ll.ContractError):
        try:
            message = ll.decode(kind, data)
            if isinstance(message, ll.EventEnvelope):
                ll.unwrap(message)
        except ll.ContractError as error:
            if not (error.field and error.expected and str(error).isprintable()):
                raise AssertionError(f"an error that says nothing: {error!r}") from error
            raise


@pytest.mark.parametrize("name", sorted(ALL))
def test_damaged_vectors_raise_only_contract_errors(name: str) -> None:
    data, kind, chance = ll.encode(ALL[name]), type(ALL[name]), random.Random(name)
    for end in range(0, len(data), max(1, len(data) // 100)):
        with pytest.raises(ll.ContractError):
            ll.decode(kind, data[:end])
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 4))):
            place = chance.randrange(len(damaged))
            match chance.randrange(3):
                case 0:
                    damaged[place] = chance.randrange(256)
                case 1:
                    del damaged[place : place + chance.randrange(1, 4)]
                case _:
                    damaged[place:place] = chance.randbytes(chance.randrange(1, 4))
            damaged = damaged or bytearray(b"\x00")
        read(kind, bytes(damaged))


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.mark.parametrize("name", sorted(ALL))
@given(data=st.data())
@pytest.mark.sampled
def test_any_value_in_any_field_is_read_or_a_contract_error(name: str, data: st.DataObject) -> None:
    message = ALL[name]
    field = data.draw(st.sampled_from(sorted(type(message).model_fields)))
    plain = msgpack.unpackb(ll.encode(message))
    inner = plain.get(field)
    if isinstance(inner, dict) and data.draw(st.booleans()):
        inner[data.draw(st.sampled_from(sorted(inner) or [""]))] = data.draw(plain_values)
    else:
        plain[field] = data.draw(plain_values)
    read(type(message), msgpack.packb(plain))


@given(data=st.binary(max_size=200))
def test_any_bytes_at_all_raise_a_contract_error(data: bytes) -> None:
    with pytest.raises(ll.ContractError):
        ll.read_envelope(data)


def test_an_array_does_not_go_into_a_message() -> None:
    with pytest.raises(TypeError, match="blobs"):
        ll.encode(examples.STATISTICS[0])

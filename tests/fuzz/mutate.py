"""Mutations, seeded: of bytes, of msgpack values at any depth, of safetensors headers."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import msgpack

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 1e308, -0.0, float("nan"),
    float("inf"), "", "a" * 70_000, "\x00", "é́", "../../etc/passwd", "file:///etc/passwd",
    "redis:" + "0" * 64, b"", b"\xff" * 64, [], {}, [[]], {"": ""}, [0] * 5000, "1e999", "9" * 500,
    "2026-13-45T99:99:99Z", "9999-12-31T23:59:59-14:00",
)  # fmt: skip


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One mutation, or a few, of sound bytes."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(_WAYS)(data, chance)
    return data


def _flip(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return b"\x80"
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 20))):
        changed[chance.randrange(len(changed))] = chance.choice((0, 0xFF, chance.randrange(256)))
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _splice(data: bytes, chance: random.Random) -> bytes:
    start, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[start:end] * chance.choice((0, 2, 5)) + data[end:]


def _bomb(data: bytes, chance: random.Random) -> bytes:
    """Headers that promise more than follows, and nesting without end."""
    bombs = (
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff", b"\x91" * 5000, b"\x81\xa1a" * 2000, b"\xc9\xff\xff\xff\xff\x01",
        struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 100) + b"[" * 100,
    )  # fmt: skip
    place = chance.choice((0, chance.randrange(len(data) + 1)))
    return data[:place] + chance.choice(bombs) + data[place:]


def _value(data: bytes, chance: random.Random) -> bytes:
    """A hostile value in place of any value of a msgpack message, however deep."""
    try:
        content = msgpack.unpackb(data, strict_map_key=False)
    except Exception:
        return _flip(data, chance)
    return bytes(msgpack.packb(_changed(content, chance)))


def _changed(value: Any, chance: random.Random, depth: int = 0) -> Any:
    if isinstance(value, bytes) and len(value) > 20 and chance.random() < 0.8:
        return _value(value, chance)  # the payload of an envelope
    if isinstance(value, dict) and value and chance.random() < 0.95:
        key = chance.choice(list(value))
        if chance.random() < 0.15:
            return _with_other_keys(value, key, chance)
        return {**value, key: _changed(value[key], chance, depth + 1)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], _changed(value[place], chance, depth + 1), *value[place + 1 :]]
    return chance.choice(HOSTILE)


def _with_other_keys(value: dict[Any, Any], key: Any, chance: random.Random) -> dict[Any, Any]:
    rest = {name: part for name, part in value.items() if name != key}
    return chance.choice((rest, {**value, "surprise": 1}, {**rest, 7: value[key]}))


def _header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors header with hostile entries."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
    except (struct.error, ValueError, RecursionError):
        return _value(data, chance)
    if not isinstance(header, dict):
        return _value(data, chance)
    name = chance.choice(list(header) or [""])
    entry = header.get(name)
    if isinstance(entry, dict) and chance.random() < 0.8:
        part = chance.choice(["dtype", "shape", "data_offsets"])
        entry[part] = chance.choice(
            ["F64", "BF16", [2**40], [-1], [0, 2**62], [5, 1], [1.5], None, {}, [0] * 9, [1] * 4]
        )
    else:
        header = chance.choice(
            [{**header, "../x/y": entry}, {str(i): entry for i in range(3000)}, {name: 3}, {}]
        )
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


_WAYS = (_flip, _cut, _splice, _bomb, _value, _value, _value, _header)

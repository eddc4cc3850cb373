"""Sealed blobs: AES-256-GCM in pieces, bound to one architecture.

Promises: a sealed blob opens only with its key and for the architecture that it was sealed for;
a piece that was changed, dropped, repeated or moved is found; the same content sealed again for
the same architecture is the same bytes, so that content addressing and idempotent publishing still
work (what is then visible is that two blobs are equal, nothing else).

Format: ``ELS1``, one byte of length and the key's id, eight bytes of nonce prefix, then the pieces
of 4 MB, each followed by its 16-byte tag. The nonce of piece i is the prefix and i; the prefix is
HMAC-SHA256 of content and architecture under a key derived for it alone, so it never repeats for
other content. Associated data: the header, the architecture's fingerprint, i, and whether the piece
is the last. NIST SP 800-38D; the deterministic prefix follows the idea of RFC 8452 (SIV).
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from leyline import Unreadable
from leyline.errors import brief

PIECE = 4 << 20
TAG = 16
_MAGIC = b"ELS1"
_PREFIX = 8


def seal(data: bytes | memoryview, key_id: str, key: bytes, architecture: str) -> bytes:
    """``data`` encrypted under ``key`` (32 bytes), bound to an architecture's fingerprint."""
    view = memoryview(data).cast("B")
    name = key_id.encode()
    if len(name) > 255:
        raise ValueError("a key id of at most 255 bytes")
    digest = hashlib.sha256(view).digest()
    prefix = hmac.digest(_derived(key, b"nonce"), architecture.encode() + digest, "sha256")
    header = _MAGIC + bytes([len(name)]) + name + prefix[:_PREFIX]
    cipher = AESGCM(_derived(key, b"content"))
    pieces = [view[start : start + PIECE] for start in range(0, len(view), PIECE)] or [view]
    sealed = [
        cipher.encrypt(_nonce(header, number), piece, _bound(header, architecture, number, last))
        for number, piece in enumerate(pieces)
        for last in [number == len(pieces) - 1]
    ]
    return b"".join([header, *sealed])


def is_sealed(data: bytes | memoryview) -> bool:
    """Whether bytes begin as a sealed blob does."""
    return bytes(memoryview(data)[: len(_MAGIC)]) == _MAGIC


def unseal(
    data: bytes | memoryview, keys: Mapping[str, bytes], architecture: str, *, field: str = "blob"
) -> bytes:
    """The content of a sealed blob.

    Raises:
        Unreadable: if it is no sealed blob, its key is not here, or anything of it, or of the
            architecture, is not what was sealed.
    """
    view = memoryview(data).cast("B")
    header, body = _header(view, field)
    name = bytes(header[5:-_PREFIX]).decode("utf-8", "replace")
    if name not in keys:
        raise Unreadable(field, f"a blob sealed with one of {sorted(keys)}", brief(name))
    cipher = AESGCM(_derived(keys[name], b"content"))
    step = PIECE + TAG
    count = max(1, -(-len(body) // step))
    opened = []
    for number in range(count):
        piece = body[number * step : (number + 1) * step]
        bound = _bound(header, architecture, number, number == count - 1)
        try:
            opened.append(cipher.decrypt(_nonce(header, number), piece, bound))
        except (InvalidTag, ValueError):
            raise Unreadable(
                f"{field} piece {number}",
                f"what was sealed with {name} for architecture {architecture}",
                "other bytes, or another architecture",
            ) from None
    return b"".join(opened)


def _header(view: memoryview, field: str) -> tuple[bytes, memoryview]:
    fixed = len(_MAGIC) + 1
    if len(view) < fixed or not is_sealed(view):
        raise Unreadable(field, "a sealed blob", f"{len(view)} bytes of something else")
    end = fixed + view[len(_MAGIC)] + _PREFIX
    if len(view) < end + TAG:
        raise Unreadable(field, f"at least {end + TAG} bytes", f"{len(view)} bytes")
    return bytes(view[:end]), view[end:]


def _nonce(header: bytes, number: int) -> bytes:
    return header[-_PREFIX:] + struct.pack(">I", number)


def _bound(header: bytes, architecture: str, number: int, last: bool) -> bytes:
    return header + architecture.encode() + struct.pack(">I?", number, last)


def _derived(key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(key, b"elesh-seal-v1:" + purpose, "sha256")

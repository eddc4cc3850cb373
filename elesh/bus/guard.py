"""What stands between the bus and those who may write to it: signed entries, sealed blobs.

Promises: with a keyring, everything that this process publishes is signed, and nothing that comes
is parsed before its signature was checked; without one, entries are plain. A signed envelope is a
frame: a byte that begins no msgpack value, the signature, then the envelope's own bytes, so that
scripts, records and dead letters carry it like any other.
"""

from __future__ import annotations

import hashlib
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from elesh.security import Keyring, seal, unseal
from elesh.settings import SettingsError
from elesh.settings.security import SecuritySettings
from leyline import Malformed
from leyline.streams import OPERATIONS, Stream

__all__ = ["Guard", "unframed"]

_MAGIC = b"\xc1ELSIG1"
_LENGTH = struct.Struct(">H")


class Guard:
    """Signs what goes out and checks what comes in.

    Args:
        keyring: None: nothing is signed or checked.
        blob_key: id of the key that seals blobs; empty: blobs are stored plain.

    Raises:
        SettingsError: if the keyring has no such HMAC key.
    """

    def __init__(self, keyring: Keyring | None = None, blob_key: str = "") -> None:
        self._keyring = keyring
        self._blob_keys = keyring.secrets() if keyring else {}
        if blob_key and blob_key not in self._blob_keys:
            known = ", ".join(sorted(self._blob_keys)) or "none"
            raise SettingsError(
                f"bus.security.blob_key: expected an HMAC key of the keyring ({known}), "
                f"found {blob_key!r}"
            )
        self._blob_key = blob_key

    @classmethod
    def of(cls, settings: SecuritySettings) -> Self:
        """The guard that the settings ask for.

        Raises:
            SettingsError: if the keyring's file cannot be used.
        """
        if not settings.keyring:
            return cls(None, settings.blob_key)
        ring = Keyring.load(Path(settings.keyring), required=settings.require_signatures)
        return cls(ring, settings.blob_key)

    def frame(self, stream: Stream, envelope: bytes) -> bytes:
        """The content of an entry's ``envelope`` field; the plain envelope where nothing signs."""
        return self._framed(stream.name, envelope)

    def check(self, stream: Stream, framed: bytes) -> str:
        """The id of the key that signed an entry; empty where entries may be unsigned.

        Raises:
            Unsigned, BadSignature, NotAuthorized: as :meth:`Keyring.check`.
            Malformed: if the frame is cut short.
        """
        return self._checked(stream.name, framed, stream.name)

    def frame_redrive(self, at: str, framed: bytes) -> bytes:
        """The content of the field that says when an operator sent ``framed`` again."""
        return self._framed(_redrive(framed), at.encode())

    def check_redrive(self, field: bytes, framed: bytes) -> str:
        """As :meth:`check`, for that field: an operator's key, and this very entry."""
        return self._checked(_redrive(framed), field, OPERATIONS.name)

    @property
    def requires_signatures(self) -> bool:
        """Whether nothing comes in that no key of the keyring has signed."""
        return self._keyring is not None and self._keyring.required

    @property
    def seals(self) -> bool:
        """Whether blobs that belong to an architecture are stored sealed."""
        return bool(self._blob_key)

    def seal(self, data: bytes | memoryview, architecture: str) -> bytes:
        """A blob's bytes, encrypted for one architecture."""
        return seal(data, self._blob_key, self._blob_keys[self._blob_key], architecture)

    def unseal(self, data: bytes, architecture: str, field: str) -> bytes:
        """The content of a sealed blob.

        Raises:
            Unreadable: if no key here opens it, or it is not what was sealed.
        """
        return unseal(data, self._blob_keys, architecture, field=field)

    def _framed(self, context: str, content: bytes) -> bytes:
        signature = self._keyring.sign(context, content) if self._keyring else b""
        if not signature:
            return content
        return _MAGIC + _LENGTH.pack(len(signature)) + signature + content

    def _checked(self, context: str, framed: bytes, stream: str) -> str:
        if self._keyring is None:
            return ""
        signature, content = _parts(framed)
        return self._keyring.check(context, content, signature, datetime.now(UTC), may=stream)


def unframed(framed: bytes) -> bytes:
    """The envelope in a frame, unchecked; plain envelopes are their own.

    Raises:
        Malformed: if the frame is cut short.
    """
    return _parts(framed)[1]


def _parts(framed: bytes) -> tuple[bytes, bytes]:
    """Signature (empty where there is none) and content."""
    if not framed.startswith(_MAGIC):
        return b"", framed
    start = len(_MAGIC) + _LENGTH.size
    if len(framed) < start:
        raise Malformed("envelope", "a signed frame", f"{len(framed)} bytes of one")
    end = start + _LENGTH.unpack(framed[len(_MAGIC) : start])[0]
    if len(framed) < end:
        raise Malformed("envelope", f"a signature of {end - start} bytes", "less")
    return framed[start:end], framed[end:]


def _redrive(framed: bytes) -> str:
    """What a redrive's signature stands for: this entry and no other."""
    return f"redrive:{hashlib.sha256(framed).hexdigest()}"

"""What stands between the bus and those who may write to it: signed entries, signed state, sealed
blobs.

Promises: with a keyring, everything that this process publishes or keeps on the bus to decide from
is signed, for the place where it stands, and nothing that comes is parsed before its signature was
checked; without one, all of it is plain. What is signed is a frame: a byte that begins no msgpack
value, the signature, then the content's own bytes, so that scripts, records and dead letters carry
it like any other.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from elesh.security import Keyring, seal, unseal
from elesh.settings import SettingsError
from elesh.settings.operation import SecuritySettings
from leyline import Malformed
from leyline.streams import DECISIONS, OPERATIONS, Stream

__all__ = ["Guard", "unframed"]

_MAGIC = b"\xc1ELSIG1"
_LENGTH = struct.Struct(">H")


class Guard:
    """Signs what goes out and checks what comes in, for one partition.

    Args:
        keyring: None: nothing is signed or checked.
        blob_key: id of the key that seals blobs; empty: blobs are stored plain.
        partition: part of every place that is signed for.

    Raises:
        SettingsError: if the keyring has no such HMAC key.
    """

    def __init__(
        self, keyring: Keyring | None = None, blob_key: str = "", partition: str = "main"
    ) -> None:
        self._keyring = keyring
        self._partition = partition
        self._blob_keys = keyring.secrets() if keyring else {}
        if blob_key and blob_key not in self._blob_keys:
            known = ", ".join(sorted(self._blob_keys)) or "none"
            raise SettingsError(
                f"bus.security.blob_key: expected an HMAC key of the keyring ({known}), "
                f"found {blob_key!r}"
            )
        self._blob_key = blob_key
        self.seals = bool(blob_key)
        """Whether blobs that belong to an architecture are stored sealed."""

    @classmethod
    def of(cls, settings: SecuritySettings, partition: str = "main") -> Self:
        """The guard that the settings ask for.

        Raises:
            SettingsError: if the keyring's file cannot be used.
        """
        if not settings.keyring:
            return cls(None, settings.blob_key, partition)
        ring = Keyring.load(Path(settings.keyring), required=settings.require_signatures)
        return cls(ring, settings.blob_key, partition)

    # Entries

    def frame(self, stream: Stream, envelope: bytes) -> bytes:
        """The content of an entry's ``envelope`` field; the plain envelope where nothing signs."""
        return self.frame_state(stream.key(self._partition), envelope)

    def check(self, stream: Stream, framed: bytes, at: datetime | None = None) -> str:
        """The id of the key that signed an entry; empty where entries may be unsigned.

        Args:
            at: when the key had to be valid; now, if None.

        Raises:
            Unsigned, BadSignature, NotAuthorized: as :meth:`Keyring.check`.
            Malformed: if the frame is cut short.
        """
        return self._checked(stream.key(self._partition), framed, (stream.name,), at)[0]

    def require_believed(self, *streams: Stream) -> None:
        """Refuse to be a party whose own keyring does not believe what it writes there.

        Raises:
            Unsigned, BadSignature, NotAuthorized: as :meth:`check`.
        """
        for stream in streams:
            self.check(stream, self.frame(stream, b""))

    def frame_redrive(self, at: str, framed: bytes) -> bytes:
        """The content of the field that says when an operator sent ``framed`` again."""
        return self.frame_state(self._redrive(framed), at.encode())

    def check_redrive(self, field: bytes, framed: bytes) -> str:
        """As :meth:`check`, for that field: an operator's key, and this very entry."""
        return self._checked(self._redrive(framed), field, (OPERATIONS.name,))[0]

    # State

    def frame_state(self, place: str, content: bytes) -> bytes:
        """Something that a decision will be built from, as it is kept at ``place``: a Redis key,
        with the field's name where it is a hash."""
        signature = self._keyring.sign(place, content) if self._keyring else b""
        if not signature:
            return content
        return _MAGIC + _LENGTH.pack(len(signature)) + signature + content

    def state(self, place: str, framed: bytes, *, may: Collection[Stream] = (DECISIONS,)) -> bytes:
        """What is kept at ``place``, by a key that may do what is built from it: decide.

        Raises:
            Unsigned, BadSignature, NotAuthorized, Malformed: as :meth:`check`.
        """
        return self._checked(place, framed, [stream.name for stream in may])[1]

    # Blobs

    @property
    def signs(self) -> bool:
        """Whether what this process publishes is signed."""
        return self._keyring is not None and bool(self._keyring.sign_with)

    @property
    def requires_signatures(self) -> bool:
        """Whether nothing comes in that no key of the keyring has signed."""
        return self._keyring is not None and self._keyring.required

    def seal(self, data: bytes | memoryview, architecture: str) -> bytes:
        """A blob's bytes, encrypted for one architecture."""
        return seal(data, self._blob_key, self._blob_keys[self._blob_key], architecture)

    def unseal(self, data: bytes, architecture: str, field: str) -> bytes:
        """The content of a sealed blob.

        Raises:
            Unreadable: if no key here opens it, or it is not what was sealed.
        """
        return unseal(data, self._blob_keys, architecture, field=field)

    def _checked(
        self, place: str, framed: bytes, may: Collection[str], at: datetime | None = None
    ) -> tuple[str, bytes]:
        """The signer, empty where there need be none, and the content."""
        signature, content = _parts(framed)
        if self._keyring is None:
            return "", content
        at = at or datetime.now(UTC)
        return self._keyring.check(place, content, signature, at, may=may), content

    def _redrive(self, framed: bytes) -> str:
        """The place that the signature of a redrive names: this entry."""
        digest = hashlib.sha256(framed).hexdigest()
        return f"{OPERATIONS.key(self._partition)}:redrive:{digest}"


def unframed(framed: bytes) -> bytes:
    """The content of a frame, unchecked; what is plain is its own.

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

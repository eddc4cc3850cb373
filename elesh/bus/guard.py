"""Signatures and encryption of what is on the bus: signed entries, signed state, sealed blobs.

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
from typing import NamedTuple, Self

from elesh.security import Keyring, seal, unseal
from elesh.settings import SettingsError
from elesh.settings.operation import SecuritySettings
from leyline import Malformed
from leyline.streams import DECISIONS, OPERATIONS, Stream

_MAGIC = b"\xc1ELSIG1"
_LENGTH = struct.Struct(">H")


class Checked(NamedTuple):
    """What a signature was checked of."""

    signer: str
    """Id of the key; empty where signatures are not required."""
    content: bytes


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

    def frame(self, where: Stream | str, content: bytes) -> bytes:
        """What is written at a place: an entry's envelope on a stream, or something that a decision
        will be built from, at a Redis key, with the field's name where it is a hash. It is the
        plain content where nothing signs."""
        signature = self._keyring.sign(self._place(where), content) if self._keyring else b""
        if not signature:
            return content
        return _MAGIC + _LENGTH.pack(len(signature)) + signature + content

    def check(
        self,
        where: Stream | str,
        framed: bytes,
        *,
        may: Collection[Stream] | None = None,
        at: datetime | None = None,
    ) -> Checked:
        """What stands at a place, and who signed it.

        Args:
            may: what the signer's key has to have a right to; None: to write on the stream, or to
                decide, for what decisions are built from.
            at: when the key had to be valid; now, if None.

        Raises:
            Unsigned, BadSignature, NotAuthorized: as :meth:`Keyring.check`.
            Malformed: if the frame is cut short.
        """
        signature, content = _parts(framed)
        if self._keyring is None:
            return Checked("", content)
        rights = may or ((where,) if isinstance(where, Stream) else (DECISIONS,))
        signer = self._keyring.check(
            self._place(where),
            content,
            signature,
            at or datetime.now(UTC),
            may=[stream.name for stream in rights],
        )
        return Checked(signer, content)

    def redrive_of(self, framed: bytes) -> str:
        """The place that an operator's redrive of the entry ``framed`` is signed for."""
        digest = hashlib.sha256(framed).hexdigest()
        return f"{OPERATIONS.key(self._partition)}:redrive:{digest}"

    def require_believed(self, *streams: Stream) -> None:
        """Check that this process's own keyring accepts what it will write on these streams.

        Raises:
            Unsigned, BadSignature, NotAuthorized: as :meth:`check`.
        """
        for stream in streams:
            self.check(stream, self.frame(stream, b""))

    def _place(self, where: Stream | str) -> str:
        return where.key(self._partition) if isinstance(where, Stream) else where

    # Blobs

    @property
    def signs(self) -> bool:
        """Whether what this process publishes is signed."""
        return self._keyring is not None and bool(self._keyring.sign_with)

    @property
    def requires_signatures(self) -> bool:
        """Whether what is unsigned is refused."""
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


def unframed(framed: bytes) -> bytes:
    """The content of a frame, unchecked; plain content as it is.

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

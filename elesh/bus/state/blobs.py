"""Blobs by claim check: bytes are stored in pieces, the message carries a :class:`BlobRef`.

Promises: a blob's size is checked before anything is read and its digest while it is read; what
does not keep its reference's promise never reaches the caller, and no half file is left behind.
A reference only gives access to what its scheme allows:

- ``redis:<sha256>``: pieces of 4 MB in the partition, content addressed, with a time to live
  (one large string would stop every other client while it is copied); one that was found damaged
  is stored anew by the next who puts it;
- ``file:<path>``: a file inside ``BusSettings.blob_folder``, and only there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import stat
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Literal

from elesh.bus.errors import BusUnavailable
from elesh.bus.scripts import Shared, Store
from elesh.settings import BusSettings
from leyline import BlobRef, DigestMismatch, InvalidField, MissingBlob, TooLarge
from leyline.errors import brief

CHUNK = 4 << 20
"""Bytes in one piece."""
_READ = 1 << 20
"""Bytes that one command reads: others on the server wait for no more than that."""
# A head never outlives its chunks, so that a blob is seen whole or not at all.
_CHUNK_GRACE = 300
_UNFINISHED = 900
"""Seconds that a piece lives whose blob is not whole yet: what a full server refused the rest of
must not keep it full."""


class BlobStore(Store):
    """The blobs of a partition."""

    def __init__(self, shared: Shared, settings: BusSettings) -> None:
        super().__init__(shared)
        self._ttl = settings.blob_ttl_seconds
        self._limit = int(settings.max_blob_bytes)
        self._folder = settings.blob_folder

    async def put(
        self,
        data: bytes | memoryview,
        codec: Literal["safetensors", "msgpack", "raw"] = "safetensors",
        *,
        architecture: str = "",
    ) -> BlobRef:
        """Store bytes; the same content again only lives longer. The pieces of a blob of which the
        server refuses the rest go by themselves after a quarter of an hour.

        Args:
            architecture: fingerprint of the network that they are about; with a ``blob_key`` they
                are stored sealed for it.

        Raises:
            TooLarge: over ``max_blob_bytes``.
            BusUnavailable: if the server does not take or keep all pieces.
        """
        sealed = architecture if self._guard.seals and architecture else None
        if sealed is not None:
            data = await asyncio.to_thread(self._guard.seal, data, sealed)
        view = memoryview(data).cast("B")
        self._require_size("blob", view.nbytes)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(view).hexdigest())
        keys = self._keys_of(digest, view.nbytes)
        expires = datetime.now(UTC) + timedelta(seconds=self._ttl)
        lives = (self._ttl, self._ttl + _CHUNK_GRACE)
        whole = (*lives, view.nbytes)
        if not await self._scripts.run("touch", keys, whole):
            for number, key in enumerate(keys[1:]):
                piece = view[number * CHUNK : (number + 1) * CHUNK]
                await self._client.set(key, piece, ex=min(_UNFINISHED, lives[1]))
            await self._client.set(keys[0], view.nbytes, ex=min(_UNFINISHED, lives[0]))
            if not await self._scripts.run("touch", keys, whole):
                hint = "set maxmemory-policy noeviction, or see to its speed"
                lost = "a piece of a blob vanished before all were stored"
                raise BusUnavailable(self._client.url, lost, hint=hint)
        return BlobRef(
            uri=f"redis:{digest}",
            size=view.nbytes,
            sha256=digest,
            codec=codec,
            expires=expires,
            sealed=sealed,
        )

    async def fetch(self, ref: BlobRef, path: Path) -> None:
        """Copy a blob into a new file, piece by piece; ``path`` appears only once it is whole.

        Raises:
            MissingBlob, DigestMismatch, TooLarge: as :meth:`get`.
        """
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                async with aclosing(self._verified(ref)) as pieces:
                    async for piece in pieces:
                        await asyncio.to_thread(file.write, piece)
            if ref.sealed is not None:
                await asyncio.to_thread(self._unseal_file, ref, partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    async def get(self, ref: BlobRef) -> bytes:
        """The bytes of a blob.

        Raises:
            MissingBlob: if it expired, was never put, or lacks a piece.
            DigestMismatch: if size or content are not what ``ref`` promises.
            TooLarge: if ``ref`` promises more than ``max_blob_bytes``; nothing is read then.
            InvalidField: if this store may not read the URI.
            Unreadable: if it is sealed and no key here opens it for its architecture.
        """
        # Grows in place and is handed out as it is: the blob is in memory once.
        buffer = io.BytesIO()
        async with aclosing(self._verified(ref)) as pieces:
            async for piece in pieces:
                buffer.write(piece)
        data = buffer.getvalue()
        return data if ref.sealed is None else self._unsealed(ref, data)

    def _unsealed(self, ref: BlobRef, data: bytes) -> bytes:
        return self._guard.unseal(data, ref.sealed or "", f"blob {ref.uri}")

    def _unseal_file(self, ref: BlobRef, path: Path) -> None:
        path.write_bytes(self._unsealed(ref, path.read_bytes()))

    def _require_size(self, field: str, size: int) -> None:
        if size > self._limit:
            raise TooLarge(field, f"at most max_blob_bytes = {self._limit} bytes", f"{size} bytes")

    async def _verified(self, ref: BlobRef) -> AsyncGenerator[bytes, None]:
        """The pieces of a blob; raises at the first piece, or after the last, that is wrong."""
        self._require_size(f"blob {ref.uri}", ref.size)
        digest, size = hashlib.sha256(), 0
        hashing: asyncio.Task[None] | None = None
        scheme, _, place = ref.uri.partition(":")
        if scheme not in ("redis", "file"):
            raise InvalidField("blob.uri", "a URI of scheme redis or file", ref.uri)
        read = self._redis_pieces if scheme == "redis" else self._file_pieces
        async with aclosing(read(ref, place)) as pieces:
            async for piece in pieces:
                size += len(piece)
                if size > ref.size:
                    break
                if hashing is not None:
                    await hashing
                # While the next piece is on its way.
                hashing = asyncio.create_task(asyncio.to_thread(digest.update, piece))
                yield piece
        if hashing is not None:
            await hashing
        if size == ref.size and digest.hexdigest() == ref.sha256:
            return
        if scheme == "redis":
            await self._give_up(ref)
        if size != ref.size:
            raise _wrong_size(ref, size)
        raise DigestMismatch(f"blob {ref.uri}", f"sha256 {ref.sha256}", digest.hexdigest())

    async def _give_up(self, ref: BlobRef) -> None:
        """Take the head off a blob whose pieces are not what its key says, so that the next one who
        puts it stores it anew. Who may only read leaves it to others."""
        with contextlib.suppress(BusUnavailable):
            await self._client.expire(self._keys_of(ref.sha256, 0)[0], 0)

    async def _redis_pieces(self, ref: BlobRef, digest: str) -> AsyncGenerator[bytes, None]:
        if digest != ref.sha256:
            raise InvalidField("blob.uri", f"redis:{ref.sha256}, as its sha256 says", ref.uri)
        head, *chunks = self._keys_of(digest, ref.size)
        size = await self._client.get(head)
        if size is None:
            raise _missing(ref, "no such key")
        if size != b"%d" % ref.size:
            raise _wrong_size(ref, int(size) if size.isdigit() else brief(size))
        for number, chunk in enumerate(chunks):
            for start in range(0, min(CHUNK, ref.size - number * CHUNK), _READ):
                piece: Any = await self._client.getrange(chunk, start, start + _READ - 1)
                if not piece:
                    raise _missing(ref, f"piece {number} of {len(chunks)} is gone")
                yield piece

    async def _file_pieces(self, ref: BlobRef, place: str) -> AsyncGenerator[bytes, None]:
        with _opened(ref, self._allowed(ref, place)) as file:
            size = os.fstat(file.fileno()).st_size
            if size != ref.size:
                raise _wrong_size(ref, size)
            while piece := await asyncio.to_thread(file.read, CHUNK):
                yield piece

    def _allowed(self, ref: BlobRef, place: str) -> Path:
        if not self._folder:
            raise InvalidField(
                "blob.uri",
                "no file: URI, since bus.blob_folder is not set",
                ref.uri,
                hint="set bus.blob_folder to the folder that is shared with the trainer",
            )
        root = Path(self._folder).resolve()
        try:
            path = (root / place.removeprefix("//")).resolve()
        except (OSError, ValueError, RuntimeError):
            raise InvalidField("blob.uri", "a path", ref.uri) from None
        if not path.is_relative_to(root):
            raise InvalidField("blob.uri", f"a path inside bus.blob_folder {root}", ref.uri)
        return path

    def _keys_of(self, digest: str, size: int) -> list[str]:
        """The head's key, then those of the chunks."""
        head = self._keys.named("blob", digest)
        return [head, *(f"{head}:{number}" for number in range(-(-size // CHUNK)))]


def _opened(ref: BlobRef, path: Path) -> BinaryIO:
    """A file opened for reading; folders are refused, and opening a pipe does not block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise _missing(ref, error.strerror or str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _missing(ref, "not a regular file")
    return open(descriptor, "rb")


def _missing(ref: BlobRef, found: str) -> MissingBlob:
    return MissingBlob(
        f"blob {ref.uri}",
        f"{ref.size} bytes",
        found,
        hint="it expired or was never stored; publish the checkpoint again",
    )


def _wrong_size(ref: BlobRef, size: int | str) -> DigestMismatch:
    return DigestMismatch(f"blob {ref.uri}", f"{ref.size} bytes", f"{size} bytes")

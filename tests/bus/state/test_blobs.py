from __future__ import annotations

import asyncio
import hashlib
import os
from unittest.mock import ANY

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elesh.bus import Bus, BusRefuses, BusUnavailable
from elesh.bus.state.blobs import CHUNK
from elesh.settings import BusSettings
from leyline import BlobRef, DigestMismatch, InvalidField, MissingBlob, TooLarge

LARGE = os.urandom(1 << 16) * 145  # 9.06 MB: two whole pieces and a part


def chunk_key(bus: Bus, ref: BlobRef, number: int) -> str:
    return f"elesh:{{{bus.partition}}}:blob:{ref.sha256}:{number}"


def test_a_large_blob_comes_back_whole_in_pieces(with_bus, tmp_path):
    async def scenario(bus: Bus) -> None:
        ref = await bus.blobs.put(memoryview(LARGE))
        assert (ref.size, ref.codec) == (len(LARGE), "safetensors")
        assert ref.sha256 == hashlib.sha256(LARGE).hexdigest()
        assert await bus._client.strlen(chunk_key(bus, ref, 0)) == CHUNK
        await bus.blobs.fetch(ref, tmp_path / "blob")
        assert (tmp_path / "blob").read_bytes() == LARGE
        assert await bus.blobs.get(ref) == LARGE
        assert [path.name for path in tmp_path.iterdir()] == ["blob"]

    with_bus(scenario)


@settings(max_examples=20, deadline=None)
@given(data=st.binary(max_size=2000))
def test_any_bytes_come_back(redis_url, data):
    async def scenario() -> None:
        bus = await Bus.connect(redis_url, BusSettings(partition="bytes"))
        assert await bus.blobs.get(await bus.blobs.put(data, "raw")) == data
        await bus.close()

    asyncio.run(scenario())


def test_the_same_content_again_only_lives_longer(with_bus):
    async def scenario(bus: Bus) -> None:
        ref = await bus.blobs.put(LARGE)
        mine = f"elesh:{{{bus.partition}}}:*"
        names = await bus._client.keys(mine)
        for name in names:
            await bus._client.expire(name, 10)
        commands = (await bus._client.info("commandstats"))["cmdstat_set"]["calls"]
        assert (await bus.blobs.put(LARGE)).uri == ref.uri
        assert (await bus._client.info("commandstats"))["cmdstat_set"]["calls"] == commands
        assert sorted(await bus._client.keys(mine)) == sorted(names)
        lives = {name: await bus._client.ttl(name) for name in names}
        head = f"elesh:{{{bus.partition}}}:blob:{ref.sha256}".encode()
        assert 90 < lives[head] <= 100
        assert all(life > 100 for name, life in lives.items() if name != head)

    with_bus(scenario, blob_ttl_seconds=100)


def test_a_put_completes_what_lost_a_piece(with_bus):
    async def scenario(bus: Bus) -> None:
        ref = await bus.blobs.put(LARGE)
        await bus._client.delete(chunk_key(bus, ref, 1))
        await bus.blobs.put(LARGE)
        assert await bus.blobs.get(ref) == LARGE
        await lie_about_size(bus, ref)
        await bus.blobs.put(LARGE)
        assert await bus.blobs.get(ref) == LARGE

    with_bus(scenario)


@pytest.mark.parametrize("damaged", [b"x" * CHUNK, b"x" * (CHUNK - 1)], ids=["other", "shorter"])
def test_a_blob_that_was_found_damaged_is_stored_anew_by_the_next_put(with_bus, damaged):
    async def scenario(bus: Bus) -> None:
        ref = await bus.blobs.put(LARGE)
        await bus._client.set(chunk_key(bus, ref, 1), damaged, ex=100)
        with pytest.raises(DigestMismatch):
            await bus.blobs.get(ref)
        assert await bus.blobs.put(LARGE) == ref.model_copy(update={"expires": ANY})
        assert await bus.blobs.get(ref) == LARGE

    with_bus(scenario)


def test_a_reference_of_another_size_takes_nothing_from_a_sound_blob(with_bus):
    async def scenario(bus: Bus) -> None:
        ref = await bus.blobs.put(LARGE)
        with pytest.raises(DigestMismatch):
            await bus.blobs.get(ref.model_copy(update={"size": ref.size - 1}))
        assert await bus.blobs.get(ref) == LARGE

    with_bus(scenario)


def test_pieces_of_what_the_server_refuses_the_rest_of_go_soon(with_bus, monkeypatch):
    async def scenario(bus: Bus) -> None:
        put = bus._client.set

        async def full(name: str, value: bytes, **more: int) -> object:
            if name.endswith(":1"):
                raise BusRefuses("redis://h", "OOM", "it is full", hint="")
            return await put(name, value, **more)

        monkeypatch.setattr(bus._client, "set", full)
        with pytest.raises(BusRefuses):
            await bus.blobs.put(LARGE)
        pieces = await bus._client.keys(f"elesh:{{{bus.partition}}}:blob:*")
        assert len(pieces) == 1
        assert all([0 < await bus._client.ttl(piece) <= 900 for piece in pieces])
        monkeypatch.undo()
        ref = await bus.blobs.put(LARGE)
        assert await bus.blobs.get(ref) == LARGE
        lives = bus.settings.blob_ttl_seconds
        pieces = await bus._client.keys(f"elesh:{{{bus.partition}}}:blob:*")
        assert min([await bus._client.ttl(piece) for piece in pieces]) > 0.9 * lives

    with_bus(scenario)


def test_a_blob_of_which_the_server_loses_a_piece_meanwhile_is_not_said_to_be_stored(
    with_bus, monkeypatch
):
    async def scenario(bus: Bus) -> None:
        put = bus._client.set

        async def evicting(name: str, value: bytes, **more: int) -> object:
            await put(name, value, **more)
            return await bus._client.delete(name) if name.endswith(":0") else None

        monkeypatch.setattr(bus._client, "set", evicting)
        with pytest.raises(BusUnavailable, match="noeviction"):
            await bus.blobs.put(LARGE)

    with_bus(scenario)


async def swap_content(bus: Bus, ref: BlobRef) -> None:
    await bus._client.setrange(chunk_key(bus, ref, 2), 5, b"wrong")


async def truncate_piece(bus: Bus, ref: BlobRef) -> None:
    await bus._client.set(chunk_key(bus, ref, 1), LARGE[CHUNK : 2 * CHUNK - 1])


async def lengthen_piece(bus: Bus, ref: BlobRef) -> None:
    await bus._client.append(chunk_key(bus, ref, 2), b"more")


async def drop_piece(bus: Bus, ref: BlobRef) -> None:
    await bus._client.delete(chunk_key(bus, ref, 1))


async def drop_head(bus: Bus, ref: BlobRef) -> None:
    await bus._client.delete(chunk_key(bus, ref, 0).removesuffix(":0"))


async def lie_about_size(bus: Bus, ref: BlobRef) -> None:
    await bus._client.set(chunk_key(bus, ref, 0).removesuffix(":0"), len(LARGE) - 1)


@pytest.mark.parametrize(
    ("harm", "error", "text"),
    [
        (swap_content, DigestMismatch, "sha256"),
        (truncate_piece, DigestMismatch, f"{len(LARGE)} bytes, found {len(LARGE) - 1} bytes"),
        (lengthen_piece, DigestMismatch, f"found {len(LARGE) + 4} bytes"),
        (drop_piece, MissingBlob, "piece 1 of 3 is gone"),
        (drop_head, MissingBlob, "publish the checkpoint again"),
        (lie_about_size, DigestMismatch, f"found {len(LARGE) - 1} bytes"),
    ],
)
def test_a_blob_that_breaks_its_promise_is_refused_and_leaves_no_file(
    with_bus, tmp_path, harm, error, text
):
    async def scenario(bus: Bus) -> None:
        ref = await bus.blobs.put(LARGE)
        await harm(bus, ref)
        with pytest.raises(error, match=text):
            await bus.blobs.fetch(ref, tmp_path / "blob")
        assert list(tmp_path.iterdir()) == []

    with_bus(scenario)


def test_a_blob_over_the_limit_is_neither_stored_nor_read(with_bus):
    async def scenario(bus: Bus) -> None:
        with pytest.raises(TooLarge, match="at most max_blob_bytes = 100"):
            await bus.blobs.put(bytes(101))
        ref = BlobRef(uri="redis:" + "a" * 64, size=101, sha256="a" * 64)
        with pytest.raises(TooLarge, match="at most max_blob_bytes = 100"):
            await bus.blobs.get(ref)

    with_bus(scenario, max_blob_bytes=100)


def file_ref(place: str, data: bytes) -> BlobRef:
    return BlobRef(uri=f"file:{place}", size=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_a_file_in_the_blob_folder_is_read_by_relative_and_absolute_path(with_bus, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "blob").write_bytes(LARGE)
    os.mkfifo(tmp_path / "pipe")

    async def scenario(bus: Bus) -> None:
        for place in ("sub/blob", f"//{tmp_path}/sub/blob", str(tmp_path / "sub" / "blob")):
            assert await bus.blobs.get(file_ref(place, LARGE)) == LARGE
        with pytest.raises(DigestMismatch, match="sha256"):
            await bus.blobs.get(file_ref("sub/blob", LARGE[::-1]))
        with pytest.raises(DigestMismatch, match="3 bytes"):
            await bus.blobs.get(file_ref("sub/blob", b"abc"))
        with pytest.raises(MissingBlob, match="No such file"):
            await bus.blobs.get(file_ref("sub/none", LARGE))
        for place in ("sub", "pipe"):
            with pytest.raises(MissingBlob, match="not a regular file"):
                await bus.blobs.get(file_ref(place, LARGE))

    with_bus(scenario, blob_folder=str(tmp_path))


@pytest.mark.parametrize(
    "place",
    ["../secret", "//{outside}/secret", "{outside}/secret", "link/secret", "a/../../secret"],
)
def test_no_path_leads_out_of_the_blob_folder(with_bus, tmp_path, place):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path)

    async def scenario(bus: Bus) -> None:
        with pytest.raises(InvalidField, match=r"inside bus\.blob_folder"):
            await bus.blobs.get(file_ref(place.format(outside=tmp_path), b"secret"))

    with_bus(scenario, blob_folder=str(root))


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("file:/etc/passwd", "set bus.blob_folder"),
        ("s3://bucket/blob", "scheme redis or file"),
        ("redis:" + "b" * 64, "as its sha256 says"),
        ("nothing", "scheme redis or file"),
    ],
)
def test_a_uri_that_nobody_allowed_is_refused(with_bus, uri, text):
    async def scenario(bus: Bus) -> None:
        with pytest.raises(InvalidField, match=text):
            await bus.blobs.get(BlobRef(uri=uri, size=1, sha256="a" * 64))

    with_bus(scenario)

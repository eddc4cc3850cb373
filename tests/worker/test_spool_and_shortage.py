"""A worker's own folder, and what it lacks itself."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.examples import MESSAGES
from elesh.bus.admission import Work, admit, read
from elesh.settings import Settings, SettingsError
from elesh.worker.compute.protocol import DOCUMENT, Failed
from elesh.worker.executor import AnalysisExecutor
from elesh.worker.spool import SHORTAGE_CODE, Shortage, shortage_of, spool
from leyline import encode, wrap

KILLED = """
import os, signal
from elesh.worker.spool import spool
with spool() as folder:
    (folder / "checkpoint").write_bytes(bytes(100))
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_of_a_killed_worker_goes_with_the_next_and_that_of_a_living_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = [sys.executable, "-c", KILLED]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=800)
    left = Path(done.stdout.strip())
    assert (left / "checkpoint").exists()
    stranger = tmp_path / "elesh-worker-just-made"
    stranger.mkdir()
    with spool() as living:
        assert not left.exists()
        with spool() as second:
            assert living.is_dir()
            assert second.is_dir()
            assert stranger.is_dir()
    assert not living.exists()


def test_without_a_place_for_temporary_files_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(SettingsError, match="set TMPDIR"), spool():
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x", "/tmp/f"),
        OSError(errno.EMFILE, "x"),
        MemoryError(),
        Shortage("x"),
    ],
)
def test_what_a_worker_lacks_is_told_from_what_a_message_does(error: Exception) -> None:
    assert shortage_of(error)
    assert not shortage_of(ValueError("x"))
    assert not shortage_of(FileNotFoundError(errno.ENOENT, "x"))


def test_a_child_without_room_blames_nobody_elses_message() -> None:
    failed = Failed(SHORTAGE_CODE, "analysis", "a decision", "no space left on device", False)
    assert isinstance(failed.error, Shortage)
    assert shortage_of(failed.error) == "no space left on device"


def test_what_a_full_disk_took_half_of_is_written_anew_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime(2025, 1, 14, 12, tzinfo=UTC)
    envelope = encode(wrap(MESSAGES["CheckpointReady"], source="test", now=now))
    work = admit(read(envelope), window=60, now=now)
    assert isinstance(work, Work)

    async def fetch(ref: object, path: Path) -> None:
        path.touch()

    nothing = lambda *_, **__: None  # noqa: E731
    guard = SimpleNamespace(requires_signatures=True)
    blobs = SimpleNamespace(fetch=fetch)
    bus: Any = SimpleNamespace(guard=guard, history=nothing, blobs=blobs)
    reports: Any = SimpleNamespace(step=nothing)
    executor = AnalysisExecutor(bus, Settings(), reports, tmp_path)

    async def document() -> bytes:
        async with executor._fetched(work, keep=True) as folder:
            return (folder / DOCUMENT).read_bytes()

    write = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space"):
            asyncio.run(document())
    assert asyncio.run(document()) == encode(work.document)

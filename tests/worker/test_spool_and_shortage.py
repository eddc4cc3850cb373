"""A worker's own folder, and what it lacks itself."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from elesh.settings import SettingsError
from elesh.worker.compute.protocol import Failed
from elesh.worker.spool import SHORTAGE_CODE, Shortage, shortage_of, spool

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

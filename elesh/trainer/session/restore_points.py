"""Restore points by number, in memory or in a folder.

Promises of the folder: a point is there wholly or not at all, whenever the process is killed; one
that was damaged is refused by name, never half-read; one process at a time uses it. Tensors are
safetensors, the rest msgpack and JSON.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from leyline import DigestMismatch, InvalidField, Malformed, PrunedArchitecture

from .snapshot import Snapshot
from .trees import pack_tree, unpack_tree

__all__ = ["FolderInUse", "FolderPoints", "MemoryPoints", "Points", "write_durably"]

_FORMAT = 1
_TENSORS, _STATE, _ARCHITECTURE = "tensors.safetensors", "state.msgpack", "architecture.json"
_MANIFEST = "point.json"


class FolderInUse(InvalidField):
    """Another process uses the folder of restore points."""


class Points(Protocol):
    """Where restore points are kept."""

    def put(self, snapshot: Snapshot) -> int:
        """Keep a snapshot; its number is higher than any before."""

    def get(self, number: int) -> Snapshot:
        """A snapshot again.

        Raises:
            ContractError: if it is not there, or not what was written.
        """

    def numbers(self) -> list[int]:
        """All that are there, oldest first."""

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget some."""


class MemoryPoints:
    """Restore points that end with the process."""

    def __init__(self) -> None:
        self._snapshots: dict[int, Snapshot] = {}
        self._last = 0

    def put(self, snapshot: Snapshot) -> int:
        """Keep a snapshot."""
        self._last += 1
        self._snapshots[self._last] = snapshot
        return self._last

    def get(self, number: int) -> Snapshot:
        """A snapshot again."""
        if number not in self._snapshots:
            raise InvalidField("restore point", f"one of {self.numbers()}", number)
        return self._snapshots[number]

    def numbers(self) -> list[int]:
        """All that are there."""
        return list(self._snapshots)

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget some."""
        for number in numbers:
            self._snapshots.pop(number, None)


class FolderPoints:
    """Restore points of one run in a folder; each is a folder of its own.

    Args:
        folder: made if it is not there; ``claim`` in it is the token by which the run's next
            process takes its claim over.

    Raises:
        FolderInUse: if another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            hint = "end it first, or give this run an id or a folder of its own"
            raise FolderInUse(
                "restore_dir", "a folder of this process", f"{folder} is in use", hint=hint
            ) from None
        self._points = folder / "points"
        self._points.mkdir(exist_ok=True)
        for leftover in self._points.glob(".*"):  # of a process that was killed while writing
            shutil.rmtree(leftover)
        self._last = max(self.numbers(), default=0)

    @property
    def token(self) -> str:
        """The run's claim token: the same for every process that has used this folder."""
        file = self.folder / "claim"
        if not file.exists():
            write_durably(file, secrets.token_hex(8).encode())
        return file.read_text()

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def put(self, snapshot: Snapshot) -> int:
        """Write a snapshot beside the others; it is there once the folder is renamed."""
        state, tensors = pack_tree(snapshot.state)
        parts = {
            _STATE: state,
            _TENSORS: tensors,
            _ARCHITECTURE: snapshot.architecture.model_dump_json().encode(),
        }
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
        manifest = {"format": _FORMAT, "files": digests}
        number = self._last + 1
        draft = self._points / f".{number:08d}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for name, data in {**parts, _MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
            with (draft / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(draft)
        draft.rename(self._path(number))
        _sync_folder(self._points)
        self._last = number
        return number

    def get(self, number: int) -> Snapshot:
        """Read a snapshot, every file checked by its digest."""
        folder = self._path(number)
        try:
            manifest = json.loads((folder / _MANIFEST).read_bytes())
            parts = {name: (folder / name).read_bytes() for name in manifest["files"]}
            if manifest["format"] != _FORMAT:
                raise Malformed(str(folder), f"format {_FORMAT}", manifest["format"])
            for name, digest in manifest["files"].items():
                if (found := hashlib.sha256(parts[name]).hexdigest()) != digest:
                    raise DigestMismatch(str(folder / name), digest, found)
            architecture = PrunedArchitecture.model_validate_json(parts[_ARCHITECTURE], strict=True)
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise Malformed(str(folder), "a whole restore point", str(error)) from None
        return Snapshot(architecture, unpack_tree(parts[_STATE], parts[_TENSORS]))

    def numbers(self) -> list[int]:
        """All that are there, oldest first."""
        names = (path.name for path in self._points.iterdir())
        return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))

    def drop(self, numbers: Iterable[int]) -> None:
        """Remove some; a kill in between leaves a hidden folder that the next start removes."""
        for number in numbers:
            gone = self._points / f".{number:08d}"
            with contextlib.suppress(FileNotFoundError):
                self._path(number).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._points / f"{number:08d}"


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file as a whole: after a kill or a power cut it is the old one or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

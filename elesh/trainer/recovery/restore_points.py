"""Restore points by number, in memory or in a folder.

Promises of the folder: a point is there wholly or not at all, whenever the process is killed; one
that was damaged is refused by name, never half-read; files of others are left alone. Tensors are
safetensors, the rest msgpack and JSON; only the owner can read them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from elesh.observe import get_logger
from leyline import DigestMismatch, InvalidField, Malformed, PrunedArchitecture

from .files import private_folder, sync_folder, write_private
from .snapshot import Snapshot
from .trees import pack_tree, unpack_tree

__all__ = ["FolderPoints", "MemoryPoints", "Points"]

_FORMAT = 2
_TENSORS, _STATE, _ARCHITECTURE = "tensors.safetensors", "state.msgpack", "architecture.json"
_MANIFEST = "point.json"
_NUMBER, _LEFTOVER = re.compile(r"[0-9]{8,}"), re.compile(r"\.[0-9]{8,}")
_log = get_logger(__name__)


class Points(Protocol):
    """Where restore points are kept."""

    def put(self, snapshot: Snapshot) -> int:
        """Keep a snapshot; its number is higher than any before.

        Raises:
            OSError: if it cannot be written. Nothing is left of it then.
        """

    def get(self, number: int) -> Snapshot:
        """A snapshot again.

        Raises:
            ContractError: if it is not there, or not what was written.
        """

    def numbers(self) -> list[int]:
        """All that are there, oldest first."""

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget some; one that cannot be removed stays, with a line in the log."""


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
    """Restore points of one run; each is a folder of its own, named by its number.

    Args:
        folder: made if it is not there; no other process may write to it meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = private_folder(folder)
        for leftover in self._named(_LEFTOVER):  # of a process that was killed while writing
            shutil.rmtree(leftover, ignore_errors=True)
        self._last = max((int(path.name) for path in self._named(_NUMBER)), default=0)

    def put(self, snapshot: Snapshot) -> int:
        """Write a snapshot beside the others; it is there once the folder is renamed."""
        state, tensors = pack_tree(snapshot.state)
        parts = {
            _STATE: state,
            _TENSORS: tensors,
            _ARCHITECTURE: snapshot.architecture.model_dump_json().encode(),
        }
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
        parts[_MANIFEST] = _sealed({"format": _FORMAT, "epoch": snapshot.epoch, "files": digests})
        number = self._last + 1
        draft = self._folder / f".{number:08d}"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            private_folder(draft)
            for name, data in parts.items():
                write_private(draft / name, data)
            sync_folder(draft)
            draft.rename(self._path(number))
            sync_folder(self._folder)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)  # a full disk needs the room
            shutil.rmtree(self._path(number), ignore_errors=True)
            raise
        self._last = number
        return number

    def get(self, number: int) -> Snapshot:
        """Read a snapshot, every file checked by its digest."""
        folder = self._path(number)
        try:
            manifest = _opened(folder / _MANIFEST)
            parts = {name: (folder / name).read_bytes() for name in manifest["files"]}
            for name, digest in manifest["files"].items():
                if (found := hashlib.sha256(parts[name]).hexdigest()) != digest:
                    raise DigestMismatch(str(folder / name), digest, found)
            architecture = PrunedArchitecture.model_validate_json(parts[_ARCHITECTURE], strict=True)
            state = unpack_tree(parts[_STATE], parts[_TENSORS])
            return Snapshot(architecture, state, int(manifest["epoch"]))
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise Malformed(str(folder), "a whole restore point", str(error)) from None

    def numbers(self) -> list[int]:
        """All that are there, oldest first."""
        return sorted(int(path.name) for path in self._named(_NUMBER) if self._is_point(path))

    def drop(self, numbers: Iterable[int]) -> None:
        """Remove some; a kill in between leaves a hidden folder that the next start removes."""
        for number in numbers:
            gone = self._folder / f".{number:08d}"
            try:
                self._path(number).rename(gone)
            except FileNotFoundError:
                pass
            except OSError as error:
                _log.warning("restore point not removed", point=number, reason=str(error))
            shutil.rmtree(gone, ignore_errors=True)

    def _named(self, name: re.Pattern[str]) -> Iterable[Path]:
        """The folders with such a name; anything else there is not ours."""
        return [p for p in self._folder.iterdir() if name.fullmatch(p.name) and p.is_dir()]

    def _is_point(self, path: Path) -> bool:
        return path == self._path(int(path.name)) and (path / _MANIFEST).is_file()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}"


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as JSON with its own digest."""
    return json.dumps({**manifest, "digest": _digest(manifest)}, indent=1).encode()


def _opened(file: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(file.read_bytes())
    if manifest["format"] != _FORMAT:
        hint = "go on with the version of Elesh that wrote it, or remove the folder to begin anew"
        raise Malformed(str(file), f"format {_FORMAT}", manifest["format"], hint=hint)
    digest = manifest.pop("digest")
    if digest != (found := _digest(manifest)):
        raise DigestMismatch(str(file), digest, found)
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

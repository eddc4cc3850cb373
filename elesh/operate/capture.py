"""A case in one file: event, blobs, decision, settings and versions; it can be replayed anywhere.

The file is a zip whose members are stored, not compressed: nothing in it unpacks to more than the
file's own size. Promises on reading: members are read by the names below and no other, each within
its limit; every blob has the size and digest that the event promises; nothing is pickled, extracted
by its own name, or executed.

``manifest.json`` (format, versions, where it stood), ``event.msgpack`` (the envelope as it was),
``decision.msgpack`` (the recorded one, if there is one), ``settings.json`` (those that decided, as
far as known), ``blobs/<name>``.
"""

from __future__ import annotations

import hashlib
import json
import platform
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from leyline import (
    BlobRef,
    DigestMismatch,
    Malformed,
    StructuralPruningDecision,
    TooLarge,
    decode,
    encode,
)

_FORMAT = 1
_MEMBERS = 64
_TEXT = 4 << 20
_MESSAGE = 64 << 20
_VERSIONED = ("elesh", "numpy", "scipy", "torch", "redis", "pydantic", "msgpack")


@dataclass(frozen=True)
class Case:
    """What a replay needs, but for the blobs, which stay in the file."""

    stream: str
    entry_id: str
    envelope: bytes
    decision: StructuralPruningDecision | None
    settings: dict[str, Any] | None
    """What decided, without what has no part in decisions; None if it is no longer known."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python, the processor and the packages that took part, where the capture was made."""


def versions() -> dict[str, str]:
    """What takes part in decisions: Python, the kind of processor, packages as far as installed."""
    found = {"python": platform.python_version(), "processor": _processor()}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The kind of processor, by which libraries choose how they add up; as precise as is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    stated = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in stated.items()}
    known = [facts[name] for name in ("model name", "cpu family", "model") if name in facts]
    return " ".join(known) or platform.machine()


def save_case(path: Path, case: Case, blobs: Path) -> None:
    """Write a case with the files of the folder ``blobs``; ``path`` appears only once it is whole.

    Raises:
        OSError: if the file cannot be written.
    """
    manifest = {
        "format": _FORMAT,
        "stream": case.stream,
        "entry_id": case.entry_id,
        "versions": case.versions,
    }
    draft = path.with_name(path.name + ".partial")
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("manifest.json", json.dumps(manifest, indent=2))
            archive.writestr("event.msgpack", case.envelope)
            if case.decision is not None:
                archive.writestr("decision.msgpack", encode(case.decision))
            if case.settings is not None:
                archive.writestr("settings.json", json.dumps(case.settings, indent=2))
            for blob in sorted(blobs.iterdir()):
                archive.write(blob, f"blobs/{blob.name}")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def open_case(path: Path) -> Case:
    """The case of a file.

    Raises:
        Malformed, TooLarge, UnsupportedVersion: if it is not a captured case, or breaks a limit.
        FileNotFoundError: if there is no such file.
    """
    with _archive(path) as archive:
        manifest = _json(archive, path, "manifest.json")
        if manifest.get("format") != _FORMAT:
            raise Malformed(f"{path}: format", str(_FORMAT), manifest.get("format"))
        names = set(archive.namelist())
        decision = settings = None
        if "decision.msgpack" in names:
            data = _member(archive, path, "decision.msgpack", _MESSAGE)
            decision = decode(StructuralPruningDecision, data, field=f"{path}: decision")
        if "settings.json" in names:
            settings = _json(archive, path, "settings.json")
        return Case(
            stream=str(manifest.get("stream", "")),
            entry_id=str(manifest.get("entry_id", "")),
            envelope=_member(archive, path, "event.msgpack", _MESSAGE),
            decision=decision,
            settings=settings,
            versions={str(k): str(v) for k, v in dict(manifest.get("versions", {})).items()},
        )


def take_blobs(path: Path, wanted: Mapping[str, BlobRef], folder: Path) -> None:
    """Copy the wanted blobs of a case into ``folder``, each checked against its reference.

    Raises:
        Malformed: if one is not in the file.
        DigestMismatch: if size or content are not what the event promises.
    """
    with _archive(path) as archive:
        for name, ref in wanted.items():
            data = _member(archive, path, f"blobs/{name}", ref.size)
            digest = hashlib.sha256(data).hexdigest()
            if (len(data), digest) != (ref.size, ref.sha256):
                promised = f"{ref.size} bytes with sha256 {ref.sha256}"
                raise DigestMismatch(f"{path}: blobs/{name}", promised, f"{len(data)}, {digest}")
            (folder / name).write_bytes(data)


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise Malformed(str(path), "a file that elesh capture wrote", str(error)) from None
    if len(archive.infolist()) > _MEMBERS:
        found = len(archive.infolist())
        archive.close()
        raise TooLarge(str(path), f"at most {_MEMBERS} members", found)
    return archive


def _member(archive: zipfile.ZipFile, path: Path, name: str, limit: int) -> bytes:
    """A stored member of at most ``limit`` bytes."""
    place = f"{path}: {name}"
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise Malformed(place, "a member of that name", sorted(archive.namelist())) from None
    if entry.compress_type != zipfile.ZIP_STORED:
        raise Malformed(place, "a stored member", f"compression {entry.compress_type}")
    if entry.file_size > limit:
        raise TooLarge(place, f"at most {limit} bytes", f"{entry.file_size} bytes")
    try:
        with archive.open(entry) as member:
            return member.read(limit + 1)
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise Malformed(place, "a whole member", str(error)) from None


def _json(archive: zipfile.ZipFile, path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(_member(archive, path, name, _TEXT))
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{path}: {name}", "JSON", str(error)) from None
    if not isinstance(value, dict):
        raise Malformed(f"{path}: {name}", "an object", value)
    return value

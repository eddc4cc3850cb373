"""A run's restore points by number, in memory or in a folder, and the journal beside them.

Promises: a run that was killed resumes on one side or the other of whatever was going on, bit for
bit, and says which epoch that is; a point that cannot be read is passed over, and cuts that are
undone by that are reported so. It knows nothing of the bus.

A point of a folder is there wholly or not at all, whenever the process is killed; one that was
damaged is refused by name, never half-read; files of others are left alone. Tensors are
safetensors, the rest msgpack and JSON; only the owner can read them.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from elesh.observe import get_logger
from elesh.trainer.network.state import trainable
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import (
    ContractError,
    DigestMismatch,
    InvalidField,
    Malformed,
    PrunedArchitecture,
    PruningOutcome,
)

from .evaluation import event_id_of
from .files import FolderLock, private_folder, sync_folder, write_durably, write_private
from .journal import Journal, Line, MadeCut, Situation
from .latecomers import Latecomers
from .snapshot import Snapshot, Tracked, pack_tree, unpack_tree

_FORMAT = 2
_TENSORS, _STATE, _ARCHITECTURE = "tensors.safetensors", "state.msgpack", "architecture.json"
_MANIFEST = "point.json"
_NUMBER, _LEFTOVER = re.compile(r"[0-9]{8,}"), re.compile(r"\.[0-9]{8,}")
_log = get_logger(__name__)


class NoRestorePoint(InvalidField):
    """None that can be read is left to go back to."""


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
            private_folder(self._folder)  # it may have been deleted since
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
        try:
            return [p for p in self._folder.iterdir() if name.fullmatch(p.name) and p.is_dir()]
        except FileNotFoundError:  # deleted since: the next point makes it anew
            return []

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
        hint = "use the version of Elesh that wrote it, or remove the folder to start again"
        raise Malformed(str(file), f"format {_FORMAT}", manifest["format"], hint=hint)
    digest = manifest.pop("digest")
    if digest != (found := _digest(manifest)):
        raise DigestMismatch(str(file), digest, found)
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class Recovery:
    """The restore points and the journal of one run.

    Args:
        folder: where they are kept; None: in memory, for this process only.
        keep: how many points are kept; more only while monitored cuts need them.
        wait_seconds: how long to wait for another process that has the folder.

    Raises:
        FolderInUse: if another process still has the folder then.
        InvalidField: if the folder cannot be used.
    """

    def __init__(self, folder: Path | None = None, keep: int = 4, wait_seconds: float = 0) -> None:
        self.epoch = 0
        """The epoch that training was last heard to be at."""
        self.token = ""
        """By which the run's next process takes its claim over; empty without a folder."""
        self.carriers: dict[str, Mapping[str, str]] = {}
        """Trace contexts of the decisions that were heard, by key; after a restart of those whose
        outcome is still to be reported."""
        self.moves: tuple[float, ...] = ()
        """Of accuracy from epoch to epoch, by training alone; kept for the run's next process."""
        self.uncut = 0
        """Reports for which training is still watched without a cut; kept, too."""
        self._keep = keep
        self.tracked: Tracked | None = None
        """What points are taken of; None before the first of :meth:`resume` and :meth:`track`."""
        self._folder: Path | None = None
        self._lock: FolderLock | None = None
        self._points: Points = MemoryPoints()
        if folder is None:
            self.journal = Journal(None)
            return
        try:
            self._folder = folder = (
                folder.absolute()
            )  # the working directory may change, or be gone
            self._lock = FolderLock(private_folder(folder), wait_seconds, gives_way=True)
            self._points = FolderPoints(folder / "points")
            self.journal = Journal(folder / "journal.jsonl")
            self.carriers.update(self.journal.situation.carriers)
            self.moves, self.uncut = self.journal.situation.moves, self.journal.situation.uncut
            self.token = _token(folder / "claim")
        except OSError as error:
            self._release()
            hint = "free the disk or choose another folder"
            raise InvalidField("restore_dir", "a usable folder", str(error), hint=hint) from None

    def keep_folder(self) -> None:
        """From now on no later session of this process takes the folder over.

        Raises:
            FolderInUse: if one has.
        """
        if self._lock is not None:
            self._lock.keep()

    def _hold(self, folder: Path) -> None:
        """Make the run's folder anew where it was deleted since, and lock it: others may have it.

        Raises:
            FolderInUse: if one has.
            OSError: if it cannot be made.
        """
        if self._lock is None or self._lock.stands:
            return
        lock = FolderLock(private_folder(folder))
        self._release()
        self._lock = lock
        what = "the folder of restore points was deleted and is created again: earlier cuts stay"
        _log.warning(what, folder=folder)
        write_durably(folder / "claim", self.token.encode())

    @property
    def unreported(self) -> list[PruningOutcome]:
        """Outcomes that are not known to be on the bus."""
        return [
            PruningOutcome.model_validate(o) for o in self.journal.situation.unreported.values()
        ]

    def reported(self, event_id: str) -> None:
        """An outcome is on the bus. Safe to call from any thread."""
        if event_id in self.journal.situation.unreported:
            self.journal.write_later(reported=event_id)

    def close(self) -> None:
        """Let go of the folder, of the network and of what is kept beside it."""
        self.tracked = None
        self.journal.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    # Resuming

    @trainable()
    def resume(self, tracked: Tracked, here: int | None = None) -> int:
        """Go back to where the run's last process stood; the epoch of the state that was put back,
        0 for a new run.

        Args:
            here: the present state is that after this epoch, and the run goes on from it.

        Raises:
            InvalidField: if the network is not the one of the run, a part's state cannot be kept,
                or no restore point can be read.
        """
        self.keep_folder()
        if here is not None:
            return self._go_on(tracked, here)
        situation, numbers = self.journal.situation, self._points.numbers()
        lost = not self.journal.whole and bool(numbers)
        if situation.point is None and not lost:
            Snapshot.take(tracked)  # what cannot be kept is refused now, not amid training
            self._begin_anew(tracked)
            return 0
        present = max(numbers) if lost or situation.point is None else situation.point
        begun: Line = situation.begun or {}
        point, epoch = self.restore(begun.get("goal", present), tracked)
        self.epoch = epoch
        self._follow(tracked)
        outcomes = _interrupted(begun, tracked.surgeon)
        ended = {outcome.idempotency_key for outcome in outcomes}
        cuts = [cut for cut in situation.cuts if cut.key not in ended]
        outcomes += [_undone_by_loss(cut, epoch) for cut in cuts if cut.before >= point]
        left = [cut for cut in cuts if cut.before < point]
        self.done("resume", point, outcomes, left, later=True)
        self.drop_after(point)
        interrupted = begun.get("begin", "nothing")
        _log.info("resumed", point=point, epoch=epoch, interrupted=interrupted)
        return epoch

    def _go_on(self, tracked: Tracked, epoch: int) -> int:
        """The run goes on from the present; cuts that are not in it are monitored no more."""
        snapshot, self.epoch = Snapshot.take(tracked, epoch), epoch
        self._follow(tracked)
        outcomes = _interrupted(self.journal.situation.begun or {}, tracked.surgeon)
        made = {record.idempotency_key for record in tracked.surgeon.architecture.history}
        cuts = [cut for cut in self.journal.situation.cuts if cut.key in made]
        try:
            point = self._points.put(snapshot)
        except OSError as error:
            reason = f"no restore point could be written: {error}"
            raise InvalidField("restore_dir", "a folder that can be written", reason) from None
        self.done("resume", point, outcomes, cuts, later=True)
        _log.info("resumed from a checkpoint of the framework", point=point, epoch=epoch)
        return epoch

    def track(self, surgeon: Surgeon) -> Tracked:
        """What points are taken of from now on: ``surgeon`` and the parts named before. A process
        that did not resume begins the run anew with this."""
        if self.tracked is None:
            self.keep_folder()
            self._begin_anew(Tracked(surgeon))
        elif self.tracked.surgeon is not surgeon:
            self._follow(replace(self.tracked, surgeon=surgeon))
        assert self.tracked is not None
        return self.tracked

    def _follow(self, tracked: Tracked) -> None:
        self.tracked = tracked
        tracked.surgeon.leave_undo_to_session()

    def _begin_anew(self, tracked: Tracked) -> None:
        """Start the run in this process; restore points of an earlier one are removed."""
        numbers, self.epoch = self._points.numbers(), 0
        self.moves, self.uncut = (), 0
        self._follow(tracked)
        self.journal.write_later(situation=Situation().as_line())
        if numbers and not self.journal.waits:
            what = (
                "run started again without resume: restore points of its last process are removed"
            )
            _log.warning(what, points=len(numbers))
            self._points.drop(numbers)

    # Points

    @trainable()
    def save(self, epoch: int) -> bool:
        """Write a restore point of now; False, and a line in the log, if that fails."""
        if self.tracked is None:
            return False
        self.epoch = epoch
        try:
            point = self.put(Snapshot.take(self.tracked, epoch))
            self.journal.write(point=point, moves=self.moves, uncut=self.uncut)
        except (ContractError, OSError) as error:
            _log.error("restore point not written", epoch=epoch, reason=str(error))
            return False
        self.thin_out()
        return True

    def put(self, snapshot: Snapshot) -> int:
        """Write a point. It is the present only once the journal says so."""
        if self._folder is not None:
            self._hold(self._folder)
        present = self.journal.situation.point
        if present is not None:
            self.drop_after(present)  # what was written and never became the present
        return self._points.put(snapshot)

    def restore(self, goal: int, tracked: Tracked, *, here: bool = False) -> tuple[int, int]:
        """Put back the newest point up to ``goal`` that can be read; its number and its epoch.

        Args:
            here: it was taken in this process, and optimizers and averages may be others since.

        Raises:
            ShapeMismatch: if the network was changed without its surgeon.
            NoRestorePoint: if there is none.
            InvalidField: if it is of another network or of other parts.
        """
        numbers = self._points.numbers()
        for point in reversed([number for number in numbers if number <= goal]):
            try:
                snapshot = self._points.get(point)
            except ContractError as error:
                _log.error("restore point passed over", point=point, reason=str(error))
                continue
            known = snapshot.state["parts"].keys()
            late = Latecomers.of(tracked.surgeon, snapshot.architecture, known)
            snapshot.put_back(tracked, here=here)
            late.begin_anew()
            return point, snapshot.epoch
        hint = "remove the folder to start again"
        raise NoRestorePoint("restore points", f"an intact one up to {goal}", numbers, hint=hint)

    def older_than(self, point: int) -> int | None:
        """The number of the newest point before this one."""
        return max((n for n in self._points.numbers() if n < point), default=None)

    def drop_after(self, point: int) -> None:
        """Forget what came after a point that was gone back to."""
        self._points.drop([number for number in self._points.numbers() if number > point])

    def thin_out(self) -> None:
        """Keep as many points as are asked for, and those that monitored cuts need."""
        situation, numbers = self.journal.situation, self._points.numbers()
        needed = {cut.before for cut in situation.monitored} | {situation.point}
        self._points.drop(n for n in numbers[: -self._keep] if n not in needed)

    # Journal

    def begin(self, what: str, pending: Sequence[PruningOutcome], **place: int) -> None:
        """Say what is about to be done, and its outcomes if it is interrupted."""
        if self._folder is not None:
            self._hold(self._folder)
        lines = [outcome.model_dump(mode="json") for outcome in pending]
        keys = [outcome.idempotency_key for outcome in pending]
        known = {key: dict(self.carriers[key]) for key in keys if self.carriers.get(key)}
        more: Line = {"carriers": known} if known else {}
        self.journal.write(begin=what, pending=lines, **place, **more)

    def done(
        self,
        what: str,
        point: int,
        outcomes: Sequence[PruningOutcome],
        cuts: Iterable[MadeCut],
        *,
        later: bool = False,
    ) -> None:
        """The commit: from this line on, ``point`` is the present.

        Args:
            later: it may wait for the disk, since what was begun is finished after a kill.
        """
        oldest = min(self._points.numbers(), default=0)
        kept = [cut.as_line() for cut in cuts if cut.left or cut.before >= oldest]
        lines = {event_id_of(o): o.model_dump(mode="json") for o in outcomes}
        write = self.journal.write_later if later else self.journal.write
        write(done=what, point=point, cuts=kept, outcomes=lines, moves=self.moves, uncut=self.uncut)

    def abandon(self) -> None:
        """Note that what was begun, if anything, was given up and changed nothing."""
        if self.journal.situation.begun is not None:
            self.journal.write_later(done="nothing")

    def stood(self, outcomes: Sequence[PruningOutcome], cuts: Iterable[MadeCut]) -> None:
        """Monitored cuts have stood one report more; these outcomes are final."""
        lines = {event_id_of(o): o.model_dump(mode="json") for o in outcomes}
        kept = [cut.as_line() for cut in cuts]
        self.journal.write_later(cuts=kept, outcomes=lines, moves=self.moves, uncut=self.uncut)


def _token(file: Path) -> str:
    """The run's claim token: the same for every process that has used this folder."""
    found = file.read_text(errors="replace") if file.exists() else ""
    if not found:
        found = secrets.token_hex(8)
        write_durably(file, found.encode())
    return found


def _interrupted(begun: Line, surgeon: Surgeon) -> list[PruningOutcome]:
    """The outcomes of what was begun and not completed. A cut that is in the network was made,
    although its line in the journal was damaged."""
    made = {record.idempotency_key for record in surgeon.architecture.history}
    found = [PruningOutcome.model_validate(line) for line in begun.get("pending", ())]
    after = {"result": "applied", "detail": "", "watched": 0}
    after["parameters_after"] = surgeon.architecture.parameters
    return [
        outcome.model_copy(update=after)
        if outcome.result == "refused" and outcome.idempotency_key in made
        else outcome
        for outcome in found
    ]


def _undone_by_loss(cut: MadeCut, epoch: int) -> PruningOutcome:
    """The outcome of a cut that is undone, since no restore point after it can be read. Its own key
    in ``undone_with`` says that no accuracy is to blame."""
    return cut.outcome.model_copy(
        update={
            "result": "rolled_back",
            "rolled_back_epoch": epoch,
            "watched": None,
            "accuracy_after": None,
            "loss_after": None,
            "parameters_after": cut.outcome.parameters_before,
            "detail": "undone: no restore point after the cut can be read; "
            f"the run resumed from before it, after epoch {epoch}",
            "undone_with": cut.key,
        }
    )

"""Restore points and the journal when disks, folders and processes are not as they should be."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from guarded import Run, World, decide, told
from shared import quick_first

from elesh.trainer.recovery.files import FolderInUse, FolderLock
from elesh.trainer.recovery.journal import Journal
from elesh.trainer.recovery.recovery import FolderPoints, Recovery
from leyline import ContractError, InvalidField, PruningOutcome


def trained(folder: Path, epochs: int = 0, **trainer: Any) -> tuple[Run, World, dict[int, str]]:
    """A run that saved so many epochs, and the digest of each."""
    world, run = World(), Run(folder, **trainer)
    run.resume(world.tracked)
    digests = {}
    for epoch in range(1, epochs + 1):
        world.train()
        assert run.save(epoch)
        digests[epoch] = world.digest()
    return run, world, digests


def resumed(folder: Path) -> tuple[Run, World, int]:
    run, world = Run(folder), World()
    return run, world, run.resume(world.tracked)


def points(folder: Path) -> list[Path]:
    return sorted((folder / "points").glob("[0-9]*"))


def flip(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_restore_points_stay_where_they_are_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, _, _ = trained(Path("run"), epochs=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run.save(2)
    assert len(points(tmp_path / "run")) == 2
    assert not list(Path().iterdir())


# Damaged restore points


@pytest.mark.parametrize(
    "name", ["tensors.safetensors", "state.msgpack", "architecture.json", "point.json"]
)
@pytest.mark.parametrize("damaged", [1, 2])
@pytest.mark.sampled
def test_resume_returns_the_epoch_of_the_state_that_it_put_back(
    tmp_path: Path, name: str, damaged: int
) -> None:
    run, _, digests = trained(tmp_path, 4)
    run.close()
    for folder in points(tmp_path)[-damaged:]:
        flip(folder / name, at=len((folder / name).read_bytes()) // 2)
    _, world, epoch = resumed(tmp_path)
    assert (epoch, world.digest()) == (4 - damaged, digests[4 - damaged])


@pytest.mark.parametrize("how", ["emptied", "file gone", "truncated"])
@pytest.mark.slow
def test_a_point_that_lost_a_file_or_a_part_is_passed_over(tmp_path: Path, how: str) -> None:
    run, _, digests = trained(tmp_path, 3)
    run.close()
    newest = points(tmp_path)[-1]
    if how == "emptied":
        shutil.rmtree(newest)
        newest.mkdir()
    elif how == "file gone":
        (newest / "state.msgpack").unlink()
    else:
        file = newest / "tensors.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    run, world, epoch = resumed(tmp_path)
    assert (epoch, world.digest()) == (2, digests[2])
    world.train()
    assert run.save(3)
    run.close()
    assert resumed(tmp_path)[2] == 3


def undone(run: Run) -> list[PruningOutcome]:
    return [o for o in run.unreported if o.result == "rolled_back"]


@pytest.mark.parametrize("reports", [3, 1], ids=["monitored", "no longer monitored"])
@pytest.mark.slow
def test_a_reported_cut_that_is_undone_by_a_damaged_point_is_reported_so(
    tmp_path: Path, reports: int
) -> None:
    run, world, _ = trained(tmp_path, 2, watch_epochs=reports)
    made = run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9))
    assert made.result == "applied"
    for outcome in [made, *run.watch(3, told(0.9))]:
        run.reported(next(iter(run.recovery.journal.situation.unreported)))
        assert outcome.result == "applied"
    run.close()
    flip(points(tmp_path)[-1] / "tensors.safetensors")
    run, world, epoch = resumed(tmp_path)
    (outcome,) = undone(run)
    assert outcome.idempotency_key == made.idempotency_key
    assert (outcome.rolled_back_epoch, epoch) == (2, 2)
    assert outcome.parameters_after == world.original.parameters
    assert outcome.undone_with == made.idempotency_key, "no accuracy is to blame"
    assert run.monitored == ()
    run.close()
    run, _, _ = resumed(tmp_path)
    assert undone(run) == [outcome], "until the bus has it"


@pytest.mark.slow
def test_a_cut_that_the_restored_point_still_has_is_not_reported_as_undone(tmp_path: Path) -> None:
    run, world, _ = trained(tmp_path, 1)
    run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9))
    world.train()
    run.save(2)
    run.close()
    flip(points(tmp_path)[-1] / "tensors.safetensors")
    run, world, epoch = resumed(tmp_path)
    assert (epoch, undone(run)) == (1, [])
    assert world.surgeon.architecture.parameters < world.original.parameters
    assert [cut.left for cut in run.monitored] == [3]


@pytest.mark.slow
def test_a_rollback_whose_point_is_damaged_says_of_all_cuts_that_they_are_undone(
    tmp_path: Path,
) -> None:
    run, world, _ = trained(tmp_path, 1)
    first = run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9))
    before_second = points(tmp_path)[-1]
    second = run.apply(decide(world.surgeon.architecture, number=2), world.surgeon, told(0.8))
    number = run.monitored[1].before
    flip(tmp_path / "points" / f"{number:08d}" / "state.msgpack")
    flip(before_second / "state.msgpack")
    outcomes = run.watch(2, told(0.785))  # too little for the first only, whose point is sound
    assert {o.idempotency_key for o in outcomes} == {
        first.idempotency_key, second.idempotency_key
    }  # fmt: skip
    assert world.surgeon.architecture.parameters == world.original.parameters


def test_without_any_sound_point_resuming_is_refused_by_name(tmp_path: Path) -> None:
    run, _, _ = trained(tmp_path, 2)
    run.close()
    for folder in points(tmp_path):
        flip(folder / "state.msgpack")
    with pytest.raises(InvalidField, match="an intact one"):
        resumed(tmp_path)


def test_points_of_an_earlier_format_are_refused_with_what_to_do(tmp_path: Path) -> None:
    run, _, _ = trained(tmp_path, 1)
    run.close()
    manifest = points(tmp_path)[-1] / "point.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(ContractError, match=r"format 2.*remove the folder"):
        FolderPoints(tmp_path / "points").get(1)


# A damaged journal


def damage_middle(file: Path) -> None:
    flip(file, at=len(file.read_bytes()) // 2)


def damage_first(file: Path) -> None:
    flip(file, at=5)


def not_ours(file: Path) -> None:
    file.write_bytes(b'{"point": 1, "epoch": 99}\n\x00\xff not a line\n')


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def without_a_whole_line(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


NO_LINES = [Path.unlink, emptied, without_a_whole_line]


@pytest.mark.parametrize(
    "damage", [damage_middle, damage_first, not_ours, *NO_LINES], ids=lambda f: f.__name__
)
@pytest.mark.slow
def test_with_a_damaged_journal_a_run_goes_on_from_its_newest_point(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run, _, digests = trained(tmp_path, 4)
    run.close()
    damage(tmp_path / "journal.jsonl")
    run, world, epoch = resumed(tmp_path)
    assert (epoch, world.digest()) == (4, digests[4])
    run.close()
    assert resumed(tmp_path)[2] == 4
    assert (tmp_path / "journal.damaged").exists() is (damage not in NO_LINES)


@pytest.mark.slow
def test_a_torn_last_line_counts_for_nothing_and_spoils_nothing(tmp_path: Path) -> None:
    run, world, digests = trained(tmp_path, 2)
    run.close()
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'0123456789abcdef {"point": 9')
    run, world, epoch = resumed(tmp_path)
    assert (epoch, world.digest()) == (2, digests[2])
    run.save(3)
    run.close()
    assert resumed(tmp_path)[2] == 3


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    run, _, digests = trained(tmp_path, 2)
    run.close()
    foreign = [".DS_Store", "notes.txt", "00000099", ".nfs0001", "12", "journal.jsonl~"]
    for name in foreign:
        (tmp_path / "points" / name).write_text("mine")
    (tmp_path / "points" / "00000050").mkdir()
    (tmp_path / "points" / "00000050" / "mine").write_text("mine")
    run, world, epoch = resumed(tmp_path)
    assert (epoch, world.digest()) == (2, digests[2])
    for later in range(3, 9):
        assert run.save(later)
    for name in [*foreign, "00000050/mine"]:
        assert (tmp_path / "points" / name).read_text() == "mine"


# Who has the folder


def test_another_holder_is_waited_for_and_then_the_run_resumes(tmp_path: Path) -> None:
    run, _, _ = trained(tmp_path, 3)
    run.close()
    holder = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'a')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(FolderInUse, match=r"in use by process.*end that process"):
            Recovery(tmp_path, wait_seconds=0.1)
        assert process.stdin is not None
        process.stdin.write("end\n")
        process.stdin.flush()
        recovery = Recovery(tmp_path, wait_seconds=60)
    assert recovery.resume(World().tracked) == 3


def test_a_session_of_this_process_that_was_not_closed_is_named(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(FolderInUse, match="close the session of this process"):
        FolderLock(tmp_path)
    with pytest.raises(FolderInUse, match="close the session of this process"):
        FolderLock(tmp_path, math.inf)  # nobody else can end it: not waited for
    lock.release()
    FolderLock(tmp_path).release()


def _live_until_told(pipe: Connection) -> None:
    pipe.send("up")
    pipe.recv()


def test_forked_children_do_not_hold_the_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_live_until_told, args=(there,), daemon=True)
    child.start()  # as a data loader's worker
    try:
        assert here.recv() == "up"
        with pytest.raises(FolderInUse):
            FolderLock(tmp_path)  # the child's letting go has not let go the parent's
        lock._file.close()  # as the parent's end does: nobody unlocks
        FolderLock(tmp_path).release()
    finally:
        here.send("end")
        child.join()


def test_everything_written_is_the_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = tmp_path / "restore" / "run"
        run, world, _ = trained(folder, 2)
        run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9))
    finally:
        os.umask(before)
    run.close()
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    wrong = {p: oct(m) for p, m in found.items() if m != (0o700 if p.is_dir() else 0o600)}
    assert not wrong
    (folder / "journal.jsonl").chmod(0o644)
    Journal(folder / "journal.jsonl").close()
    assert stat.S_IMODE((folder / "journal.jsonl").stat().st_mode) == 0o600


# A folder that is deleted while the run goes on


@pytest.mark.parametrize(
    "gone", quick_first(["", "points", "journal.jsonl"]), ids=lambda name: name or "all"
)
def test_what_was_deleted_of_the_folder_is_made_anew_and_the_run_goes_on(
    tmp_path: Path, gone: str
) -> None:
    folder = tmp_path / "run"
    run, world, _ = trained(folder, 2)
    made = run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9))
    victim = folder / gone
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    assert run.save(3)
    more = run.apply(decide(world.surgeon.architecture, number=2), world.surgeon, told(0.9))
    assert (made.result, more.result) == ("applied", "applied")
    stands = world.digest()
    with pytest.raises(FolderInUse):
        FolderLock(folder)
    token = run.recovery.token
    run.close()
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in [folder, *folder.rglob("*")]} == {
        0
    }
    run, world, epoch = resumed(folder)
    assert (epoch, world.digest(), run.recovery.token) == (3, stands, token)
    assert [cut.key for cut in run.monitored] == [made.idempotency_key, more.idempotency_key]
    assert run.unreported == [made, more]


def test_a_folder_that_another_process_made_after_ours_was_deleted_is_not_written_to(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    run, world, _ = trained(folder, 2)
    shutil.rmtree(folder)
    folder.mkdir()
    theirs = FolderLock(folder)
    before = world.digest()
    assert not run.save(3)
    outcome = run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9))
    assert (outcome.result, world.digest()) == ("refused", before)
    assert "in use by process" in outcome.detail
    assert not list(folder.rglob("*.safetensors"))
    theirs.release()
    assert run.save(4)


def test_a_harmful_cut_without_a_point_to_go_back_to_is_told_of_and_ends_its_monitoring(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    run, world, _ = trained(folder, 2, watch_epochs=1)
    run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9))
    after = world.digest()
    shutil.rmtree(folder)
    found = [outcome for epoch in (3, 4) for outcome in run.watch(epoch, told(0.2))]
    assert ([outcome.result for outcome in found], world.digest()) == (["applied"], after)
    assert "accuracy 0.9000 fell to 0.2000" in found[0].detail
    assert "no restore point from before the cut is left" in found[0].detail
    assert run.monitored == ()
    assert run.save(5)


# A full disk


class Disk:
    """A disk that is full while it is told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        fsync = os.fsync

        def checked(descriptor: int) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", checked)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_moment_stops_nothing_for_good(
    tmp_path: Path, disk: Disk
) -> None:
    run, world, _ = trained(tmp_path, 1)
    made = run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9))
    after = world.digest()
    disk.full = True
    assert not run.save(2)
    refused = run.apply(decide(world.surgeon.architecture, number=2), world.surgeon, told(0.9))
    assert (refused.result, world.digest()) == ("refused", after)
    for event in list(run.recovery.journal.situation.unreported):
        run.reported(event)  # on the bus's thread: must not raise
    assert run.watch(2, told(0.9)) == []
    assert not list((tmp_path / "points").glob(".*")), "halves would fill the disk"
    disk.full = False
    again = run.apply(decide(world.surgeon.architecture, number=2), world.surgeon, told(0.9))
    assert again.result == "applied"
    assert run.save(3)
    stood = world.digest()
    run.close()
    run, world, epoch = resumed(tmp_path)
    assert (epoch, world.digest()) == (3, stood)
    assert [cut.left for cut in run.monitored] == [2, 3], "the report of then was not lost"
    assert made.idempotency_key not in {o.idempotency_key for o in run.unreported}


@pytest.mark.slow
def test_a_disk_that_fills_up_within_a_rollback_leaves_the_run_rolled_back(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, world, digests = trained(tmp_path, 1)
    run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9))
    restore = Recovery.restore

    def restored_and_full(*args: Any, **how: Any) -> tuple[int, int]:
        found = restore(*args, **how)
        disk.full = True
        return found

    monkeypatch.setattr(Recovery, "restore", restored_and_full)
    (outcome,) = run.watch(2, told(0.5))
    monkeypatch.undo()
    assert (outcome.result, world.digest()) == ("rolled_back", digests[1])
    assert run.monitored == ()
    run.recovery.journal._waiting.clear()  # killed: the line never reached the disk
    run.close()
    run, world, _ = resumed(tmp_path)
    assert world.digest() == digests[1], "the rollback that was begun is completed"
    assert [o.result for o in run.unreported][-1] == "rolled_back"


def test_a_disk_that_is_full_when_the_run_begins_is_refused_with_what_to_do(
    tmp_path: Path, disk: Disk
) -> None:
    disk.full = True
    with pytest.raises(InvalidField, match=r"No space left.*another folder"):
        Run(tmp_path / "run")


def test_a_part_whose_state_can_no_longer_be_kept_refuses_the_cut_and_not_training(
    tmp_path: Path,
) -> None:
    run, world, _ = trained(tmp_path, 1)
    world.scheduler.secret = lambda: None
    assert not run.save(2)
    outcome = run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9))
    assert outcome.result == "refused"
    assert "secret" in outcome.detail


@pytest.mark.slow
def test_a_journal_that_cannot_be_shortened_is_gone_on_with(tmp_path: Path, disk: Disk) -> None:
    run, _, _ = trained(tmp_path, 2)
    run.close()
    disk.full = True
    run = Run(tmp_path)
    disk.full = False
    world = World()
    assert run.resume(world.tracked) == 2
    assert run.save(3)
    run.close()
    assert resumed(tmp_path)[2] == 3

"""Restore points, the watch after a cut, rollback and resuming: bit for bit, whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import World, decide, outputs, told, trainer_settings

from elesh.trainer import apply_decision
from elesh.trainer.session.guard import Guard
from elesh.trainer.session.reporting import event_id_of
from elesh.trainer.session.restore_points import FolderInUse, FolderPoints
from elesh.trainer.session.snapshot import Snapshot, Tracked
from leyline import ContractError, InvalidField, PruningOutcome

SUPPORT = Path(__file__).parents[2] / "support"


def guarded(folder: Path | None = None, **trainer: Any) -> tuple[Guard, World]:
    """A run that has trained for a while."""
    world, guard = World(), Guard(trainer_settings(**trainer), folder)
    guard.resume(world.tracked)
    world.train()
    return guard, world


def cut(guard: Guard, world: World, number: int = 1, accuracy: float = 0.9) -> PruningOutcome:
    decision = decide(world.surgeon.architecture, number=number)
    outcome = guard.apply(decision, world.surgeon, told(accuracy))
    assert outcome.result == "applied"
    return outcome


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_cut_that_loses_accuracy_within_its_watch_is_rolled_back_bit_for_bit(
    tmp_path: Path, on_disk: bool
) -> None:
    guard, world = guarded(tmp_path if on_disk else None)
    before, answers = world.digest(), outputs(world)
    made = cut(guard, world)
    assert (made.watched, made.accuracy_after) == (3, 0.9)
    world.train()
    assert guard.watch(61, told(0.89)) == []
    world.train()
    (outcome,) = guard.watch(62, told(0.87))
    assert (outcome.result, outcome.rolled_back_epoch) == ("rolled_back", 62)
    assert outcome.accuracy_after == 0.87
    assert outcome.parameters_after == world.original.parameters
    assert world.digest() == before
    assert torch.equal(outputs(world), answers)
    assert guard.watched == ()


def test_training_goes_on_after_a_rollback_as_if_the_cut_had_never_been() -> None:
    guard, world = guarded()
    cut(guard, world)
    guard.watch(61, told(0.5))
    world.train()
    other = World()
    other.train()
    other.train()
    assert world.digest() == other.digest()


def test_a_cut_that_stands_its_watch_is_kept_and_no_longer_evaluated() -> None:
    guard, world = guarded(watch_epochs=2)
    cut(guard, world)
    assert guard.watch(61, told(0.9)) == []
    (outcome,) = guard.watch(62, told(0.91))
    assert (outcome.result, outcome.watched, outcome.accuracy_after) == ("applied", 0, 0.91)

    def never() -> Any:
        raise AssertionError("nothing is on probation")

    assert guard.watch(63, never) == []


def test_an_accuracy_that_is_no_number_rolls_back() -> None:
    guard, world = guarded()
    cut(guard, world)
    (outcome,) = guard.watch(61, told(float("nan")))
    assert outcome.result == "rolled_back"


@pytest.mark.parametrize(
    ("layers", "units", "drop", "result"),
    [((), 2, 0.03, "rolled_back"), (("blocks.2",), 0, 0.04, "applied"),
     (("blocks.2",), 2, 0.04, "rolled_back")],
)  # fmt: skip
def test_the_strictest_trigger_of_the_levels_holds(
    layers: tuple[str, ...], units: int, drop: float, result: str
) -> None:
    guard, world = guarded()
    decision, whole = decide(world.original, units=units, layers=layers), outputs(world)
    outcome = guard.apply(decision, world.surgeon, told(0.9, 0.9 - drop))
    assert outcome.result == result
    assert (world.surgeon.architecture is world.original) is (result == "rolled_back")
    assert torch.equal(outputs(world), whole) is (result == "rolled_back")
    assert ("under the mask" in outcome.detail) is (result == "rolled_back")


def test_a_cut_that_is_worse_than_its_mask_is_taken_back_at_once() -> None:
    guard, world = guarded()
    before = world.digest()
    decision = decide(world.surgeon.architecture, layers=("blocks.2",))
    outcome = guard.apply(decision, world.surgeon, told(0.9, 0.9, 0.5))
    assert (outcome.result, outcome.accuracy_after) == ("rolled_back", 0.5)
    assert "after the cut" in outcome.detail
    assert world.digest() == before


def test_without_a_guard_a_bad_cut_is_undone_by_the_surgeon() -> None:
    world = World()
    decision = decide(world.surgeon.architecture, layers=("blocks.2",))
    whole = outputs(world)
    outcome = apply_decision(decision, world.surgeon, told(0.9, 0.9, 0.5))
    assert outcome.result == "rolled_back"
    assert world.surgeon.architecture is world.original
    assert torch.equal(outputs(world), whole)


def test_an_error_of_the_callers_evaluation_leaves_the_network_as_it_was() -> None:
    guard, world = guarded()
    before, calls = world.digest(), iter(range(3))

    def evaluate() -> Any:
        if next(calls) == 2:
            raise OSError("the validation data cannot be read")
        return told(0.9)()

    with pytest.raises(OSError, match="validation data"):
        guard.apply(decide(world.surgeon.architecture), world.surgeon, evaluate)
    assert world.digest() == before


# Modes


def two_cuts(mode: str) -> tuple[Guard, World, list[str]]:
    """Two cuts on probation, the second from .80 to .79; and the states before each."""
    guard, world = guarded(rollback=mode)
    states = [world.digest()]
    cut(guard, world, 1, accuracy=0.9)
    world.train()
    states.append(world.digest())
    cut(guard, world, 2, accuracy=0.8)
    world.train()
    return guard, world, states


def test_immediate_goes_back_to_before_the_first_cut_that_failed() -> None:
    guard, world, states = two_cuts("immediate")
    first, second = guard.watch(62, told(0.79))
    assert world.digest() == states[0]
    assert first.undone_with is None
    assert second.undone_with == first.idempotency_key, "the second did not fail itself"
    guard, world, states = two_cuts("immediate")
    first, second = guard.watch(62, told(0.5))
    assert world.digest() == states[0]


def test_atomic_takes_only_the_newest_cut_back() -> None:
    guard, world, states = two_cuts("atomic")
    (outcome,) = guard.watch(62, told(0.5))
    assert world.digest() == states[1]
    assert [cut.key for cut in guard.watched] != [outcome.idempotency_key]
    (outcome,) = guard.watch(63, told(0.5))
    assert world.digest() == states[0]


def test_progressive_goes_to_ever_older_points_until_one_validates() -> None:
    guard, world, states = two_cuts("progressive")
    assert len(guard.watch(62, told(0.5, 0.9))) == 1
    assert world.digest() == states[1]
    guard, world, states = two_cuts("progressive")
    outcomes = guard.watch(62, told(0.5, 0.5, 0.5, 0.9))  # the point just after the first cut, too
    assert world.digest() == states[0]
    assert len(outcomes) == 2


# Resuming


def fresh(folder: Path, **trainer: Any) -> tuple[Guard, World, int]:
    world, guard = World(), Guard(trainer_settings(**trainer), folder)
    return guard, world, guard.resume(world.tracked)


def test_a_new_process_goes_on_where_the_last_one_stood(tmp_path: Path) -> None:
    guard, world = guarded(tmp_path)
    cut(guard, world)
    guard.watch(61, told(0.9))
    world.train()
    assert guard.save(61)
    stood = world.digest()
    world.train()
    went_on = world.digest()
    guard.close()
    guard, later, epoch = fresh(tmp_path)
    assert (epoch, later.digest()) == (61, stood)
    assert [cut.left for cut in guard.watched] == [2], "the watch goes on"
    later.train()
    assert later.digest() == went_on, "and training does, as if nothing had happened"


def test_a_new_process_can_still_roll_a_cut_back(tmp_path: Path) -> None:
    guard, world = guarded(tmp_path)
    before = world.digest()
    guard.apply(decide(world.original, layers=("blocks.2",)), world.surgeon, told(0.9))
    guard.close()
    guard, later, _ = fresh(tmp_path)
    later.train()
    (outcome,) = guard.watch(61, told(0.5))
    assert outcome.result == "rolled_back"
    assert later.digest() == before


def test_an_apply_that_was_cut_short_is_reported_when_the_run_resumes(tmp_path: Path) -> None:
    guard, world = guarded(tmp_path)
    before = world.digest()

    def killed() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard.apply(decide(world.original), world.surgeon, killed)
    guard.close()
    guard, later, _ = fresh(tmp_path)
    (outcome,) = guard.unreported
    assert (outcome.result, later.digest()) == ("refused", before)
    assert "interrupted" in outcome.detail


def test_outcomes_stay_unreported_until_the_bus_has_them(tmp_path: Path) -> None:
    guard, world = guarded(tmp_path)
    outcome = cut(guard, world)
    guard.close()
    guard, _, _ = fresh(tmp_path)
    assert guard.unreported == [outcome]
    guard.reported(event_id_of(outcome))
    guard.close()
    guard, _, _ = fresh(tmp_path)
    assert guard.unreported == []


def test_a_damaged_restore_point_is_passed_over_by_name_and_an_older_one_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard, world = guarded(tmp_path)
    guard.save(1)
    stood = world.digest()
    world.train()
    guard.save(2)
    guard.close()
    newest = max((tmp_path / "points").iterdir())
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    points = FolderPoints(tmp_path)
    with pytest.raises(ContractError, match="tensors"):
        points.get(int(newest.name))
    points.close()
    _, later, _ = fresh(tmp_path)
    assert later.digest() == stood


def test_two_processes_cannot_use_one_folder(tmp_path: Path) -> None:
    guard, _ = guarded(tmp_path)
    with pytest.raises(FolderInUse, match="in use"):
        Guard(trainer_settings(), tmp_path)
    guard.close()
    Guard(trainer_settings(), tmp_path).close()


def test_points_are_bounded_but_those_that_the_watch_needs_stay(tmp_path: Path) -> None:
    guard, world = guarded(tmp_path, restore_points=2, watch_epochs=20)
    before = world.digest()
    cut(guard, world)
    for epoch in range(61, 71):
        guard.save(epoch)
    assert len(list((tmp_path / "points").iterdir())) == 3
    assert len(guard.watch(71, told(0.1))) == 1
    assert world.digest() == before


def test_a_full_disk_leaves_the_network_alone_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, world = guarded(tmp_path)
    before, put, calls = world.digest(), FolderPoints.put, iter(range(9))

    def full(points: FolderPoints, snapshot: Snapshot) -> int:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        return put(points, snapshot)

    monkeypatch.setattr(FolderPoints, "put", full)
    outcome = guard.apply(decide(world.original), world.surgeon, told(0.9))
    assert outcome.result == "refused"
    assert "No space left" in outcome.detail
    assert world.digest() == before


def test_what_cannot_be_kept_is_refused_by_name_before_training() -> None:
    world = World()
    world.scheduler.secret = lambda: None
    with pytest.raises(InvalidField, match=r"training.parts.scheduler.secret.*function"):
        Guard(trainer_settings()).resume(world.tracked)


def test_resuming_with_other_parts_is_refused_by_name(tmp_path: Path) -> None:
    guard, _ = guarded(tmp_path)
    guard.save(1)
    guard.close()
    world = World()
    with pytest.raises(InvalidField, match="parts"):
        Guard(trainer_settings(), tmp_path).resume(Tracked(world.surgeon))


def test_killed_at_seeded_moments_a_run_resumes_on_one_side_or_the_other() -> None:
    """A slice; ``python tests/support/kill_driver.py --moments 100`` does a hundred."""
    paths = [str(SUPPORT), str(SUPPORT / "nets")]
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "kill_driver.py"), "--moments", "21", "--seed", "5"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == 21
    sides = Counter(line["side"] for line in lines)
    assert sides["before"]
    assert sides["after"]

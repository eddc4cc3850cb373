"""Restore points, the watch after a cut, rollback and resuming: bit for bit, whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import Run, World, decide, outputs, told

from elesh.safety import vote_of
from elesh.trainer import Evaluation, apply_decision
from elesh.trainer.recovery.evaluation import event_id_of, expected
from elesh.trainer.recovery.files import FolderInUse
from elesh.trainer.recovery.recovery import FolderPoints
from elesh.trainer.recovery.snapshot import Snapshot, Tracked
from leyline import ContractError, InvalidField, PruningOutcome

SUPPORT = Path(__file__).parents[2] / "support"


def trained(folder: Path | None = None, **trainer: Any) -> tuple[Run, World]:
    """A run that has trained for a while."""
    world, run = World(), Run(folder, **trainer)
    run.resume(world.tracked)
    world.train()
    return run, world


def cut(run: Run, world: World, number: int = 1, accuracy: float = 0.9) -> PruningOutcome:
    decision = decide(world.surgeon.architecture, number=number)
    outcome = run.apply(decision, world.surgeon, told(accuracy))
    assert outcome.result == "applied"
    return outcome


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.sampled
def test_a_cut_that_loses_accuracy_within_its_watch_is_rolled_back_bit_for_bit(
    tmp_path: Path, on_disk: bool
) -> None:
    run, world = trained(tmp_path if on_disk else None)
    calm(run)
    before, answers = world.digest(), outputs(world)
    made = cut(run, world)
    assert (made.watched, made.accuracy_after) == (3, 0.9)
    world.train()
    assert run.watch(61, told(0.89)) == []
    world.train()
    (outcome,) = run.watch(62, told(0.85))
    assert (outcome.result, outcome.rolled_back_epoch) == ("rolled_back", 62)
    assert outcome.accuracy_after == 0.85
    assert outcome.parameters_after == world.original.parameters
    assert world.digest() == before
    assert torch.equal(outputs(world), answers)
    assert run.monitored == ()


def test_a_report_that_is_little_below_the_limit_leaves_the_next_one_to_decide() -> None:
    run, world = trained(watch_epochs=2)
    calm(run)
    cut(run, world)
    assert run.watch(61, told(0.87)) == []
    assert (run.cuts.doubted, run.monitored[0].left) == (True, 2)
    assert run.watch(62, told(0.89)) == []  # it was chance
    assert (run.cuts.doubted, run.monitored[0].left) == (False, 1)
    (outcome,) = run.watch(63, told(0.87))
    assert (outcome.result, outcome.rolled_back_epoch) == ("rolled_back", 63)
    assert "0.8767 in the mean of 3 reports" in outcome.detail


SCATTER = (0.9, 0.88, 0.91, 0.875, 0.905, 0.87, 0.9)
"""Accuracy from epoch to epoch, of a training that falls by more than the trigger by itself."""


def scattering(folder: Path | None = None, **trainer: Any) -> tuple[Run, World]:
    """A run that scatters, and was cut at epoch 60, at no cost."""
    run, world = trained(folder, **trainer)
    for epoch, accuracy in enumerate(SCATTER, 54):
        assert run.watch(epoch, told(accuracy), always=True) == []
    cut(run, world)
    return run, world


def test_what_training_scatters_by_itself_is_not_blamed_on_a_cut() -> None:
    run, _ = scattering()
    found = [
        run.watch(61 + n, told(x)) for n, x in enumerate((0.872, 0.87, 0.903, 0.869, *SCATTER))
    ]
    (outcome,) = [outcome for outcomes in found for outcome in outcomes]
    assert (outcome.result, outcome.watched) == ("applied", 0)


def test_a_cut_that_does_harm_is_taken_back_however_training_scatters() -> None:
    run, world = scattering()
    found = [run.watch(61 + n, told(x - 0.06)) for n, x in enumerate(SCATTER)]
    (outcome,) = [outcome for outcomes in found for outcome in outcomes]
    assert outcome.result == "rolled_back"
    assert "training scatters by 0.0" in outcome.detail
    assert world.surgeon.architecture is world.original


def test_a_fall_that_the_loss_does_not_confirm_is_chance() -> None:
    run, world = trained()
    calm(run)
    cut(run, world)
    found = [run.watch(61 + n, lambda: Evaluation(0.86, 0.05)) for n in range(6)]
    (outcome,) = [outcome for outcomes in found for outcome in outcomes]
    assert (outcome.result, outcome.watched) == ("applied", 0)


@pytest.mark.parametrize(("samples", "kept"), [(100, True), (10_000, False)])
def test_of_few_validation_samples_accuracy_scatters_more(samples: int, kept: bool) -> None:
    """Six of a hundred more that are wrong are chance, six hundred of ten thousand are not."""
    after = expected(0.9, 0.9, (), 0.02, samples=samples)
    assert after.fell([0.84, 0.84]) is not kept


def test_a_training_that_still_learns_scatters_as_much_as_one_that_does_not() -> None:
    noise = (0.0, 0.02, -0.02, 0.02, -0.01, 0.02, -0.02, 0.01)
    for slope in (0.0, 0.03):
        level = [0.5 + slope * n + x for n, x in enumerate(noise)]
        moves = [b - a for a, b in pairwise(level)]
        assert 0.01 < expected(0.8, 0.8, moves, 0.02).scatter < 0.03


@pytest.mark.parametrize("stood", [4, 0, 1, 2, 3, 5])
@pytest.mark.sampled
def test_a_collapse_is_taken_back_at_its_first_report_however_training_scatters(stood: int) -> None:
    """It does not hide in the scatter that it makes itself."""
    run, _ = scattering(watch_epochs=6)
    for n in range(stood):
        assert run.watch(61 + n, told(SCATTER[n])) == []
    (outcome,) = run.watch(61 + stood, told(0.7))
    assert outcome.result == "rolled_back"


def calm(run: Run) -> None:
    """Training goes on for some epochs, and accuracy stays where it is."""
    for epoch in range(50, 60):
        assert run.watch(epoch, told(0.9), always=True) == []


def test_calm_training_that_falls_after_a_cut_has_the_cut_to_blame() -> None:
    run, world = trained()
    calm(run)
    cut(run, world)
    assert run.watch(61, told(0.877)) == []
    (outcome,) = run.watch(62, told(0.877))
    assert outcome.result == "rolled_back"


def test_a_cut_that_stays_in_doubt_is_kept_in_the_end_and_says_so() -> None:
    run, _ = scattering(watch_epochs=2)
    for epoch in range(61, 64):
        assert run.watch(epoch, told(0.874 if epoch % 2 else 0.878)) == []
        assert run.cuts.doubted
    (outcome,) = run.watch(64, told(0.876))
    assert (outcome.result, outcome.watched) == ("applied", 0)
    assert "no further than training scatters" in outcome.detail


def test_a_cut_of_a_training_that_is_not_known_yet_is_taken_back_and_not_blamed() -> None:
    run, world = trained()
    made = cut(run, world)
    assert run.watch(61, told(0.88)) == []
    (outcome,) = run.watch(62, told(0.8))
    assert (outcome.result, outcome.undone_with) == ("rolled_back", made.idempotency_key)
    assert vote_of(outcome) == "none"
    other = decide(world.surgeon.architecture, number=2)
    for epoch, accuracy in ((63, 0.88), (64, 0.8)):  # training by itself does the same
        waits = run.apply(other, world.surgeon, told(0.9))
        assert (waits.result, "without a cut" in waits.detail) == ("refused", True)
        assert run.watch(epoch, told(accuracy)) == []
    assert run.apply(other, world.surgeon, told(0.9)).result == "applied"
    assert run.watch(65, told(0.82)) == [], "now it is known"


def test_a_collapse_is_blamed_on_the_cut_of_a_training_that_is_not_known_yet() -> None:
    run, world = trained()
    cut(run, world)
    (outcome,) = run.watch(61, told(0.5))
    assert (vote_of(outcome), outcome.undone_with) == ("failure", None)
    other = decide(world.surgeon.architecture, number=2)
    assert run.apply(other, world.surgeon, told(0.9)).result == "applied"


def test_a_cut_that_does_harm_where_training_is_known_is_blamed() -> None:
    run, _ = scattering()
    (outcome,) = run.watch(61, told(0.7))
    assert (vote_of(outcome), outcome.undone_with) == ("failure", None)


def test_epochs_that_come_again_after_a_rollback_pass_without_another_cut() -> None:
    """Random states came back: one bad epoch would be blamed on the next cut, too."""
    run, world = scattering()
    assert run.watch(61, told(0.89)) == []
    (outcome,) = run.watch(62, told(0.7))
    assert outcome.undone_with is None
    other = decide(world.surgeon.architecture, number=2)
    for epoch, accuracy in ((63, 0.89), (64, 0.7)):
        waits = run.apply(other, world.surgeon, told(0.9))
        assert (waits.result, "same epochs are trained again" in waits.detail) == (
            "refused",
            True,
        )
        assert run.watch(epoch, told(accuracy)) == []
    assert run.apply(other, world.surgeon, told(0.7)).result == "applied"


def test_a_killed_run_still_waits_for_the_epochs_after_a_rollback(tmp_path: Path) -> None:
    run, world = trained(tmp_path)
    cut(run, world)
    assert run.watch(61, told(0.88)) == []
    assert run.watch(62, told(0.8))[0].result == "rolled_back"
    assert run.watch(63, told(0.88)) == []
    run.save(63)
    run.close()
    again, other = Run(tmp_path), World()
    again.resume(other.tracked)
    decision = decide(other.surgeon.architecture, number=2)
    assert again.apply(decision, other.surgeon, told(0.9)).result == "refused"
    assert again.watch(64, told(0.8)) == []
    assert again.recovery.moves == run.recovery.moves
    assert again.apply(decision, other.surgeon, told(0.8)).result == "applied"


def test_what_a_cut_gained_at_once_need_not_last() -> None:
    run, world = trained()
    for epoch, accuracy in enumerate(SCATTER, 54):
        run.watch(epoch, told(accuracy), always=True)
    made = run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9, 0.99))
    assert made.result == "applied"
    for epoch, accuracy in ((61, 0.872), (62, 0.874)):
        assert run.watch(epoch, told(accuracy)) == []


def test_a_killed_run_still_knows_how_its_training_scattered(tmp_path: Path) -> None:
    run, world = scattering(folder=tmp_path)
    known = run.monitored[0]
    run.watch(61, told(0.872))
    run.recovery.close()
    again = Run(tmp_path)
    again.resume(world.tracked)
    assert (again.monitored[0].moves, again.monitored[0].reports) == (known.moves, (0.872,))
    assert len(known.moves) == len(SCATTER) - 1


def test_training_goes_on_after_a_rollback_as_if_the_cut_had_never_been() -> None:
    run, world = trained()
    cut(run, world)
    run.watch(61, told(0.5))
    world.train()
    other = World()
    other.train()
    other.train()
    assert world.digest() == other.digest()


def test_a_cut_that_stands_its_watch_is_kept_and_no_longer_evaluated() -> None:
    run, world = trained(watch_epochs=2)
    cut(run, world)
    assert run.watch(61, told(0.9)) == []
    (outcome,) = run.watch(62, told(0.91))
    assert (outcome.result, outcome.watched, outcome.accuracy_after) == ("applied", 0, 0.91)

    def never() -> Any:
        raise AssertionError("nothing is monitored")

    assert run.watch(63, never) == []


def test_an_accuracy_that_is_no_number_rolls_back() -> None:
    run, world = trained()
    cut(run, world)
    (outcome,) = run.watch(61, told(float("nan")))
    assert outcome.result == "rolled_back"


@pytest.mark.parametrize(
    ("layers", "units", "drop", "result"),
    [((), 2, 0.03, "rolled_back"), (("blocks.2",), 0, 0.04, "applied"),
     (("blocks.2",), 2, 0.04, "rolled_back")],
)  # fmt: skip
@pytest.mark.sampled
def test_the_strictest_trigger_of_the_levels_holds(
    layers: tuple[str, ...], units: int, drop: float, result: str
) -> None:
    run, world = trained()
    decision, whole = decide(world.original, units=units, layers=layers), outputs(world)
    outcome = run.apply(decision, world.surgeon, told(0.9, 0.9 - drop))
    assert outcome.result == result
    assert (world.surgeon.architecture is world.original) is (result == "rolled_back")
    assert torch.equal(outputs(world), whole) is (result == "rolled_back")
    assert ("under the mask" in outcome.detail) is (result == "rolled_back")


def test_a_cut_that_is_worse_than_its_mask_is_taken_back_at_once() -> None:
    run, world = trained()
    before = world.digest()
    decision = decide(world.surgeon.architecture, layers=("blocks.2",))
    outcome = run.apply(decision, world.surgeon, told(0.9, 0.9, 0.5))
    assert (outcome.result, outcome.accuracy_after) == ("rolled_back", 0.5)
    assert "after the cut" in outcome.detail
    assert world.digest() == before


def test_without_a_session_a_bad_cut_is_undone_by_the_surgeon() -> None:
    world = World()
    decision = decide(world.surgeon.architecture, layers=("blocks.2",))
    whole = outputs(world)
    outcome = apply_decision(decision, world.surgeon, told(0.9, 0.9, 0.5))
    assert outcome.result == "rolled_back"
    assert world.surgeon.architecture is world.original
    assert torch.equal(outputs(world), whole)


@pytest.mark.parametrize(
    ("call", "when"), [(0, "before"), (1, "under the mask"), (2, "in the cut")]
)
@pytest.mark.sampled
def test_an_error_of_the_callers_evaluation_is_an_outcome_and_leaves_the_network_as_it_was(
    call: int, when: str
) -> None:
    run, world = trained()
    before, calls = world.digest(), iter(range(3))

    def evaluate() -> Any:
        number = next(calls)
        if number == call:
            raise OSError("the validation data cannot be read")
        return told(0.9 - 0.001 * number)()  # a mask moves the figures

    outcome = run.apply(decide(world.surgeon.architecture), world.surgeon, evaluate)
    assert outcome.result == "refused"
    assert when in outcome.detail
    assert "validation data cannot be read" in outcome.detail
    assert world.surgeon.masked == {}
    if call == 2:  # then the random numbers that evaluating has drawn come back, too
        assert world.digest() == before


def test_an_error_of_the_evaluation_while_monitored_leaves_the_cut_for_the_next_report() -> None:
    run, world = trained()
    cut(run, world)

    def unreadable() -> Any:
        raise RuntimeError("no data")

    assert run.watch(61, unreadable) == []
    assert [cut.left for cut in run.monitored] == [3]
    (outcome,) = run.watch(62, told(0.5))
    assert outcome.result == "rolled_back"


# Modes


def two_cuts(mode: str) -> tuple[Run, World, list[str]]:
    """Two monitored cuts, the second from .80 to .79; and the states before each."""
    run, world = trained(rollback=mode)
    calm(run)
    states = [world.digest()]
    cut(run, world, 1, accuracy=0.9)
    world.train()
    states.append(world.digest())
    cut(run, world, 2, accuracy=0.8)
    world.train()
    return run, world, states


@pytest.mark.slow
def test_immediate_goes_back_to_before_the_first_cut_that_failed() -> None:
    run, world, states = two_cuts("immediate")
    first, second = run.watch(62, told(0.79))
    assert world.digest() == states[0]
    assert first.undone_with is None
    assert second.undone_with == first.idempotency_key, "the second did not fail itself"
    run, world, states = two_cuts("immediate")
    first, second = run.watch(62, told(0.5))
    assert world.digest() == states[0]


@pytest.mark.slow
def test_atomic_takes_only_the_newest_cut_back() -> None:
    run, world, states = two_cuts("atomic")
    (outcome,) = run.watch(62, told(0.5))
    assert world.digest() == states[1]
    assert [cut.key for cut in run.monitored] != [outcome.idempotency_key]
    (outcome,) = run.watch(63, told(0.5))
    assert world.digest() == states[0]


@pytest.mark.slow
def test_progressive_goes_to_ever_older_points_until_one_validates() -> None:
    run, world, states = two_cuts("progressive")
    assert len(run.watch(62, told(0.5, 0.9))) == 1
    assert world.digest() == states[1]
    run, world, states = two_cuts("progressive")
    outcomes = run.watch(62, told(0.5, 0.5, 0.5, 0.9))  # the point just after the first cut, too
    assert world.digest() == states[0]
    assert len(outcomes) == 2


# Resuming


def fresh(folder: Path, **trainer: Any) -> tuple[Run, World, int]:
    world, run = World(), Run(folder, **trainer)
    return run, world, run.resume(world.tracked)


@pytest.mark.slow
def test_a_new_process_goes_on_where_the_last_one_stood(tmp_path: Path) -> None:
    run, world = trained(tmp_path)
    cut(run, world)
    run.watch(61, told(0.9))
    world.train()
    assert run.save(61)
    stood = world.digest()
    world.train()
    went_on = world.digest()
    run.close()
    run, later, epoch = fresh(tmp_path)
    assert (epoch, later.digest()) == (61, stood)
    assert [cut.left for cut in run.monitored] == [2], "the watch goes on"
    later.train()
    assert later.digest() == went_on, "and training does, as if nothing had happened"


@pytest.mark.slow
def test_a_new_process_can_still_roll_a_cut_back(tmp_path: Path) -> None:
    run, world = trained(tmp_path)
    before = world.digest()
    run.apply(decide(world.original, layers=("blocks.2",)), world.surgeon, told(0.9))
    run.close()
    run, later, _ = fresh(tmp_path)
    later.train()
    (outcome,) = run.watch(61, told(0.5))
    assert outcome.result == "rolled_back"
    assert later.digest() == before


def test_an_apply_that_was_cut_short_is_reported_when_the_run_resumes(tmp_path: Path) -> None:
    run, world = trained(tmp_path)
    before = world.digest()

    def killed() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.apply(decide(world.original), world.surgeon, killed)
    run.close()
    run, later, _ = fresh(tmp_path)
    (outcome,) = run.unreported
    assert (outcome.result, later.digest()) == ("refused", before)
    assert "interrupted" in outcome.detail


@pytest.mark.slow
def test_outcomes_stay_unreported_until_the_bus_has_them(tmp_path: Path) -> None:
    run, world = trained(tmp_path)
    outcome = cut(run, world)
    run.close()
    run, _, _ = fresh(tmp_path)
    assert run.unreported == [outcome]
    run.reported(event_id_of(outcome))
    run.close()
    run, _, _ = fresh(tmp_path)
    assert run.unreported == []


def test_a_damaged_restore_point_is_passed_over_by_name_and_an_older_one_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, world = trained(tmp_path)
    run.save(1)
    stood = world.digest()
    world.train()
    run.save(2)
    run.close()
    newest = max((tmp_path / "points").iterdir())
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    points = FolderPoints(tmp_path / "points")
    with pytest.raises(ContractError, match="tensors"):
        points.get(int(newest.name))
    _, later, _ = fresh(tmp_path)
    assert later.digest() == stood


def test_two_processes_cannot_use_one_folder(tmp_path: Path) -> None:
    run, _ = trained(tmp_path)
    with pytest.raises(FolderInUse, match="in use"):
        Run(tmp_path)
    run.close()
    Run(tmp_path).close()


def test_points_are_bounded_but_those_that_the_watch_needs_stay(tmp_path: Path) -> None:
    run, world = trained(tmp_path, restore_points=2, watch_epochs=20)
    before = world.digest()
    cut(run, world)
    for epoch in range(61, 71):
        run.save(epoch)
    assert len(list((tmp_path / "points").iterdir())) == 3
    assert len(run.watch(71, told(0.1))) == 1
    assert world.digest() == before


def test_a_full_disk_leaves_the_network_alone_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, world = trained(tmp_path)
    before, put, calls = world.digest(), FolderPoints.put, iter(range(9))

    def full(points: FolderPoints, snapshot: Snapshot) -> int:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        return put(points, snapshot)

    monkeypatch.setattr(FolderPoints, "put", full)
    outcome = run.apply(decide(world.original), world.surgeon, told(0.9))
    assert outcome.result == "refused"
    assert "No space left" in outcome.detail
    assert world.digest() == before


def test_what_cannot_be_kept_is_refused_by_name_before_training() -> None:
    world = World()
    world.scheduler.secret = lambda: None
    with pytest.raises(InvalidField, match=r"training.parts.scheduler.secret.*function"):
        Run().resume(world.tracked)


def test_resuming_with_other_parts_is_refused_by_name(tmp_path: Path) -> None:
    run, _ = trained(tmp_path)
    run.save(1)
    run.close()
    world = World()
    with pytest.raises(InvalidField, match="parts"):
        Run(tmp_path).resume(Tracked(world.surgeon))


@pytest.mark.slow
def test_killed_at_seeded_moments_a_run_resumes_on_one_side_or_the_other() -> None:
    """A slice; ``python tests/support/kill_driver.py --moments 200`` does two hundred."""
    paths = [str(SUPPORT), str(SUPPORT / "nets"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "kill_driver.py"), "--moments", "6", "--seed", "5"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == 6
    sides = Counter(line["side"] for line in lines)
    assert sides["before"]
    assert sides["after"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((0.9, 0.1), "found a tuple"),
        (None, "found a NoneType"),
        (Evaluation(91.5, 0.1), "divide percents by 100"),
    ],
)
def test_what_is_no_evaluation_refuses_the_decision_and_changes_nothing(
    found: Any, said: str
) -> None:
    run, world = trained()
    before = world.digest()
    outcome = run.apply(decide(world.original), world.surgeon, lambda: found)
    assert outcome.result == "refused"
    assert said in outcome.detail
    assert world.digest() == before


def test_what_is_cut_and_rolled_back_in_inference_mode_is_trained_on() -> None:
    run, world = trained()
    with torch.inference_mode():
        cut(run, world)
    world.train()
    with torch.inference_mode():
        run.watch(61, told(0.5))
    world.train()
    with torch.inference_mode():
        world.surgeon.cut(decide(world.original).units)
    world.train()
    assert not any(p.is_inference() for p in world.model.parameters())


def test_a_decision_for_a_network_whose_modules_were_changed_since_is_refused() -> None:
    run, world = trained()
    world.model.fc = torch.nn.Sequential(world.model.fc, torch.nn.Identity())
    outcome = run.apply(decide(world.original), world.surgeon, told(0.9))
    assert outcome.result == "refused"
    assert "create Recorder and Surgeon again" in outcome.detail
    assert isinstance(world.model.fc, torch.nn.Sequential)

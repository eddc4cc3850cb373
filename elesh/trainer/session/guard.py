"""Guards a training run: restore points before every cut, the watch after it, rollback, resuming.

Promises: whatever a cut or a rollback changes is on one side or the other, bit for bit, when the
process is killed at any moment of it and started again; a cut whose accuracy falls too far within
its watch is taken back; training is not stopped because a restore point cannot be written.
It knows nothing of the bus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from elesh.observe import get_logger, span
from elesh.settings import Settings
from elesh.trainer.surgery.reconstruction import Moments
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import (
    ContractError,
    InvalidField,
    PrunedArchitecture,
    PruningOutcome,
    StructuralPruningDecision,
)

from .apply import Evaluation, apply_decision, outcome_of, refusal, trigger_of
from .journal import Journal, MonitoredCut, Situation
from .reporting import event_id_of
from .restore_points import FolderPoints, MemoryPoints, Points
from .snapshot import Snapshot, Tracked

__all__ = ["Guard"]

Evaluate = Callable[[], Evaluation]
_CUT_SHORT = "interrupted: the trainer ended while it was applied"
_log = get_logger(__name__)


class Guard:
    """The restore points, the journal and the watched cuts of one run.

    Args:
        settings: for triggers, watch, rollback mode and number of restore points.
        folder: where restore points and journal are kept; None: in memory, for this process only.

    Raises:
        FolderInUse: if another process has the folder.
    """

    def __init__(self, settings: Settings, folder: Path | None = None) -> None:
        self._triggers = settings.structured_pruning.rollback_triggers
        self._limits = settings.trainer
        self._folder = None if folder is None else FolderPoints(folder)
        self._points: Points = self._folder or MemoryPoints()
        self._journal = Journal(None if folder is None else folder / "journal.jsonl")
        self._tracked: Tracked | None = None
        self.epoch = self._journal.situation.epoch
        """The epoch that training was last heard to be at."""

    @property
    def token(self) -> str:
        """The claim token that the folder keeps; empty without one."""
        return "" if self._folder is None else self._folder.token

    @property
    def surgeon(self) -> Surgeon | None:
        """Whose network is guarded; None before the first of :meth:`resume` and :meth:`apply`."""
        return self._tracked.surgeon if self._tracked else None

    @property
    def watched(self) -> tuple[MonitoredCut, ...]:
        """The monitored cuts, oldest first."""
        return self._journal.situation.watched

    def tried(self, key: str) -> bool:
        """Whether a decision was applied before in the life of the run, whatever came of it."""
        return key in self._journal.situation.tried

    @property
    def unreported(self) -> list[PruningOutcome]:
        """Outcomes that are not known to be on the bus."""
        lines = self._journal.situation.unreported.values()
        return [PruningOutcome.model_validate(line) for line in lines]

    def reported(self, event_id: str) -> None:
        """An outcome is on the bus. Called from the bus's thread."""
        if event_id in self._journal.situation.unreported:
            self._journal.write(reported=event_id)

    def close(self) -> None:
        """Let go of the folder."""
        self._journal.close()
        if self._folder is not None:
            self._folder.close()

    # Resuming

    def resume(self, tracked: Tracked) -> int:
        """Go back to where the run's last process stood; the epoch of that, 0 for a new run.

        Raises:
            InvalidField: if the network is not the one of the run, a part's state cannot be kept,
                or no restore point can be read.
        """
        situation = self._journal.situation
        if situation.point is None:
            Snapshot.take(tracked)  # what cannot be kept is refused now, not amid training
            self._begin_anew(tracked)
            return 0
        self._tracked, begun = tracked, situation.begun or {}
        point = self._restore(begun.get("goal", situation.point), tracked)
        self.epoch = situation.epoch
        outcomes = [PruningOutcome.model_validate(line) for line in begun.get("pending", ())]
        ended = {outcome.idempotency_key for outcome in outcomes}
        watched = [c for c in situation.watched if c.before < point and c.key not in ended]
        self._done("resume", point, outcomes, watched)
        self._drop_after(point)
        _log.info("resumed", point=point, epoch=self.epoch, cut_short=begun.get("begin", "nothing"))
        return self.epoch

    def save(self, epoch: int) -> bool:
        """Write a restore point of now; False, and a line in the log, if that fails."""
        if self._tracked is None:
            return False
        self.epoch = epoch
        try:
            point = self._points.put(Snapshot.take(self._tracked))
            self._journal.write(point=point, epoch=epoch)
        except OSError as error:
            _log.error("restore point not written", epoch=epoch, reason=str(error))
            return False
        self._thin_out()
        return True

    def _begin_anew(self, tracked: Tracked) -> None:
        """This process starts the run: what an earlier one left is not of it."""
        self._tracked, self.epoch = tracked, 0
        self._journal.write(situation=Situation().as_line())
        self._points.drop(self._points.numbers())

    # Applying

    def apply(
        self,
        decision: StructuralPruningDecision,
        surgeon: Surgeon,
        evaluate: Evaluate,
        *,
        redistribute: Callable[[], Moments] | None = None,
    ) -> PruningOutcome:
        """As :func:`apply_decision`, with a restore point before and after.

        If one cannot be written, the outcome is ``refused`` and nothing has changed.
        """
        now = surgeon.architecture
        refused = refusal(decision, now)
        if refused is not None:
            return refused
        try:
            tracked = self._tracked_with(surgeon)
            snapshot = Snapshot.take(tracked)
        except ContractError as error:
            return outcome_of(decision, now, now, "refused", str(error))
        pending = outcome_of(decision, now, now, "refused", _CUT_SHORT)
        try:
            before = self._points.put(snapshot)
            self._begin("apply", [pending], point=before, epoch=self.epoch)
        except OSError as error:
            return _unwritten(decision, now, error)
        outcome = apply_decision(
            decision,
            surgeon,
            evaluate,
            triggers=self._triggers,
            redistribute=redistribute,
            take_back=lambda: snapshot.put_back(tracked),
        )
        try:
            outcome = self._commit(decision, outcome, tracked, before)
        except OSError as error:
            snapshot.put_back(tracked)
            return _unwritten(decision, now, error)
        self._thin_out()
        return outcome

    def _commit(
        self,
        decision: StructuralPruningDecision,
        outcome: PruningOutcome,
        tracked: Tracked,
        before: int,
    ) -> PruningOutcome:
        """Make what became of a decision last, and put a cut under watch."""
        if outcome.result != "applied":
            self._done("apply", before, [outcome], self.watched)
            return outcome
        reports = self._limits.watch_epochs
        outcome = outcome.model_copy(update={"watched": reports})
        cut = MonitoredCut(outcome, before, trigger_of(decision, self._triggers), reports)
        point = self._points.put(Snapshot.take(tracked))
        self._done("apply", point, [outcome], [*self.watched, cut] if reports else self.watched)
        return outcome

    def _tracked_with(self, surgeon: Surgeon) -> Tracked:
        if self._tracked is None:
            self._begin_anew(Tracked(surgeon))
        elif self._tracked.surgeon is not surgeon:
            self._tracked = replace(self._tracked, surgeon=surgeon)
        assert self._tracked is not None
        return self._tracked

    # Watching

    def watch(self, epoch: int, evaluate: Evaluate) -> list[PruningOutcome]:
        """Judge the monitored cuts by the accuracy of now; what became of those decided on.

        ``evaluate`` is called only while there are any.
        """
        self.epoch = epoch
        tracked, watched = self._tracked, self.watched
        if not watched or tracked is None:
            return []
        with span("evaluate watched cuts"):
            now = evaluate()
        failed = [cut for cut in watched if cut.fails(now.accuracy)]
        try:
            if not failed:
                return self._stood(now)
            with span("roll back", attributes={"elesh.epoch": epoch}):
                return self._roll_back(tracked, failed, now, evaluate)
        except (ContractError, OSError) as error:
            _log.error("watch failed, will be tried again", epoch=epoch, reason=str(error))
            return []

    def _stood(self, now: Evaluation) -> list[PruningOutcome]:
        """One report less to stand; those that have stood all are kept."""
        watched = [replace(cut, left=cut.left - 1) for cut in self.watched]
        figures = {"accuracy_after": now.accuracy, "loss_after": now.loss, "watched": 0}
        kept = [cut.outcome.model_copy(update=figures) for cut in watched if not cut.left]
        lines = [cut.as_line() for cut in watched if cut.left]
        self._journal.write(watched=lines, outcomes=_by_id(kept))
        self._thin_out()
        return kept

    def _roll_back(
        self,
        tracked: Tracked,
        failed: Sequence[MonitoredCut],
        now: Evaluation,
        evaluate: Evaluate,
    ) -> list[PruningOutcome]:
        watched = self.watched
        atomic = self._limits.rollback == "atomic"
        first = len(watched) - 1 if atomic else watched.index(failed[0])
        if self._limits.rollback == "progressive":
            first = len(watched) - 1
        cause = watched[first] if atomic else failed[0]
        goal = watched[first].before
        while True:
            undone = [_undone(cut, cause, now, self.epoch) for cut in watched[first:]]
            self._begin("rollback", undone, goal=goal)
            point = self._restore(goal, tracked)
            older = [n for n in self._points.numbers() if n < point]
            if self._limits.rollback != "progressive" or not older:
                break
            if not failed[0].fails(evaluate().accuracy):
                self._restore(point, tracked)  # evaluating may have drawn random numbers
                break
            goal = older[-1]
            while first and watched[first - 1].before >= goal:
                first -= 1
        self._done("rollback", point, undone, watched[:first])
        self._drop_after(point)
        _log.warning("rolled back", point=point, cuts=len(undone), accuracy=now.accuracy)
        return undone

    # Restore points and journal

    def _restore(self, goal: int, tracked: Tracked) -> int:
        """Put back the newest point up to ``goal`` that can be read; its number."""
        numbers = self._points.numbers()
        for point in reversed([number for number in numbers if number <= goal]):
            try:
                snapshot = self._points.get(point)
            except ContractError as error:
                _log.error("restore point passed over", point=point, reason=str(error))
                continue
            snapshot.put_back(tracked)
            return point
        hint = "remove the folder to begin anew"
        raise InvalidField("restore points", f"a sound one up to {goal}", numbers, hint=hint)

    def _begin(self, what: str, pending: Sequence[PruningOutcome], **place: int) -> None:
        """Say what is about to be done, and its outcomes if it is cut short."""
        lines = [outcome.model_dump(mode="json") for outcome in pending]
        self._journal.write(begin=what, pending=lines, **place)

    def _done(
        self,
        what: str,
        point: int,
        outcomes: Sequence[PruningOutcome],
        watched: Sequence[MonitoredCut],
    ) -> None:
        """The commit: from this line on, ``point`` is the present."""
        self._journal.write(
            done=what,
            point=point,
            epoch=self.epoch,
            watched=[cut.as_line() for cut in watched],
            outcomes=_by_id(outcomes),
        )

    def _drop_after(self, point: int) -> None:
        """Forget what came after a point that was gone back to."""
        self._points.drop([number for number in self._points.numbers() if number > point])

    def _thin_out(self) -> None:
        """Keep as many points as are asked for, and those that watched cuts need."""
        numbers = self._points.numbers()
        needed = {cut.before for cut in self.watched} | {self._journal.situation.point}
        old = numbers[: -self._limits.restore_points]
        self._points.drop(number for number in old if number not in needed)


def _unwritten(
    decision: StructuralPruningDecision, now: PrunedArchitecture, error: OSError
) -> PruningOutcome:
    _log.error("not applied: no restore point", reason=str(error))
    detail = f"no restore point could be written: {error}"
    return outcome_of(decision, now, now, "refused", detail)


def _by_id(outcomes: Sequence[PruningOutcome]) -> dict[str, object]:
    return {event_id_of(outcome): outcome.model_dump(mode="json") for outcome in outcomes}


def _undone(cut: MonitoredCut, cause: MonitoredCut, now: Evaluation, epoch: int) -> PruningOutcome:
    """The outcome of a cut that is taken back at ``epoch``, because of itself or an earlier one."""
    before = cut.outcome.accuracy_before
    detail = f"accuracy {before:.4f} fell to {now.accuracy:.4f} within the watch, "
    detail += f"more than {cut.limit:g}"
    blamed = cut.key == cause.key
    return cut.outcome.model_copy(
        update={
            "result": "rolled_back",
            "rolled_back_epoch": epoch,
            "watched": None,
            "accuracy_after": now.accuracy,
            "loss_after": now.loss,
            "parameters_after": cut.outcome.parameters_before,
            "detail": detail if blamed else f"taken back with the cut of {cause.key}",
            "undone_with": None if blamed else cause.key,
        }
    )

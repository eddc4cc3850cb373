"""Cuts between two restore points, and the monitoring window after each.

Promises: a cut is made between two restore points, so that it can be taken back; one whose accuracy
falls too far within its monitoring window is taken back; nothing that fails here, be it the disk,
the surgery or the caller's ``evaluate``, is raised into the training loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from elesh.observe import get_logger, span
from elesh.settings import Settings
from elesh.trainer.network.state import trainable
from elesh.trainer.recovery.evaluation import Judged, outcome_of, trigger_of
from elesh.trainer.recovery.journal import MadeCut
from elesh.trainer.recovery.recovery import NoRestorePoint, Recovery
from elesh.trainer.recovery.snapshot import Snapshot, Tracked
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import ContractError, PrunedArchitecture, PruningOutcome, StructuralPruningDecision

from .apply import (
    Evaluation,
    RefitData,
    check_and_cut,
    preserving,
    refusal,
)

Evaluate = Callable[[], Evaluation]
_INTERRUPTED = "interrupted: the trainer ended while it was applied"
_MOVES = 20
"""Number of the latest changes of accuracy from epoch to epoch that estimate the scatter."""
_ENOUGH = 6
"""Number of changes that suffice to blame a cut; then nothing is evaluated for that alone."""
_RUIN = 10
"""A fall of this many limits is blamed on the cut even if the scatter is unknown."""
_CONTROL = (
    "after a rollback the same epochs are trained again without a cut: accuracy may fall in them "
    "by training alone"
)
_LOST = "and no restore point from before the cut is left"
_log = get_logger(__name__)


class MonitoredCuts:
    """Applies a run's decisions, monitors the cuts, and rolls back.

    Args:
        settings: for triggers, monitoring window and rollback mode.
        recovery: where the run's restore points are.
    """

    def __init__(self, settings: Settings, recovery: Recovery) -> None:
        self._triggers = settings.structured_pruning.rollback_triggers
        self._reports, self._mode = settings.trainer.watch_epochs, settings.trainer.rollback
        self._cut_drop = settings.trainer.cut_accuracy_drop
        self._limits = settings.verification
        self._recovery = recovery
        self.judged = Judged()
        """What the last decision that was checked was judged by."""
        self._last: tuple[int, float] | None = None
        """The epoch and the accuracy that the next move begins with."""

    def _saw(self, accuracy: float | None) -> None:
        """Record the accuracy of an epoch, before anything is cut."""
        epoch = self._recovery.epoch
        if accuracy is None or not math.isfinite(accuracy):
            return
        if self._last is not None and epoch > self._last[0]:
            moves = (*self._recovery.moves, accuracy - self._last[1])
            self._recovery.moves = moves[-_MOVES:]
        self._last = (epoch, accuracy)

    @property
    def knows_scatter(self) -> bool:
        """Whether enough is known of how accuracy moves from epoch to epoch."""
        return len(self._recovery.moves) >= _ENOUGH

    @property
    def monitored(self) -> tuple[MadeCut, ...]:
        """The cuts in their monitoring window, oldest first."""
        return self._recovery.journal.situation.monitored

    @property
    def doubted(self) -> bool:
        """Whether the next report decides on a cut that the last one failed, or shows what training
        does without one that was taken back."""
        return self._recovery.uncut > 0 or any(cut.doubted for cut in self.monitored)

    @trainable()
    def apply(
        self,
        decision: StructuralPruningDecision,
        surgeon: Surgeon,
        evaluate: Evaluate,
        data: RefitData,
        known: Evaluation | None = None,
    ) -> PruningOutcome:
        """As :func:`apply_decision`, with a restore point before and after.

        If one cannot be taken or written, the outcome is ``refused`` and nothing has changed.
        """
        recovery, now = self._recovery, surgeon.architecture
        refused = refusal(decision, now)
        if refused is not None:
            return refused
        if recovery.uncut:
            return outcome_of(decision, now, now, "refused", _CONTROL)
        pending = outcome_of(decision, now, now, "refused", _INTERRUPTED)
        try:
            tracked = recovery.track(surgeon)
            snapshot = Snapshot.take(tracked, recovery.epoch)
            before = recovery.put(snapshot)
            recovery.begin("apply", [pending], point=before)
        except (ContractError, OSError) as error:
            return _unwritten(decision, now, error)
        outcome, self.judged = check_and_cut(
            decision,
            surgeon,
            evaluate,
            data,
            self._triggers,
            take_back=lambda: snapshot.put_back(tracked),
            now=known,
            cut_drop=self._cut_drop,
            limits=self._limits,
        )
        self._saw(outcome.accuracy_before)
        if outcome.result == "applied":
            outcome = outcome.model_copy(update={"watched": self._reports})
            limit = trigger_of(decision, self._triggers)
            shown = self.judged.samples
            cut = MadeCut(
                outcome, before, limit, self._reports, moves=recovery.moves, samples=shown
            )
            outcome = self._commit(decision, cut, snapshot, tracked)
        else:
            recovery.done("apply", before, [outcome], recovery.journal.situation.cuts, later=True)
        recovery.thin_out()
        return outcome

    def _commit(
        self,
        decision: StructuralPruningDecision,
        cut: MadeCut,
        snapshot: Snapshot,
        tracked: Tracked,
    ) -> PruningOutcome:
        """Make a cut last and put it under monitoring, or take it back if it cannot be written."""
        recovery, cuts, outcome = self._recovery, self._recovery.journal.situation.cuts, cut.outcome
        try:
            point = recovery.put(Snapshot.take(tracked, recovery.epoch))
            recovery.done("apply", point, [outcome], [*cuts, cut])
        except (ContractError, OSError) as error:
            snapshot.put_back(tracked)
            outcome = _unwritten(decision, snapshot.architecture, error)
            recovery.done("apply", cut.before, [outcome], cuts, later=True)
        else:
            self._last = (recovery.epoch, outcome.accuracy_after or 0.0)
        return outcome

    @trainable()
    def watch(
        self, epoch: int, evaluate: Evaluate, *, always: bool = False, look: bool = True
    ) -> list[PruningOutcome]:
        """Judge the monitored cuts by the accuracy of now; what became of those decided on.

        ``evaluate`` is called only while there are any, or ``always``. If it fails, or the disk
        does, the cuts are judged at the next call.
        """
        self._recovery.epoch = epoch
        tracked, monitored, uncut = self._recovery.tracked, self.monitored, self._recovery.uncut
        if tracked is None or not (monitored or always or uncut):
            return []
        evaluate = preserving(evaluate, tracked.surgeon.model)
        try:
            with span("evaluate monitored cuts"):
                now = evaluate()
            failed = [cut for cut in monitored if cut.failure(now)]
            self._saw(now.accuracy)
            self._recovery.uncut = max(uncut - 1, 0)
            if not failed:
                if look and any(cut.stood(now).left for cut in monitored):
                    # A rollback brings those along that are updated from now on.
                    tracked.surgeon.updated_copies()
                return self._stood(now) if monitored or uncut else []
            with span("roll back", attributes={"elesh.epoch": epoch}):
                try:
                    return self._roll_back(tracked, failed, now, evaluate)
                except NoRestorePoint:
                    self._recovery.abandon()
                    return self._stood(now)
        except Exception:
            _log.exception("monitored cuts not judged, will be tried again", epoch=epoch)
            self._recovery.abandon()
            return []

    def _stood(self, now: Evaluation) -> list[PruningOutcome]:
        """One report more; what became of the cuts that have stood all, or cannot be taken back."""
        before = self._recovery.journal.situation.cuts
        cuts = [cut.stood(now) if cut.left else cut for cut in before]
        lost = {cut.key: f"{why} {_LOST}" for cut in self.monitored if (why := cut.failure(now))}
        for cut in cuts:
            if cut.key in lost:
                _log.error("monitored cut cannot be taken back", key=cut.key, reason=lost[cut.key])
            elif cut.doubted and cut.left:
                fall = f"{(cut.outcome.accuracy_before or 0) - now.accuracy:.4f}"
                said = f"{fall}, limit {cut.limit:g}; training scatters by {cut.scatter:.4f}"
                _log.warning(
                    "monitored cut in doubt, the next report decides", key=cut.key, drop=said
                )
        ended = [c for c, was in zip(cuts, before, strict=True) if was.left and not c.left]
        kept = [_kept(cut, now, lost.get(cut.key, "")) for cut in ended]
        self._recovery.stood(kept, cuts)
        self._recovery.thin_out()
        return kept

    def _roll_back(
        self, tracked: Tracked, failed: Sequence[MadeCut], now: Evaluation, evaluate: Evaluate
    ) -> list[PruningOutcome]:
        recovery, monitored = self._recovery, self.monitored
        newest = self._mode in ("atomic", "progressive")
        first = monitored[-1] if newest else failed[0]
        cause = monitored[-1] if self._mode == "atomic" else failed[0]
        point = self._go_back(tracked, first.before, cause, now)
        if self._mode == "progressive":
            point = self._go_further(tracked, point, cause, now, evaluate)
        undone = self._undone_by(point, cause, now)  # further back, where a point was damaged
        gone = [cut for cut in recovery.journal.situation.cuts if cut.before >= point]
        recovery.moves = gone[0].moves
        self._last = (recovery.epoch, gone[0].outcome.accuracy_before or 0.0)
        if not cause.falls_short(now, _RUIN):
            recovery.uncut = len(gone[0].reports) + 1
            if not self.knows_scatter:
                undone = [_not_blamed(outcome) for outcome in undone]
        left = [cut for cut in recovery.journal.situation.cuts if cut.before < point]
        recovery.done("rollback", point, undone, left, later=True)
        recovery.drop_after(point)
        _log.warning("rolled back", point=point, cuts=len(undone), accuracy=now.accuracy)
        return undone

    def _go_back(self, tracked: Tracked, goal: int, cause: MadeCut, now: Evaluation) -> int:
        """Announce a rollback and put a restore point back; its number."""
        self._recovery.begin("rollback", self._undone_by(goal, cause, now), goal=goal)
        return self._recovery.restore(goal, tracked, here=True)[0]

    def _go_further(
        self, tracked: Tracked, point: int, cause: MadeCut, now: Evaluation, evaluate: Evaluate
    ) -> int:
        """Ever older restore points, until one validates or there is none; its number."""
        while (older := self._recovery.older_than(point)) is not None:
            try:
                if not cause.falls_short(evaluate()):
                    break
                point = self._go_back(tracked, older, cause, now)
            except Exception:
                _log.exception("not rolled back any further", point=point)
                break
        # Evaluating may have drawn random numbers.
        return self._recovery.restore(point, tracked, here=True)[0]

    def _undone_by(self, goal: int, cause: MadeCut, now: Evaluation) -> list[PruningOutcome]:
        """The outcomes of the cuts that are taken back with going back to ``goal``."""
        gone = [cut for cut in self._recovery.journal.situation.cuts if cut.before >= goal]
        return [_undone(cut, cause, now, self._recovery.epoch) for cut in gone]


def _unwritten(
    decision: StructuralPruningDecision, now: PrunedArchitecture, error: Exception
) -> PruningOutcome:
    _log.error("not applied: no restore point", reason=str(error))
    detail = f"no restore point could be written: {error}"
    return outcome_of(decision, now, now, "refused", detail)


def _kept(cut: MadeCut, now: Evaluation, reason: str = "") -> PruningOutcome:
    """The outcome of a cut that has stood its monitoring window, or cannot be taken back for a
    ``reason``."""
    figures: dict[str, Any] = {"accuracy_after": now.accuracy, "loss_after": now.loss, "watched": 0}
    if cut.doubted and not reason:
        reason = f"accuracy fell by more than {cut.limit:g}, but no further than training scatters "
        reason += f"by itself ({cut.scatter:.4f} from epoch to epoch)"
        _log.warning("monitored cut kept in doubt", key=cut.key, reason=reason)
    if reason:
        figures["detail"] = "; ".join(filter(None, [cut.outcome.detail, reason]))
    return cut.outcome.model_copy(update=figures)


def _not_blamed(outcome: PruningOutcome) -> PruningOutcome:
    """The outcome of a cut that was taken back before it was known how training scatters: its own
    key in ``undone_with`` says that no accuracy is to blame."""
    if outcome.undone_with is not None:
        return outcome
    detail = f"{outcome.detail}, of which too few epochs are known to blame the cut"
    return outcome.model_copy(update={"undone_with": outcome.idempotency_key, "detail": detail})


def _undone(cut: MadeCut, cause: MadeCut, now: Evaluation, epoch: int) -> PruningOutcome:
    """The outcome of a cut that is taken back at ``epoch``, because of itself or an earlier one."""
    reason = cut.failure(now) or f"accuracy {now.accuracy:.4f} is too low for an earlier cut,"
    reason = f"{reason} within the monitoring window"
    if (at_once := cut.outcome.accuracy_after) is not None:
        reason += f"; right after the cut it was {at_once:.4f}"
        reason += f", and training scatters by {cut.scatter:.4f}"
    blamed = cut.key == cause.key
    return cut.outcome.model_copy(
        update={
            "result": "rolled_back",
            "rolled_back_epoch": epoch,
            "watched": None,
            "accuracy_after": now.accuracy,
            "loss_after": now.loss,
            "parameters_after": cut.outcome.parameters_before,
            "detail": reason if blamed else f"taken back with the cut of {cause.key}",
            "undone_with": None if blamed else cause.key,
        }
    )

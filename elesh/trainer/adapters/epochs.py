"""The work after every epoch, whichever framework trains: watch, apply, measure, publish."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from elesh.analysis import phase_at
from elesh.analysis.budgets.fitting import likely_missed, out_of_reach
from elesh.analysis.selection.choose import gates_of
from elesh.analysis.selection.reconstruction_order import reconstruction_fault
from elesh.analysis.selection.schedule import as_asked, phase_ends, phases_within
from elesh.observe import get_logger
from elesh.settings import SafetySchedule, StructuredPruning
from elesh.trainer.arguments import levels_of, require_one_process, require_share, whole_number
from elesh.trainer.calibration.given import as_taken
from elesh.trainer.calibration.losses import class_axis, class_labels
from elesh.trainer.calibration.recorder import MeasuredCheckpoint, Recorder, enough_samples
from elesh.trainer.export import Exporter, calibration_inputs, is_worth_exporting
from elesh.trainer.goals import Goals, shares_of
from elesh.trainer.network.calling import (
    Batches,
    Inputs,
    batch_size,
    call,
    device_of,
    first_samples,
    main_output,
    map_tensors,
    remember_example,
)
from elesh.trainer.network.state import preserve_state, unwrapped
from elesh.trainer.recovery.checkpoints import Loading
from elesh.trainer.recovery.evaluation import checked
from elesh.trainer.recovery.witnesses import Shown
from elesh.trainer.session.apply import Evaluation
from elesh.trainer.session.session import Session
from elesh.trainer.surgery.lineage import original_of
from elesh.trainer.surgery.optimizers import begin_others_anew, leave_others
from elesh.trainer.surgery.reconstruction.after_cut import InputCovariance
from elesh.trainer.surgery.surgeon import Surgeon
from elesh.trainer.time_share import TimeShare
from leyline import (
    AnalysisParameters,
    CheckpointBundle,
    ContractError,
    InvalidField,
    Level,
    NetworkExport,
    Phase,
    PrunedArchitecture,
    PruningGroup,
    PruningOutcome,
    StructuralPruningDecision,
)

from .classifying import classification, require_several

__all__ = ["EveryEpoch", "classification"]

_log = get_logger(__name__)
_EVERY = 5
_LOSS_SAMPLES, _LOSS_SAMPLES_TO_RANK = 32, 128
"""Samples whose loss's derivatives are taken where channels are not ranked by them; more where
heads or whole layers may go, which are."""
_LEAST, _LEAST_TO_ORDER = 256, 128
"""Minimum number of measured samples however little time there is; fewer if they only order units
and are not used for the loss."""


class EveryEpoch:
    """The session's part of a training loop.

    Args:
        session: must be open during training.
        calibration: the samples for measuring, about 500 of the training data.
        validation: the data that judges masks and cuts; never training data.
        held_out: one batch (inputs, class labels) of neither training nor validation data, on which
            workers measure cuts; the network is published with it while something may be cut.
            Without it, workers decide by prediction.
        evaluate: your own evaluation; default: accuracy and cross-entropy of logits.
        budget: what may be left of the original network at the end, by resource
            (``{"macs": 0.5}``; parameters, macs, memory, latency): every checkpoint asks for what
            is still missing, within the schedule's limits. Without, the schedule's shares.
        reconstruct: whether the layers that read kept units are refitted in every cut; None: as
            ``trainer.reconstruct`` says.
        removed_at_most: share of the original units that may be removed in all, in place of the
            schedule's; the limits of the other phases change in proportion.
        every: epochs between two checkpoints; None: 5, or a tenth of a shorter run.
        levels: what may be removed.
        ignored_layers, compared: see :class:`Recorder`.
        preflight: whether a new run begins with a preflight (see :meth:`Session.resume`).
    """

    def __init__(
        self,
        session: Session,
        calibration: Batches,
        validation: Batches,
        *,
        held_out: tuple[Inputs, Tensor] | None = None,
        evaluate: Callable[[nn.Module, Batches], Evaluation] | None = None,
        budget: Mapping[str, float] | None = None,
        reconstruct: bool | None = None,
        removed_at_most: float | None = None,
        every: int | None = None,
        levels: Collection[str] = (Level.CHANNEL,),
        ignored_layers: Sequence[str] = (),
        compared: Callable[[Any], Any] | None = None,
        preflight: bool = True,
    ) -> None:
        self.session, self.levels = session, levels_of(levels, tuple(Level))
        self.every = _EVERY if every is None else whole_number("every", every, least=1)
        self._every_given = every is not None
        self.last: int | None = None
        """The epoch that training ends with, where that is known."""
        if removed_at_most is not None:
            require_share("removed_at_most", removed_at_most, "a share of the original units")
        self._asked = AnalysisParameters(removed_at_most=removed_at_most)
        """Of the schedule, beside what the settings say."""
        self.surgeon: Surgeon | None = None
        """Set by :meth:`begin`; its architecture is what the network looks like."""
        self._calibration, self._validation, self._held_out = calibration, validation, held_out
        self._evaluate = evaluate or classification
        self._ignored, self._compared = ignored_layers, compared
        self._budget: Mapping[str, float] | None = budget
        if budget is not None:
            shares_of(budget)  # refused before a run begins
        self._preflight = preflight
        self._goals: Goals | None = None
        self._held_back: PruningOutcome | None = None
        """What became of the last decision, where not all of it was cut."""
        chosen = session.settings.trainer.reconstruct
        self._reconstruct = chosen if reconstruct is None else reconstruct
        self._loading: Loading | None = None
        self._known: Evaluation | None = None
        """What the network does at this epoch, as far as it has been evaluated."""
        self._given: Evaluation | None = None
        """The same, by the training loop itself; until it has been used."""
        self._lately: tuple[int, Evaluation] | None = None
        """The last epoch at which it was evaluated, and what it did then."""
        self._relabelled = False
        self._all_derived = False
        """Whether units are ranked by the loss's derivatives, of all samples then."""

    def look_at(self, network: nn.Module) -> Surgeon:
        """Find what can be removed from a network, before it is trained or loaded; once for each.

        From then on it takes the structure of every checkpoint that it loads, of before or after a
        cut.

        Raises:
            InvalidField: if it cannot be pruned, or its labels cannot be judged.
        """
        network = unwrapped(network)
        if self.surgeon is not None and self.surgeon.model is network:
            return self.surgeon
        if self._loading is not None:
            self._loading.end()
        self._network, self._exporter = network, Exporter(network)
        self._not_exported = ""
        """Why the network could not be exported, as it was last said."""
        example = self._take_as_given(network)
        self._recorder = Recorder(
            network, example, ignored_layers=self._ignored, compared=self._compared
        )
        self._require_classes()
        self.surgeon = Surgeon(network, self._recorder.architecture, restore_points=0)
        self._loading = Loading(self.surgeon)
        return self.surgeon

    def _take_as_given(self, network: nn.Module) -> Any:
        """Have batches in the dtype that the network takes; an example of two samples."""
        self._calibration = as_taken(network, self._calibration)
        if self._evaluate is classification:
            self._validation = as_taken(network, self._validation)
        if self._held_out is not None:
            self._held_out = as_taken(network, [self._held_out])[0]
        device, batch = device_of(network), first_samples(self._calibration[0][0], 2)
        example = map_tensors(lambda x: x.to(device), batch)
        remember_example(network, example)
        return example

    def _require_classes(self) -> None:
        """That labels are classes of the network's outputs, as measuring takes them, and not all of
        them one class: any cut may then look harmless."""
        with preserve_state(self._network, 0), torch.no_grad():
            known = [
                self._classes(f"calibration[{number}]", *batch)
                for number, batch in enumerate(self._calibration)
            ]
            require_several("calibration", set().union(*known))
            if self._held_out is not None:
                require_several("held_out", self._classes("held_out", *self._held_out))

    def _classes(self, name: str, inputs: Inputs, labels: Any) -> set[int]:
        """The classes of a batch."""
        device, some = device_of(self._network), first_samples(inputs, 2)
        logits = main_output(call(self._network, map_tensors(lambda x: x.to(device), some)))
        if logits.ndim:  # those of the first sample stand for all
            rows = len(logits) * batch_size(inputs) // batch_size(some)
            logits = logits[:1].expand(rows, *logits.shape[1:])
        try:
            found = class_labels(logits, labels)
        except InvalidField as error:
            raise error.inside(name) from None
        if found.is_floating_point():  # shares of every class
            found = found.argmax(class_axis(logits, found))
        return set(found[found >= 0].tolist())

    def relabel(self, change: Callable[[Inputs, Any], tuple[Inputs, Any]]) -> None:
        """Change inputs and labels of every batch, as the network's own loss does, so that a
        label stands where its logits are. An ``evaluate`` of the user's sees them as given."""
        if self._relabelled:
            return
        self._relabelled = True
        self._calibration = [change(*batch) for batch in self._calibration]
        if self._evaluate is classification:
            self._validation = [change(*batch) for batch in self._validation]
        if self._held_out is not None:
            self._held_out = change(*self._held_out)

    def begin(
        self,
        network: nn.Module,
        optimizer: Any,
        *,
        processes: int = 1,
        epoch: int = 0,
        alone: bool = False,
        **parts: Any,
    ) -> int:
        """Look at the network and go back to where an earlier process of the run stood; the epoch
        of that, 0 for a new run. Where the framework has loaded a checkpoint of its own, training
        goes on from that.

        Args:
            optimizer: one or several.
            processes: that train together.
            epoch: that the framework has trained up to, by a checkpoint of its own.
            alone: nothing but these optimizers trains the network from now on; others that are
                alive are of trainings before.
            parts: what restore points hold beside network and optimizer, averages of the weights
                among them (:meth:`Session.resume`).

        Raises:
            InvalidField: if several processes train: they would be cut differently; or if
                something named cannot be kept or cut.
        """
        require_one_process(processes)
        surgeon = self.look_at(network)
        self._take_as_given(surgeon.model)  # frameworks cast a network when training begins
        if alone:
            leave_others(surgeon.model, optimizer)
        surgeon.train_with(optimizer)
        limit = self.session.settings.trainer.time_share
        self._time = TimeShare(limit, device=device_of(self._network))
        if self._budget is not None:
            first, example = surgeon.architecture, self._calibration[0][0]
            original = original_of(self._network, first)
            self._goals = Goals.of(self._network, example, first, original, self._budget)
            if why := self._missed(first, out_of_reach):
                _log.warning("the budget will not be reached", reason=why)
            elif why := self._missed(first, likely_missed):
                _log.warning("the budget may not be reached", reason=why)
        with self._time.taking():
            return self.session.resume(
                surgeon,
                evaluate=self.evaluate,
                preflight=self._preflight,
                here=epoch or None,
                **parts,
            )

    def _missed(self, now: PrunedArchitecture, judge: Callable[..., str]) -> str:
        """Why what the schedule's limits leave to remove falls short of the budget, by
        :func:`out_of_reach` or :func:`likely_missed`; empty where it does not."""
        assert self._goals is not None
        groups = self._groups(now)
        count = sum(math.floor(self._most * g.original_size) - g.removed for g in groups)
        minimum = self._pruning.channel_analysis.min_channels_per_layer
        budgets = self._goals.budgets(now)
        return judge(now, budgets, groups, units=max(count, 0), minimum=minimum)

    def _groups(self, now: PrunedArchitecture) -> list[PruningGroup]:
        """Those that may lose units."""
        return [g for g in now.groups if g.prunable and g.level in self.levels]

    @property
    def _pruning(self) -> StructuredPruning:
        return self.session.settings.structured_pruning

    @property
    def _schedule(self) -> SafetySchedule:
        return as_asked(self._pruning.safety_schedule, self._asked)

    @property
    def _limit(self) -> float:
        """The share of the original units that may be gone in the end."""
        return self._schedule.aggressive_limit

    @property
    def _most(self) -> float:
        """The same without the margin that is left unused."""
        return self._limit * (1 - self._pruning.channel_analysis.safety_margin)

    def so_far(self) -> str:
        """Whether the budget is reached, or without one how much of what the limit allows is gone;
        and if not, what holds it back and what would help."""
        if self.surgeon is None:
            return ""
        now = self.surgeon.architecture
        if self._goals is None:
            return self._removed_so_far(now)
        uses = self._goals.uses(now)
        left = ", ".join(f"{u.reached:.1%} of the {u.resource} left" for u in uses)
        asked = ", ".join(f"{u.resource} {u.asked:.0%}" for u in uses)
        if self._goals.met(now):
            return f"budget reached ({asked}): {left}"
        if not (why := self._missed(now, out_of_reach)):
            why = "; ".join(filter(None, [self._not_yet(), self._missed(now, likely_missed)]))
        return f"budget not reached ({asked}): {left}; {why}"

    def _removed_so_far(self, now: PrunedArchitecture) -> str:
        groups = self._groups(now)
        gone, whole = sum(g.removed for g in groups), sum(g.original_size for g in groups)
        limit, margin = self._limit, self._pruning.channel_analysis.safety_margin
        said = f"{gone} of {whole} units removed ({gone / max(whole, 1):.1%}), at most {limit:.0%} "
        said += (
            f"are allowed; safety_margin keeps {margin:.0%} of them" if margin else "are allowed"
        )
        least = self._pruning.channel_analysis.min_channels_per_layer
        spare = sum(g.size - (least if g.level is Level.CHANNEL else 1) for g in groups)
        if gone >= math.floor(self._most * whole) - len(groups):
            return said
        if spare <= 0:
            return f"{said}; groups keep their minimum (min_channels_per_layer is {least})"
        return f"{said}; {self._not_yet()}"

    def _not_yet(self) -> str:
        """Why no more has gone, as far as the last decision says."""
        if self._held_back is None:
            if unanswered := self.session.unanswered:
                return unanswered
            return "the run is not over, or too short: train longer, or make checkpoints more often"
        became, why = _became(self._held_back), self._held_back.detail
        if not self._cuts_at(self._held_back.epoch):
            first, *_, last = (end.epoch for end in phase_ends(self._schedule))
            hint = f"the schedule cuts from epoch {first + 1} to {last}: change safety_schedule"
            return f"the last decision was {became}: {why}; {hint}"
        hint = "train longer between cuts, or raise the limit named here"
        return f"the last decision was {became}: {why}; {hint}"

    def _cuts_at(self, epoch: int) -> bool:
        return phase_at(epoch, self._schedule) not in (Phase.PREPARATION, Phase.VALIDATION)

    def ends_with(self, last: int) -> None:
        """Training ends with epoch ``last``. A run with a budget (or ``removed_at_most``) that is
        shorter than the schedule has its phases in proportion; the schedule is in force otherwise.
        """
        self.last = last = whole_number("epochs", last, least=0)
        if not self._every_given:
            self.every = min(_EVERY, max(1, last // 10))
        schedule = self._pruning.safety_schedule
        asks = bool(self._budget) or self._asked.removed_at_most is not None
        phases = phases_within(schedule, last) if asks else None
        self._asked = self._asked.model_copy(update={"phases": phases})
        if phases is not None:
            _log.info("phases shortened to fit the run", epochs=last, phases=list(phases))
        elif last <= schedule.validation_epochs:
            hint = "set structured_pruning.safety_schedule" + ("" if asks else ", or give a budget")
            said = f"in its first {schedule.validation_epochs} epochs the schedule only watches"
            _log.warning("nothing will be cut in this run", epochs=last, reason=said, hint=hint)

    def end_epoch(self, epoch: int, known: Evaluation | None = None) -> list[PruningOutcome]:
        """After an epoch (counted from 1) has been trained; what became of decisions at it.

        Args:
            known: what ``evaluate`` says of the network as it is, where the loop has called it: it
                is not called for that again.
        """
        with self._time.taking():
            self._known = self._given = checked(known) if known else None
            found = self._end_epoch(epoch)
            if self._known is not None:
                self._lately = (epoch, self._known)
            return found

    def _end_epoch(self, epoch: int) -> list[PruningOutcome]:
        assert self.surgeon is not None, "begin comes first"
        decisions, checkpoint = self.session.decisions(), self._asks(epoch)
        found = self._judge(epoch, decisions, checkpoint)
        if undone := [outcome for outcome in found if outcome.result == "rolled_back"]:
            self._known = self._lately = None  # that was of the network before
            own = (o for o in undone if o.undone_with in (None, o.idempotency_key))
            self._held_back = next(own, undone[0])
        for decision in decisions:
            found.append(self._apply(decision, self.surgeon))
        if epoch == self.last:
            self.session.ask_nothing()
        elif checkpoint and self._budget_met(self.surgeon):
            _log.info("budget reached, nothing more is asked for", epoch=epoch)
            self.session.ask_nothing()
        elif checkpoint:
            try:
                self._checkpoint(epoch)
            except Exception as error:
                _log.exception("checkpoint not published", epoch=epoch, reason=str(error))
        return found

    def _asks(self, epoch: int) -> bool:
        """Whether a checkpoint is due: no answer to one of the last epoch could be applied."""
        return epoch % self.every == 0 and epoch != self.last

    def _judge(
        self, epoch: int, decisions: Sequence[StructuralPruningDecision], checkpoint: bool
    ) -> list[PruningOutcome]:
        """Judge the monitored cuts, or put that off while time is short and nothing hangs on it."""
        assert self.surgeon is not None
        due = epoch == self.last or self.session.doubted
        due |= epoch % self.every == 0 and self._known_lately(epoch) is None
        cuts = any(decision.approved_for_application for decision in decisions)
        if self._time.over and not due and not cuts and self._given is None:
            self.session.reach(epoch, self._noted)
            return []
        # How training scatters keeps cuts from being blamed; nothing is cut beyond the budget.
        unknown = checkpoint and not self.session.knows_scatter
        always = self._given is not None or (unknown and not self._budget_met(self.surgeon))
        return self.session.watch(epoch, self._noted, always=always, look=not cuts)

    def _known_lately(self, epoch: int) -> tuple[int, Evaluation] | None:
        """When, since the last checkpoint was due, it was evaluated, and what it did then."""
        lately = self._lately
        return lately if lately is not None and epoch - lately[0] < self.every else None

    def _budget_met(self, surgeon: Surgeon) -> bool:
        return self._goals is not None and self._goals.met(surgeon.architecture)

    def _apply(self, decision: StructuralPruningDecision, surgeon: Surgeon) -> PruningOutcome:
        def measured() -> InputCovariance:
            self._recorder.architecture = surgeon.architecture
            return self._recorder.moments(self._calibration, decision.units)

        outcome = self.session.apply(
            decision,
            surgeon,
            self.evaluate,
            reconstruct=measured,
            batches=self._calibration,
            held_out=() if self._held_out is None else (self._held_out,),
            known=self._known,
        )
        held = self._held_back
        if held is None or self._cuts_at(outcome.epoch) or not self._cuts_at(held.epoch):
            self._held_back = outcome if _became(outcome) else None
        if surgeon.architecture.model_hash != decision.model_hash:
            begin_others_anew(surgeon.model, surgeon.optimizers.all, only_ended=True)
        if outcome.accuracy_before is not None:  # with the answers, for another decision
            figures = self.session.judged.figures
            self._known = figures.get("after" if outcome.result == "applied" else "before")
        return outcome

    def _noted(self) -> Evaluation:
        """The evaluation, remembered until the epoch ends: training changes the network. What was
        given is of the network before anything is taken back."""
        given, self._given = self._given, None
        if given is None:
            with Shown.by(self._network) as shown:
                given = checked(self.evaluate())
            given = replace(given, answers=shown.answers)
        self._known = given
        return given

    def evaluate(self) -> Evaluation:
        """How well the network does now; its training flags are left as they are."""
        flags = [(module, module.training) for module in self._network.modules()]
        self._network.eval()
        try:
            return self._evaluate(self._network, self._validation)
        finally:
            for module, training in flags:
                module.training = training

    def _checkpoint(self, epoch: int) -> None:
        assert self.surgeon is not None
        self._recorder.architecture = self.surgeon.architecture
        known, said = self._known, ""
        if known is None and self._time.over and (lately := self._known_lately(epoch)):
            known, said = lately[1], f"accuracy and loss are those of epoch {lately[0]}"
        known = known if known and known.finite else None
        with self.session.checkpoint(epoch):
            network = self._export(epoch)
            predicted = network is None and self._may_cut(epoch)
            bundle = self._measured(epoch, known, few=not predicted)
            if said and known:
                bundle = self._put_off(bundle, said)
            asked = bundle.parameters
            if self._goals is not None:
                first, *more = self._goals.budgets(self.surgeon.architecture)
                asked = asked.model_copy(update={"budget": first, "more_budgets": tuple(more)})
            own = {"removed_at_most": self._asked.removed_at_most, "phases": self._asked.phases}
            asked = asked.model_copy(update=own)
            bundle = replace(bundle, levels=self.levels, network=network, parameters=asked)
            self.session.publish(bundle)

    def _measured(self, epoch: int, known: Evaluation | None, *, few: bool) -> CheckpointBundle:
        """The network as it is.

        Args:
            few: nothing is decided by what is predicted of the loss, so that derivatives of a few
                samples do, unless units are ranked by them.
        """
        few = few and self._reconstruct and not self._all_derived
        enough, least = self._samples(few)
        count = self._time.samples(enough, least)
        with self._time.measuring(count):
            bundle = self._measure(epoch, known, few, count)
        ranked = [gates for level in self.levels if (gates := gates_of(bundle, level))]
        if few and any(map(reconstruction_fault, ranked)):
            self._all_derived = True
            return self._measured(epoch, known, few=False)
        if count == enough:
            return bundle
        return self._put_off(bundle, f"measured on {count} of {enough} calibration samples")

    def _put_off(self, bundle: CheckpointBundle, what: str) -> CheckpointBundle:
        """Say in a checkpoint, and in the log, what of it was put off."""
        share = self.session.settings.trainer.time_share
        said = f"{what}: Elesh has taken more than {share:.0%} of the training's time"
        said += " (trainer.time_share)"
        found = bundle.metadata
        _log.info("postponed to save time", epoch=found.epoch, reason=said)
        said = "; ".join(filter(None, [found.held_back, said]))
        return replace(bundle, metadata=found.model_copy(update={"held_back": said}))

    def _samples(self, few: bool) -> tuple[int, int]:
        """On how many samples a checkpoint is measured, and on how many at least."""
        there_are = sum(batch_size(inputs) for inputs, _ in self._calibration)
        if not few:
            return there_are, _LEAST
        now = self._recorder.architecture
        return min(there_are, enough_samples(now)), enough_samples(now, at_least=_LEAST_TO_ORDER)

    def _measure(
        self, epoch: int, known: Evaluation | None, few: bool, count: int
    ) -> MeasuredCheckpoint:
        return self._recorder.measure(
            self._calibration,
            epoch=epoch,
            run_id=self.session.run_id,
            accuracy=known.accuracy if known else None,
            loss=known.loss if known else None,
            reconstruct=self._reconstruct,
            batch_statistics=True,
            skip=self.session.settings.trainer.reconstruct_skip,
            loss_samples=self._loss_samples(epoch) if few else None,
            max_samples=count,
        )

    def _loss_samples(self, epoch: int) -> int:
        now = self._recorder
        heads = any(g.prunable and g.level is Level.HEAD for g in now.architecture.groups)
        layers = any(b.prunable and not b.removed for b in now.architecture.blocks)
        layers = layers and phase_at(epoch, self._schedule) is Phase.AGGRESSIVE
        ranked = (heads and Level.HEAD in self.levels) or (layers and Level.LAYER in self.levels)
        return _LOSS_SAMPLES_TO_RANK if ranked else _LOSS_SAMPLES

    def _may_cut(self, epoch: int) -> bool:
        """Whether something may be cut now, or soon and is measured for that."""
        return is_worth_exporting(epoch, self._schedule)

    def _export(self, epoch: int) -> NetworkExport | None:
        """The network for workers to measure on, where they have a use for it."""
        assert self.surgeon is not None
        if self._held_out is None or not self._may_cut(epoch):
            return None
        try:
            return self._exporter.export(
                self.surgeon.architecture, self._held_out, calibration_inputs(self._calibration)
            )
        except ContractError as error:
            if self._not_exported != str(error):  # once, not at every checkpoint
                self._not_exported = str(error)
                said = "network not published; workers decide by prediction"
                _log.warning(said, reason=self._not_exported)
            return None


def _became(outcome: PruningOutcome) -> str:
    """What a decision came to, where not all of it was cut."""
    if outcome.result != "applied":
        return outcome.result.replace("_", " ")
    return "shortened" if outcome.shortened_to is not None else ""

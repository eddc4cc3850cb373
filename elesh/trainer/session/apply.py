"""Applies a decision with two checks: mask, evaluate, then cut and evaluate again, or take it back.
A decision that costs too much at once is shortened under the mask.

Promises: mask and cut compute the same, reconstruction included, and are evaluated both unless they
answer the same (decision 0128); whatever fails in between, the
network is bit for bit what it was, and the outcome says why; a figure that is no finite number is a
failed check; figures that no mask changes are not of this network, and nothing is cut by them.
Evaluations draw from no random state that training draws from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from elesh.observe import get_logger, span
from elesh.safety import strictest_limits
from elesh.settings import RollbackTriggers, VerificationSettings
from elesh.trainer.calibration.recorder import of_a_table
from elesh.trainer.network.calling import Batches, first_batches, spread_samples
from elesh.trainer.network.state import preserved
from elesh.trainer.recovery.evaluation import (
    Evaluation,
    Excess,
    Judged,
    Result,
    checked,
    excess,
    failed_check,
    failed_loss,
    outcome_of,
    trigger_of,
)
from elesh.trainer.recovery.witnesses import OwnSamples, Shown, call_seconds
from elesh.trainer.surgery.reconstruction.after_cut import (
    InputCovariance,
    Refit,
    RefitData,
    consumer_axes,
    estimated_batch_statistics,
    put_batch_statistics,
)
from elesh.trainer.surgery.reconstruction.layer_by_layer import (
    OutputsBefore,
    layer_solutions,
    outputs_before,
)
from elesh.trainer.surgery.reconstruction.output_matching import (
    Wanted,
    matched_parameters,
    wanted_of_a_table,
)
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import (
    CutFallback,
    InvalidField,
    PrunedArchitecture,
    PruningOutcome,
    StructuralPruningDecision,
)

from .carry_over import carried_over, present_form
from .shortening import Shortening, measured_alone, size_of

__all__ = [
    "Evaluation",
    "RefitData",
    "apply_decision",
    "check_and_cut",
    "failed_check",
    "preserving",
    "refusal",
]

Evaluate = Callable[[], Evaluation]
_UNMOVED = (
    "accuracy and loss under the mask are bit for bit those without it, even with almost all units "
    "masked: evaluate does not run the surgeon's network, but a copy, or a compiled or exported "
    "version of it; let it call surgeon.model"
)
_OF_BEFORE = "one that was given weights of another structure (of before the cut) meanwhile"
_NAME_IT = (
    "name what evaluate loads into the network, an average or the best weights, so that it is cut, "
    "too: session.resume(surgeon, ema=average) or elesh.attach(..., ema=average)"
)
_STATISTICS = 256
"""Calibration samples that estimate batch statistics and that layers are solved by: every position
of them counts, and all of them would cost more than measuring the checkpoint does. Of a table,
where a sample is one row, all take part."""
_WITNESSES = 128
"""Samples of Elesh's own whose loss is looked at beside ``evaluate``."""
_ROWS = 8
"""Rows for every coefficient that layers are solved by: a decision takes little, and training goes
on; ``elesh.prune`` takes twice as many."""
_LONGEST = 2000
"""Of an error in an outcome, in characters."""
_log = get_logger(__name__)


def apply_decision(
    decision: StructuralPruningDecision,
    surgeon: Surgeon,
    evaluate: Evaluate,
    *,
    triggers: RollbackTriggers | None = None,
    reconstruct: InputCovariance | Callable[[], InputCovariance] | None = None,
    redistribute: Callable[[], InputCovariance] | None = None,
    batches: Batches = (),
    held_out: Batches = (),
) -> PruningOutcome:
    """Mask what the decision names, evaluate, and cut only if accuracy holds; evaluate again.

    A decision that speaks of another architecture than the present one (an earlier cut came
    between) is carried over to it by its original numbering (:mod:`.carry_over`). One that was not
    approved, or of which nothing is left, changes nothing; nor does one that the surgeon refuses
    (an optimizer or an average of the network that it was not given, state that cannot be kept), or
    whose mask, cut or evaluation raises an error: the outcome is ``refused`` with the reason. A
    drop of accuracy beyond the trigger (of several levels, the strictest), a loss that is no
    finite number, and one that rises by more than a worker would let it (that of ``evaluate`` has
    to double as well: its unit may be any) take the mask off, or the cut back: the network is then
    bit for bit what it was.
    Where the figures under the mask are bit for bit those without, ``evaluate`` is called once more
    with nearly everything masked: if that changes nothing either, it does not run this network (but
    a copy, or what was compiled or exported of it), and the outcome is ``refused``.

    Args:
        reconstruct: input covariance of the present network (``bundle.covariance``), with which
            what reads the kept units is refitted, under the mask and in the cut, where the
            decision says so; or what measures it, which the outcome then says. None: nothing is
            refitted; where the decision asks for it, the outcome says that.
        redistribute: called for the same, whatever the decision says; the name of the version
            before.
        batches: (inputs, labels) pairs of calibration samples: where the decision says so, the
            running statistics of batch normalisations move by what the cut does to those of them,
            under the mask and in the cut. Empty: they stay, and the outcome says so.
        held_out: the same of other samples: their loss is looked at beside ``evaluate``. Empty:
            that of the first calibration samples.

    Returns:
        The outcome, with accuracy and loss before, under the mask and after the cut, where they
        were measured.
    """
    if refused := refusal(decision, surgeon.architecture):
        return refused
    data = RefitData(reconstruct, redistribute, batches, held_out)
    limits = triggers or RollbackTriggers()
    outcome, _ = check_and_cut(decision, surgeon, evaluate, data, limits)
    return outcome


def check_and_cut(
    decision: StructuralPruningDecision,
    surgeon: Surgeon,
    evaluate: Evaluate,
    data: RefitData,
    triggers: RollbackTriggers,
    *,
    take_back: Callable[[], object] | None = None,
    now: Evaluation | None = None,
    cut_drop: float | None = None,
    limits: VerificationSettings | None = None,
) -> tuple[PruningOutcome, Judged]:
    """As :func:`apply_decision`, of a decision that :func:`refusal` lets pass.

    Args:
        take_back: takes a cut back; by default the surgeon does, from a copy that is kept until
            this call returns.
        now: what ``evaluate`` said of the network as it is, where it was called a moment ago.
        cut_drop: the drop of accuracy under the mask from which on a decision is too much at once.
            Its cheaper half is then tried, and half of that, three times at most; the first that
            costs no more is cut, and the outcome says what share of the decision that is. What
            it costs is told from accuracy and loss together (:func:`excess`); a drop of one
            validation sample is not too much where the loss says no more. None, or 1: the decision
            is cut whole or not at all.
        limits: what the loss may rise by.

    Returns:
        The outcome, and what it was judged by.
    """
    present = surgeon.architecture
    try:
        blocked = surgeon.blocked()
    except Exception as error:  # of whatever else is alive in this process
        key = decision.idempotency_key
        _log.exception("decision refused: the process cannot be searched", key=key)
        blocked = (
            f"the process cannot be searched for other holders of the network's tensors: {error}"
        )
    if blocked:
        return outcome_of(decision, present, present, "refused", blocked), Judged()
    said = ""
    if decision.model_hash != present.model_hash:
        decision, said = present_form(decision, present)
    limit = trigger_of(decision, triggers)
    asked, phase = limits or VerificationSettings(), decision.safety.phase
    allowed = strictest_limits(asked, decision.taken, phase)
    own = None
    if data.held_out or data.batches:
        known = data.held_out or first_batches(data.batches, _STATISTICS)
        own = OwnSamples(surgeon.model, spread_samples(known, _WITNESSES), allowed.loss_rise)
    try:
        refit = Refit.of(decision, surgeon.model, present, data)
    except Exception as error:  # samples that do not reach a layer, too little memory
        _log.exception("decision refused: not measured again", key=decision.idempotency_key)
        reason = f"the input covariance for refitting cannot be measured: {error}"
        return outcome_of(decision, present, present, "refused", reason), Judged()
    notes = tuple(part for part in (said, refit.said) if part)
    if refit.fallbacks:
        key = decision.idempotency_key
        _log.warning("cut fell back", key=key, fallback=refit.fallbacks[0], reason=refit.said)
    check = _Check(decision, surgeon, evaluate, (limit, allowed.loss_rise), own, refit, notes)
    outcome = (
        check.plain(now)
        or check.masked(cut_drop)
        or check.cut(take_back or _to_now(surgeon))
        or check.outcome("applied")
    )
    return outcome, Judged(check.samples, check.figures)


class _Check:
    """One decision that is checked; a step returns the outcome if the decision ends there."""

    _not_followed = True

    def __init__(
        self,
        decision: StructuralPruningDecision,
        surgeon: Surgeon,
        evaluate: Evaluate,
        limits: tuple[float, float],
        own: OwnSamples | None,
        refit: Refit,
        notes: tuple[str, ...],
    ) -> None:
        self._decision, self._surgeon, self._own = decision, surgeon, own
        self._limit, self._loss_limit = limits
        self._evaluate = preserving(evaluate, surgeon.model)
        self._before = surgeon.architecture
        self.figures: dict[str, Evaluation] = {}
        """So far, by ``before``, ``masked`` and ``after`` (the cut)."""
        self._more: dict[str, float | None] = {}
        """Fields of the outcome of a cut that was made."""
        self.samples = 0
        """That the last evaluation showed the network."""
        self._as_it_is = False
        """Whether it showed them to the network as it was."""
        self._refit, self._notes = refit, notes
        self._fallbacks: tuple[CutFallback, ...] = refit.fallbacks
        self._own_rose = ""
        """Why the loss of Elesh's own samples says that the mask costs too much."""
        self._statistics: Mapping[str, Tensor] = {}
        """Of batch normalisations, as they are after the cut, in present sizes."""
        self._outputs: OutputsBefore | None = None
        """Of layers, before anything is masked."""
        self._wanted: Wanted | None = None
        """Of a table: the network's outputs, before anything is masked."""
        self._matches = True
        """Whether outputs are matched, of a table."""
        self._solved: Mapping[str, Tensor] = {}
        """Parameters that were solved layer by layer under the mask, in present sizes."""

    def plain(self, known: Evaluation | None = None) -> PruningOutcome | None:
        """The network as it is, to compare with; evaluated unless that is known."""
        try:
            now = self.figures["before"] = known or self._measure("before", "evaluate")
            if self._own is not None:
                self._own.before()
            self._more["latency_before"] = call_seconds(self._surgeon.model)
        except Exception as error:
            return self._failed("before anything was changed", error)
        if not now.finite:
            detail = (
                f"not checkable: the uncut network has accuracy {now.accuracy:g}, loss {now.loss:g}"
            )
            return self.outcome("refused", detail)
        return None

    def masked(self, cut_drop: float | None = None) -> PruningOutcome | None:
        """With the mask on, which is off again on return; as much of the decision as costs little
        at once. If every part fails, the outcome is that of the whole."""
        whole = self._decision
        first = failed = self._masked()
        excess = self._excess(cut_drop)
        if cut_drop is None or cut_drop >= 1 or "masked" not in self.figures:
            return first
        too_much = excess.why or (first.detail if first else "")
        parts = None
        while failed or excess.why:
            if parts is None:
                accuracy = self.figures["before"].accuracy
                alone = measured_alone(self._surgeon, self._own, self._refit, accuracy)
                parts = Shortening(whole, self._before, alone)
            try:
                part = parts.next(excess.within)
            except Exception as error:
                return self._failed("under the mask", error)
            if part is None:
                if self._decision is whole and whole.layers:  # one layer: the triggers judge it
                    return first
                break
            self._decision = part
            failed, excess = self._masked(), self._excess(cut_drop)
            if "masked" not in self.figures:  # an error
                return failed
        if not failed and not excess.likely:
            if self._decision is not whole:
                self._say_shortened(whole, too_much)
            if excess.unseen:
                reason = f"judged by accuracy and loss alone: {excess.unseen}"
                self._fall_back("answers_not_compared", reason)
            return None
        last, self._decision = self._decision, whole
        if first is not None:
            return first
        reason = f"{too_much} with all of its units"
        if last is not whole:
            share = size_of(last) / size_of(whole)
            reason += f", and still more than {cut_drop:g} with {share:.3g} of them"
        return self.outcome("refused", f"{reason}: cut less, cut later, or raise cut_accuracy_drop")

    def _excess(self, cut_drop: float | None) -> Excess:
        """What the mask costs, where that is too much at once."""
        before, now = self.figures["before"], self.figures.get("masked")
        if now is None or not now.finite or cut_drop is None:
            return Excess()
        if worse := failed_loss(before, now, self._loss_limit) or self._own_rose:
            return Excess(worse.removesuffix(","), likely=True)
        return excess(before, now, self.samples, cut_drop)

    def _say_shortened(self, whole: StructuralPruningDecision, why: str) -> None:
        """A shortened decision: a field of the outcome, a line in the log, words in the detail."""
        sizes = [size_of(each) for each in (self._decision, whole)]
        self._more["shortened_to"] = sizes[0] / sizes[1]
        said = f"shortened to {sizes[0]} of {sizes[1]} units: {why} with all of them"
        self._notes += (said,)
        _log.warning("decision shortened", key=whole.idempotency_key, reason=said)

    def _masked(self) -> PruningOutcome | None:
        """With the mask on; the figures of an earlier mask are forgotten."""
        self.figures.pop("masked", None)
        self._own_rose = ""
        surgeon, decision = self._surgeon, self._decision
        before: dict[str, Tensor] = {}
        try:
            with span("mask"):
                refit = self._refit
                by_samples = bool(refit.samples or refit.batches)
                if by_samples:
                    self._keep_outputs()
                surgeon.mask(decision.units, reconstruct=refit.covariance, skip=refit.skip)
                if decision.layers:
                    surgeon.mask_layers(target.layer_name for target in decision.layers)
                if by_samples:
                    before = self._solve_layers()
            now = self._measure("masked", "evaluate masked")
            if self._own is not None:
                self._own_rose = self._own.rose()
                self._own.remember(comparable=self._is_like_others())
        except Exception as error:
            return self._failed("under the mask", error)
        finally:
            surgeon.unmask()
            if before:
                put_batch_statistics(surgeon.model, before)
        if now == self.figures["before"]:
            try:
                acts = self._mask_acts()
            except Exception as error:
                return self._failed("under the mask", error)
            if not acts:
                return self.outcome("refused", _UNMOVED)
        return self._judge(now, "under the mask")

    def _keep_outputs(self) -> None:
        """Keep what layers put out as the network is, for them to be solved for under the mask."""
        model, now = self._surgeon.model, self._before
        if self._refit.samples and self._outputs is None:
            try:
                samples = self._refit.samples
                if not of_a_table(now):
                    samples = first_batches(samples, _STATISTICS)
                changing = self._changing()
                self._outputs = outputs_before(model, now, samples, rows=_ROWS, changing=changing)
            except Exception as error:
                self._not_solved(error)
        outputs = self._outputs
        if outputs and self._wanted is None and self._matches and of_a_table(now):
            try:
                self._wanted = wanted_of_a_table(model, outputs.inputs)
            except Exception as error:
                self._not_matched(error)

    def _changing(self) -> set[str] | None:
        """The modules that the mask and its refitting act on; None where that may be any."""
        decision, now = self._decision, self._before
        if decision.layers or any(now.group[name].norms for name in decision.units):
            return None
        return {path for path, _ in consumer_axes(now, decision.units)}

    def _solve_layers(self) -> dict[str, Tensor]:
        """Under the mask, solve layers one behind the other for what they put out without it, and
        give batch normalisations the statistics that they have then; what they had."""
        self._solved, self._statistics = {}, {}
        if self._outputs is not None:
            try:
                skip = self._refit.skip
                found = layer_solutions(self._surgeon.model, self._outputs, skip=skip)
                self._solved, self._statistics = found.parameters, found.statistics
            except Exception as error:
                self._not_solved(error)
            self._surgeon.refit_masked(self._solved)
        model, batches = self._surgeon.model, self._refit.batches
        if not batches:
            self._statistics = {}
        elif not self._statistics:  # not known from the pass that solved the layers
            self._statistics = estimated_batch_statistics(
                model, first_batches(batches, _STATISTICS)
            )
        if batches and not self._statistics:
            reason = "batch statistics not estimated anew: batches are too small"
            self._fall_back("statistics_not_estimated", reason)
        before = put_batch_statistics(model, self._statistics)
        self._match_outputs()
        return before

    def _match_outputs(self) -> None:
        """Of a table, bring the masked network nearer to its outputs before."""
        if self._outputs is None or self._wanted is None:
            return
        try:
            found = matched_parameters(self._surgeon.model, self._wanted, skip=self._refit.skip)
        except Exception as error:
            return self._not_matched(error)
        self._surgeon.refit_masked(found)
        self._solved = {**self._solved, **found}

    def _not_solved(self, error: Exception) -> None:
        """The cut is refitted by the covariance alone; the network is as it was."""
        self._refit, self._outputs = replace(self._refit, samples=()), None
        reason = f"layers not solved one behind the other: {type(error).__name__}: {error}"
        self._fall_back("layers_not_solved", reason[:_LONGEST])

    def _not_matched(self, error: Exception) -> None:
        """The cut is refitted by its layers alone; the network is as it was."""
        self._wanted, self._matches = None, False
        reason = f"outputs not matched: {type(error).__name__}: {error}"
        self._fall_back("outputs_not_matched", reason[:_LONGEST])

    def _fall_back(self, name: CutFallback, reason: str) -> None:
        """The cut goes without something: a field and words of the outcome, a line in the log."""
        if name not in self._fallbacks:
            self._fallbacks += (name,)
        self._notes += (reason,)
        _log.warning(
            "cut fell back", key=self._decision.idempotency_key, fallback=name, reason=reason
        )

    def _mask_acts(self) -> bool:
        """Whether the evaluation sees a mask at all: of all units but a few, and of every layer."""
        surgeon, now = self._surgeon, self._surgeon.architecture
        units = {g.name: range(g.size - g.unit_multiple) for g in now.groups if g.prunable}
        try:
            surgeon.mask(units)
            surgeon.mask_layers(b.name for b in now.blocks if b.prunable and not b.removed)
            with span("evaluate almost all masked"):
                return self._evaluate() != self.figures["before"]
        finally:
            surgeon.unmask()

    def cut(self, take_back: Callable[[], object]) -> PruningOutcome | None:
        """Cut, as one step to undo; what does not stand is taken back."""
        decision, surgeon, refit = self._decision, self._surgeon, self._refit
        layers = [target.layer_name for target in decision.layers]
        epoch, key = decision.epoch, decision.idempotency_key
        try:
            with span("cut"), surgeon.as_one_cut():
                if self._statistics:  # The cut takes its part of them.
                    put_batch_statistics(surgeon.model, self._statistics)
                if decision.units or not layers:
                    surgeon.cut(
                        decision.units,
                        epoch=epoch,
                        key=key,
                        reconstruct=refit.covariance,
                        skip=refit.skip,
                        solved=self._solved,
                    )
                    self._notes += surgeon.notes
                if layers:
                    surgeon.cut_layers(layers, epoch=epoch, key=key)
                    self._notes += surgeon.notes
            if self._own is not None and self._own.as_remembered():
                now = self.figures["after"] = self.figures["masked"]
            else:
                now = self._measure("after", "evaluate cut")
            self._more["latency_after"] = call_seconds(surgeon.model)
        except BaseException as error:
            take_back()
            if not isinstance(error, Exception):
                raise
            return self._failed("in the cut", error)
        failed = self._judge(now, "after the cut")
        if failed is not None:
            take_back()
        return failed

    def _is_like_others(self) -> bool:
        """Whether ``evaluate`` has run such a network as will be left: each group has lost units
        before, so that code that counts on a size has met others; it runs this network, as it is,
        and no copy goes along that it might run, too."""
        decision, now = self._decision, self._before
        known = all(now.group[name].removed for name in decision.units)
        return self._as_it_is and known and not decision.layers and not self._surgeon.copies

    def outcome(self, result: Result, detail: str = "") -> PruningOutcome:
        """The outcome with the figures so far."""
        before = self._before
        after = self._surgeon.architecture if result == "applied" else before
        detail = detail or "; ".join(dict.fromkeys(self._notes))
        outcome = outcome_of(self._decision, before, after, result, detail, self.figures)
        if result != "applied":
            return outcome
        return outcome.model_copy(update={**self._more, "fallbacks": self._fallbacks})

    def _measure(self, name: str, step: str) -> Evaluation:
        model = self._surgeon.model
        with span(step), Shown.by(model) as shown:
            now = self._evaluate()
        if shown.of_before:
            raise InvalidField("evaluate", "the network as it is", _OF_BEFORE, hint=_NAME_IT)
        now = self.figures[name] = replace(now, answers=shown.answers)
        self.samples, self._as_it_is = shown.count, shown.as_it_is
        return now

    def _judge(self, now: Evaluation, when: str) -> PruningOutcome | None:
        before = self.figures["before"]
        reason = failed_check(before.accuracy, now, self._limit)
        reason = reason or failed_loss(before, now, self._loss_limit) or self._own_rose
        return self.outcome("rolled_back", f"{reason} {when}") if reason else None

    def _failed(self, when: str, error: Exception) -> PruningOutcome:
        reason = f"{type(error).__name__}: {error}"[:_LONGEST]
        key = self._decision.idempotency_key
        _log.exception("decision refused, an error came up", key=key, when=when, reason=reason)
        return self.outcome("refused", f"{when}: {reason}")


def preserving(evaluate: Evaluate, model: nn.Module | None) -> Evaluate:
    """An evaluation that leaves random states, training flags and all that modules hold as they
    were: its own generators, too, where they can be reached."""

    def evaluated() -> Evaluation:
        with preserved(model or nn.Module(), evaluate):
            return checked(evaluate())

    return evaluated


def refusal(decision: StructuralPruningDecision, now: PrunedArchitecture) -> PruningOutcome | None:
    """The outcome of a decision that is not to be applied to this network; None if it is."""
    if not decision.approved_for_application:
        return outcome_of(decision, now, now, "rejected", decision.rejection_reason)
    if not decision.units and not decision.layers:
        return outcome_of(decision, now, now, "refused", "it names no unit and no layer to remove")
    if decision.model_hash != now.model_hash and carried_over(decision, now) is None:
        stale = f"stale: decided for architecture {decision.model_hash}, now {now.model_hash}, "
        stale += "which has lost at least as much"
        return outcome_of(decision, now, now, "refused", stale)
    return None


def _to_now(surgeon: Surgeon) -> Callable[[], object]:
    point = surgeon.restore_point()
    return lambda: surgeon.bring_back(point)

"""``elesh.prune``: makes a trained network smaller at once, without a server or training.

In rounds: the network as it is now is measured, units are chosen to the round's share of the
budget, cut, and the layers that read what is left are solved again; then the cut is measured and
kept, or taken back and tried at half the size.

Promises: nothing that was measured as worse than the limits is kept; whatever goes wrong, a wrong
call or an error in ``evaluate`` or Ctrl-C, leaves the network bit for bit as it was given.
Parameters stay the same objects, and an optimizer's state is cut with them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from elesh.analysis import analyze
from elesh.analysis.selection.choose import gates_of
from elesh.analysis.selection.reconstruction_order import reconstruction_fault
from elesh.safety import Measured, Proposal
from elesh.settings import Settings
from elesh.trainer import Evaluation, MeasuredCheckpoint, Recorder, Surgeon
from elesh.trainer.arguments import (
    levels_of,
    require_network,
    require_one_process,
    require_share,
    whole_number,
)
from elesh.trainer.calibration.losses import Loss
from elesh.trainer.calibration.recorder import enough_samples, of_a_table
from elesh.trainer.goals import Goals, shares_of
from elesh.trainer.network.calling import batch_size, device_of, map_tensors
from elesh.trainer.network.onednn import SAFE_CHANNELS, narrowing_is_unsafe
from elesh.trainer.network.traversal import deep_copied
from elesh.trainer.surgery.lineage import original_of
from elesh.trainer.surgery.optimizers import other_optimizers
from elesh.trainer.surgery.reconstruction.after_cut import (
    reestimate_batch_statistics,
    soften_outputs,
)
from elesh.trainer.surgery.reconstruction.layer_by_layer import (
    OutputsBefore,
    outputs_before,
    solved_layer_by_layer,
)
from elesh.trainer.surgery.reconstruction.output_matching import (
    Matched,
    Wanted,
    match_outputs,
    wanted_of_a_table,
)
from elesh.trainer.surgery.reconstruction.principal_components import turn_streams
from leyline import (
    Budget,
    CheckpointBundle,
    InvalidField,
    Level,
    PrunedArchitecture,
    StructuralPruningDecision,
)

from .judging import (
    Evaluate,
    HeldOut,
    Judge,
    Limits,
    Validation,
    outcomes,
    require_labels_fit,
    require_no_arguments,
)
from .latency import compared as latencies
from .progress import Progress
from .report import Figures, PruningReport, Round, Spared, spared_of
from .samples import Batch, Samples, divided, require_no_copies

_LOGGER = logging.getLogger(__name__)
_ATTEMPTS = 3
"""How often a round that costs too much is tried again at half the size."""
_EXTRA = 2
"""Rounds that may follow the planned ones to reach what these have left."""
_LOSS_SAMPLES, _LOSS_SAMPLES_OF_LAYERS = 32, 128
"""The order for reconstruction is of more samples; what only describes single units is of the first
ones. Whole layers are ranked by the loss."""


def prune(
    model: nn.Module,
    batches: Iterable[Batch],
    budget: Mapping[str, float],
    *,
    evaluate: Evaluate | None = None,
    max_accuracy_drop: float = 0.05,
    max_loss_increase: float | None = None,
    levels: Collection[str] = ("channel", "head"),
    rounds: int = 3,
    optimizer: torch.optim.Optimizer | None = None,
    ignored_layers: Collection[str] = (),
    loss: Loss | None = None,
    compared: Callable[[Any], Any] | None = None,
    min_channels: int = 4,
    min_heads: int = 1,
    round_to: int = 1,
    reconstruct: bool = True,
    soften: bool = True,
    turn: bool = True,
    progress: bool = True,
    seed: int = 0,
) -> PruningReport:
    """Cut a trained network down to a budget, in place.

    Args:
        model: a trained network that can be copied; Elesh may have cut it before.
        batches: (inputs, labels) pairs of training data, about 500 samples in all; for a table
            1,000. Inputs are a tensor, a sequence (positional) or a mapping (keywords).
        budget: what may be left of the network as it was before its first cut, by resource:
            ``{"macs": 0.5}``, ``parameters``, ``memory`` (bytes of weights), ``latency`` (of one
            batch, on the network's device), or several.
        evaluate: takes no arguments and returns an ``elesh.Evaluation`` or (accuracy, loss) on your
            own validation data; it judges every cut. Without it a fifth of the samples is held out,
            and the upper 95% bound of the drop counts.
        max_accuracy_drop: what all cuts together may cost; 0.05 is five points. A budget that costs
            more is not reached.
        max_loss_increase: the same limit for the loss. Needed with a loss of your own and no
            ``evaluate``.
        levels: what may go: ``channel`` (and hidden units), ``head``, ``layer``.
        rounds: the number of rounds in which the budget is approached.
        optimizer: its state (momentum, moments) is cut, too.
        ignored_layers: names of layers, or of modules that hold some, whose outputs stay.
        loss: a function of the model's output and the labels that returns a loss for each sample;
            default: cross-entropy of logits.
        compared: a function of the model's output that returns what must be equal under a mask and
            after a cut, if other outputs jump (see :class:`Recorder`); default: all of it.
        min_channels, min_heads: the minimum that every group keeps. At least 8 channels where
            PyTorch would abort the process with fewer (see
            :mod:`elesh.trainer.network.onednn`).
        round_to: groups keep a multiple of this many channels.
        reconstruct: solve the layers that read the kept units again, one behind the other, for
            their outputs before the cut, and re-estimate batch statistics. At the end, train all
            layers for two passes without labels towards the outputs before, if validation is better
            for it.
        soften: if the network is more confident than its accuracy justifies, scale its outputs
            down, so that further training works well; answers stay the same. Not with a loss of
            your own or ``max_loss_increase``.
        turn: rotate residual streams to their principal components before anything is measured, if
            the network's function stays the same (pre-norm transformers): cutting its width then
            loses a third to a half as much. Not with an ``optimizer``, whose state belongs to
            single weights; undone if nothing is cut.
        progress: print progress on standard error.
        seed: seed of the random directions of the measurement.

    Returns:
        A report; ``print(report)`` shows it. ``report.reached`` says whether the budget was
        reached.

    Raises:
        InvalidField: if an argument is not as described, samples are too few, labels do not belong
            to the inputs, the model cannot be copied or traced, or several processes train it
            (DistributedDataParallel). Nothing was changed then.
    """
    begun = time.monotonic()
    require_network(model)
    if isinstance(model, DistributedDataParallel):
        require_one_process()
    asked = levels_of(levels)
    shares_of(budget)
    expected = "a share of the answers, 0.05 for five points"
    require_share("max_accuracy_drop", max_accuracy_drop, expected, least=-math.inf)
    _require_whole_numbers(
        rounds=rounds, min_channels=min_channels, min_heads=min_heads, round_to=round_to
    )
    if loss is not None and evaluate is None and max_loss_increase is None:
        expected = "a limit: with a loss of your own and no evaluate nothing else judges a cut"
        raise InvalidField("max_loss_increase", expected, None)
    if evaluate is not None:
        require_no_arguments(evaluate)
    shown = Progress(progress)
    with shown:
        shown.doing("looking at the samples")
        samples = divided(batches, hold_out=evaluate is None).taken_by(model)
        if loss is None:  # with one of the caller's own, outputs need not be classes
            require_no_copies(model, samples)
        shown.doing("finding out what can be removed")
        example = _example(model, samples)
        recorder = Recorder(
            model,
            example,
            ignored_layers=ignored_layers,
            loss=loss,
            outputs="logits" if loss is None else "values",
            compared=compared,
            seed=seed,
        )
        first = recorder.architecture
        goals = Goals.of(model, example, first, original_of(model, first), budget)
        limits = Limits(max_accuracy_drop, max_loss_increase)
        judge = _judge(model, samples, evaluate, limits, loss)
        before = deep_copied(model)
        surgeon = Surgeon(model, first, optimizer=optimizer, restore_points=0)
        min_channels, fallbacks = _safe(min_channels, model)
        others = other_optimizers(model, (), stateful=True) if optimizer is None else []
        with _whole_or_not_at_all(surgeon) as given:
            settings = _settings(min_channels, min_heads, round_to, reconstruct)
            work = _Work(
                recorder, surgeon, judge, goals, samples.calibration, asked, settings, shown
            )
            if turn and optimizer is None and Level.CHANNEL in asked:
                work.turn(example, compared)
            held_back = work.run(rounds)
            if work.turned and not work.has_cut:
                surgeon.bring_back(given)
            work.match()
            if soften and loss is None and max_loss_increase is None:
                work.soften()
        shown.doing("measuring latency")
        took = latencies({"before": before, "after": model}, samples.calibration[0][0])
    if work.has_cut:
        fallbacks += _not_cut_along(others)
    now = surgeon.architecture
    return PruningReport(
        before=_figures(judge.before, first, took["before"]),
        after=_figures(work.evaluation, now, took["after"]),
        original=first,
        architecture=now,
        budget=goals.uses(now),
        rounds=tuple(work.rounds),
        spared=spared_of(first, now, work.spared),
        data=judge.data,
        held_back=held_back,
        turned=work.turned if work.has_cut else (),
        matched=work.matched,
        fallbacks=(*fallbacks, *work.fallbacks),
        seconds=time.monotonic() - begun,
    )


def _require_whole_numbers(**arguments: Any) -> None:
    for name, number in arguments.items():
        whole_number(name, number, least=1)


def _safe(min_channels: int, model: nn.Module) -> tuple[int, tuple[str, ...]]:
    """What every group keeps, where PyTorch aborts the process with fewer; and the fallbacks."""
    if min_channels >= SAFE_CHANNELS or not narrowing_is_unsafe(model):
        return min_channels, ()
    said = f"every group keeps {SAFE_CHANNELS} channels: PyTorch aborts with fewer"
    _LOGGER.warning(said)
    return SAFE_CHANNELS, (said,)


def _not_cut_along(others: Sequence[torch.optim.Optimizer]) -> tuple[str, ...]:
    """The fallback of optimizers of the network that the caller did not give."""
    if not others:
        return ()
    kinds = ", ".join(dict.fromkeys(type(other).__name__ for other in others))
    said = (
        f"{kinds} still has the state of the uncut network: create it again before training goes "
        "on, or pass optimizer=... so that its state is cut, too"
    )
    _LOGGER.warning(said)
    return (said,)


def _example(model: nn.Module, samples: Samples) -> Any:
    """Two samples on the network's device."""
    inputs, device = samples.calibration[0][0], device_of(model)
    size = batch_size(inputs)

    def two(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor[:2] if tensor.ndim and len(tensor) == size else tensor).to(device)

    return map_tensors(two, inputs)


def _judge(
    model: nn.Module,
    samples: Samples,
    evaluate: Evaluate | None,
    limits: Limits,
    loss: Loss | None,
) -> Judge:
    """The judge. Labels of classes are then known to belong to their inputs."""
    if evaluate is None:
        held_out = HeldOut(model, samples.held_out, limits, loss)
        if loss is None:
            require_labels_fit(held_out.outcomes, None)
            held_out.require_enough()
        return held_out
    validation = Validation(model, evaluate, limits)
    if loss is None:
        found = outcomes(model, samples.calibration, None)
        require_labels_fit(found, validation.before)
    return validation


def _figures(found: Evaluation, now: PrunedArchitecture, took: Mapping[int, float]) -> Figures:
    return Figures(found.accuracy, found.loss, now.parameters, now.macs, dict(took))


def _settings(min_channels: int, min_heads: int, round_to: int, reconstruct: bool) -> Settings:
    """Without phases and without limits of what is predicted: here everything is measured."""
    everything = dict.fromkeys(("conservative_limit", "moderate_limit", "aggressive_limit"), 1.0)
    return Settings.model_validate(
        {
            "structured_pruning": {
                "safety_schedule": everything,
                "channel_analysis": {
                    "min_channels_per_layer": min_channels,
                    "round_to": round_to,
                    "safety_margin": 0.0,
                    "max_predicted_shift": 1e30,
                    "redistribute": reconstruct,
                },
                "attention_analysis": {"min_heads_per_layer": min_heads, "safety_margin": 0.0},
            },
            "verification": {"rounds": 1, "kept_share": 0.0},
        }
    )


@contextmanager
def _whole_or_not_at_all(surgeon: Surgeon) -> Iterator[Any]:
    """Whatever is raised inside, the network and the optimizer are then as they were."""
    before = surgeon.restore_point()
    try:
        yield before
    except BaseException:
        surgeon.bring_back(before)
        raise


@dataclass
class _Work:
    """The rounds."""

    recorder: Recorder
    surgeon: Surgeon
    judge: Judge
    goals: Goals
    batches: Sequence[Batch]
    levels: tuple[Level, ...]
    settings: Settings
    progress: Progress
    rounds: list[Round] = field(default_factory=list)
    spared: list[Spared] = field(default_factory=list)
    turned: tuple[str, ...] = ()
    """Groups whose channels are principal components."""
    matched: Matched | None = None
    """How near the outputs are to those before, where they were matched."""
    fallbacks: list[str] = field(default_factory=list)
    """What was done with less than was asked for."""
    evaluation: Evaluation = field(init=False)
    """Of the network as it is."""
    _whole: bool = False
    """Whether all statistics are of all samples."""
    _outputs: OutputsBefore | None = None
    """Of the layers as they were given, as far as they are still there."""
    _wanted: Wanted | None = None
    """What the network as it was given puts out."""

    def __post_init__(self) -> None:
        self.evaluation = self.judge.before

    def run(self, rounds: int) -> str:
        """Cut until every budget is met; the reason if one is not, and what would help."""
        for number in range(1, rounds + _EXTRA + 1):
            now = self.surgeon.architecture
            if self.goals.met(now):
                break
            progress = min(1.0, number / rounds)
            if self.goals.next(now, progress) is None:
                continue
            if stopped := self._round(number, rounds, progress):
                return stopped
        if self.goals.met(self.surgeon.architecture):
            return ""
        return "held back: the groups cannot lose more; lower min_channels, or name more levels"

    @property
    def has_cut(self) -> bool:
        """Whether any round stayed."""
        return any(not made.refused for made in self.rounds)

    def turn(self, example: Any, compared: Callable[[Any], Any] | None) -> None:
        """Streams to their principal components, which say what can go."""
        self.progress.doing("rotating residual streams")
        model, now = self.surgeon.model, self.surgeon.architecture
        if self.surgeon.copies:
            _LOGGER.info(
                "residual streams are not rotated: averages of the weights would not follow"
            )
            return
        if self.surgeon.blocked():
            return  # The cut says why.
        self.turned = turn_streams(model, now, self.batches, example, compared)
        if self.turned:
            self.progress.done(f"rotated to its principal components: {', '.join(self.turned)}")

    def match(self) -> None:
        """The cut network's outputs nearer to those before, if that does it good."""
        if not self.has_cut or self._outputs is None:
            return
        if self._outputs.counts and self._wanted is None:
            self.fallbacks.append(
                "outputs are not matched: those before the cut are too large to keep"
            )
            _LOGGER.warning(self.fallbacks[-1])
            return
        before = self.surgeon.restore_point()
        matched = self._match()
        if matched is None:
            return
        found, refused = self.judge.now()
        now = self.evaluation
        if refused or not (found.loss < now.loss or found.accuracy > now.accuracy):
            self.progress.done("  taken back: neither accuracy nor loss is better")
            self.surgeon.bring_back(before)
        else:
            self.evaluation, self.matched = found, matched

    def _match(self) -> Matched | None:
        """How near they came; None if that changed nothing."""
        if self._wanted is None:
            return None
        self.progress.doing("matching outputs to those before the cut")
        found = match_outputs(self.surgeon.model, self._wanted.inputs, self._wanted.outputs)
        if found is None or not found.after < found.before:
            return None
        what = f"outputs matched: distance {found.before:.1%} before, {found.after:.1%} after"
        self.progress.done(what)
        return found

    def _wanted_outputs(self, outputs: OutputsBefore) -> Wanted | None:
        """What the network is to come near to; None where that is too large to keep."""
        if outputs.answers is None:
            return None
        if of_a_table(self.surgeon.architecture):
            return wanted_of_a_table(self.surgeon.model, outputs.inputs)
        return Wanted(outputs.inputs, outputs.answers)

    def soften(self) -> None:
        """The cut network's outputs, no surer of training samples than its accuracy warrants."""
        if not self.has_cut:
            return
        if soften_outputs(self.surgeon.model, self.batches, self.evaluation.accuracy) < 1:
            self.evaluation = self.judge.now()[0]

    def _round(self, number: int, rounds: int, progress: float) -> str:
        """One more cut, as large as the limits allow; the reason if there can be none."""
        name = f"round {min(number, rounds)} of {rounds}"
        self.progress.doing(f"{name}: measuring")
        bundle = self._measured()
        for _ in range(_ATTEMPTS):
            wanted = self.goals.next(self.surgeon.architecture, progress)
            assert wanted is not None
            decision = self._decided(bundle, wanted)
            layers = [target.layer_name for target in decision.layers]
            if not decision.units and not layers:
                return f"held back: {decision.rejection_reason or 'nothing is left to remove'}"
            refused = self._cut(name, bundle, decision, layers)
            if not refused:
                return ""
            progress = self._halved(progress)
        return f"held back: {refused}; raise the limit, or train and prune again"

    def _halved(self, progress: float) -> float:
        """Halfway between the progress made and the progress that was tried."""
        left = self.goals.left(self.surgeon.architecture)
        done = [math.log(left[n]) / math.log(s) for n, s in self.goals.asked.items() if s < 1]
        return (max(0.0, min(done)) + progress) / 2

    def _measured(self) -> CheckpointBundle:
        self.recorder.architecture = self.surgeon.architecture
        reconstruct = self.settings.structured_pruning.channel_analysis.redistribute
        last = self.settings.structured_pruning.safety_schedule.total_epochs
        layers = Level.LAYER in self.levels
        few = reconstruct and not self._whole
        some = _LOSS_SAMPLES_OF_LAYERS if layers else _LOSS_SAMPLES

        def measured(loss_samples: int | None, samples: int | None = None) -> CheckpointBundle:
            return self.recorder.measure(
                self.batches,
                epoch=last,
                run_id="prune",
                look_ahead=0,
                reconstruct=reconstruct,
                loss_samples=loss_samples,
                max_samples=samples,
                layers=layers,
            )

        enough = enough_samples(self.surgeon.architecture)
        bundle = measured(some, enough) if few else measured(None)
        ranked = [gates for level in self.levels if (gates := gates_of(bundle, level))]
        if few and any(map(reconstruction_fault, ranked)):  # They are ranked by other statistics.
            self._whole = True
            bundle = measured(None)
        return replace(bundle, levels=self.levels)

    def _decided(self, bundle: CheckpointBundle, budget: Budget) -> StructuralPruningDecision:
        """What goes for a budget. Gates of what is only predicted are not looked at."""
        self.progress.doing("choosing")
        asked = bundle.parameters.model_copy(update={"budget": budget})

        def later(proposal: Proposal) -> Measured:
            return Measured(proposal.order)

        bundle, threads = replace(bundle, parameters=asked), torch.get_num_threads()
        decision = analyze(bundle, self.settings, threads=threads, verify=later)
        self._note(decision)
        return decision

    def _note(self, decision: StructuralPruningDecision) -> None:
        """Why groups lose nothing."""
        self.spared = [Spared(name, reason) for name, reason in decision.ignored]
        for group in decision.spared:
            unit = group.spared[0]
            self.spared.append(Spared(group.layer_name, f"{unit.reason}: the next one costs more"))

    def _cut(
        self,
        name: str,
        bundle: CheckpointBundle,
        decision: StructuralPruningDecision,
        layers: Sequence[str],
    ) -> str:
        """Cut, measure, and take back what costs too much: then why."""
        surgeon, before = self.surgeon, self.surgeon.restore_point()
        self.progress.doing(f"{name}: cutting")
        covariance = bundle.covariance if isinstance(bundle, MeasuredCheckpoint) else None
        key, whole = f"prune: {name}", surgeon.architecture
        if covariance is not None and self._outputs is None:
            self._outputs = outputs_before(surgeon.model, whole, self.batches)
            self._wanted = self._wanted_outputs(self._outputs)
        outputs = self._outputs and self._outputs.without(whole, decision.units)
        if decision.units:
            surgeon.cut(decision.units, key=key, reconstruct=covariance)
        if layers:
            surgeon.cut_layers(layers, key=key)
        if covariance is not None and outputs is not None:
            self.progress.doing(f"{name}: solving the layers that read the kept units")
            solved_layer_by_layer(surgeon.model, outputs, batch_statistics=True)
            if not outputs.whole:
                reestimate_batch_statistics(surgeon.model, self.batches)
        self.progress.doing(f"{name}: measuring the cut")
        found, refused = self.judge.now()
        matched = self._match() if refused and outputs is not None else None
        if matched is not None:
            found, refused = self.judge.now()
        units = sum(map(len, decision.units.values()))
        macs = surgeon.architecture.macs / max(surgeon.architecture.original_macs, 1)
        number = len(self.rounds) + 1
        made = Round(number, units, len(layers), macs, found.accuracy, found.loss, refused)
        self.rounds.append(made)
        self.progress.done(_described(name, made))
        if refused:
            surgeon.bring_back(before)
        else:
            self.evaluation, self._outputs = found, outputs
            self.matched = matched or self.matched
        return refused


def _described(name: str, made: Round) -> str:
    """For example: round 1 of 3: 34 units, 79% of the MACs left, accuracy 96.5%, loss 0.12"""
    accuracy = "" if math.isnan(made.accuracy) else f"accuracy {made.accuracy:.2%}, "
    what = f"{made.units} units" + (f" and {made.layers} layers" if made.layers else "")
    line = f"{name}: {what} go, {made.macs:.0%} of the MACs left, {accuracy}loss {made.loss:.3f}"
    return f"{line}\n  taken back: {made.refused}" if made.refused else line

"""``elesh.attach``: a training loop under Elesh, with a few added lines.

Promises: training never waits for Elesh, and goes on without it where the bus or the workers are
away; whatever a cut changes is on one side or the other when the process is killed at any moment,
and the next process with the same ``run_id`` goes on from there; no other code cuts the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from elesh.observe import get_logger
from elesh.settings import Settings
from elesh.trainer import Evaluation, Session, Surgeon
from elesh.trainer.adapters.epochs import EveryEpoch
from elesh.trainer.arguments import levels_of, require_network, require_one_process, whole_number
from elesh.trainer.network.calling import joined
from elesh.trainer.network.state import unwrapped
from elesh.trainer.recovery.snapshot import Stateful
from elesh.trainer.session.session import SessionObserver
from leyline import InvalidField, PrunedArchitecture, PruningOutcome

from .judging import Evaluate, evaluated, require_no_arguments
from .samples import Batch, divided, pair, require_no_copies

_log = get_logger(__name__)
_LEVELS = ("channel", "head", "layer")
_MEASURED = 256
"""Samples that a checkpoint is measured on, and cuts are refitted by, where a network is not wide:
what is there beyond them serves workers better, whose figures are as good as they are many."""


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run_id: str,
    calibration: Iterable[Batch],
    evaluate: Evaluate,
    held_out: tuple[Any, Tensor] | None = None,
    budget: Mapping[str, float] | None = None,
    removed_at_most: float | None = None,
    every: int | None = None,
    levels: Collection[str] = _LEVELS,
    scheduler: Stateful | None = None,
    scaler: Stateful | None = None,
    restore_dir: str | Path = "elesh-restore",
    url: str = "",
    settings: Settings | str | Path | None = None,
    ignored_layers: Sequence[str] = (),
    compared: Callable[[Any], Any] | None = None,
    observers: Sequence[SessionObserver] = (),
    **parts: Stateful | torch.Generator,
) -> Pruning:
    """Watch a network while it trains, and cut what is decided on.

    ::

        with elesh.attach(model, optimizer, run_id="my-run",
                          calibration=batches, evaluate=evaluate) as pruning:
            for epoch in pruning.epochs(120):
                train_one_epoch(model, optimizer)
                pruning.step(epoch)

    Args:
        model, optimizer: built as for a new run, also after an earlier process was killed.
        run_id: the name of the run; only one trainer at a time may use it.
        calibration: (inputs, labels) pairs of training data, about 500 samples (1,000 for a table,
            where a sample is one row), kept for the run.
        evaluate: takes no arguments and returns an ``elesh.Evaluation`` or (accuracy, loss) on your
            own validation data. It is the trainer's check of every cut. Called for cuts, once when
            a run begins, and at the first checkpoints, to learn how accuracy scatters.
        held_out: one batch (inputs, labels) of neither training nor validation data, on which
            workers measure cuts. Without it a fifth of ``calibration`` is used; of more than 256
            samples that are no rows of a table those beyond 256, at most 256, if these are more.
        budget: what may be left of the original network at the end, by resource (``{"macs":
            0.5}``); without it the schedule's shares apply. The schedule's limits stay above a
            budget. ``print(pruning)``, and a log line at the end, say whether it was reached, or
            what held it back.
        removed_at_most: share of the original units that may be removed in all, in place of the
            schedule's limit.
        every: epochs between two checkpoints; by default 5, or a tenth of a shorter run.
        levels: what may go: ``channel`` (and hidden units), ``head``, ``layer``.
        scheduler, scaler, parts: other objects that a restore point must hold: anything with
            ``state_dict`` and ``load_state_dict``, and torch generators.
        restore_dir: where restore points are kept, in a folder named like the run.
        url: Redis URL; empty: ``ELESH_REDIS_URL``, else the embedded server. Workers
            (``elesh worker``) run beside it, on this machine or others.
        settings: settings, or the path of a settings file; default: the file that
            ``ELESH_SETTINGS`` names, else the defaults.
        ignored_layers: names of layers, or of modules that hold some, whose outputs stay.
        compared: a function of the model's output that returns what must be equal under a mask and
            after a cut, if other outputs jump (see :class:`Recorder`); default: all of it.
        observers: called with checkpoints and outcomes (``TensorBoardSummaries``).

    Raises:
        InvalidField: if several processes train (DistributedDataParallel), samples are too few or a
            few repeated with noise, an argument is not as described (a level, a share, a network),
            or ``evaluate`` cannot be called without arguments. Nothing was changed then.
    """
    require_network(model)
    require_one_process()
    require_no_arguments(evaluate)
    if held_out is not None:
        held_out = pair("held_out", held_out)
    samples = divided(calibration, hold_out=held_out is None, measured=_MEASURED)
    samples = samples.taken_by(unwrapped(model))
    require_no_copies(unwrapped(model), samples)
    session = Session(run_id, url, settings, restore_dir=restore_dir, observers=observers)
    try:
        epochs = EveryEpoch(
            session,
            samples.calibration,
            (),
            held_out=held_out or joined(samples.held_out),
            evaluate=lambda network, batches: evaluated(evaluate()),
            budget=budget,
            removed_at_most=removed_at_most,
            every=every,
            levels=levels_of(levels),
            ignored_layers=ignored_layers,
            compared=compared,
        )
    except InvalidField:
        session.close()
        raise
    held: dict[str, Any] = {"scheduler": scheduler, "scaler": scaler, **parts}
    return Pruning(session, epochs, model, optimizer, held)


class Pruning:
    """A training run under Elesh; made by :func:`attach`, a context manager."""

    def __init__(
        self,
        session: Session,
        epochs: EveryEpoch,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[str, Any],
    ) -> None:
        self.session = session
        """The line to the bus, for those who want the parts."""
        self._epochs = epochs
        self._given: tuple[nn.Module, Any, Mapping[str, Any]] = (model, optimizer, parts)
        self.done = 0
        """The epoch that an earlier process of the run had reached; 0 for a new run."""
        self.outcomes: list[PruningOutcome] = []
        """What became of every decision so far, in this process."""

    def __enter__(self) -> Self:
        self.session.__enter__()
        try:
            model, optimizer, parts = self._given
            self.done = self._epochs.begin(model, optimizer, **parts)
            self._given = (model, None, {})  # who makes another optimizer afterwards has one only
        except BaseException:
            self.session.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if said := self._epochs.so_far():
            _log.info("run ends", reason=said)
        self.session.close()

    @property
    def surgeon(self) -> Surgeon:
        """Who cuts the network, for those who want the parts."""
        surgeon = self._epochs.surgeon
        if surgeon is None:
            raise InvalidField("pruning", "to be inside `with elesh.attach(...)`", "outside")
        return surgeon

    @property
    def architecture(self) -> PrunedArchitecture:
        """What the network looks like now."""
        return self.surgeon.architecture

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs that are still to be trained, up to ``count`` of the whole run, from 1. The
        last one publishes no checkpoint: its answer would come too late. With a budget, the phases
        of the schedule are those of so many epochs."""
        assert self.surgeon is not None
        self._epochs.ends_with(count)
        return iter(range(self.done + 1, count + 1))

    def step(
        self, epoch: int, evaluation: Evaluation | tuple[float, float] | None = None
    ) -> list[PruningOutcome]:
        """After an epoch: judge the cuts of the last ones, apply what has been decided, and every
        few epochs measure the network and publish. Never waits.

        Args:
            evaluation: what ``evaluate`` says after this epoch, for loops that have called it
                anyway: it is then called for the network under a mask and after a cut alone.

        Returns:
            What became of decisions at this epoch; mostly nothing.

        Raises:
            InvalidField: outside the ``with`` block, or where ``epoch`` is no whole number.
        """
        _ = self.surgeon  # refuses a call outside the block
        epoch = whole_number("epoch", epoch, least=0)
        known = None if evaluation is None else evaluated(evaluation)
        found = self._epochs.end_epoch(epoch, known)
        cut = any(outcome.watched for outcome in found)  # Then a restore point of now is there.
        if epoch % self._epochs.every == 0 and not cut:
            self.session.save(epoch)
        self.outcomes += found
        return found

    def evaluate(self) -> Evaluation:
        """How well the network does now."""
        _ = self.surgeon  # refuses a call outside the block
        return self._epochs.evaluate()

    def __str__(self) -> str:
        """What is left of the network in a line, and in another how far a budget was reached, or
        the limit without one, and what held it back."""
        now = self.architecture
        # A cut is reported twice: when it is made, and when its monitoring window ends.
        became = Counter({o.idempotency_key: o.result for o in self.outcomes}.values())
        parameters = now.parameters / max(now.original_parameters, 1)
        macs = now.macs / max(now.original_macs, 1)
        line = (
            f"{became['applied']} cuts applied, {became['rolled_back']} rolled back; "
            f"{parameters:.1%} of the parameters and {macs:.1%} of the MACs are left"
        )
        return "\n".join([line, *filter(None, [self._epochs.so_far()])])

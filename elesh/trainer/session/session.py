"""The session: a training run's connection to the bus, kept off the training thread.

Promises: ``publish`` and ``decisions`` never block and never raise because the bus is away; what
could not be sent is counted in ``missed`` and logged; a checkpoint that was published twice is one
event; an observer that fails is left out from then on, with its error in the log. A session uses
its parts and none of them uses it: what happens to the network is in :mod:`.monitoring`, where the
run stands in :mod:`elesh.trainer.recovery`, and everything that waits in :mod:`.bus_thread`, which
shares a :mod:`.mailbox` with the session and nothing else.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

from opentelemetry.trace import SpanKind

from elesh.observe import (
    carrier_of,
    get_logger,
    mark_failed,
    messaging,
    setup_tracing,
    span,
)
from elesh.settings import Settings
from elesh.trainer.calibration.recorder import UNNAMED, MeasuredCheckpoint
from elesh.trainer.network.calling import example_of
from elesh.trainer.recovery.checkpoints import Loading
from elesh.trainer.recovery.evaluation import (
    Judged,
    event_id_of,
    outcome_of,
    recompilation,
    trigger_of,
    validation_of,
)
from elesh.trainer.recovery.recovery import Recovery
from elesh.trainer.recovery.snapshot import Stateful, Tracked
from elesh.trainer.surgery.reconstruction.after_cut import InputCovariance
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import (
    CheckpointBundle,
    InvalidField,
    Message,
    PreflightCheck,
    PrunedArchitecture,
    PruningOutcome,
    StructuralPruningDecision,
    checkpoint_id,
    stable_hash,
)
from leyline.streams import CHECKPOINTS, OUTCOMES, RECOMPILE, REQUESTS, VALIDATION, Stream

from .apply import Evaluation, RefitData, preserving
from .bus_thread import BusThread
from .mailbox import Ended, Mailbox, Outgoing
from .monitoring import MonitoredCuts
from .preflight import preflight as try_all
from .preflight import require_passed, table

_log = get_logger(__name__)


class SessionObserver(Protocol):
    """Told of a run's checkpoints and decisions as they happen."""

    def on_checkpoint(self, bundle: CheckpointBundle) -> None:
        """A checkpoint is published."""

    def on_outcome(self, decision: StructuralPruningDecision, outcome: PruningOutcome) -> None:
        """A decision was applied, rolled back, refused or had been rejected."""

    def close(self) -> None:
        """The session ends."""


_Event = Literal["on_checkpoint", "on_outcome", "close"]


class Observers:
    """The observers of one session that have not failed."""

    def __init__(self, observers: Sequence[SessionObserver]) -> None:
        self._left = list(observers) if isinstance(observers, Iterable) else [observers]
        for each in self._left:
            if not any(hasattr(each, name) for name in get_args(_Event)):
                expected = f"objects with {', '.join(get_args(_Event))}"
                raise InvalidField("observers", expected, each)

    def notify(self, event: _Event, *about: object) -> None:
        """Call the method of this name of all of them."""
        for observer in tuple(self._left):
            try:
                getattr(observer, event)(*about)
            except Exception:
                self._left.remove(observer)
                _log.exception("observer left out", observer=type(observer).__name__)


_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Session:
    """Publishes a run's checkpoints and receives its decisions.

    Use it as a context manager around the training loop::

        with Session(run_id="my-run", restore_dir="restore") as session:
            done = session.resume(surgeon, scheduler=scheduler)  # 0 for a new run
            for epoch in range(done + 1, 121):
                train_one_epoch()
                session.watch(epoch, evaluate)
                for decision in session.decisions():
                    session.apply(decision, surgeon, evaluate)
                if epoch % 5 == 0:
                    recorder.architecture = surgeon.architecture
                    session.publish(recorder.measure(batches, epoch=epoch, run_id="my-run"))

    Args:
        run_id: the name of the run, at most 64 letters, digits and ``_.-``. Decisions of other runs
            are ignored, and only one trainer at a time may use it.
        url: Redis URL; empty: ``ELESH_REDIS_URL``, else the embedded server.
        settings: settings (bus, rollback triggers, the trainer's section), or the path of a
            settings file. Default: the file that ``ELESH_SETTINGS`` names, else the defaults.
        restore_dir: folder of the restore points, in a subfolder named like the run; empty: in
            memory, so that cuts can be taken back, but a killed process starts again from the
            beginning.
        observers: called with checkpoints and outcomes, on the training thread
            (``TensorBoardSummaries``).

    Raises:
        InvalidField: if the run id or the folder cannot be used.
        FolderInUse: if another process still has the run's folder after ``trainer.claim_seconds``.
        SettingsError: if the settings cannot be read.
    """

    _not_followed = True

    def __init__(
        self,
        run_id: str,
        url: str = "",
        settings: Settings | str | Path | None = None,
        *,
        restore_dir: str | Path = "",
        observers: Sequence[SessionObserver] = (),
    ) -> None:
        if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id):
            expected = "up to 64 letters, digits and _.-, the first a letter or digit"
            raise InvalidField("run_id", expected, run_id)
        self.run_id = run_id
        self.settings = Settings.in_force(settings)
        self._observers = Observers(observers)
        limits = self.settings.trainer
        try:
            folder = Path(restore_dir) / run_id if restore_dir else None
        except TypeError:
            raise InvalidField("restore_dir", "the path of a folder", restore_dir) from None
        self._recovery = Recovery(folder, limits.restore_points, limits.claim_seconds)
        self._cuts = MonitoredCuts(self.settings, self._recovery)
        self._mailbox = Mailbox()
        self._bus = BusThread(
            run_id,
            url or self.settings.bus.url,
            self.settings,
            self._mailbox,
            token=self._recovery.token or secrets.token_hex(8),
            sent=self._recovery.reported,
        )
        self._failed: dict[str, str] = {}
        self._heard: set[str] = set()
        self._decisions: list[StructuralPruningDecision] = []
        self._decided: dict[str, StructuralPruningDecision] = {}
        self._evaluate: Callable[[], Evaluation] | None = None
        self._preflight: tuple[PreflightCheck, ...] | None = None
        self._nothing_asked, self._asked = False, 0
        self._loading: Loading | None = None
        self._covariance: InputCovariance | None = None
        """Of the last checkpoint that was published."""

    @property
    def missed(self) -> int:
        """Messages that could not be queued or sent."""
        return self._mailbox.missed

    @property
    def failed(self) -> dict[str, str]:
        """Keys of what will have no decision, each with the reason: it became a dead letter, came
        too late, was shed or never published, or not answered. The end of an outcome that was
        published is under its stream's name and the key: ``outcomes: <key>``."""
        self._collect()
        return self._failed

    @property
    def unanswered(self) -> str:
        """That checkpoints were published and none was answered, and what to do; empty where one
        was, or none was published."""
        if not self._asked or self._heard:
            return ""
        said = f"none of {self._asked} checkpoints was answered"
        if self.failed:
            return f"{said}: {list(self._failed.values())[-1]}"
        return f"{said}: a worker must run meanwhile on the same bus, start it with: elesh worker"

    @property
    def refused(self) -> str:
        """Why this trainer may not speak for the run: another one does. Training goes on without
        Elesh then. Empty where it may."""
        return self._mailbox.refused

    @property
    def reused(self) -> str:
        """Who trained under this run id before, where this process did not resume that run; empty
        if no run did. The run goes on: its checkpoints are analysed anew."""
        return self._mailbox.reused

    @property
    def monitored(self) -> tuple[str, ...]:
        """Keys of the decisions whose cuts are monitored, oldest first."""
        return tuple(cut.key for cut in self._cuts.monitored)

    watched = monitored
    """The name in the version before."""

    @property
    def doubted(self) -> bool:
        """Whether the next report decides on a monitored cut that the last one failed by little."""
        return self._cuts.doubted

    @property
    def judged(self) -> Judged:
        """What the last decision that was checked was judged by."""
        return self._cuts.judged

    @property
    def knows_scatter(self) -> bool:
        """Whether enough is known of how accuracy moves from epoch to epoch."""
        return self._cuts.knows_scatter

    def __enter__(self) -> Self:
        self._recovery.keep_folder()
        setup_tracing("elesh-trainer", self.run_id, self.settings.observe)
        self._bus.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self, timeout: float = 5.0) -> None:
        """Send what is queued, for at most ``timeout`` seconds, and end the thread."""
        if self._mailbox.forked:  # thread, files and claim are the other process's
            return
        self._bus.close(timeout)
        self._recovery.close()
        self._observers.notify("close")
        if self._loading is not None:
            self._loading.end()

    def wait_connected(self, timeout: float) -> bool:
        """Wait until the bus answered once. Training does not need this; tools do."""
        return self._mailbox.connected.wait(timeout)

    @contextmanager
    def checkpoint(self, epoch: int) -> Iterator[None]:
        """The root span of a checkpoint: measure and publish inside, and the trace begins here."""
        with span("checkpoint", attributes={"elesh.run": self.run_id, "elesh.epoch": epoch}):
            yield

    def publish(self, bundle: CheckpointBundle) -> bool:
        """Queue a checkpoint for publishing; False (and counted as missed) if the queue is full.

        Where its metadata has no accuracy, the ``evaluate`` that :meth:`watch` or :meth:`apply` was
        last called with gives it, so that reports show it. One that was measured without a run id
        is this run's.

        Raises:
            InvalidField: if it was measured for another run: its answer would not be heard here.
        """
        bundle, self._nothing_asked = self._with_accuracy(self._of_this_run(bundle)), False
        if self._preflight is not None:  # In the run's first checkpoint only.
            metadata = bundle.metadata.model_copy(update={"preflight": self._preflight})
            bundle, self._preflight = replace(bundle, metadata=metadata), None
        metadata = bundle.metadata
        event_id = "ev-" + stable_hash(metadata.run_id, metadata.checkpoint_id)
        self._observers.notify("on_checkpoint", bundle)
        self._asked += 1
        return self._queue(CHECKPOINTS, bundle, metadata.epoch, event_id)

    def request(self, bundle: CheckpointBundle, request_id: str) -> bool:
        """Ask for an analysis by name, as a coordinator does (StructuralAnalysisRequest).

        The decision's key holds ``request_id`` where that of a checkpoint holds its own id; the
        bundle's levels, parameters and requirements are asked for.
        """
        bundle = self._of_this_run(bundle)
        event_id = "rq-" + stable_hash(bundle.metadata.run_id, request_id)
        return self._queue(REQUESTS, bundle, bundle.metadata.epoch, event_id, request_id)

    def decisions(self) -> list[StructuralPruningDecision]:
        """The decisions that have come since the last call; never waits."""
        self._collect()
        found, self._decisions = self._decisions, []
        return found

    def wait(self, timeout: float) -> bool:
        """Wait until something has come, for tools and tests; training has no need to. After
        :meth:`ask_nothing` it returns at once.

        Args:
            timeout: seconds.
        """
        seconds = 0.0 if self._nothing_asked else timeout
        return bool(self._decisions) or self._mailbox.arrived.wait(seconds)

    def ask_nothing(self) -> None:
        """No checkpoint is published where one was due: the budget is reached, or training ends."""
        self._nothing_asked = True

    def resume(
        self,
        surgeon: Surgeon,
        *,
        evaluate: Callable[[], Evaluation] | None = None,
        preflight: bool = True,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        here: int | None = None,
        **parts: Any,
    ) -> int:
        """Name what restore points hold, and go back to where the run's last process stood.

        Call it once, with network and optimizer as they are built for a new run. Held are the
        surgeon's network and optimizers, the global random generators, and whatever is named here:
        anything with ``state_dict`` and ``load_state_dict``, torch generators, and averages of the
        weights (``ema=average``: a module, a holder of one, tensors by path), which are from then
        on cut, masked and brought back with the network. Weights of before a cut that are loaded
        into the network later (``load_state_dict`` of the best ones) bring it to their structure.

        A new run begins with a preflight (:mod:`.preflight`), which prints one table: ``evaluate``,
        a mask, a training step after a cut of each kind, optimizers, and restore points are tried,
        all but the first two on copies.

        Args:
            evaluate: the one that :meth:`apply` will get; the preflight calls it once.
            preflight: whether to run it.
            here: continue from the present state, which is that after this epoch, instead of from
                the newest restore point, because a framework has loaded its own checkpoint.

        Returns:
            The epoch of the restored state, after which training continues; 0 for a new run.

        Raises:
            InvalidField: if a part's state holds more than tensors and plain values, the restore
                points are of another network or of other parts, or a check of the preflight fails.
        """
        named = {"scheduler": scheduler, "scaler": scaler, **parts}
        held = {name: part for name, part in named.items() if part is not None}
        epoch = self._recovery.resume(Tracked(surgeon, held), here)
        if not Loading.is_followed(surgeon):
            self._loading = Loading(surgeon)
        if preflight and not epoch and here is None:
            self._try_all(surgeon, evaluate, held)
        for outcome in self._recovery.unreported:
            self.report(outcome)
        return epoch

    def _try_all(
        self,
        surgeon: Surgeon,
        evaluate: Callable[[], Evaluation] | None,
        parts: Mapping[str, Any],
    ) -> None:
        report = try_all(surgeon, example_of(surgeon.model), evaluate, parts)
        print(table(report), flush=True)
        require_passed(report)
        self._preflight = report

    def save(self, epoch: int) -> bool:
        """Write a restore point of now, so that a killed run goes on from here and not only from
        its last cut; False, and a line in the log, if that fails."""
        return self._recovery.save(epoch)

    def apply(
        self,
        decision: StructuralPruningDecision,
        surgeon: Surgeon,
        evaluate: Callable[[], Evaluation],
        *,
        reconstruct: InputCovariance | Callable[[], InputCovariance] | None = None,
        redistribute: Callable[[], InputCovariance] | None = None,
        batches: Sequence[tuple[Any, Any]] = (),
        held_out: Sequence[tuple[Any, Any]] = (),
        known: Evaluation | None = None,
    ) -> PruningOutcome:
        """Restore point, mask, evaluate, cut or take back (see :func:`apply_decision`); publish
        the outcome. A cut that was made is monitored for ``trainer.watch_epochs`` calls of
        :meth:`watch`.

        An error of the surgery or of ``evaluate`` is not raised: the outcome is ``refused`` with
        the reason, and the network is what it was.

        Args:
            reconstruct: the input covariance of the present network, in place of that of the last
                published checkpoint; or what measures it (``recorder.moments``), called where that
                one is of another network, as after a restart or another cut.
            batches: (inputs, labels) pairs of calibration samples, for
                ``recorder.measure(..., batch_statistics=True)``.
            held_out: other samples, whose loss is checked beside ``evaluate``.
            known: the result of ``evaluate`` for the present network, if :meth:`watch` has just
                called it; it is not called again for that.
        """
        self._evaluate = evaluate
        before = surgeon.architecture
        if why := self._mailbox.refused or self._refusal(decision):
            _log.warning("decision refused", key=decision.idempotency_key, reason=why)
            return outcome_of(decision, before, before, "refused", why)
        own = self._covariance
        given = reconstruct is not None and not callable(reconstruct)
        if not given and own is not None and own.model_hash == before.model_hash:
            reconstruct = own  # of the last published checkpoint
        carrier = self._recovery.carriers.get(decision.idempotency_key, {})
        levels = ",".join(level.value for level in decision.taken)
        attributes = {"elesh.key": decision.idempotency_key, "elesh.levels": levels}
        with span(
            "apply decision", kind=SpanKind.CONSUMER, carrier=carrier, attributes=attributes
        ) as current:
            data = RefitData(reconstruct, redistribute, batches, held_out)
            outcome = self._cuts.apply(decision, surgeon, evaluate, data, known)
            current.set_attribute("elesh.outcome", outcome.result)
            triggers = self.settings.structured_pruning.rollback_triggers
            limit = trigger_of(decision, triggers)
            self._publish_outcome(outcome, limit, before, surgeon.architecture)
        if outcome.watched:
            self._decided[outcome.idempotency_key] = decision
        else:
            self._recovery.carriers.pop(outcome.idempotency_key, None)
        self._observers.notify("on_outcome", decision, outcome)
        return outcome

    def _refusal(self, decision: StructuralPruningDecision) -> str:
        """Why a decision is not this run's, or was applied before; empty if it may be applied.

        No outcome is published for it: the one that was published before stays true.
        """
        key = decision.key
        if decision.run_id != self.run_id:
            return (
                f"it was made for run {decision.run_id}, this is {self.run_id}; measure what is "
                f"decided here with recorder.measure(..., run_id={self.run_id!r})"
            )
        if (key.epoch, key.model_hash) != (decision.epoch, decision.model_hash):
            return f"its key {key} is of another epoch or architecture than its body"
        if decision.idempotency_key in self._recovery.journal.situation.tried:
            return "it was applied before; a decision is applied once in the life of a run"
        return ""

    def reach(self, epoch: int, evaluate: Callable[[], Evaluation]) -> None:
        """In place of :meth:`watch`: only say which epoch this is, and let the next report judge
        the monitored cuts."""
        self._evaluate, self._recovery.epoch = evaluate, epoch

    def watch(
        self,
        epoch: int,
        evaluate: Callable[[], Evaluation],
        *,
        always: bool = False,
        look: bool = True,
    ) -> list[PruningOutcome]:
        """Report an epoch's accuracy: monitored cuts stand it, or are rolled back.

        Call it once an epoch, after training and before :meth:`apply`. ``evaluate`` is called only
        while a cut is monitored. After a rollback everything that restore points hold is bit for
        bit what it was at the restore point; the training loop goes on with its next epoch.

        Args:
            always: evaluate even if nothing is monitored: changes of accuracy from epoch to epoch
                say whether a later cut is to blame for a fall.
            look: search for copies of the network that the script made since the cut, which a
                rollback must change, too; :meth:`apply` also does it.

        Returns:
            The final outcomes of the cuts that were decided on; mostly none.
        """
        self._evaluate = evaluate
        limits = {cut.key: cut.limit for cut in self._recovery.journal.situation.cuts}
        tracked = self._recovery.tracked
        if tracked is None:  # nothing was cut yet
            self.reach(epoch, evaluate)
            return []
        before = tracked.surgeon.architecture
        outcomes = self._cuts.watch(epoch, evaluate, always=always, look=look)
        for outcome in outcomes:
            key = outcome.idempotency_key
            # It belongs to the trace of the cut's checkpoint.
            carrier = self._recovery.carriers.get(key, {})
            attributes = {"elesh.key": key, "elesh.outcome": outcome.result}
            with span("monitored", kind=SpanKind.CONSUMER, carrier=carrier, attributes=attributes):
                now = tracked.surgeon.architecture
                self._publish_outcome(outcome, limits[key], before, now)
                before = now
            self._recovery.carriers.pop(key, None)
            if decision := self._decided.pop(outcome.idempotency_key, None):
                self._observers.notify("on_outcome", decision, outcome)
        return outcomes

    def report(self, outcome: PruningOutcome) -> bool:
        """Publish what became of a decision, with a link to it in the trace."""
        carrier = self._recovery.carriers.get(outcome.idempotency_key, {})
        return self._queue(OUTCOMES, outcome, outcome.epoch, event_id_of(outcome), answers=carrier)

    def _publish_outcome(
        self,
        outcome: PruningOutcome,
        limit: float,
        before: PrunedArchitecture,
        after: PrunedArchitecture,
    ) -> None:
        """Report an outcome; publish what was measured, for Urabrask, and an architecture that is
        another now, for Tezzeret. A decision that the network does not keep is found by the error
        status of the current span."""
        if outcome.result != "applied":
            mark_failed(outcome.result, outcome.detail)
        self.report(outcome)
        if (validation := validation_of(outcome, limit)) is not None:
            self._queue(VALIDATION, validation, outcome.epoch)
        if before.model_hash != after.model_hash:
            self._queue(RECOMPILE, recompilation(outcome, before, after), outcome.epoch)

    def _queue(
        self,
        stream: Stream,
        message: Message | CheckpointBundle,
        epoch: int,
        event_id: str = "",
        request_id: str = "",
        *,
        answers: Mapping[str, str] | None = None,
    ) -> bool:
        """Queue a message under a span that all later steps continue; an answer links to what it
        answers."""
        with span(
            f"create {stream.name}",
            kind=SpanKind.PRODUCER,
            attributes=messaging("create", stream.name),
            answers=answers,
        ):
            item = Outgoing(stream, message, carrier_of(), epoch, event_id, request_id)
            posted = self._mailbox.post(item)
            self._bus.wake()
            return posted

    def _collect(self) -> None:
        """Take in what has come."""
        for item in self._mailbox.received():
            if isinstance(item, Ended):
                self._failed[item.key] = item.reason
            elif isinstance(item.message, StructuralPruningDecision):
                key = item.message.idempotency_key
                if key in self._heard:
                    _log.warning("decision received again, skipped", key=key)
                    continue
                self._heard.add(key)
                self._recovery.carriers[key] = item.carrier
                self._decisions.append(item.message)

    def _of_this_run(self, bundle: CheckpointBundle) -> CheckpointBundle:
        """The bundle under this run's id; the covariance that cuts decided from it are refitted
        with is kept."""
        found = bundle.metadata
        if found.run_id not in (self.run_id, UNNAMED):
            hint = "recorder.measure(batches, epoch=epoch, run_id=session.run_id)"
            raise InvalidField("checkpoint.run_id", self.run_id, found.run_id, hint=hint)
        if isinstance(bundle, MeasuredCheckpoint) and bundle.covariance is not None:
            self._covariance = bundle.covariance
        if found.run_id == self.run_id:
            return bundle
        name = checkpoint_id(self.run_id, found.epoch, found.model_hash)
        metadata = found.model_copy(update={"run_id": self.run_id, "checkpoint_id": name})
        return replace(bundle, metadata=metadata)

    def _with_accuracy(self, bundle: CheckpointBundle) -> CheckpointBundle:
        """The bundle with accuracy and loss in its metadata, where they can be known."""
        tracked, metadata = self._recovery.tracked, bundle.metadata
        if metadata.accuracy is not None or self._evaluate is None or tracked is None:
            return bundle
        try:
            with span("evaluate checkpoint"):
                now = preserving(self._evaluate, tracked.surgeon.model)()
        except Exception:
            _log.exception("checkpoint published without accuracy", epoch=metadata.epoch)
            return bundle
        figures = {"accuracy": now.accuracy, "loss": now.loss}
        return replace(bundle, metadata=metadata.model_copy(update=figures))

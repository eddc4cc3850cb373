"""The verifier: finds a proposal's largest safe part on the network, and reports what it measured.

Promises: never raises for the network's sake; what cannot be measured is named and the
stricter gates of predicted cuts stand in; the same checkpoint and proposal give the same answer,
unless the window ends first, which is said as well and said again by a replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch

from elesh import safety
from elesh.safety import Entry, Harm, LogitGaps, Measured, Proposal
from elesh.safety.measured_gates import Outcomes
from elesh.settings import Settings, VerificationSettings
from leyline import (
    CheckpointBundle,
    ContractError,
    Fallback,
    GateResult,
    InvalidField,
    NetworkExport,
    PrunedArchitecture,
    Reconstructed,
    Reconstruction,
    Verification,
)

from . import (
    CALIBRATION_SKIPPED,
    GROUPS_TIMEOUT,
    RECONSTRUCTION_SKIPPED,
    ROUNDS_SKIPPED,
    ROUNDS_TIMEOUT,
    SKIPPED,
    TIMEOUT,
)
from .measure import Bench, LogitGapMeter, Measurement, TooSlow
from .program import DOES_NOT_RUN

_SHARE_OF_ROUNDS = 0.5
_SHARE_OF_GROUPS = 0.5
T = TypeVar("T")


class NetworkVerifier:
    """Measures proposals on the network that a checkpoint carries.

    Args:
        bundle: the checkpoint; has a network.
        settings: of the worker.
        seconds: how long measuring may take, from its first figure on; rounds half of it.
        met: in a replay, by fallback, what chance had refused then.
    """

    def __init__(
        self,
        bundle: CheckpointBundle,
        settings: Settings,
        seconds: float,
        met: Mapping[str, Fallback] | None = None,
    ) -> None:
        assert bundle.network is not None
        self._network: NetworkExport = bundle.network
        self._architecture: PrunedArchitecture = bundle.architecture
        self._parameters, self._said = bundle.parameters, bundle.metadata.accuracy
        self._shortens = bundle.parameters.failing_gate == "shorten"
        self._settings = settings
        self._seconds = seconds
        self._met = met or {}
        self._begun: float | None = None
        self._remeasured = 0

    def __call__(self, proposal: Proposal) -> Measured:
        """The largest safe part of ``proposal``."""
        found = self._tried(lambda: self._measured(proposal), "measuring", 1, TIMEOUT, SKIPPED)
        if isinstance(found, Fallback):
            return safety.predicted_only(proposal, self._settings, found)
        return found

    def remeasure(
        self, masked: Sequence[Entry], halved: Sequence[Entry] = ()
    ) -> LogitGaps | Fallback:
        """Logit gaps and their gradients with respect to every gate, with parts masked."""
        if ROUNDS_TIMEOUT in self._met:
            return self._met[ROUNDS_TIMEOUT]
        found = self._tried(
            lambda: self._logit_gaps(masked, halved),
            "choosing in rounds",
            _SHARE_OF_ROUNDS,
            ROUNDS_TIMEOUT,
            ROUNDS_SKIPPED,
        )
        # A failed measurement is not counted: a replay of such a decision does not repeat it.
        self._remeasured = 0 if isinstance(found, Fallback) else self._remeasured + 1
        return found

    def loss_increase(self, entries: Sequence[Entry]) -> float | Fallback:
        """What masking ``entries`` does to the loss, in nats a held-out sample."""
        if CALIBRATION_SKIPPED in self._met:
            return self._met[CALIBRATION_SKIPPED]
        return self._tried(
            lambda: self._until(1).outcomes(entries).loss - self._whole.loss,
            "measuring calibration probes",
            1,
            CALIBRATION_SKIPPED,
            CALIBRATION_SKIPPED,
        )

    def _tried(
        self, work: Callable[[], T], what: str, share: float, too_slow: str, otherwise: str
    ) -> T | Fallback:
        """What ``work`` returns, or why it cannot be done.

        Args:
            what: is done, in words.
            share: of the verifier's seconds that it may take.
            too_slow, otherwise: the fallbacks where it takes longer, or cannot be done at all.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums must not depend on the machine
        self._begun = time.monotonic() if self._begun is None else self._begun
        try:
            return work()
        except TooSlow:
            otherwise = too_slow
            reason = f"{what} takes longer than {share * self._seconds:g} s of the window"
        except ContractError as error:
            reason = str(error)
        except DOES_NOT_RUN as error:
            # The operators' own complaints: the program is not what it says.
            reason = f"the program does not run: {type(error).__name__}: {error}"
        finally:
            torch.set_num_threads(threads)
        return Fallback(rung=otherwise, reason=reason[:8192])

    def _until(self, share: float) -> Bench:
        """The network; measuring stops when this share of the time has passed."""
        assert self._begun is not None
        bench = self._bench
        bench.deadline = self._begun + share * self._seconds
        return bench

    @cached_property
    def _bench(self) -> Bench:
        return Bench(self._network, self._architecture, self._shortens)

    @cached_property
    def _whole(self) -> Outcomes:
        return self._bench.outcomes(())

    @cached_property
    def _meter(self) -> LogitGapMeter:
        inputs = self._bench.calibration()
        if not inputs:
            hint = "Exporter.export(..., calibration=inputs)"
            raise InvalidField(
                "held_out.calibration", "inputs to measure again on", "none", hint=hint
            )
        return LogitGapMeter(self._bench, self._architecture, inputs)

    def _logit_gaps(self, masked: Sequence[Entry], halved: Sequence[Entry]) -> LogitGaps:
        self._until(_SHARE_OF_ROUNDS)
        return self._meter(masked, halved)

    def _measured(self, proposal: Proposal) -> Measured:
        asked, fallbacks = self._parameters.reconstruction, tuple[Fallback, ...]()
        bench = self._until(1)
        if asked is None:
            return self._searched(proposal)
        try:
            bench.refit = bench.refitting(asked.skip, asked.batch_statistics)
        except ContractError as error:
            # The trainer may still refit: its own check is of the network after that.
            reason = f"measured without reconstruction: {error}"[:8192]
            found = self._searched(proposal)
            fallbacks = (*found.fallbacks, Fallback(rung=RECONSTRUCTION_SKIPPED, reason=reason))
            outcome = Reconstructed(applied=False, reason=reason, skip=asked.skip)
            return replace(found, reconstruction=outcome, fallbacks=fallbacks)
        if asked.batch_statistics and not bench.refit.norms:
            reason = "batch statistics stay: no normalisation of the program runs by them"
            fallbacks = (Fallback(rung=RECONSTRUCTION_SKIPPED, reason=reason),)
        try:
            found = self._searched(proposal)
            outcome = self._compared(found.kept or proposal.order, asked)
        finally:
            bench.refit = None
        if not outcome.applied:
            found = self._searched(proposal)
        return replace(found, reconstruction=outcome, fallbacks=(*found.fallbacks, *fallbacks))

    def _compared(self, entries: tuple[Entry, ...], asked: Reconstruction) -> Reconstructed:
        """Whether refitted weights do better on the held-out samples than those as they were, or
        at least not worse by more than the standard error of the difference."""
        bench, entries = self._bench, tuple(sorted(entries))
        refitted = bench.outcomes(entries)
        refit, bench.refit = bench.refit, None
        plain = bench.outcomes(entries)
        bench.refit = refit
        more = refitted.losses - plain.losses
        worse = float(more.mean()) > float(more.std()) / len(more) ** 0.5
        helps = not worse or refitted.accuracy > plain.accuracy
        figures = f"held-out loss {refitted.loss:.4g} with, {plain.loss:.4g} without"
        return Reconstructed(
            applied=helps,
            reason="" if helps else f"refitting does not help: {figures}",
            skip=asked.skip,
            batch_statistics=helps and refit is not None and bool(refit.norms),
            loss=refitted.loss,
            loss_without=plain.loss,
        )

    def _searched(self, proposal: Proposal) -> Measured:
        """The largest safe part of the proposal, with the weights as the bench has them."""
        settings = self._settings.verification
        bench = self._until(1)
        before = bench.measure(())
        search = _Search(bench, proposal, settings, self._remeasured, before)
        labels = (safety.labels_belong(before.outcomes, self._said),) if self._shortens else ()
        if not all(gate.passed for gate in labels):  # Then no figure means anything.
            gates, figures = search.verdict(proposal.order)
            return Measured((), (*labels, *gates), search.verification(figures, ()))
        order, fallbacks = proposal.order, tuple[Fallback, ...]()
        if proposal.rounds == 1 and not search.is_safe(order):
            order, fallbacks = self._by_measured_costs(search)
        safe = set(safety.largest_safe(order, search.is_safe))
        kept = tuple(entry for entry in proposal.order if entry in safe)
        least = 0.0 if self._shortens else settings.kept_share
        ranking = safety.ranking_holds(len(kept), len(proposal.order), least)
        kept = kept if ranking.passed else ()
        gates, figures = search.verdict(kept or proposal.order)
        measured = search.verification(figures, kept)
        return Measured(kept, (*labels, *gates, ranking), measured, fallbacks=fallbacks)

    def _by_measured_costs(self, search: _Search) -> tuple[tuple[Entry, ...], tuple[Fallback, ...]]:
        """The order of a proposal that is too much as a whole, by what each group's part of it is
        measured to cost alone; or the proposal's own, and why."""
        proposal = search.proposal
        if GROUPS_TIMEOUT in self._met:
            return proposal.order, (self._met[GROUPS_TIMEOUT],)
        parts = safety.parts_alone(proposal.order)
        if len(parts) == 1:
            return proposal.order, ()
        self._until(_SHARE_OF_GROUPS)
        try:
            found = [(part, search.cost_alone(part)) for part in parts]
        except TooSlow:
            seconds = _SHARE_OF_GROUPS * self._seconds
            reason = f"measuring groups alone takes longer than {seconds:g} s of the window"
            return proposal.order, (Fallback(rung=GROUPS_TIMEOUT, reason=reason),)
        finally:
            self._until(1)
        search.alone = len(parts)
        return safety.by_measured_costs(proposal.order, proposal.costs, found), ()


@dataclass
class _Search:
    """Measures parts of one proposal, each once."""

    bench: Bench
    proposal: Proposal
    settings: VerificationSettings
    remeasured: int
    """How often the network was measured while its units were chosen."""
    before: Measurement
    """With nothing masked."""
    seen: dict[tuple[Entry, ...], tuple[tuple[GateResult, ...], Harm]] = field(default_factory=dict)
    alone: int = 0
    """Parts that were measured for how they compare, and not judged."""

    def verdict(self, entries: tuple[Entry, ...]) -> tuple[tuple[GateResult, ...], Harm]:
        """Gates and figures with ``entries`` masked."""
        key = tuple(sorted(entries))
        if key not in self.seen:
            after = self.bench.measure(key)
            flow = self.bench.flow_change(self.before, after, key)
            levels = {entry[0] for entry in key}
            limits = safety.strictest_limits(self.settings, levels, self.proposal.phase)
            self.seen[key] = safety.harm(
                self.before.outcomes, after.outcomes, flow, limits, self.settings
            )
        return self.seen[key]

    def cost_alone(self, part: Sequence[Entry]) -> float:
        """By how much the loss rises with ``part`` masked, in nats a sample, above 0. The standard
        error counts, too: what seems to cost nothing may do so by chance."""
        more = self.bench.outcomes(tuple(sorted(part))).losses - self.before.outcomes.losses
        return max(float(more.mean() + more.std() / len(more) ** 0.5), 1e-9)

    def is_safe(self, entries: tuple[Entry, ...]) -> bool:
        """Whether ``entries`` pass every gate."""
        return all(gate.passed for gate in self.verdict(entries)[0])

    def verification(self, figures: Harm, kept: tuple[Entry, ...]) -> Verification:
        """The contract's figures."""
        left = len(self.proposal.order) - len(kept)
        stopped = self._failed(self.proposal.order) if left else ""
        return Verification(
            samples=self.bench.samples,
            measurements=self.remeasured + self.alone + len(self.seen),
            proposed=len(self.proposal.order),
            kept=len(kept),
            stopped=stopped,
            loss_before=self.before.outcomes.loss,
            predicted_loss_rise=self.proposal.predicted_loss_rise,
            loss_rise=figures.increase[0],
            loss_rise_interval=figures.increase[1],
            accuracy_before=self.before.outcomes.accuracy,
            accuracy_drop=figures.drop[0],
            accuracy_drop_interval=figures.drop[1],
            confidence=self.settings.confidence,
            class_accuracy_drop=figures.worst.drop,
            worst_class=figures.worst.number,
            gradient_flow_change=figures.flow,
            rounds=self.proposal.rounds,
        )

    def _failed(self, entries: tuple[Entry, ...]) -> str:
        """Which gates ``entries`` failed, with figures."""
        failed = [gate for gate in self.verdict(entries)[0] if not gate.passed]
        failures = [f"{g.name} {g.measured:.4g} against {g.limit:.4g}" for g in failed]
        return f"all {len(entries)} units: {', '.join(failures)}"

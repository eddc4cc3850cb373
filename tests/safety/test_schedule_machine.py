"""No sequence of checkpoints, restarts, replays and outcomes prunes more than the schedule allows,
or under an open breaker."""

from __future__ import annotations

import networks
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elesh.analysis import analyze, phase_at
from elesh.safety import BreakerStatus, votes
from elesh.settings import Settings
from leyline import Level, Phase, PrunedArchitecture, StructuralPruningDecision

SCHEDULE = {
    "validation_epochs": 4,
    "conservative_epochs": 4,
    "moderate_epochs": 4,
    "aggressive_epochs": 4,
}
SETTINGS = Settings.model_validate(
    {
        "structured_pruning": {
            "safety_schedule": SCHEDULE,
            "channel_analysis": {"max_predicted_shift": 1e9, "min_channels_per_layer": 2},
        }
    }
)
LIMITS = {Phase.CONSERVATIVE: 0.05, Phase.MODERATE: 0.10, Phase.AGGRESSIVE: 0.20}
ORIGINAL = networks.chain([24, 32, 24])
TOTAL = 80


def removed(architecture: PrunedArchitecture) -> int:
    return TOTAL - sum(group.size for group in architecture.groups)


class Run(RuleBasedStateMachine):
    """A trainer that crashes, restores, and meets decisions in any order, and its breaker."""

    @initialize()
    def begin(self) -> None:
        self.architecture, self.limit = ORIGINAL, 0.0
        self.saved = [(ORIGINAL, 0.0)]
        self.decisions: list[StructuralPruningDecision] = []
        self.failures, self.state = 0, "closed"

    def breaker(self) -> BreakerStatus:
        return BreakerStatus(self.state, self.failures, "test")

    def vote(self, vote: str) -> None:
        """The breaker's own rules, in short: three failures in a row open it."""
        if vote == "failure":
            self.failures += 1
            if self.failures >= 3 or self.state == "half_open":
                self.state = "open"
        elif vote == "success" and self.state != "open":
            self.failures, self.state = 0, "closed"

    @rule(epoch=st.integers(0, 20), seed=st.integers(0, 3))
    def checkpoint(self, epoch: int, seed: int) -> None:
        bundle = networks.bundle(self.architecture, epoch=epoch, seed=seed)
        decision = analyze(bundle, SETTINGS, breakers={Level.CHANNEL: self.breaker()})
        if decision.approved_for_application:
            phase = phase_at(epoch, SETTINGS.structured_pruning.safety_schedule)
            assert phase in LIMITS
            assert self.state != "open"
            cut = sum(map(len, decision.units.values()))
            assert removed(self.architecture) + cut <= LIMITS[phase] * TOTAL
        self.vote(votes(decision)[Level.CHANNEL])
        self.decisions.append(decision)

    @precondition(lambda self: self.decisions)
    @rule(data=st.data())
    def apply_one_that_arrived_sometime(self, data: st.DataObject) -> None:
        """Fresh, late or for the second time: the trainer checks the architecture's hash."""
        decision = data.draw(st.sampled_from(self.decisions))
        if not decision.approved_for_application:
            return
        if decision.model_hash == self.architecture.model_hash:
            self.architecture = self.architecture.without(decision.units)
            self.limit = max(self.limit, LIMITS[decision.safety.phase])
            self.vote("success")

    @rule()
    def save(self) -> None:
        self.saved.append((self.architecture, self.limit))

    @rule(data=st.data())
    def restart_from_any_saved_state(self, data: st.DataObject) -> None:
        self.architecture, self.limit = data.draw(st.sampled_from(self.saved))

    @rule(times=st.integers(1, 3))
    def report_rollbacks(self, times: int) -> None:
        for _ in range(times):
            self.vote("failure")

    @precondition(lambda self: self.state == "open")
    @rule()
    def recover(self) -> None:
        self.state = "half_open"

    @invariant()
    def the_network_is_within_the_limit_of_the_latest_phase_that_cut(self) -> None:
        gone = removed(self.architecture)
        assert gone <= self.limit * TOTAL + 1e-9
        assert gone <= 0.20 * TOTAL


TestRun = Run.TestCase
TestRun.settings = settings(stateful_step_count=15)

"""No cut is approved that was not measured on held-out data; what cannot be measured says why."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache

import msgpack
import proved_networks
import pytest
import safetensors.torch
import torch
from proved_networks import Trained, inverted

from elesh import program, safety
from elesh.analysis import analyze
from elesh.program import GROUPS_TIMEOUT, SKIPPED, TIMEOUT, verifier
from elesh.program.measure import Bench, TooSlow
from elesh.program.network_verifier import NetworkVerifier
from elesh.safety import BreakerStatus, Proposal
from elesh.trainer import Surgeon
from elesh.trainer.export import Exporter
from leyline import (
    CheckpointBundle,
    Level,
    NetworkExport,
    Outcome,
    Phase,
    StructuralPruningDecision,
    encode,
)

SETTINGS = proved_networks.settings()
MEASURED = safety.MEASURED_GATES


def decide(
    bundle: CheckpointBundle, recorded: StructuralPruningDecision | None = None
) -> StructuralPruningDecision:
    return analyze(bundle, SETTINGS, verify=verifier(bundle, SETTINGS, recorded))


@cache
def decided(network: str, epoch: int, *, wrong: bool = False) -> StructuralPruningDecision:
    """What is decided of that network at that epoch, by an inverted ranking or the right one: the
    same every time, as a test of this file shows."""
    trained = getattr(proved_networks, network)()
    return decide(inverted(trained, epoch) if wrong else trained.at(epoch))


def masked_accuracy(trained: Trained, decision: StructuralPruningDecision) -> float:
    surgeon = Surgeon(trained.model, trained.bundle.architecture)
    surgeon.mask(decision.units)
    try:
        return trained.accuracy
    finally:
        surgeon.unmask()


@pytest.fixture(params=["perceptron", "wine", "convolutions"])
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def trained(network: str) -> Trained:
    found: Trained = getattr(proved_networks, network)()
    return found


@pytest.mark.slow
def test_an_approved_cut_of_a_fifth_keeps_95_percent_of_the_accuracy_on_unseen_data(
    network: str, trained: Trained
) -> None:
    """Without fine-tuning, at the end of the aggressive phase; or less is approved, and why."""
    before, decision = trained.accuracy, decided(network, 119)
    found = decision.safety.verification
    assert found is not None, (decision.rejection_reason, decision.fallbacks)
    assert before > 0.85
    if not decision.approved_for_application:
        assert any(g.name in MEASURED and not g.passed for g in decision.safety.gates)
        assert found.kept == 0
        return
    assert masked_accuracy(trained, decision) >= 0.95 * before
    assert found.kept == sum(map(len, decision.units.values())) > 0
    assert (found.kept < found.proposed) == bool(found.stopped)
    assert decision.safety.outcome is Outcome.GO


@pytest.mark.sampled
def test_figures_of_a_measured_decision_are_those_of_the_masked_network(trained: Trained) -> None:
    decision = decide(trained.at(80))
    found = decision.safety.verification
    assert found is not None
    x, y = trained.held_out
    surgeon, losses, hits = Surgeon(trained.model, trained.bundle.architecture), [], []
    assert decision.units
    for units in ({}, decision.units):
        surgeon.mask(units)
        with torch.no_grad():
            logits = trained.model(x)
        losses.append(float(torch.nn.functional.cross_entropy(logits, y)))
        hits.append(float((logits.argmax(1) == y).float().mean()))
    surgeon.unmask()
    assert found.loss_before == pytest.approx(losses[0], abs=1e-5)
    assert found.loss_rise == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert found.accuracy_drop == pytest.approx(hits[0] - hits[1], abs=1e-6)
    assert found.loss_rise_interval.low <= found.loss_rise <= found.loss_rise_interval.high
    assert {gate.name for gate in decision.safety.gates} >= MEASURED
    assert decision.safety.measured


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes(network: str, trained: Trained) -> None:
    bundle, first = trained.at(119), decided(network, 119)
    threads = torch.get_num_threads()
    torch.manual_seed(99)
    assert encode(decide(bundle)) == encode(first)
    assert encode(decide(bundle, recorded=first)) == encode(first)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("epoch", [45, 85, 119])
@pytest.mark.parametrize("network", ["perceptron", "convolutions"])
@pytest.mark.sampled
def test_an_inverted_ranking_never_costs_more_than_the_limit(network: str, epoch: int) -> None:
    trained = getattr(proved_networks, network)()
    decision = decided(network, epoch, wrong=True)
    assert decision.safety.verification is not None
    limits = safety.strictest_limits(SETTINGS.verification, {Level.CHANNEL}, decision.safety.phase)
    limit = limits.accuracy_drop
    assert trained.accuracy - masked_accuracy(trained, decision) <= limit


@pytest.mark.slow
def test_a_ranking_that_is_mostly_wrong_is_refused_whole_and_counts_against_its_level() -> None:
    trained = proved_networks.convolutions()
    unmeasured = analyze(inverted(trained, 119), SETTINGS)
    assert unmeasured.approved_for_application, "nothing but measuring notices"
    assert masked_accuracy(trained, unmeasured) < trained.accuracy - 0.3
    decision = decided("convolutions", 119, wrong=True)
    assert "ranking" in decision.rejection_reason
    assert not decision.units
    assert safety.votes(decision) == {Level.CHANNEL: "failure"}
    assert decided("convolutions", 119).approved_for_application


@pytest.mark.slow
def test_a_cut_of_which_no_part_is_safe_is_refused_and_counts_against_its_level() -> None:
    trained = proved_networks.convolutions()
    bundle = trained.at(119)
    strict = SETTINGS.verification.model_copy(update={"gradient_flow_change": 0.0})
    settings = SETTINGS.model_copy(update={"verification": strict})
    decision = analyze(bundle, settings, verify=verifier(bundle, settings))
    assert not decision.approved_for_application
    assert decision.safety.outcome is Outcome.NO_GO
    assert "gradient_flow" in decision.rejection_reason
    assert not decision.units
    assert safety.votes(decision) == {Level.CHANNEL: "failure"}


def test_an_open_breaker_is_not_measured_against() -> None:
    bundle = proved_networks.perceptron().at(119)
    decision = analyze(
        bundle,
        SETTINGS,
        breakers={Level.CHANNEL: BreakerStatus("open", 3, "test")},
        verify=verifier(bundle, SETTINGS),
    )
    assert not decision.approved_for_application
    assert decision.safety.verification is None


def spoiled(kind: str, network: NetworkExport) -> NetworkExport:
    held_out = safetensors.torch.load(network.held_out)
    weights = safetensors.torch.load(network.weights)
    program = msgpack.unpackb(network.program)
    if kind == "no program":
        return replace(network, program=b"\x93\x01")
    if kind == "pickle":
        return replace(network, program=b"\x80\x04cos\nsystem\n(S'x'\ntR.")
    if kind == "another architecture":
        return replace(network, program=msgpack.packb(program | {"model_hash": "0" * 16}))
    if kind == "other operators":
        nodes = [[node[0], "aten.relu.default", [{"value": program["output"]}], {}]
                 for node in program["nodes"]]  # fmt: skip
        return replace(network, program=msgpack.packb(program | {"nodes": nodes}))
    if kind == "wrong shapes":
        nodes = program["nodes"]
        nodes[-1][1:] = ["aten.reshape.default", [{"value": nodes[-2][0]}, [7, 11, 13]], {}]
        return replace(network, program=msgpack.packb(program | {"nodes": nodes}))
    if kind == "no weights":
        weights.pop(next(iter(weights)))
        return replace(network, weights=safetensors.torch.save(weights))
    if kind == "other weights":
        name = next(iter(weights))
        weights[name] = weights[name][1:].contiguous()
        return replace(network, weights=safetensors.torch.save(weights))
    if kind == "NaN weights":
        name = next(iter(weights))
        weights[name].view(-1)[0] = torch.nan
        return replace(network, weights=safetensors.torch.save(weights))
    if kind == "no labels":
        held_out.pop("labels")
    elif kind == "one class":
        held_out["labels"] = torch.zeros_like(held_out["labels"])
    elif kind == "NaN":
        held_out["inputs/0"].view(-1)[5] = torch.nan
    elif kind == "labels outside":
        held_out["labels"][0] = 99
    elif kind == "few samples":
        held_out = {name: value[:8].contiguous() for name, value in held_out.items()}
    elif kind == "no inputs":
        held_out.pop("inputs/0")
    elif kind == "half labels":
        held_out["labels"] = held_out["labels"][::2].contiguous()
    elif kind == "not safetensors":
        return replace(network, held_out=b"junk")
    return replace(network, held_out=safetensors.torch.save(held_out))


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("no program", "program"),
        ("pickle", "program"),
        ("another architecture", "program.model_hash"),
        ("other operators", "program"),
        ("wrong shapes", "program does not run"),
        ("no weights", "weights."),
        ("other weights", "weights."),
        ("NaN weights", "weights."),
        ("no labels", "held_out.labels"),
        ("one class", "held_out.labels: expected at least two classes"),
        ("NaN", "held_out.inputs/0"),
        ("labels outside", "held_out.labels: expected classes"),
        ("few samples", "held_out.labels"),
        ("no inputs", "held_out.inputs/0"),
        ("half labels", "held_out.inputs/0"),
        ("not safetensors", "held_out"),
    ],
)
def test_what_cannot_be_measured_is_named_and_the_stricter_gate_stands_in(
    kind: str, named: str
) -> None:
    trained = proved_networks.perceptron()
    network = trained.bundle.network
    assert network is not None
    decision = decide(replace(trained.at(70), network=spoiled(kind, network)))
    (skipped,) = [taken for taken in decision.fallbacks if taken.rung == SKIPPED]
    assert named in skipped.reason
    assert decision.safety.verification is None
    assert not decision.safety.measured
    assert "predicted_loss" in {gate.name for gate in decision.safety.gates}
    assert decision.safety.outcome is not Outcome.GO


def test_nothing_is_approved_on_labels_of_one_class() -> None:
    """Nor by prediction: what would always answer that class looks perfect."""
    trained = proved_networks.perceptron()
    network = trained.bundle.network
    assert network is not None
    bundle = replace(trained.at(70), network=spoiled("one class", network))
    parameters = bundle.parameters.model_copy(update={"failing_gate": "shorten"})
    decision = decide(replace(bundle, parameters=parameters))
    assert not decision.approved_for_application
    assert decision.units == {}
    assert "labels: " in decision.rejection_reason
    assert "all held-out labels are class 0" in decision.rejection_reason
    assert SKIPPED not in {taken.rung for taken in decision.fallbacks}


def test_too_slow_for_the_window_is_named_and_replayed_as_it_was() -> None:
    bundle = proved_networks.perceptron().at(70)
    hurried = SETTINGS.model_copy(
        update={"worker": SETTINGS.worker.model_copy(update={"window_seconds": 1e-9})}
    )
    decision = analyze(bundle, hurried, verify=verifier(bundle, hurried))
    (taken,) = decision.fallbacks
    assert taken.rung == TIMEOUT
    again = analyze(bundle, SETTINGS, verify=verifier(bundle, SETTINGS, recorded=decision))
    assert again.fallbacks == decision.fallbacks
    assert again.safety == decision.safety


def proposed(bundle: CheckpointBundle, *, first: int) -> Proposal:
    """Half of every group; the statistics take the units of the group ``first`` for the
    cheapest of all, a thousand times cheaper than the others."""
    groups = [group for group in bundle.architecture.groups if group.prunable]
    costs = {
        (Level.CHANNEL, group.name, unit): (unit + 1.0) * (1e-3 if number == first else 1.0)
        for number, group in enumerate(groups)
        for unit in range(group.size // 2)
    }
    order = tuple(sorted(costs, key=costs.__getitem__))
    return Proposal(order, tuple(map(costs.__getitem__, order)), Phase.AGGRESSIVE)


def without_a_group(trained: Trained, number: int) -> Trained:
    """The network, of which the first half of a group's units is wasted: nothing reads it."""
    changed = copy.deepcopy(trained)
    assert isinstance(changed.model, torch.nn.Sequential)
    linear = [each for each in changed.model if isinstance(each, torch.nn.Linear)]
    with torch.no_grad():
        linear[number + 1].weight[:, : linear[number].out_features // 2] = 0
    architecture = changed.bundle.architecture
    network = Exporter(changed.model).export(architecture, changed.held_out, changed.held_out[0])
    return replace(changed, bundle=replace(changed.bundle, network=network))


def test_units_that_cost_nothing_go_though_statistics_take_another_group_for_cheaper() -> None:
    """How groups compare is measured where the whole is too much."""
    bundle = without_a_group(proved_networks.perceptron(), 1).bundle
    wasted = [group for group in bundle.architecture.groups if group.prunable][1]
    found = verifier(bundle, SETTINGS)(proposed(bundle, first=0))
    assert found.verification is not None
    assert found.verification.kept < found.verification.proposed
    order = proposed(bundle, first=0).order
    assert list(found.kept) == sorted(found.kept, key=order.index)
    kept = {unit for _, name, unit in found.kept if name == wasted.name}
    assert kept == set(range(wasted.size // 2))


def test_groups_that_cannot_be_compared_in_time_are_named_and_replayed_in_the_order_of_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = without_a_group(proved_networks.perceptron(), 1).bundle
    proposal = proposed(bundle, first=0)

    def slow(search: object, part: object) -> float:
        raise TooSlow

    with monkeypatch.context() as patched:
        patched.setattr("elesh.program.network_verifier._Search.cost_alone", slow)
        found = verifier(bundle, SETTINGS)(proposal)
    (taken,) = found.fallbacks
    assert taken.rung == GROUPS_TIMEOUT
    again = NetworkVerifier(bundle, SETTINGS, math.inf, {GROUPS_TIMEOUT: taken})(proposal)
    assert again == found
    assert set(found.kept) == set(proposal.order[: len(found.kept)])


def test_a_worker_without_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elesh.program.find_spec", lambda name: None)
    decision = decide(proved_networks.perceptron().at(70))
    (taken,) = decision.fallbacks
    assert "no torch" in taken.reason
    assert decision.safety.outcome is not Outcome.GO


def test_a_predicted_rise_that_measuring_might_allow_is_refused_unmeasured() -> None:
    order = ((Level.CHANNEL, "a", 0),)
    limit = SETTINGS.verification.channel.conservative.loss_rise
    for rise, passes in ((limit / 2, True), (limit * 0.51, False)):
        proposal = Proposal(order, (0.0,), Phase.CONSERVATIVE, predicted_loss_rise=rise)
        (gate,) = safety.predicted_only(proposal, SETTINGS).gates
        assert gate.passed is passes


@pytest.mark.slow
def test_batch_statistics_that_lag_behind_training_are_no_change_of_a_cut() -> None:
    trained = copy.deepcopy(proved_networks.convolutions())
    for module in trained.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var *= 2
    architecture, calibration = trained.bundle.architecture, trained.unseen[0]
    network = Exporter(trained.model).export(architecture, trained.held_out, calibration)
    bench = Bench(network, architecture)
    bench.refit = bench.refitting((), batch_statistics=True)
    group = next(group for group in architecture.groups if group.prunable)
    one: list[safety.Entry] = [(Level.CHANNEL, group.name, 0)]
    before, after = bench.measure(()), bench.measure(one)
    assert bench.flow_change(before, after, one) < 0.15
    assert bench.measure(()).outcomes.loss == before.outcomes.loss, "the network is as it was"


def test_what_measures_can_be_asked_for_again_after_it_was_loaded() -> None:
    """Regression: a module of the function's name took its place once it was imported."""
    program.preload()
    assert program.verifier is verifier

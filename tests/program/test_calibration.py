"""Predictions are measured in the preparation phase, and what that says is used and stated."""

from __future__ import annotations

from dataclasses import replace

import proved_networks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from elesh import safety
from elesh.analysis import analyze
from elesh.analysis.levels.units import select_channels
from elesh.program import CALIBRATION_SKIPPED, verifier
from elesh.safety import Proposal, calibrated
from elesh.settings import VerificationSettings
from elesh.trainer import Surgeon
from leyline import (
    CheckpointBundle,
    Level,
    LossFactor,
    Phase,
    StructuralPruningDecision,
    WouldBeCut,
    encode,
)

SETTINGS = proved_networks.settings()
PREPARING = 25


def decide(
    bundle: CheckpointBundle,
    recorded: StructuralPruningDecision | None = None,
    factor: LossFactor | None = None,
) -> StructuralPruningDecision:
    verify = verifier(bundle, SETTINGS, recorded)
    return analyze(bundle, SETTINGS, verify=verify, loss_factor=factor)


@pytest.mark.slow
def test_would_be_cuts_are_measured_as_the_masked_network_does() -> None:
    trained = proved_networks.digits()
    decision = decide(trained.at(PREPARING))
    assert decision.safety.phase is Phase.PREPARATION
    assert not decision.approved_for_application
    assert not decision.units
    x, y = trained.held_out
    surgeon = Surgeon(trained.model, trained.bundle.architecture)

    def loss() -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(trained.model(x), y))

    before, channels = loss(), SETTINGS.structured_pruning.channel_analysis
    assert len(decision.would_be) == 4
    for cut in decision.would_be:
        surgeon.mask(select_channels(trained.bundle, cut.units, settings=channels))
        assert cut.measured == pytest.approx(loss() - before, abs=1e-5)
        surgeon.unmask()
    assert encode(decide(trained.at(PREPARING), recorded=decision)) == encode(decision)
    assert not decide(trained.at(80)).would_be, "in the preparation phase only"
    assert not decide(replace(trained.at(PREPARING), network=None)).would_be


def test_what_cannot_be_measured_is_named_and_replayed_as_it_was() -> None:
    trained = proved_networks.perceptron()
    network = trained.bundle.network
    assert network is not None
    bundle = replace(trained.at(PREPARING), network=replace(network, held_out=b"junk"))
    decision = decide(bundle)
    (taken,) = decision.fallbacks
    assert taken.rung == CALIBRATION_SKIPPED
    assert "held_out" in taken.reason
    assert not decision.would_be
    assert encode(decide(bundle, recorded=decision)) == encode(decision)
    # Nor does a replay measure what could not be measured then.
    assert encode(decide(trained.at(PREPARING), recorded=decision)) == encode(decision)


def test_a_worker_without_torch_says_that_it_does_not_calibrate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("elesh.program.find_spec", lambda name: None)
    (taken,) = decide(proved_networks.perceptron().at(PREPARING)).fallbacks
    assert taken.rung == CALIBRATION_SKIPPED
    assert "no torch" in taken.reason


cuts = st.lists(
    st.builds(
        WouldBeCut,
        units=st.integers(0, 100),
        predicted=st.floats(-1, 10),
        measured=st.floats(-1, 100),
    ),
    max_size=30,
)


@given(cuts, st.integers(0, 10), st.floats(1, 8))
def test_the_factor_is_bounded_and_needs_enough_measurements(
    found: list[WouldBeCut], least: int, default: float
) -> None:
    settings = VerificationSettings(calibration_measurements=least, predicted_loss_factor=default)
    factor = calibrated(found, settings)
    telling = sum(cut.predicted >= 1e-3 for cut in found)
    assert (factor is None) == (not least or telling < max(2, least))
    if factor is not None:
        assert 1 <= factor.factor <= 2 * default + 1e-3
        assert factor.measurements == telling
        assert factor == calibrated(reversed(found), settings), "whatever came first"


def test_predictions_that_are_too_low_make_the_gate_stricter() -> None:
    settings = VerificationSettings()
    for ratio, expected in ((0.4, 1.0), (1.5, 1.5), (3.0, 3.0), (9.0, 4.0)):
        found = [WouldBeCut(units=9, predicted=0.01, measured=0.01 * ratio)] * 6
        factor = calibrated(found, settings)
        assert factor is not None
        assert factor.factor == pytest.approx(expected)


def test_nine_of_ten_measured_rises_lie_below_the_prediction_times_the_factor() -> None:
    ratios = [1.0 + number / 10 for number in range(11)]
    found = [WouldBeCut(units=9, predicted=0.01, measured=0.01 * ratio) for ratio in ratios]
    factor = calibrated(found, VerificationSettings())
    assert factor is not None
    assert factor.factor == pytest.approx(1.9)


def test_the_gate_of_predicted_cuts_states_where_its_factor_comes_from() -> None:
    bundle = replace(proved_networks.perceptron().at(80), network=None)
    own = LossFactor(factor=1.25, measurements=7)
    gates = {}
    for factor in (None, own):
        decision = decide(bundle, factor=factor)
        assert decision.loss_factor == factor
        gates[factor] = next(g for g in decision.safety.gates if g.name == "predicted_loss")
    default, calibrated_ = gates[None], gates[own]
    assert default.measured is not None
    assert calibrated_.measured is not None
    assert "times 2 (default)" in default.detail
    assert "times 1.25 (calibrated from 7 cuts of this run)" in calibrated_.detail
    assert calibrated_.measured == pytest.approx(default.measured / 2 * 1.25)
    limit = SETTINGS.verification.channel.conservative.loss_rise
    order = ((Level.CHANNEL, "a", 0),)
    proposal = Proposal(order, (0.0,), Phase.CONSERVATIVE, limit * 0.7, loss_factor=own)
    assert safety.predicted_only(proposal, SETTINGS).gates[0].passed
    assert not safety.predicted_only(replace(proposal, loss_factor=None), SETTINGS).gates[0].passed

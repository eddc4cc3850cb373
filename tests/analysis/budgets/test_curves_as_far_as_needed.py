"""Curves of marginal costs are drawn as far as a budget needs them; nothing else comes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import trainer_nets

from elesh import analyze
from elesh.analysis.budgets import fitting
from elesh.pruning.at_once import _settings
from elesh.safety import Measured, Proposal
from elesh.trainer import Recorder
from leyline import Budget, CheckpointBundle, Level


@pytest.fixture(scope="module")
def bundle() -> CheckpointBundle:
    torch.manual_seed(0)
    model, x = trainer_nets.build("Vgg"), trainer_nets.example()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, *x.shape[1:], generator=generator)
    found = Recorder(model, x).measure([(inputs, torch.arange(24) % 4)], epoch=120)
    return replace(found, levels=(Level.CHANNEL,))


@pytest.mark.parametrize("at_most", [0.9, 0.5, 0.2])
def test_a_budget_is_fitted_the_same_with_whole_curves(
    bundle: CheckpointBundle, at_most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(resource="macs", at_most=at_most)
    asked = replace(bundle, parameters=bundle.parameters.model_copy(update={"budget": budget}))
    depths: list[int] = []
    curves = fitting._curves

    def seen(ranking, own, quota):  # type: ignore[no-untyped-def]
        depths.append(sum(own.values()))
        return curves(ranking, own, quota)

    def later(proposal: Proposal) -> Measured:
        return Measured(proposal.order)

    def decided() -> object:
        return analyze(asked, _settings(1, 1, 1, True), verify=later).units

    monkeypatch.setattr(fitting, "_curves", seen)
    needed = decided()
    assert needed
    first = depths[0]
    monkeypatch.setattr(fitting, "_AT_FIRST", 1e9)
    depths.clear()
    assert decided() == needed
    assert at_most < 0.9 or first < depths[0] / 2, "the whole curves were drawn"

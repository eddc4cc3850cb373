"""Figures that a mask does not move prove nothing, and evaluating does not disturb training."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from elesh.analysis import analyze
from elesh.settings import Settings
from elesh.trainer import Evaluation, Recorder, Surgeon, apply_decision
from elesh.trainer.session.apply import preserving
from leyline import ChannelPruningTarget, StructuralPruningDecision


def world() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(64, 8)
    return model, x, model(x).argmax(1)


def decision(
    recorder: Recorder, x: Tensor, y: Tensor, gone: list[int]
) -> StructuralPruningDecision:
    found = analyze(recorder.measure([(x, y)], epoch=100), settings=Settings())
    target = ChannelPruningTarget(
        layer_name="0",
        channel_indices=tuple(gone),
        original_indices=tuple(gone),
        importance=(0.1,) * len(gone),
        channels_before=16,
        channels_after=16 - len(gone),
    )
    approved = {"channels": (target,), "approved_for_application": True, "rejection_reason": ""}
    return found.model_copy(update=approved)


def evaluation(network: nn.Module, x: Tensor, y: Tensor) -> Evaluation:
    with torch.no_grad():
        out = network(x)
    return Evaluation(
        float((out.argmax(1) == y).float().mean()), float(functional.cross_entropy(out, y))
    )


def test_a_decision_that_removes_nothing_is_refused_for_that_and_not_blamed_on_evaluate() -> None:
    model, x, y = world()
    recorder = Recorder(model, x)
    whole = decision(recorder, x, y, [0])
    outcome = apply_decision(
        whole.model_copy(update={"channels": ()}),
        Surgeon(model, recorder.architecture),
        lambda: evaluation(model, x, y),
    )
    assert (outcome.result, outcome.detail) == (
        "refused",
        "it names no unit and no layer to remove",
    )


def test_an_evaluation_of_a_copy_is_no_check() -> None:
    model, x, y = world()
    recorder, before = Recorder(model, x), copy.deepcopy(model.state_dict())
    surgeon, aside = Surgeon(model, recorder.architecture), copy.deepcopy(model)
    outcome = apply_decision(
        decision(recorder, x, y, [0, 1]), surgeon, lambda: evaluation(aside, x, y)
    )
    assert outcome.result == "refused"
    assert "surgeon.model" in outcome.detail
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not surgeon.masked


def test_channels_that_do_nothing_are_cut_although_no_figure_moves() -> None:
    model, x, y = world()
    with torch.no_grad():
        model[2].weight[:, [0, 1]] = 0
    recorder = Recorder(model, x)
    surgeon = Surgeon(model, recorder.architecture)
    y = model(x).argmax(1)
    outcome = apply_decision(
        decision(recorder, x, y, [0, 1]), surgeon, lambda: evaluation(model, x, y)
    )
    assert outcome.result == "applied", outcome.detail


def test_evaluating_leaves_random_states_and_flags_as_they_were() -> None:
    model, x, y = world()
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=torch.Generator())

    def evaluate() -> Evaluation:
        model.eval()
        random.random()
        np.random.rand()
        return evaluation(model, *next(iter(loader)))

    def states() -> tuple[object, ...]:
        torches = [torch.get_rng_state().tolist(), loader.generator.get_state().tolist()]
        return random.getstate(), np.random.get_state()[1].tolist(), torches, model.training

    before = states()
    first, second = preserving(evaluate, model)(), preserving(evaluate, model)()
    assert states() == before
    assert first == second


def test_what_evaluating_raises_comes_through() -> None:
    def fails() -> Evaluation:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        preserving(fails, None)()

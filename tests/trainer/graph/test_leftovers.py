"""No width stays without a word, and products of recurrent layers and of functions are counted."""

from __future__ import annotations

import pytest
import torch
from cut_check import counted_macs, cut_and_checked
from torch import Tensor, nn

from elesh.trainer import Recorder

STEPS = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    """[B, T, 10] to [B, T, 3]."""

    def __init__(self, inner: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(10, 8), inner, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.leave(self.inner(self.enter(x))[0])
        return made


class Cells(nn.Module):
    """[B, T, 10] to [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.leave = nn.GRUCell(10, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 7)
        for step in x.unbind(1):
            state = self.inner(step, state)
        made: Tensor = self.leave(state)
        return made


def _layers() -> dict[str, nn.Module]:
    several = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    return {
        "gru": Recurrent(nn.GRU(8, 6, **several), 12),
        "rnn": Recurrent(nn.RNN(8, 6, batch_first=True), 6),
        "cells": Cells(),
    }


@pytest.mark.parametrize("name", ["gru", "rnn", "cells"])
def test_products_of_recurrent_layers_are_counted(name: str) -> None:
    model = _layers()[name].eval()
    assert Recorder(model, STEPS).architecture.macs == counted_macs(model, STEPS)


def test_states_of_cells_have_a_reason() -> None:
    states = Recorder(Cells().eval(), STEPS).architecture.group["inner.states"]
    assert "read by all of its states in the next step" in states.reason
    parts = {(part.tensor, part.dim): part.width for part in states.slices}
    assert parts == {(f"inner.{w}_{s}", 0): 3 for w in ("weight", "bias") for s in ("ih", "hh")}


@pytest.mark.parametrize(("name", "parts"), [("gru", 3), ("rnn", 1)])
def test_states_of_recurrent_layers_go_from_all_layers_and_directions(
    name: str, parts: int
) -> None:
    model = _layers()[name]
    surgeon = cut_and_checked(model, STEPS)
    group = surgeon.architecture.group["inner"]
    assert group.prunable
    assert group.size == 6
    inner = model.inner
    assert isinstance(inner, nn.RNNBase)
    surgeon.cut({"inner": [0, 4]})
    assert inner.hidden_size == 4
    assert inner.weight_hh_l0.shape == (4 * parts, 4)
    if inner.bidirectional:  # The second layer reads both directions of the first.
        assert inner.weight_ih_l1_reverse.shape == (4 * parts, 8)
    assert surgeon.architecture.macs == counted_macs(model, STEPS)


def test_a_recurrent_layer_whose_weights_lie_in_one_memory_can_go() -> None:
    model = Recurrent(nn.GRU(8, 6, batch_first=True), 6)
    weights = list(model.inner.parameters())
    whole = torch.cat([weight.detach().flatten() for weight in weights])
    for weight, part in zip(weights, whole.split([w.numel() for w in weights]), strict=True):
        weight.data = part.view_as(weight)
    group = cut_and_checked(model, STEPS).architecture.group["inner"]
    assert group.prunable


class Started(Recurrent):
    """First states are zeros, or made of the first step."""

    def __init__(self, learned: bool) -> None:
        super().__init__(nn.GRU(8, 6, batch_first=True), 6)
        self.hidden_size, self.first = 6, nn.Linear(8, 6) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        first = torch.zeros(1, len(x), self.hidden_size)
        if self.first is not None:
            first = self.first(x[:, 0])[None]
        made: Tensor = self.leave(self.inner(x, first)[0])
        return made


def test_states_that_begin_with_anything_but_zeros_stay() -> None:
    assert cut_and_checked(Started(False), STEPS).architecture.group["inner"].prunable
    group = cut_and_checked(Started(True), STEPS).architecture.group["inner"]
    assert group.reason == "inner gets its first states as an input"


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_products_of_an_lstm_are_those_of_its_steps() -> None:
    inner = nn.LSTM(8, 6, num_layers=2, proj_size=4, batch_first=True)
    architecture = Recorder(Recurrent(inner, 4), STEPS).architecture
    steps = sum(p.numel() for n, p in inner.named_parameters() if "weight" in n)
    assert architecture.macs == 6 * (10 * 8 + steps + 4 * 3)


class Mixture(nn.Module):
    """Experts whose weights lie in one tensor and are all used, [B, T, 10] to [B, T, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.router = nn.Linear(10, 8), nn.Linear(8, 4)
        self.up = nn.Parameter(torch.randn(4, 8, 12) * 0.3)
        self.down = nn.Parameter(torch.randn(4, 12, 3) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        inner = torch.relu(torch.einsum("btd,edh->bteh", x, self.up))
        each = torch.einsum("bteh,eho->bteo", inner, self.down)
        return (each * self.router(x).softmax(-1).unsqueeze(-1)).sum(2)


def test_weights_that_functions_multiply_by_are_counted_and_go() -> None:
    torch.manual_seed(0)
    model = Mixture().eval()
    surgeon = cut_and_checked(model, STEPS)
    group = surgeon.architecture.group
    assert surgeon.architecture.macs == counted_macs(model, STEPS)
    assert (group["up"].size, group["up"].prunable) == (12, True)
    assert (group["down"].size, group["down"].reason) == (3, "network output")


class Rotating(nn.Module):
    """Pairs of a parameter are complex numbers: [B, T, 10] to [B, T, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.turns, self.enter = nn.Parameter(torch.randn(8, 2)), nn.Linear(10, 8)
        self.leave = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(self.turns).abs() * self.enter(x)
        return torch.as_tensor(self.leave(turned))


def test_parameters_that_are_viewed_as_complex_numbers_are_recorded() -> None:
    assert Recorder(Rotating(), STEPS).architecture.parameters == 16 + 88 + 27

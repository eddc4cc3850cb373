"""Latency tables: of the network's own layers and sizes, measured without a trace left behind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from elesh.analysis.budgets.knapsack import resource_model
from elesh.cli import app
from elesh.trainer import Recorder
from elesh.trainer.latency import _cut, channel_step, measure_latency, with_surroundings
from leyline import Budget, LatencyTable, LayerLatency


class Net(nn.Module):
    """Plain, depthwise and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.point = nn.Conv2d(24, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.point(torch.relu(self.depth(torch.relu(self.stem(x))))))
        return torch.as_tensor(self.head(x.mean((2, 3))))


def test_a_table_has_every_layer_at_sizes_up_to_its_own_and_leaves_the_network_alone() -> None:
    model, inputs = Net(), torch.randn(2, 3, 8, 8)
    recorder, before = Recorder(model, inputs), copy.deepcopy(model.state_dict())
    table = measure_latency(model, inputs, recorder.architecture, rounds=1, seconds=1e-4)
    assert {layer.layer for layer in table.layers} == {"stem", "depth", "point", "head"}
    for layer in table.layers:
        weight = model.get_submodule(layer.layer).weight
        assert isinstance(weight, torch.Tensor)
        assert (layer.outputs[-1], layer.inputs[-1]) == tuple(weight.shape[:2])
    assert table.batch == 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    budget = Budget(resource="latency", at_most=0.8, latency=table)
    cost = resource_model(recorder.architecture, budget)
    assert cost.total({}) <= table.total_seconds * 1.001


def test_grouped_convolutions_are_timed_with_fewer_places_in_every_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 48, 3, groups=2), nn.Conv2d(48, 5, 1))
    inputs = torch.randn(2, 3, 6, 6)
    architecture = Recorder(model, inputs).architecture
    table = measure_latency(model, inputs, architecture, rounds=1, seconds=1e-4)
    grouped = next(layer for layer in table.layers if layer.layer == "1")
    assert len(grouped.outputs) > 1 < len(grouped.inputs)
    assert (grouped.outputs[-1], grouped.inputs[-1]) == (48, 32)
    assert all(size % 2 == 0 for size in grouped.outputs)


def test_what_surrounds_the_layers_goes_with_their_outputs_as_smaller_networks_tell() -> None:
    """Totals that are a constant, the layers, and so much an output, are told apart exactly."""
    architecture = Recorder(Net(), torch.randn(2, 3, 8, 8)).architecture
    each, fixed, batch_seconds = 1e-6, 5e-4, 1e-3
    rows = tuple(
        LayerLatency(layer=name, outputs=(size,), seconds=(batch_seconds,))
        for name, size in (("stem", 24), ("depth", 24), ("point", 32), ("head", 5))
    )
    smaller = [{"point": range(16, 32)}, {"point": range(8, 32), "stem": range(12, 24)}]
    smaller = [{name: list(units) for name, units in lost.items()} for lost in smaller]
    assert all(name in architecture.group for lost in smaller for name in lost)

    def total(lost: dict[str, list[int]]) -> float:
        after = architecture.without(lost) if lost else architecture
        outputs = sum(
            layer.positions * after.tensor[layer.weight].shape[0]
            for layer in after.layers
            if layer.weight
        )
        return fixed + 4 * batch_seconds + each * outputs

    totals = [total(lost) for lost in ({}, *smaller)]
    table = LatencyTable(device="test", batch=2, total_seconds=totals[0], layers=rows)
    found = with_surroundings(table, architecture, smaller, totals)
    point = next(layer for layer in found.layers if layer.layer == "point")
    assert point.seconds[0] == pytest.approx(batch_seconds + each * 32 * 64)
    model = resource_model(architecture, Budget(resource="latency", at_most=1, latency=found))
    assert model.fixed == pytest.approx(fixed, rel=1e-6)
    # Where the rest does not grow with the outputs, nothing is added.
    flat = with_surroundings(table, architecture, smaller, [totals[0]] * 3)
    assert flat.layers == rows


def test_sizes_are_timed_at_both_sides_of_the_devices_steps() -> None:
    model = nn.Sequential(nn.Linear(100, 70), nn.ReLU(), nn.Linear(70, 9))
    inputs = torch.randn(4, 100)
    recorder, step = Recorder(model, inputs), channel_step(torch.device("cpu"))
    assert step * 4 in (16, 32, 64), "bytes of a vector register"
    assert channel_step(torch.device("cuda"), torch.float16) == 8
    table = measure_latency(model, inputs, recorder.architecture, rounds=1, seconds=1e-5)
    first = next(layer for layer in table.layers if layer.layer == "0")
    for sizes, size in ((first.outputs, 70), (first.inputs, 100)):
        edges = [n for n in sizes if n % step == 0 and n < size]
        assert edges
        assert all(n + 1 in sizes for n in edges)
        assert sizes[-1] == size


def test_the_command_writes_a_table_that_reads_back(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    arguments = ["profile", f"{__name__}:Net", "--shape", "1,3,8,8", "--rounds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert LatencyTable.model_validate_json(out.read_text()).batch == 1
    assert "stem" in result.output
    assert f"round_to: {channel_step(torch.device('cpu'))} wastes none" in result.output


def test_a_target_that_is_none_is_refused_by_name() -> None:
    result = CliRunner().invoke(app, ["profile", "nowhere:build", "--shape", "1,3"])
    assert result.exit_code == 1
    assert "nowhere:build" in result.output


def test_what_is_timed_smaller_is_a_copy_whatever_stands_in_place_of_its_forward() -> None:
    model, inputs = Net(), torch.randn(2, 3, 8, 8)
    architecture, plain = Recorder(model, inputs).architecture, model.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return plain(x)

    model.forward = forward  # type: ignore[method-assign]
    small, seen = _cut(model, architecture, {"point": [0, 1, 2]}), list[int]()
    small.get_submodule("point").register_forward_hook(lambda *given: seen.append(len(given[2][0])))
    small(inputs)
    assert seen == [29]

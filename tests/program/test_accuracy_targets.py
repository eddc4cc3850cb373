"""The accuracy targets are measured on the network: each figure is what masking really does."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import msgpack
import numpy as np
import proved_networks
import pytest
import torch
from proved_networks import Trained, inverted
from scipy.stats import kendalltau
from torch import nn

from elesh.analysis.accuracy import AccuracyCheck
from elesh.demo.network import DigitsNet
from elesh.operate.validate import validate
from elesh.settings import Settings
from elesh.trainer import Recorder, Surgeon
from elesh.trainer.export import Exporter
from leyline import AnalysisParameters, CheckpointBundle, Level

SETTINGS = Settings()


def checks(bundle: CheckpointBundle, settings: Settings = SETTINGS, **more: Any) -> dict[str, Any]:
    return {check.name: check for check in validate(bundle, settings, **more)}


def ranking(bundle: CheckpointBundle) -> AccuracyCheck:
    found: AccuracyCheck = checks(bundle)["channel_importance_ranking"]
    return found


@pytest.mark.slow
def test_kendall_tau_is_that_of_the_scores_and_the_loss_with_each_channel_masked() -> None:
    trained = proved_networks.perceptron()
    found, taus = ranking(trained.bundle), []
    for group in trained.bundle.architecture.groups:
        if group.prunable:
            scores = trained.bundle.gates[group.name].removal_rise
            taus.append(kendalltau(scores, masked_losses(trained, group.name)).statistic)
    assert found.value == pytest.approx(np.mean(taus), abs=1e-3)
    assert found.ceiling is not None
    assert -1 <= found.ceiling <= 1


def masked_losses(trained: Trained, group: str) -> list[float]:
    surgeon = Surgeon(trained.model, trained.bundle.architecture)
    x, y = trained.held_out
    losses = []
    for unit in range(trained.bundle.architecture.group[group].size):
        surgeon.mask({group: [unit]})
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(trained.model(x), y)))
        surgeon.unmask()
    return losses


@pytest.mark.slow
def test_a_ranking_turned_upside_down_is_found_out() -> None:
    trained = proved_networks.convolutions()
    found, honest = (
        checks(bundle, units=8)["channel_importance_ranking"]
        for bundle in (inverted(trained, 119), trained.bundle)
    )
    assert found.value is not None
    assert honest.value is not None
    assert found.value < 0 < honest.value
    assert found.verdict in ("missed", "out of reach")
    assert "multi_metric" in found.detail


def test_metric_and_target_of_the_settings_act() -> None:
    bundle = proved_networks.perceptron().bundle
    values = {}
    for metric in ("kendall_tau", "spearman", "top_20_precision"):
        for target, passes in ((-1, True), (1, False)):
            wanted = {"metric": metric, "target": target}
            settings = Settings(accuracy_targets={"channel_importance_ranking": wanted})
            found = checks(bundle, settings, units=24)["channel_importance_ranking"]
            assert (found.metric, found.target) == (metric, target)
            assert (found.verdict == "passed") == passes
            values[metric] = found.value
    assert len(set(values.values())) == 3


@cache
def exported() -> tuple[DigitsNet, Recorder, Exporter]:
    """One network, so that it is traced once."""
    model = DigitsNet(blocks=(1, 1)).eval()
    return model, Recorder(model, torch.zeros(4, 1, 8, 8)), Exporter(model)


def anew(seed: int) -> DigitsNet:
    """That network with weights of this seed."""
    model = exported()[0]
    torch.manual_seed(seed)
    model.load_state_dict(DigitsNet(blocks=(1, 1)).state_dict())
    return model


def measured(samples: int) -> CheckpointBundle:
    """That network as a checkpoint, measured on 64 random samples, proved on the others."""
    _, recorder, exporter = exported()
    x, y = torch.randn(samples, 1, 8, 8), torch.arange(samples) % 10
    bundle = recorder.measure([(x[:64], y[:64])], epoch=100, run_id="planted")
    return replace(bundle, network=exporter.export(recorder.architecture, (x[64:], y[64:])))


def attention(**copied: tuple[int, int]) -> CheckpointBundle:
    """A checkpoint of a network whose head 1 has copies of head 0's projections."""
    heads = anew(0).transformer.attention
    with torch.no_grad():
        for name, (source, target) in copied.items():
            layer = getattr(heads, name)
            for tensor in (layer.weight, layer.bias):
                rows = tensor.unflatten(0, (heads.heads, heads.head_dim))
                rows[target] = rows[source]
        for layer in (heads.query, heads.key):
            layer.weight.mul_(8)  # patterns far from uniform, or all heads are alike
    return measured(128)


@pytest.mark.slow
def test_a_planted_duplicate_of_a_head_is_found_and_counts_as_right() -> None:
    found = checks(attention(query=(0, 1), key=(0, 1), value=(0, 1)), units=2)
    precision = found["attention_redundancy_detection"]
    assert (precision.value, precision.ceiling, precision.verdict) == (1.0, 1.0, "passed")
    assert precision.detail.startswith("1 of 1 redundant pairs of heads")


@pytest.mark.slow
def test_heads_that_look_alike_but_say_different_things_count_as_wrong() -> None:
    precision = checks(attention(query=(0, 1), key=(0, 1)), units=2)[
        "attention_redundancy_detection"
    ]
    assert (precision.value, precision.verdict) == (0.0, "missed")


@pytest.mark.slow
def test_without_redundant_pairs_there_is_no_precision() -> None:
    precision = checks(attention(), units=2)["attention_redundancy_detection"]
    assert precision.verdict == "not measured"
    assert precision.detail == "no two heads are more alike than 0.95"


@pytest.mark.slow
def test_gradient_flow_is_kept_by_a_layer_that_does_nothing_and_not_by_all_that_do() -> None:
    down = anew(3).transformer.down
    with torch.no_grad():
        for value in (down.weight, down.bias):
            value.zero_()
    bundle = measured(256)
    idle = "transformer.down"
    others = tuple(name for name in bundle.architecture.block if name != idle)
    alone = replace(bundle, parameters=AnalysisParameters(ignored_layers=others))
    found = checks(alone, units=2)["layer_skip_potential"]
    assert f"{idle} skipped" in found.detail
    assert found.value == pytest.approx(1.0, abs=1e-4)
    assert found.verdict == "passed"
    everything = {"layer_analysis": {"max_layer_removal_ratio": 1.0}}
    found = checks(bundle, Settings(structured_pruning=everything), units=2)["layer_skip_potential"]
    assert found.value < 0.85


def test_a_sketch_that_is_too_narrow_misses_the_error_target() -> None:
    bundle = replace(proved_networks.perceptron().bundle, network=None)
    wide = checks(bundle)["structured_pruning_accuracy"]
    assert wide.value is not None
    assert (wide.value < 1e-5, wide.verdict) == (True, "passed")
    narrow = checks(bundle, Settings(sketch_width=20, sketch_depth=1))
    assert narrow["structured_pruning_accuracy"].verdict == "missed"


def test_what_cannot_be_measured_says_what_is_missing() -> None:
    bundle = proved_networks.perceptron().bundle
    without = checks(replace(bundle, network=None))
    names = [name for name, check in without.items() if check.verdict == "not measured"]
    assert names == [
        "channel_importance_ranking",
        "attention_redundancy_detection",
        "layer_skip_potential",
    ]
    assert all("the checkpoint carries no network" in without[name].detail for name in names)
    assert bundle.network is not None
    fields = msgpack.unpackb(bundle.network.program) | {"output": "nowhere"}
    broken = replace(bundle, network=replace(bundle.network, program=msgpack.packb(fields)))
    assert "program.output" in checks(broken)["layer_skip_potential"].detail


def test_only_some_channels_of_a_wide_group_are_masked() -> None:
    seen: list[tuple[int, int]] = []
    trained = proved_networks.perceptron()
    groups = [g for g in trained.bundle.architecture.groups if g.level is Level.CHANNEL]
    validate(
        trained.bundle, SETTINGS, units=5, progress=lambda done, total: seen.append((done, total))
    )
    total = 5 * sum(group.prunable for group in groups)
    assert seen == [(done, total) for done in range(1, total + 1)]

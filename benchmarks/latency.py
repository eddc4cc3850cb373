"""A latency budget on the demo's network: predicted against measured speed-up.

    python -m benchmarks.latency --at-most 0.8 --seed 0

Measures the table on this machine, chooses channels that fit the budget from one calibration pass,
cuts them, and times the network before and after in turn. Nothing is trained: speed does not depend
on the weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace

import torch
from torch import nn

from elesh import Settings, analyze
from elesh.analysis.resources import resource_model
from elesh.demo.data import Digits
from elesh.demo.network import DigitsNet
from elesh.trainer import Recorder, Surgeon
from elesh.trainer.latency import measure_latency
from leyline import AnalysisParameters, Budget


def ratio(before: nn.Module, after: nn.Module, inputs: torch.Tensor, rounds: int = 60) -> float:
    """Least time before over least time after, measured in turn."""

    def seconds(model: nn.Module) -> float:
        begun = time.perf_counter()
        for _ in range(5):
            model(inputs)
        return time.perf_counter() - begun

    with torch.no_grad():
        seconds(before), seconds(after)
        pairs = [(seconds(before), seconds(after)) for _ in range(rounds)]
    return min(first for first, _ in pairs) / min(second for _, second in pairs)


def main() -> None:
    """Print one row of figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at-most", type=float, default=0.8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    torch.set_num_threads(1)
    data, model = Digits.load(asked.seed), DigitsNet().eval()
    inputs = data.train.images[: asked.batch]
    recorder = Recorder(model, inputs[:2], seed=asked.seed)
    table = measure_latency(model, inputs, recorder.architecture)
    budget = Budget(resource="latency", at_most=asked.at_most, latency=table)
    bundle = recorder.measure(data.calibration(), epoch=120)
    bundle = replace(bundle, parameters=AnalysisParameters(budget=budget))
    loose = Settings(
        structured_pruning={
            "channel_analysis": {"min_channels_per_layer": 4, "max_predicted_shift": 1e9},
            "safety_schedule": {"aggressive_limit": 0.9},
        }
    )
    decision = analyze(bundle, loose)
    cost = resource_model(recorder.architecture, budget)
    lost = {name: len(units) for name, units in decision.units.items()}
    predicted = cost.total({}) / cost.total(lost)
    before = copy.deepcopy(model)
    Surgeon(model, recorder.architecture).cut(decision.units)
    measured = ratio(before, model, inputs)
    print(
        f"budget {asked.at_most:.2f}: {sum(lost.values())} channels, predicted speed-up "
        f"{predicted:.3f}, measured {measured:.3f}, off by {abs(predicted / measured - 1):.1%}"
    )


if __name__ == "__main__":
    main()

"""Latency budgets on the demo's network: predicted against measured speed-up.

    python -m benchmarks.speed.latency --at-most 0.9 0.8 0.7 0.6 --seeds 0 1 2

Measures the table on this machine once a seed, chooses channels that fit each budget from one
calibration pass, cuts them, and times the network before and after in turn, on one thread; the
least times count. Nothing is trained: speed does not depend on the weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.common.report import show, write
from elesh import Settings, analyze
from elesh.analysis.budgets.knapsack import resource_model
from elesh.demo.network import Digits, DigitsNet
from elesh.trainer import Recorder, Surgeon
from elesh.trainer.latency import measure_latency
from leyline import AnalysisParameters, Budget

LOOSE = Settings(
    structured_pruning={
        "channel_analysis": {"min_channels_per_layer": 4, "max_predicted_shift": 1e9},
        "safety_schedule": {"aggressive_limit": 0.9},
    }
)
"""Nothing but the budget limits the cut."""


def ratio(before: nn.Module, after: nn.Module, inputs: torch.Tensor, rounds: int = 400) -> float:
    """Least time before over least time after, measured in turn."""

    def seconds(model: nn.Module) -> float:
        begun = time.perf_counter()
        model(inputs)
        return time.perf_counter() - begun

    with torch.no_grad():
        seconds(before), seconds(after)
        pairs = [(seconds(before), seconds(after)) for _ in range(rounds)]
    return min(first for first, _ in pairs) / min(second for _, second in pairs)


def speed_ups(seed: int, batch: int, shares: Sequence[float]) -> Iterator[tuple[int, float, float]]:
    """For each budget: channels cut, predicted and measured speed-up."""
    torch.manual_seed(seed)
    data, model = Digits.load(seed), DigitsNet().eval()
    inputs = data.train.images[:batch]
    recorder = Recorder(model, inputs[:2], seed=seed)
    architecture = recorder.architecture
    table = measure_latency(model, inputs, architecture, rounds=30)
    bundle = recorder.measure(data.calibration(), epoch=120)
    for share in shares:
        budget = Budget(resource="latency", at_most=share, latency=table)
        decision = analyze(replace(bundle, parameters=AnalysisParameters(budget=budget)), LOOSE)
        cost = resource_model(architecture, budget)
        lost = {name: len(units) for name, units in decision.units.items()}
        after = copy.deepcopy(model)
        Surgeon(after, architecture).cut(decision.units)
        yield sum(lost.values()), cost.total({}) / cost.total(lost), ratio(model, after, inputs)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at-most", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows, figures = [], []
    for seed in asked.seeds:
        found = speed_ups(seed, asked.batch, asked.at_most)
        for share, (count, predicted, measured) in zip(asked.at_most, found, strict=True):
            off = predicted / measured - 1
            figures.append({"seed": seed, "at_most": share, "off": off})
            speeds = f"{predicted:.3f}", f"{measured:.3f}", f"{off:+.1%}"
            rows.append([str(seed), f"{share:.2f}", str(count), *speeds])
    columns = ["seed", "budget", "channels cut", "predicted", "measured", "off by"]
    show(f"speed-up of the demo's network, batch {asked.batch}, one thread", columns, rows)
    write(asked.json, {"rows": figures})


if __name__ == "__main__":
    main()

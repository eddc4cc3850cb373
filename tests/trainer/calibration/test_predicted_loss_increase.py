"""Predicted rises of sets beside measured ones, on networks that were really trained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import proved_networks
import pytest
import torch
from torch.nn import functional

from elesh.analysis import select_channels
from elesh.analysis.candidates import Candidates
from elesh.analysis.pruning_set.draft import set_removal
from elesh.settings import ChannelAnalysis
from elesh.trainer import Recorder, Surgeon


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(proved_networks.digits, marks=pytest.mark.slow),
        pytest.param(proved_networks.convolutions, marks=pytest.mark.soak),
    ],
    ids=["digits", "convolutions"],
)
def test_sets_of_very_different_kinds_can_be_compared(
    network: Callable[[int], proved_networks.Trained],
) -> None:
    trained = network(0)
    x, y = trained.held_out
    architecture = trained.bundle.architecture
    bundle = Recorder(trained.model, x[:4], architecture=architecture).measure([(x, y)], epoch=1)
    candidates = Candidates.of([group for group in architecture.groups if group.prunable], 1)
    rng, settings = np.random.default_rng(0), ChannelAnalysis(min_channels_per_layer=4)
    counts = [round(share * candidates.count) for share in (0.05, 0.1, 0.2, 0.3)]
    random = [
        candidates.by_group(rng.choice(candidates.count, count, False))
        for count in counts
        for _ in range(6)
    ]
    chosen = [select_channels(bundle, count, settings=settings) for count in counts]
    surgeon = Surgeon(trained.model, architecture)

    def loss() -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(trained.model(x), y))

    whole, measured = loss(), []
    for units in [*random, *chosen]:
        surgeon.mask(units)
        measured.append(loss() - whole)
        surgeon.unmask()
    told = np.array([set_removal(bundle.gates, units)[0] for units in [*random, *chosen]])
    cut = slice(0, len(random))
    assert np.corrcoef(told, measured)[0, 1] > 0.8
    assert 1 / 2 < told[cut].sum() / np.sum(measured[cut]) < 2

"""One random network with random statistics and settings: its decision must hold in every way."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from head_networks import patterns
from layer_networks import figures
from networks import gate, vectors
from random_nets import OPERATIONS, RandomNet
from random_towers import Grouped, Tower
from torch import nn

from elesh import Settings, analyze
from elesh.trainer import Recorder, Surgeon
from leyline import (
    AnalysisParameters,
    CheckpointBundle,
    CheckpointMetadata,
    Level,
    PrunedArchitecture,
    StructuralPruningDecision,
)

SAMPLES = 64  # of the made-up layer statistics


@dataclass(frozen=True)
class Case:
    """Everything that a seed stands for."""

    model: nn.Module
    architecture: PrunedArchitecture
    bundle: CheckpointBundle
    settings: Settings
    round_to: int


@dataclass(frozen=True)
class Tally:
    """What went in one case."""

    channels: int
    heads: int
    layers: int
    approved: bool


def check(seed: int) -> Tally:
    """Decide, mask, cut and count.

    Raises:
        AssertionError: naming what does not hold.
    """
    case = make(seed)
    decision = analyze(case.bundle, case.settings)
    faults = [*_constraints(case, decision), *_cut(case, decision)]
    assert not faults, f"seed {seed}: {'; '.join(faults)}"
    return Tally(
        sum(len(target.indices) for target in decision.channels),
        sum(len(target.indices) for target in decision.attention_heads),
        len(decision.layers),
        decision.approved_for_application,
    )


def make(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    model = Tower(seed) if rng.random() < 0.5 else _wired(rng, seed)
    x = torch.randn(2, 2, 6, 6)
    model(x)  # batch statistics
    model.eval()
    architecture = Recorder(model, x).architecture
    round_to = rng.choice((1, 1, 2, 4))
    shares = sorted(rng.uniform(0.1, 0.7) for _ in range(3))
    limits = dict(zip(("conservative", "moderate", "aggressive"), shares, strict=True))
    settings = Settings(
        structured_pruning={
            "channel_analysis": {
                "min_channels_per_layer": rng.randrange(1, 5),
                "max_predicted_shift": 1e9,
                "redundancy_threshold": rng.choice((0.3, 0.95)),
                "schedule": rng.choice(("polynomial", "linear", "exponential")),
                "round_to": round_to,
            },
            "attention_analysis": {"min_heads_per_layer": rng.randrange(1, 3)},
            "layer_analysis": {"max_layer_removal_ratio": rng.uniform(0.1, 0.6)},
            "safety_schedule": {f"{name}_limit": share for name, share in limits.items()},
        }
    )
    return Case(model, architecture, _bundle(rng, seed, architecture), settings, round_to)


def _wired(rng: random.Random, seed: int) -> nn.Module:
    plan = [
        (rng.choice(OPERATIONS), rng.randrange(6), rng.randrange(6), rng.randrange(2, 7))
        for _ in range(rng.randrange(1, 8))
    ]
    torch.manual_seed(seed)
    return RandomNet(plan)


def _bundle(rng: random.Random, seed: int, architecture: PrunedArchitecture) -> CheckpointBundle:
    """Made-up statistics of all that can be removed, at a random epoch of the pruning phases."""
    numbers = np.random.default_rng(seed)
    groups = [group for group in architecture.groups if group.prunable]
    blocks = [block.name for block in architecture.blocks if block.prunable]
    good = {name: rng.random() < 0.5 for name in blocks}
    scorer = rng.choice(("auto", "auto", "multi_metric", "magnitude"))
    return CheckpointBundle(
        CheckpointMetadata(
            run_id="run",
            checkpoint_id="ck-1",
            epoch=rng.choice((60, 90, 105, 120, 120)),
            model_hash=architecture.model_hash,
            samples=SAMPLES,
        ),
        architecture,
        {g.name: vectors(g.name, g.size, numbers) for g in groups if g.level is Level.CHANNEL},
        {g.name: gate(g.name, g.size, numbers, SAMPLES) for g in groups},
        tuple(rng.sample(list(_LEVELS), rng.randrange(1, 4))),
        AnalysisParameters(scorer=scorer),
        heads={g.name: patterns(g.name, g.size) for g in groups if g.level is Level.HEAD},
        layers={name: figures(name, **({} if good[name] else {"taylor": 1.0})) for name in blocks},
    )


_LEVELS = (Level.CHANNEL, Level.HEAD, Level.LAYER)


def _constraints(case: Case, decision: StructuralPruningDecision) -> Iterator[str]:
    """What a decision must hold to by itself."""
    pruning, groups = case.settings.structured_pruning, case.architecture.group
    minimums = {
        Level.CHANNEL: pruning.channel_analysis.min_channels_per_layer,
        Level.HEAD: pruning.attention_analysis.min_heads_per_layer,
    }
    for name, units in decision.units.items():
        group, left = groups[name], groups[name].size - len(units)
        multiple = math.lcm(
            group.unit_multiple, case.round_to if group.level is Level.CHANNEL else 1
        )
        if not group.prunable or left < minimums[group.level] or left % multiple:
            yield f"{name}: {left} of {group.size} left, multiple {multiple}"
    for level, limit in _quotas(case).items():
        gone = sum(len(u) for name, u in decision.units.items() if groups[name].level is level)
        if gone > limit:
            yield f"{gone} {level}s gone, at most {limit}"
    removable = sum(block.prunable for block in case.architecture.blocks)
    gone, share = len(decision.layers), pruning.layer_analysis.max_layer_removal_ratio
    if gone and (gone > share * removable + 1e-9 or removable - gone < 3):
        yield f"{gone} of {removable} layers gone"


def _quotas(case: Case) -> dict[Level, int]:
    """The most that the last phase may ever remove of a level."""
    limit = case.settings.structured_pruning.safety_schedule.aggressive_limit
    counts = {
        level: sum(g.size for g in case.architecture.groups if g.level is level and g.prunable)
        for level in (Level.CHANNEL, Level.HEAD)
    }
    return {level: math.floor(limit * count + 1e-6) for level, count in counts.items()}


def _cut(case: Case, decision: StructuralPruningDecision) -> Iterator[str]:
    """What must hold of the network that is left, approved or not."""
    model, x = case.model, torch.randn(3, 2, 6, 6)
    layers = [target.layer_name for target in decision.layers]
    surgeon = Surgeon(model, case.architecture)
    with torch.no_grad():
        surgeon.mask(decision.units)
        surgeon.mask_layers(layers)
        masked = model(x)
        surgeon.unmask()
        if decision.units:
            surgeon.cut(decision.units)
        if layers:
            surgeon.cut_layers(layers)
        after = model(x)
    if not _close(masked, after):
        yield "the cut network does not compute what the masked one did"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != decision.statistics.parameters_after:
        yield f"{parameters} parameters, {decision.statistics.parameters_after} predicted"
    for name, module in model.named_modules():
        if isinstance(module, Grouped) and module.heads % module.kv_heads:
            yield f"{name}: {module.heads} query heads on {module.kv_heads} key/value heads"


def _close(a: Any, b: Any) -> bool:
    return bool(torch.isfinite(b).all() and (a - b).abs().max() <= 1e-4 * (1 + a.abs().max()))

"""A made-up transformer whose channels, heads and layers can all lose something."""

from __future__ import annotations

from typing import Any

import numpy as np
from head_networks import patterns
from layer_networks import block, figures
from networks import gate, tensor, vectors
from networks import settings as free_settings

from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    CheckpointMetadata,
    GateSite,
    LayerDescriptor,
    Level,
    PrunedArchitecture,
    PruningGroup,
    TensorSlice,
)

BLOCKS, HEADS, HIDDEN, WIDTH = 10, 8, 24, 4
SAMPLES = 64


def groups_inside(layer: str) -> set[str]:
    """The groups that go with a layer."""
    return {f"{layer}.up"}


def architecture() -> PrunedArchitecture:
    """Attention and a removable residual MLP in every block."""
    tensors, groups = [], []
    for i in range(BLOCKS):
        inner = HEADS * WIDTH
        tensors += [tensor(f"a{i}.{x}.weight", inner, 16) for x in "qkv"]
        tensors += [
            tensor(f"a{i}.out.weight", 16, inner),
            tensor(f"b{i}.up.weight", HIDDEN, 16),
            tensor(f"b{i}.down.weight", 16, HIDDEN),
        ]
        groups += [_heads(f"a{i}"), _channels(f"b{i}")]
    layers = tuple(
        LayerDescriptor(name=t.path[: -len(".weight")], kind="linear", weight=t.path, positions=2)
        for t in tensors
    )
    blocks = tuple(block(i) for i in range(BLOCKS))
    return PrunedArchitecture.build(tuple(tensors), layers, tuple(groups), blocks=blocks)


def _heads(name: str) -> PruningGroup:
    slices = [TensorSlice(tensor=f"{name}.{x}.weight", dim=0, width=WIDTH) for x in "qkv"]
    return PruningGroup(
        name=name,
        level=Level.HEAD,
        layers=tuple(f"{name}.{x}" for x in "qkv"),
        original_size=HEADS,
        origin=tuple(range(HEADS)),
        slices=(*slices, TensorSlice(tensor=f"{name}.out.weight", dim=1, width=WIDTH)),
        sites=(GateSite(module=f"{name}.out", dim=-1, width=WIDTH),),
    )


def _channels(name: str) -> PruningGroup:
    return PruningGroup(
        name=f"{name}.up",
        layers=(f"{name}.up",),
        original_size=HIDDEN,
        origin=tuple(range(HIDDEN)),
        slices=(
            TensorSlice(tensor=f"{name}.up.weight", dim=0),
            TensorSlice(tensor=f"{name}.down.weight", dim=1),
        ),
        sites=(GateSite(module=f"{name}.down", dim=-1),),
    )


def checkpoint(epoch: int = 115, **replaced: Any) -> CheckpointBundle:
    """Statistics of everything; only block 4 meets the five conditions."""
    structure, rng = architecture(), np.random.default_rng(3)
    parts: dict[str, Any] = {
        "metadata": CheckpointMetadata(
            run_id="run",
            checkpoint_id="ck-1",
            epoch=epoch,
            model_hash=structure.model_hash,
            samples=SAMPLES,
        ),
        "architecture": structure,
        "channels": {
            g.name: vectors(g.name, g.size, rng)
            for g in structure.groups
            if g.level is Level.CHANNEL
        },
        "gates": {g.name: gate(g.name, g.size, rng, SAMPLES) for g in structure.groups},
        "heads": {
            g.name: patterns(g.name, g.size) for g in structure.groups if g.level is Level.HEAD
        },
        "layers": {
            f"b{i}": figures(f"b{i}", 0.5) if i == 4 else figures(f"b{i}", 4.0, taylor=0.5)
            for i in range(BLOCKS)
        },
        "levels": (Level.CHANNEL, Level.HEAD, Level.LAYER),
    }
    return CheckpointBundle(**(parts | replaced))


def settings(**channel_analysis: Any) -> Settings:
    """Small groups may lose units, and any predicted shift is allowed unless one is given."""
    return free_settings(**({"min_channels_per_layer": 4} | channel_analysis))

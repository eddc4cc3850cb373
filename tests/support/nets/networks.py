"""Made-up networks and statistics for the analysis tests: seeded, small, with planted structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from elesh.settings import Settings
from leyline import (
    AnalysisParameters,
    ChannelImportanceData,
    CheckpointBundle,
    CheckpointMetadata,
    GateSite,
    GateStatistics,
    LayerDescriptor,
    PerformanceRequirements,
    PrunedArchitecture,
    PruningGroup,
    TensorDescriptor,
    TensorSlice,
)

POSITIONS = 4


def tensor(path: str, *shape: int, owner: str = "host") -> TensorDescriptor:
    return TensorDescriptor(path=path, shape=shape, dtype="float32", owner=owner)


def chain(
    sizes: Sequence[int],
    *,
    classes: int = 10,
    skip: Sequence[int] = (),
    multiples: Sequence[int] = (),
    originals: Sequence[int] = (),
) -> PrunedArchitecture:
    """Convolutions one after the other, each with batch norm, then flatten and a classifier.

    ``skip`` lists layers whose output is concatenated to the input of the classifier as well.
    """
    tensors, layers, slices = [], [], [[] for _ in sizes]
    before = 3
    for i, size in enumerate(sizes):
        tensors.append(tensor(f"conv{i}.weight", size, before, 3, 3))
        tensors.append(tensor(f"norm{i}.weight", size))
        layers.append(
            LayerDescriptor(
                name=f"conv{i}", kind="Conv2d", weight=f"conv{i}.weight", positions=POSITIONS
            )
        )
        slices[i] += [
            TensorSlice(tensor=f"conv{i}.weight", dim=0),
            TensorSlice(tensor=f"norm{i}.weight", dim=0),
        ]
        if i:
            slices[i - 1].append(TensorSlice(tensor=f"conv{i}.weight", dim=1))
        before = size
    start = 0
    for i in [len(sizes) - 1, *skip]:
        slices[i].append(TensorSlice(tensor="head.weight", dim=1, start=start, width=POSITIONS))
        start += sizes[i] * POSITIONS
    tensors.append(tensor("head.weight", classes, start))
    layers.append(LayerDescriptor(name="head", kind="Linear", weight="head.weight", positions=1))
    groups = [
        PruningGroup(
            name=f"g{i}",
            layers=(f"conv{i}",),
            original_size=originals[i] if originals else size,
            origin=tuple(range(size)),
            slices=tuple(slices[i]),
            sites=(GateSite(module=f"norm{i}", dim=1),),
            unit_multiple=multiples[i] if multiples else 1,
        )
        for i, size in enumerate(sizes)
    ]
    return PrunedArchitecture.build(tuple(tensors), tuple(layers), tuple(groups))


def vectors(
    name: str, size: int, rng: np.random.Generator, correlations: bool = True
) -> ChannelImportanceData:
    activations = rng.standard_normal((size, 64))
    unit = activations / np.linalg.norm(activations, axis=1, keepdims=True)
    return ChannelImportanceData(
        layer_name=name,
        taylor_importance=rng.lognormal(size=size).astype(np.float32),
        magnitude_importance=rng.lognormal(size=size).astype(np.float32),
        activation_frequency=rng.uniform(size=size).astype(np.float32),
        channel_correlations=(unit @ unit.T).astype(np.float32) if correlations else None,
    )


def gate(name: str, size: int, rng: np.random.Generator, samples: int = 128) -> GateStatistics:
    """Projections with a few shared directions and log-normal sizes, as trained nets have them."""
    shared = rng.standard_normal((samples, 6)) @ rng.standard_normal((6, size)) / 3
    own = rng.standard_normal((samples, size))
    scale = np.exp(1.5 * rng.standard_normal(size))
    projections = ((shared + own) * scale).astype(np.float32)
    return GateStatistics(
        layer_name=name,
        projections=projections,
        first_order=(rng.standard_normal(size) * scale / 1000).astype(np.float32),
        second_order=(scale**2 / 100).astype(np.float32),
    )


def bundle(
    architecture: PrunedArchitecture,
    *,
    epoch: int = 60,
    seed: int = 0,
    gates: bool = True,
    samples: int = 128,
    parameters: AnalysisParameters | None = None,
    requirements: PerformanceRequirements | None = None,
    **replaced: Any,
) -> CheckpointBundle:
    """A bundle of ``architecture`` with made-up statistics; ``replaced`` replaces its parts."""
    rng = np.random.default_rng(seed)
    parts: dict[str, Any] = {
        "metadata": CheckpointMetadata(
            run_id="run",
            checkpoint_id="ck-1",
            epoch=epoch,
            model_hash=architecture.model_hash,
            samples=samples,
        ),
        "architecture": architecture,
        "channels": {g.name: vectors(g.name, g.size, rng) for g in architecture.groups},
        "gates": {g.name: gate(g.name, g.size, rng, samples) for g in architecture.groups}
        if gates
        else {},
        "parameters": parameters or AnalysisParameters(),
        "requirements": requirements or PerformanceRequirements(),
    }
    return CheckpointBundle(**(parts | replaced))


def settings(**channel_analysis: Any) -> Settings:
    """Settings that do not stand in the way: no limit on the predicted shift unless given."""
    section = {"max_predicted_shift": 1e9} | channel_analysis
    return Settings(structured_pruning={"channel_analysis": section})


def floats(values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)

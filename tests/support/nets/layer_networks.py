"""Made-up residual networks and layer statistics for the tests of the layer level."""

from __future__ import annotations

from typing import Any

import numpy as np
from networks import tensor

from leyline import (
    CheckpointBundle,
    CheckpointMetadata,
    GateSite,
    LayerBlock,
    LayerDescriptor,
    LayerStatistics,
    PrunedArchitecture,
    PruningGroup,
    StandIn,
    TensorSlice,
)

AGGRESSIVE = 100


def residual(count: int, **changes: Any) -> PrunedArchitecture:
    """``count`` residual blocks of one linear layer with a hidden group each, then a head."""
    paths = [f"b{i}.{part}" for i in range(count) for part in ("up.weight", "down.weight")]
    tensors = [tensor(path, 4, 4) for path in (*paths, "head.weight")]
    layers = [
        LayerDescriptor(name=t.path[: -len(".weight")], kind="linear", weight=t.path, positions=2)
        for t in tensors
    ]
    groups = [
        PruningGroup(
            name=f"b{i}.up",
            layers=(f"b{i}.up",),
            original_size=4,
            origin=(0, 1, 2, 3),
            slices=(
                TensorSlice(tensor=f"b{i}.up.weight", dim=0),
                TensorSlice(tensor=f"b{i}.down.weight", dim=1),
            ),
            sites=(GateSite(module=f"b{i}.down", dim=-1),),
        )
        for i in range(count)
    ]
    blocks = tuple(block(i, **changes) for i in range(count))
    return PrunedArchitecture.build(tuple(tensors), tuple(layers), tuple(groups), blocks=blocks)


def block(i: int, **changes: Any) -> LayerBlock:
    parts: dict[str, Any] = {
        "name": f"b{i}",
        "kind": "linear",
        "depth": 0.25,
        "strategy": "residual",
        "skip_potential": 0.95,
        "branch": f"b{i}.down",
        "entry": f"b{i}.up",
        "stand_ins": (
            StandIn(module=f"b{i}.down", kind="zero"),
            StandIn(module=f"b{i}.up", kind="identity"),
        ),
        "tensors": (f"b{i}.up.weight", f"b{i}.down.weight"),
    }
    return LayerBlock(**(parts | changes))


def one(value: float) -> Any:
    return np.array([value], np.float32)


def figures(name: str, size: float = 1.0, seed: int = 0, **changes: float) -> LayerStatistics:
    """A layer that can go, unless changed; its projections have this size."""
    values = {
        "taylor": 0.0005, "gradient_flow": 0.9, "similarity": 0.99,
        "first_order": 0.0001, "second_order": 0.0004,
    } | changes  # fmt: skip
    rng = np.random.default_rng([seed, *name.encode()])
    projections = (size * rng.standard_normal(64)).astype(np.float32)
    return LayerStatistics(
        layer_name=name, projections=projections, **{k: one(v) for k, v in values.items()}
    )


def bundle(
    architecture: PrunedArchitecture,
    layers: list[LayerStatistics],
    *,
    epoch: int = AGGRESSIVE,
    **replaced: Any,
) -> CheckpointBundle:
    metadata = CheckpointMetadata(
        run_id="run",
        checkpoint_id="ck-1",
        epoch=epoch,
        model_hash=architecture.model_hash,
        samples=64,
    )
    return CheckpointBundle(
        metadata, architecture, {}, layers={x.layer_name: x for x in layers}, **replaced
    )


def network(
    count: int = 10, *, cheap: tuple[int, ...] = (4,), shift: float = 0.01, **more: Any
) -> CheckpointBundle:
    """Blocks of which only the cheap ones can go; those move the outputs little."""
    data = [
        figures(f"b{i}", shift) if i in cheap else figures(f"b{i}", taylor=0.5)
        for i in range(count)
    ]
    return bundle(residual(count), data, **more)

"""Made-up transformers with head statistics for the tests of analysis and worker."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from networks import bundle, floats, gate, tensor

from leyline import (
    AnalysisParameters,
    CheckpointBundle,
    GateSite,
    HeadImportanceData,
    Level,
    PrunedArchitecture,
    PruningGroup,
    TensorSlice,
)

WIDTH = 4


def transformer(*heads: int) -> PrunedArchitecture:
    """Attentions with so many heads of four channels each."""
    tensors, groups = [], []
    for i, count in enumerate(heads):
        name, inner = f"layer{i}", count * WIDTH
        tensors += [tensor(f"{name}.{x}.weight", inner, 16) for x in "qkv"]
        tensors.append(tensor(f"{name}.out.weight", 16, inner))
        slices = [TensorSlice(tensor=f"{name}.{x}.weight", dim=0, width=WIDTH) for x in "qkv"]
        groups.append(
            PruningGroup(
                name=name,
                level=Level.HEAD,
                layers=tuple(f"{name}.{x}" for x in "qkv"),
                original_size=count,
                origin=tuple(range(count)),
                slices=(*slices, TensorSlice(tensor=f"{name}.out.weight", dim=1, width=WIDTH)),
                sites=(GateSite(module=f"{name}.out", dim=-1, width=WIDTH),),
            )
        )
    return PrunedArchitecture.build(tuple(tensors), (), tuple(groups))


def patterns(name: str, count: int, **changes: Any) -> HeadImportanceData:
    rng = np.random.default_rng(count)
    fields: dict[str, Any] = {
        "gradient_sensitivity": floats(rng.uniform(0.1, 1, count)),
        "entropy": floats(rng.uniform(0.5, 2, count)),
        "entropy_bound": floats(np.full(count, math.log(16))),
        "diversity": floats(rng.uniform(0, math.log(2), count)),
        "similarity": floats(np.eye(count)),
    }
    return HeadImportanceData(layer_name=name, **fields | changes)


def checkpoint(
    architecture: PrunedArchitecture,
    epoch: int = 120,
    *,
    gates: bool = True,
    heads: dict[str, HeadImportanceData] | None = None,
    **parameters: Any,
) -> CheckpointBundle:
    rng = np.random.default_rng(7)
    groups = architecture.groups
    return bundle(
        architecture,
        epoch=epoch,
        channels={},
        gates={g.name: gate(g.name, g.size, rng) for g in groups} if gates else {},
        heads={g.name: patterns(g.name, g.size) for g in groups} if heads is None else heads,
        parameters=AnalysisParameters(**parameters),
    )

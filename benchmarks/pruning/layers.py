"""How fast whole layers are analysed. Prints a figure, asserts nothing.

    python benchmarks/pruning/layers.py [--layers 1000] [--samples 512]

From a bundle's layer statistics to the decision with all gates (conditions, order, joint
prediction), and the plan alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from elesh import Settings, analyze
from elesh.analysis.levels.layers import plan_layers
from leyline import (
    CheckpointBundle,
    CheckpointMetadata,
    LayerBlock,
    LayerDescriptor,
    LayerStatistics,
    Level,
    PrunedArchitecture,
    PruningGroup,
    StandIn,
    TensorDescriptor,
    TensorSlice,
)


def best_of(work: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def architecture(count: int) -> PrunedArchitecture:
    """``count`` residual blocks of one linear layer, each with a channel group of its own."""
    names = [f"blocks.{i}" for i in range(count)]
    return PrunedArchitecture.build(
        tuple(TensorDescriptor(path=f"{n}.weight", shape=(64, 64), dtype="float32") for n in names),
        tuple(LayerDescriptor(name=n, kind="linear", weight=f"{n}.weight") for n in names),
        tuple(
            PruningGroup(
                name=n,
                layers=(n,),
                original_size=64,
                origin=tuple(range(64)),
                slices=(TensorSlice(tensor=f"{n}.weight", dim=0),),
                sites=(),
            )
            for n in names
        ),
        blocks=tuple(
            LayerBlock(
                name=n,
                kind="linear",
                depth=i / count,
                strategy="residual",
                skip_potential=0.95,
                branch=n,
                entry=n,
                stand_ins=(StandIn(module=n, kind="zero"),),
                tensors=(f"{n}.weight",),
            )
            for i, n in enumerate(names)
        ),
    )


def checkpoint(count: int, samples: int) -> CheckpointBundle:
    """A bundle at the end of the aggressive phase; about a third of the layers can go."""
    rng, structure = np.random.default_rng(0), architecture(count)

    def drawn(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, 1).astype(np.float32)

    layers = {
        block.name: LayerStatistics(
            layer_name=block.name,
            taylor=drawn(0, 0.002),
            gradient_flow=drawn(0.4, 1),
            similarity=drawn(0.94, 1),
            projections=(0.01 * rng.standard_normal(samples)).astype(np.float32),
            first_order=drawn(-0.001, 0.001),
            second_order=drawn(0, 0.001),
        )
        for block in structure.blocks
    }
    metadata = CheckpointMetadata(
        run_id="run", checkpoint_id="ck", epoch=120, model_hash=structure.model_hash
    )
    return CheckpointBundle(metadata, structure, {}, layers=layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=512)
    asked = parser.parse_args()
    bundle, settings = checkpoint(asked.layers, asked.samples), Settings()
    planned = best_of(lambda: plan_layers(bundle, settings))
    decided = best_of(lambda: analyze(bundle, settings, level=Level.LAYER))
    print(f"plan: conditions, order, prediction  {asked.layers / planned:10,.0f} layers/s")
    print(f"decision with all gates              {asked.layers / decided:10,.0f} layers/s")


if __name__ == "__main__":
    main()

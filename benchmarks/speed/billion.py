"""Memory and time to analyse a network of a billion parameters. Prints figures, asserts nothing.

    python benchmarks/speed/billion.py [--blocks 30] [--width 2048] [--samples 256] [--folder DIR]

A made-up transformer (attention of 16 heads and a perceptron as wide as twice the stream in every
block) with all its statistics is written to a folder by one process and analysed, all three levels
joined, by a fresh one. Memory is told as the peak of the resident set beyond what is resident
before loading: with and without the pages of the input files, which are mapped, not read.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import numpy as np

from elesh.analysis import analyze
from elesh.settings import Settings
from leyline import (
    ChannelImportanceData,
    CheckpointBundle,
    CheckpointMetadata,
    GateSite,
    GateStatistics,
    HeadImportanceData,
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

HEADS, POSITIONS = 16, 128


def architecture(blocks: int, width: int) -> PrunedArchitecture:
    """Query, key, value and output projections, then two linear layers, in every block."""
    tensors, groups, layers, removable = [], [], [], []
    for i in range(blocks):
        inside = [f"{i}.{name}" for name in ("q", "k", "v", "out", "up", "down")]
        shapes = [(width, width)] * 4 + [(2 * width, width), (width, 2 * width)]
        for name, shape in zip(inside, shapes, strict=True):
            path = f"{name}.weight"
            tensors.append(TensorDescriptor(path=path, shape=shape, dtype="float32"))
            layers.append(
                LayerDescriptor(name=name, kind="linear", weight=path, positions=POSITIONS)
            )
        groups += [_heads(i, width), _channels(i, width)]
        removable += [
            _block(f"{i}.attention", inside[:4], "attention", i / blocks),
            _block(f"{i}.mlp", inside[4:], "linear", i / blocks),
        ]
    return PrunedArchitecture.build(
        tuple(tensors), tuple(layers), tuple(groups), blocks=tuple(removable)
    )


def _heads(i: int, width: int) -> PruningGroup:
    size = width // HEADS
    rows = [TensorSlice(tensor=f"{i}.{x}.weight", dim=0, width=size) for x in "qkv"]
    return PruningGroup(
        name=f"{i}.attention.heads",
        level=Level.HEAD,
        original_size=HEADS,
        origin=tuple(range(HEADS)),
        slices=(*rows, TensorSlice(tensor=f"{i}.out.weight", dim=1, width=size)),
        sites=(GateSite(module=f"{i}.out", dim=-1, width=size),),
    )


def _channels(i: int, width: int) -> PruningGroup:
    return PruningGroup(
        name=f"{i}.up",
        layers=(f"{i}.up",),
        original_size=2 * width,
        origin=tuple(range(2 * width)),
        slices=(
            TensorSlice(tensor=f"{i}.up.weight", dim=0),
            TensorSlice(tensor=f"{i}.down.weight", dim=1),
        ),
        sites=(GateSite(module=f"{i}.down", dim=-1),),
    )


def _block(name: str, modules: list[str], kind: str, depth: float) -> LayerBlock:
    return LayerBlock(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        depth=depth,
        strategy="residual",
        skip_potential=0.95,
        branch=modules[-1],
        entry=modules[0],
        stand_ins=(StandIn(module=modules[-1], kind="zero"),),
        tensors=tuple(f"{module}.weight" for module in modules),
    )


def write(folder: Path, blocks: int, width: int, samples: int) -> None:
    """The checkpoint, in the aggressive phase, with statistics of everything."""
    structure, rng = architecture(blocks, width), np.random.default_rng(0)
    alike = (rng.standard_normal((2 * width, 64)) / 8).astype(np.float32)
    correlations = np.clip(alike @ alike.T, -1, 1).astype(np.float16)
    np.fill_diagonal(correlations, 1)
    by_level = {
        level: [g for g in structure.groups if g.level is level]
        for level in (Level.CHANNEL, Level.HEAD)
    }
    metadata = CheckpointMetadata(
        run_id="billion",
        checkpoint_id="ck",
        epoch=120,
        model_hash=structure.model_hash,
        samples=samples,
    )
    CheckpointBundle(
        metadata,
        structure,
        {g.name: _vectors(g, correlations, rng) for g in by_level[Level.CHANNEL]},
        {g.name: _gate(g, samples, rng) for g in structure.groups},
        (Level.CHANNEL, Level.HEAD, Level.LAYER),
        layers={block.name: _layer(block, samples, rng) for block in structure.blocks},
        heads={g.name: _patterns(g, rng) for g in by_level[Level.HEAD]},
    ).save(folder)


def _vectors(
    group: PruningGroup, correlations: np.ndarray, rng: np.random.Generator
) -> ChannelImportanceData:
    return ChannelImportanceData(
        layer_name=group.name,
        taylor_importance=rng.lognormal(size=group.size).astype(np.float32),
        magnitude_importance=rng.lognormal(size=group.size).astype(np.float32),
        activation_frequency=rng.uniform(size=group.size).astype(np.float32),
        channel_correlations=correlations,
    )


def _gate(group: PruningGroup, samples: int, rng: np.random.Generator) -> GateStatistics:
    sizes = np.exp(1.5 * rng.standard_normal(group.size, dtype=np.float32))
    own = rng.standard_normal((samples, group.size), dtype=np.float32)
    return GateStatistics(
        layer_name=group.name,
        projections=own * sizes,
        first_order=np.zeros(group.size, np.float32),
        second_order=sizes**2,
    )


def _layer(block: LayerBlock, samples: int, rng: np.random.Generator) -> LayerStatistics:
    def drawn(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, 1).astype(np.float32)

    return LayerStatistics(
        layer_name=block.name,
        taylor=drawn(0, 0.002),
        gradient_flow=drawn(0.4, 1),
        similarity=drawn(0.94, 1),
        projections=rng.standard_normal(samples).astype(np.float32),
        first_order=drawn(-0.001, 0.001),
        second_order=drawn(0, 0.001),
    )


def _patterns(group: PruningGroup, rng: np.random.Generator) -> HeadImportanceData:
    return HeadImportanceData(
        layer_name=group.name,
        gradient_sensitivity=rng.uniform(0.1, 1, group.size).astype(np.float32),
        entropy=rng.uniform(0.5, 2, group.size).astype(np.float32),
        entropy_bound=np.full(group.size, 5, np.float32),
        diversity=rng.uniform(0, 0.6, group.size).astype(np.float32),
        similarity=np.eye(group.size, dtype=np.float32),
    )


class Peak:
    """The highest resident set while it runs, by /proc: anonymous pages, and all pages."""

    def __init__(self) -> None:
        self.anonymous = self.everything = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            anonymous, everything = resident()
            self.anonymous = max(self.anonymous, anonymous)
            self.everything = max(self.everything, everything)


@cache
def _status() -> int:
    return os.open("/proc/self/status", os.O_RDONLY)


def resident() -> tuple[int, int]:
    """Anonymous and all resident bytes of this process now. The file stays open: a worker that
    runs an exported network may open none meanwhile (:mod:`elesh.program.measure`)."""
    text = os.pread(_status(), 1 << 16, 0).decode()
    lines = dict(line.split(":", 1) for line in text.splitlines())
    found = [int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")]
    return found[0], found[1]


def measure(folder: Path) -> None:
    """Load and analyse, in a process that has done nothing else."""
    anonymous, everything = resident()
    begun = time.perf_counter()
    with Peak() as peak:
        bundle = CheckpointBundle.load(folder)
        loaded = time.perf_counter() - begun
        decision = analyze(bundle, Settings())
        seconds = time.perf_counter() - begun
    blobs = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    units = sum(group.size for group in bundle.architecture.groups)
    s = decision.statistics
    print(
        f"{s.parameters_before:,} parameters, {units:,} channels and heads, "
        f"{len(bundle.architecture.blocks)} layers; {blobs / 1e6:,.0f} MB of statistics"
    )
    print(f"loaded in {loaded:.1f} s, decided after {seconds:.1f} s: {s.parameters_after:,} left")
    print(f"memory beyond the input: {(peak.anonymous - anonymous) / 1e6:,.0f} MB")
    print(f"with the input's pages:  {(peak.everything - everything) / 1e6:,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="Where to keep the checkpoint.")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(asked.folder)
        return
    with tempfile.TemporaryDirectory(prefix="elesh-billion-") as made:
        folder = asked.folder or Path(made)
        write(folder, asked.blocks, asked.width, asked.samples)
        command = [sys.executable, __file__, "--measure", "--folder", str(folder)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

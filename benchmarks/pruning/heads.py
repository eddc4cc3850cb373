"""How well head scores follow the truth on small vision transformers. Prints, asserts nothing.

    python benchmarks/pruning/heads.py [--seeds 0 1 2] [--epochs 8] [--samples 1200]

For each seed a ViT of 3 x 8 heads is trained on the digits. The truth is the rise of the loss when
one head alone is masked, on the very samples that the statistics were measured on; the figure is
Kendall's tau a layer, averaged. The ceiling is the truth on one half of the samples against the
truth on the other. Beside the gate score: the document's mix, the same with high entropy counted
as important, gradient sensitivity (Michel 2019), and the size of the head's own output projection.
A network trained until its loss vanishes (--epochs 25) has no gate gradients of the loss left: the
gate score then falls behind, the projections do not. Last, from summaries to a
decision: heads a second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import numpy as np
import torch
from scipy.stats import kendalltau
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from elesh.analysis import analyze
from elesh.analysis.importance.scores import single_removal
from elesh.analysis.levels.heads import LATE, HeadWeights, multi_factor
from elesh.demo.network import TransformerBlock
from elesh.settings import Settings
from elesh.trainer import Recorder, Surgeon
from leyline import (
    CheckpointBundle,
    CheckpointMetadata,
    GateSite,
    GateStatistics,
    HeadImportanceData,
    Level,
    PrunedArchitecture,
    PruningGroup,
    TensorDescriptor,
    TensorSlice,
)

Truth = dict[str, np.ndarray]


class SmallViT(nn.Module):
    """Three blocks of eight heads on the sixteen 2 x 2 patches of a digit."""

    def __init__(self, width: int = 48, heads: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, 2 * width) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return torch.as_tensor(self.head(self.norm(self.blocks(x)).mean(1)))


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target)


def trained(seed: int, epochs: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    model = SmallViT()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, epochs=epochs, steps_per_epoch=len(x) // 64 + 1
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def leave_one_out(model: nn.Module, bundle: CheckpointBundle, x: Tensor, y: Tensor) -> Truth:
    """[H, N] by layer: the rise of each sample's loss without one head."""
    surgeon = Surgeon(model, bundle.architecture)

    def losses() -> np.ndarray:
        with torch.no_grad():
            return functional.cross_entropy(model(x), y, reduction="none").double().numpy()

    plain, loss_increases = losses(), {}
    for group in head_groups(bundle):
        rows = []
        for head in range(group.size):
            surgeon.mask({group.name: [head]})
            rows.append(losses() - plain)
            surgeon.unmask()
        loss_increases[group.name] = np.stack(rows)
    return loss_increases


def head_groups(bundle: CheckpointBundle) -> list[PruningGroup]:
    return [group for group in bundle.architecture.groups if group.level is Level.HEAD]


def tau(scores: Mapping[str, np.ndarray], truth: Truth) -> float:
    """Kendall's tau a layer, averaged."""
    return float(np.mean([kendalltau(scores[n], truth[n].mean(1)).statistic for n in truth]))


def ceiling(truth: Truth) -> float:
    even = {name: loss_increases[:, ::2].mean(1) for name, loss_increases in truth.items()}
    return tau(even, {name: loss_increases[:, 1::2] for name, loss_increases in truth.items()})


def high_entropy(bundle: CheckpointBundle, name: str) -> np.ndarray:
    """The mix with the sign of the entropy turned round, as the documents have it."""
    data = [bundle.heads[name]]
    focus = multi_factor(data, HeadWeights(LATE.entropy, 0, 0))
    return multi_factor(data, LATE) + LATE.entropy - 2 * focus


def speed(joint: bool, layers: int = 250, heads: int = 32, samples: int = 512) -> float:
    """Heads a second from a checkpoint's summaries to a decision, all safety gates included;
    ``joint``: in the joint order of output projections, cross-fitted, instead of by the mix."""
    rng = np.random.default_rng(0)
    names = [f"layer{i}" for i in range(layers)]
    tensors = [TensorDescriptor(path=f"{n}.w", shape=(16, heads), dtype="float32") for n in names]
    groups = [
        PruningGroup(
            name=name,
            level=Level.HEAD,
            original_size=heads,
            origin=tuple(range(heads)),
            slices=(TensorSlice(tensor=f"{name}.w", dim=1),),
            sites=(GateSite(module=name, dim=-1),),
        )
        for name in names
    ]
    architecture = PrunedArchitecture.build(tuple(tensors), (), tuple(groups))
    vector = {name: rng.uniform(0.1, 0.6, (4, heads)).astype(np.float32) for name in names}
    bundle = CheckpointBundle(
        CheckpointMetadata(
            run_id="r", checkpoint_id="c", epoch=120, model_hash=architecture.model_hash
        ),
        architecture,
        channels={},
        gates={
            name: GateStatistics(
                layer_name=name,
                projections=rng.standard_normal((samples, heads)).astype(np.float32),
                first_order=vector[name][0],
                second_order=vector[name][1],
            )
            for name in names
            if joint
        },
        heads={
            name: HeadImportanceData(
                layer_name=name,
                gradient_sensitivity=vector[name][0],
                entropy=vector[name][1],
                entropy_bound=np.full(heads, 3, np.float32),
                diversity=vector[name][2],
                similarity=np.eye(heads, dtype=np.float32),
            )
            for name in names
        },
    )
    settings, seconds = Settings(), []
    for _ in range(5):
        begun = time.perf_counter()
        analyze(bundle, settings, level=Level.HEAD)
        seconds.append(time.perf_counter() - begun)
    return layers * heads / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1200)
    options = parser.parse_args()
    x, y = digits()
    train, rest = slice(0, options.samples), slice(options.samples, None)
    names = "gate", "projection", "gradient", "mix", "mix, +entropy", "ceiling"
    print(f"{'seed':>4} {'train loss':>11} {'accuracy':>9}", *(f"{name:>13}" for name in names))
    for seed in options.seeds:
        model = trained(seed, options.epochs, x[train], y[train])
        batches = list(zip(x[train].split(100), y[train].split(100), strict=True))
        bundle = Recorder(model, x[:4], seed=seed).measure(batches, epoch=1)
        truth = leave_one_out(model, bundle, x[train], y[train])
        gates, heads = bundle.gates, bundle.heads
        columns = [
            tau({n: single_removal(gates[n]) for n in truth}, truth),
            tau({n: np.square(gates[n].projections).mean(0) for n in truth}, truth),
            tau({n: heads[n].gradient_sensitivity for n in truth}, truth),
            tau({n: multi_factor([heads[n]], LATE) for n in truth}, truth),
            tau({n: high_entropy(bundle, n) for n in truth}, truth),
            ceiling(truth),
        ]
        with torch.no_grad():
            accuracy = (model(x[rest]).argmax(1) == y[rest]).float().mean().item()
            loss = functional.cross_entropy(model(x[train]), y[train]).item()
        figures = (f"{value:13.3f}" for value in columns)
        print(f"{seed:4} {loss:11.4f} {accuracy:9.3f}", *figures)
    mix, joint = speed(joint=False), speed(joint=True)
    print(f"decisions: {mix:,.0f} heads/s by the mix, {joint:,.0f} jointly by 512 projections")


if __name__ == "__main__":
    main()

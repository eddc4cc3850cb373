"""How fast channels are scored and chosen, beside torch-pruning, and what a measurement costs.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.speed [--samples 32] [--repeat 3]

On a network of ResNet-50's shape, built from torch: scoring and choosing 20% of the channels from
the exported vectors against torch-pruning's importance and ranking of the same groups (its
tracing is not counted; its sums over weights and gradients are, where ours were made when the
vectors were measured), and the recorder's calibration pass against a plain forward and backward
pass over the same samples. Ratios of one run on one machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch_pruning as tp
from torch import Tensor, nn

from elesh.analysis import select_channels
from elesh.trainer import Recorder


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside an identity or projection path."""

    def __init__(self, into: int, mid: int, stride: int) -> None:
        super().__init__()
        out = 4 * mid
        self.body = nn.Sequential(
            nn.Conv2d(into, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU(),
            nn.Conv2d(mid, mid, 3, stride, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU(),
            nn.Conv2d(mid, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or into != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Sequential:
    """The shape of ResNet-50 (He et al. 2016), random weights."""
    blocks: list[nn.Module] = []
    into = 64
    for mid, times, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(times):
            blocks.append(Bottleneck(into, mid, stride if number == 0 else 1))
            into = 4 * mid
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 1000),
    )  # fmt: skip


def seconds(work: Callable[[], object], repeat: int) -> float:
    """The fastest of some runs."""
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def torch_pruning_ranking(
    model: nn.Module, example: Tensor
) -> tuple[Callable[[], list[tp.Group]], Callable[[], object]]:
    """How it finds its groups in the traced graph, and that with their group Taylor importance
    and global ranking, as its pruner computes them at every step."""
    nn.functional.cross_entropy(model(example), torch.zeros(len(example)).long()).backward()
    pruner = tp.pruner.MetaPruner(
        model,
        example,
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=0.2,
        ignored_layers=[module for module in model.modules() if isinstance(module, nn.Linear)],
    )

    def groups() -> list[tp.Group]:
        return list(
            pruner.DG.get_all_groups(
                ignored_layers=pruner.ignored_layers,
                root_module_types=pruner.root_module_types,
            )
        )

    def rank() -> int:
        scores = [
            score for group in groups() if (score := pruner.estimate_importance(group)) is not None
        ]
        return len(torch.cat(scores).sort().indices)

    return groups, rank


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="of the square images")
    parser.add_argument("--repeat", type=int, default=3)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = resnet50()
    images = torch.randn(asked.samples, 3, asked.size, asked.size)
    labels = torch.randint(0, 1000, (asked.samples,))
    recorder = Recorder(model.eval(), images[:1])

    def training_pass() -> None:
        model.train()
        nn.functional.cross_entropy(model(images), labels).backward()

    model.train()
    plain = seconds(training_pass, asked.repeat)
    model.eval()
    calibration = seconds(lambda: recorder.measure([(images, labels)], epoch=1), asked.repeat)
    print(f"forward + backward, {asked.samples} samples        {plain:9.3f} s")
    print(f"recorder, the same samples         {calibration:9.3f} s  {calibration / plain:.2f} x")

    bundle = recorder.measure([(images[:2], labels[:2])], epoch=1)
    groups = [group for group in bundle.architecture.groups if group.prunable]
    channels = sum(group.size for group in groups)
    followed = sum(
        bundle.architecture.tensor[f"{layer}.weight"].shape[0]
        for group in groups
        for layer in group.layers
    )
    # The vectors alone: redundancy and projections are measured in benchmarks/speed/selection.py.
    vectors = {
        name: data.model_copy(update={"channel_correlations": None})
        for name, data in bundle.channels.items()
    }
    bundle = replace(bundle, channels=vectors, gates={})
    ours = seconds(
        lambda: select_channels(bundle, channels // 5, scorer="multi_metric"),
        10 * asked.repeat,
    )
    groups_alone, rank = torch_pruning_ranking(model, images[:2])
    theirs, walk = seconds(rank, asked.repeat), seconds(groups_alone, asked.repeat)
    print(f"{channels} channels in {len(groups)} groups ({followed} outputs of layers)")
    print(f"scoring + selection from vectors   {ours:9.5f} s  {channels / ours / 1e6:.2f} M/s")
    print(f"torch-pruning, the same groups     {theirs:9.5f} s  {theirs / ours:.0f} x ours")
    print(
        f"  of which finding the groups      {walk:9.5f} s  {(theirs - walk) / ours:.0f} x without"
    )


if __name__ == "__main__":
    main()

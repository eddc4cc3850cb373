"""What ``elesh.prune`` costs, in plain forward and backward passes over its samples.

    python -m benchmarks.pruning.passes --width 16 --pixels 32
    python -m benchmarks.pruning.passes --net vit --width 96

A ResNet-50 (He et al. 2016; bottlenecks of 3, 4, 6 and 3), a VGG or a transformer learns images of
ten made-up classes for a moment, and what it then answers is taken for right; ``elesh.prune`` cuts
it to half of its MACs with 512 samples. A plain pass (loss, gradients of all weights, the same
batches) is timed in the same process before, in CPU time; all figures are in such passes, of the
whole call and of its parts.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import elesh
from benchmarks.common.nets import Vgg
from benchmarks.common.report import show, write
from elesh.demo.network import TransformerBlock
from elesh.pruning import at_once, judging
from elesh.trainer import Recorder, Surgeon
from elesh.trainer.surgery.reconstruction.after_cut import reestimate_batch_statistics

__all__ = ["NETS", "ResNet50", "cpu_seconds", "made_up", "measured", "timed"]

_CLASSES = 10
PARTS: dict[str, tuple[Any, str]] = {
    "recorder": (Recorder, "__init__"),
    "first evaluation": (at_once, "_judge"),
    "measuring": (Recorder, "measure"),
    "choosing": (at_once, "analyze"),
    "cutting": (Surgeon, "cut"),
    "outputs before": (at_once, "outputs_before"),
    "layer by layer": (at_once, "solved_layer_by_layer"),
    "batch statistics": (at_once, "reestimate_batch_statistics"),
    "evaluation": (judging.Validation, "now"),
    "matching": (at_once, "match_outputs"),
    "softening": (at_once, "soften_outputs"),
    "latency": (at_once, "latencies"),
}
"""What is timed by itself: where it is looked up, and its name."""


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside an identity or a projection."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    """With a stem of one 3x3 convolution, for small images."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks, inputs = [], width
        for stage, count in enumerate((3, 4, 6, 3)):
            for block in range(count):
                stride = 2 if stage and not block else 1
                blocks.append(Bottleneck(inputs, width * 2**stage, stride))
                inputs = 4 * width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, classes]."""
        return torch.as_tensor(self.head(self.blocks(self.stem(x)).mean((2, 3))))


class Vit(nn.Module):
    """Patches of 4 x 4 and transformer blocks."""

    def __init__(self, width: int = 96, pixels: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, (pixels // 4) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4, 4 * width) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, classes]."""
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return torch.as_tensor(self.head(self.norm(self.blocks(x)).mean(1)))


class ColourVgg(Vgg):
    """Of colour images of any size: pooled to 8 x 8 at the end of the first convolution."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(width)
        self.features[0] = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(8)
        )


NETS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet50": lambda width, pixels: ResNet50(width),
    "vgg": lambda width, pixels: ColourVgg(width),
    "vit": Vit,
}


def made_up(count: int, pixels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of made-up classes, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(_CLASSES, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(_CLASSES, (count,), generator=generator)
    return 2 * means[labels] + torch.randn(count, 3, pixels, pixels, generator=generator), labels


@contextmanager
def timed(parts: Mapping[str, tuple[Any, str]], took: dict[str, float]) -> Iterator[None]:
    """CPU seconds of the parts, while entered."""

    def timing(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def clocked(*args: Any, **options: Any) -> Any:
            begun = time.process_time()
            try:
                return work(*args, **options)
            finally:
                took[part] = took.get(part, 0.0) + time.process_time() - begun

        return clocked

    with ExitStack() as stack:
        for part, (owner, name) in parts.items():
            stack.enter_context(patch.object(owner, name, timing(part, getattr(owner, name))))
        yield


def measured(
    net: str, width: int, pixels: int, samples: int, batch: int, share: float, validation: int
) -> dict[str, float]:
    """Figures of one call of ``elesh.prune``: plain passes in all, and by part."""
    torch.manual_seed(0)
    model = NETS[net](width, pixels)
    images, labels = made_up(samples, pixels, 1)
    batches = list(zip(torch.split(images, batch), torch.split(labels, batch), strict=True))
    unseen = made_up(validation, pixels, 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def plain() -> None:
        for inputs, wanted in batches:
            optimizer.zero_grad()
            cross_entropy(model(inputs), wanted).backward()  # type: ignore[no-untyped-call]

    def trained() -> None:
        for inputs, wanted in batches:
            optimizer.zero_grad()
            cross_entropy(model(inputs), wanted).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    @torch.no_grad()
    def evaluate() -> elesh.Evaluation:
        outputs = model(unseen[0])
        right = (outputs.argmax(1) == unseen[1]).float().mean()
        return elesh.Evaluation(float(right), float(cross_entropy(outputs, unseen[1])))

    for _ in range(2):
        trained()
    reestimate_batch_statistics(model, batches)
    model.eval()
    with torch.no_grad():
        batches = [(inputs, model(inputs).argmax(1)) for inputs, _ in batches]
        unseen = unseen[0], model(unseen[0]).argmax(1)
    model.train()
    before = min(cpu_seconds(plain) for _ in range(2))
    parts: dict[str, float] = {}
    with timed(PARTS, parts):
        took = cpu_seconds(
            lambda: elesh.prune(
                model,
                batches,
                {"macs": share},
                evaluate=evaluate,
                optimizer=optimizer,
                max_accuracy_drop=1.0,
                progress=False,
            )
        )
    figures = {part: parts.get(part, 0.0) / before for part in PARTS}
    return {
        "plain_seconds": before,
        "prune_seconds": took,
        "passes": took / before,
        **figures,
        "the rest": (took - sum(parts.values())) / before,
    }


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds that it takes."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    """Print the call and its parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", choices=NETS, default="resnet50")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--validation", type=int, default=64)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    figures = measured(
        asked.net,
        asked.width,
        asked.pixels,
        asked.samples,
        asked.batch,
        asked.share,
        asked.validation,
    )
    plain, took = figures["plain_seconds"], figures["prune_seconds"]
    rows = [[name, f"{figures[name]:.2f}"] for name in ("passes", *PARTS, "the rest")]
    show(f"elesh.prune: {took:.2f} s, a plain pass {plain:.2f} s", ["", "plain passes"], rows)
    write(asked.json, figures)


if __name__ == "__main__":
    main()

"""What ``elesh.prune`` costs, in plain forward and backward passes over its samples.

    python -m benchmarks.pruning.passes --width 64 --pixels 32

A ResNet-50 (He et al. 2016; bottlenecks of 3, 4, 6 and 3) learns images of ten made-up classes for
a moment, and what it then answers is taken for right; ``elesh.prune`` cuts it to half of its MACs
with 512 samples. Plain passes (loss, gradients of all weights, the same batches) are timed in the
same process before and after, in CPU time; the ratio to the passes before is what counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import elesh
from benchmarks.common.report import show, write
from elesh.trainer.surgery.after_cut import reestimate_batch_statistics

__all__ = ["ResNet50", "measured"]

_CLASSES = 10


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


def _samples(count: int, pixels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of made-up classes, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(_CLASSES, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(_CLASSES, (count,), generator=generator)
    return 2 * means[labels] + torch.randn(count, 3, pixels, pixels, generator=generator), labels


def measured(
    width: int, pixels: int, samples: int, batch: int, share: float, validation: int
) -> dict[str, float]:
    """Figures of one call of ``elesh.prune``."""
    torch.manual_seed(0)
    model = ResNet50(width)
    images, labels = _samples(samples, pixels, 1)
    batches = list(zip(torch.split(images, batch), torch.split(labels, batch), strict=True))
    unseen = _samples(validation, pixels, 2)
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
    before = min(_seconds(plain) for _ in range(2))
    took = _seconds(
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
    return {
        "width": width,
        "pixels": pixels,
        "plain_seconds": before,
        "plain_after_seconds": _seconds(plain),
        "prune_seconds": took,
        "passes": took / before,
    }


def _seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    """Print one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--validation", type=int, default=64)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    figures = measured(
        asked.width, asked.pixels, asked.samples, asked.batch, asked.share, asked.validation
    )
    columns = ["width", "plain pass, s", "prune, s", "passes"]
    row = [f"{figures['width']:.0f}", f"{figures['plain_seconds']:.2f}"]
    row += [f"{figures['prune_seconds']:.2f}", f"{figures['passes']:.1f}"]
    show("elesh.prune in plain passes", columns, [row])
    write(asked.json, figures)


if __name__ == "__main__":
    main()

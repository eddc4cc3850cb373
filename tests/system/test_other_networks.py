"""Networks that are not the demo's: measured, decided, masked, cut, run."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from elesh import Settings, analyze
from elesh.trainer import Recorder, Surgeon
from leyline import CheckpointBundle, encode


def conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.BatchNorm2d(outputs)
    )


class Plain(nn.Module):
    """VGG-like: bias, pooling, flatten with several positions, dropout, two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 40), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            conv(40, 56), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(56 * 16, 72), nn.ReLU(), nn.Dropout(), nn.Linear(72, 7)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class Residual(nn.Module):
    """Three stages with strided shortcuts, and a squeeze-and-excitation gate in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 24)
        sizes = (24, 24, 40, 64)
        self.main = nn.ModuleList(
            nn.Sequential(conv(a, b, 1 + (a != b)), nn.ReLU(), conv(b, b))
            for a, b in pairwise(sizes)
        )
        self.short = nn.ModuleList(
            nn.Identity() if a == b else conv(a, b, 2, 1) for a, b in pairwise(sizes)
        )
        self.squeeze, self.excite = nn.Linear(64, 20), nn.Linear(20, 64)
        self.head = nn.Linear(64, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for main, short in zip(self.main, self.short, strict=True):
            x = torch.relu(main(x) + short(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return self.head((x * gate[:, :, None, None]).mean((2, 3)))


class Concat(nn.Module):
    """Two branches joined, split again, and joined with the input of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(3, 32), conv(32, 28), conv(32, 36, kernel=1)
        self.mix, self.last = conv(64, 48), conv(48 + 32, 40)
        self.head = nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        stem = torch.relu(self.stem(x))
        joined = torch.cat([self.left(stem), self.right(stem)], 1)
        a, b = self.mix(torch.relu(joined)).chunk(2, dim=1)
        mixed = torch.cat([torch.relu(a), torch.tanh(b), stem], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(self.last(mixed), 1).flatten(1))


@pytest.fixture(params=[Plain, Residual, Concat])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(23)
    return request.param()


def measured(model: nn.Module) -> tuple[Recorder, CheckpointBundle]:
    recorder = Recorder(model, torch.randn(2, 3, 16, 16))
    batches = [(torch.randn(64, 3, 16, 16), torch.randint(0, 7, (64,))) for _ in range(2)]
    return recorder, recorder.measure(batches, epoch=118)


def settings() -> Settings:
    """No limits on what an untrained network may be predicted to lose."""
    section = {"max_predicted_shift": 1e9, "min_channels_per_layer": 16}
    return Settings(structured_pruning={"channel_analysis": section})


@pytest.mark.sampled
def test_a_decision_cuts_what_it_predicted_and_masking_is_cutting(model: nn.Module) -> None:
    recorder, bundle = measured(model)
    decision = analyze(bundle, settings=settings())
    assert decision.channels, decision.rejection_reason
    surgeon = Surgeon(model, recorder.architecture)
    x = torch.randn(9, 3, 16, 16)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        plain = model(x)
        surgeon.mask(decision.units)
        masked = model(x)
        surgeon.unmask()
        surgeon.cut(decision.units)
        cut = model(x)
    assert (masked - cut).abs().max() < 1e-4
    count = sum(p.numel() for p in model.parameters())
    assert count == decision.statistics.parameters_after < decision.statistics.parameters_before
    for target in decision.channels:
        assert recorder.architecture.group[target.layer_name].size - target.channels_after > 0
        assert target.channels_after >= 16
    model.train()
    model(x).sum().backward()
    surgeon.undo()
    model.eval()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(x), plain)


@pytest.mark.sampled
def test_a_decision_is_the_same_bytes_with_one_and_with_four_threads(model: nn.Module) -> None:
    _, bundle = measured(model)
    assert encode(analyze(bundle, threads=1)) == encode(analyze(bundle, threads=4))

"""Widths that are normalised: masking normalises over what is kept, and so is cutting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.network.kinds.norms import Norm, norm_of, refilled


class OwnRmsNorm(nn.Module):
    """As language models write it: ones to add to, and a name of its own for epsilon."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x * scale * (1 + self.weight)


class UnnamedEps(nn.Module):
    """As small language models write it: what is added to the variance is a number in the code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class ByDeviation(nn.Module):
    """As the annotated Transformer has it: divided by the unbiased deviation and a bit more."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        centred, deviation = x - x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.gain * centred / (deviation + self.eps) + self.shift


class ChannelsFirst(nn.LayerNorm):
    """Over the second axis of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """A residual stream between an embedding and an output layer of the same weight."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 12), nn.Parameter(torch.randn(1, 5, 12))
        self.norms = nn.ModuleList([norm(12) for _ in range(3)])
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.out = nn.Linear(12, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norms[0](self.embed(tokens) + self.place)
        x = x + self.down(torch.relu(self.up(self.norms[1](x))))
        return self.out(self.norms[2](x))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, OwnRmsNorm, UnnamedEps, ByDeviation])
@pytest.mark.parametrize("gone", [[3], [0, 1, 5, 7, 11]])
@pytest.mark.sampled
def test_masking_a_width_is_cutting_it(norm: type[nn.Module], gone: list[int]) -> None:
    torch.manual_seed(0)
    model, tokens = Decoder(norm), torch.randint(0, 11, (2, 5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    surgeon = Surgeon(model, Recorder(model, tokens).architecture)
    assert surgeon.architecture.group["embed"].prunable, surgeon.architecture.group["embed"].reason
    whole = model(tokens)
    surgeon.mask({"embed": gone})
    masked = model(tokens)
    surgeon.unmask()
    after = surgeon.cut({"embed": gone})
    cut = model(tokens)
    assert not torch.allclose(whole, cut, atol=1e-3)
    torch.testing.assert_close(masked, cut, rtol=1e-5, atol=1e-5)
    assert after.parameters == sum(p.numel() for p in model.parameters())
    model(tokens).square().mean().backward()
    surgeon.undo()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_normalisations_are_told_by_what_they_compute() -> None:
    assert norm_of(nn.LayerNorm(8), (2, 5, 8)).kind == "layer"  # type: ignore[union-attr]
    assert norm_of(OwnRmsNorm(8), (2, 5, 8)).kind == "rms"  # type: ignore[union-attr]
    assert norm_of(UnnamedEps(8), (2, 5, 8)) == Norm("layer", -1, 1e-5)
    assert norm_of(ByDeviation(8), (2, 5, 8)) == Norm("deviation", -1, 1e-6)
    first = norm_of(ChannelsFirst(8), (2, 8, 4, 4))
    assert first is not None
    assert (first.kind, first.dim) == ("layer", 1)
    assert norm_of(nn.BatchNorm1d(8), (2, 8)) is None
    assert norm_of(nn.LayerNorm([4, 8]), (2, 4, 8)) is None


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_refilled_inputs_normalise_as_the_kept_channels_alone(eps: float) -> None:
    torch.manual_seed(0)
    x, kept = torch.randn(3, 4, 9) * 2 + 5, torch.tensor([0, 2, 3, 5, 6, 7, 8])
    gate = torch.zeros(9).index_fill(0, kept, 1.0).expand(1, 1, 9)
    alone = nn.functional.layer_norm(x[..., kept], (7,), eps=eps)
    whole = nn.functional.layer_norm(refilled(x, gate, -1, "layer", eps), (9,), eps=eps)
    torch.testing.assert_close(whole[..., kept], alone, rtol=1e-5, atol=1e-5)
    alone = nn.functional.rms_norm(x[..., kept], (7,), eps=eps)
    whole = nn.functional.rms_norm(refilled(x, gate, -1, "rms", eps), (9,), eps=eps)
    torch.testing.assert_close(whole[..., kept], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [6, 12])
def test_a_width_that_is_normalised_behind_the_samples_can_go(size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), ChannelsFirst(12), nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(),
        ChannelsFirst(8), nn.Conv2d(8, 4, 1),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, size, size)
    architecture = Recorder(model, x).architecture
    assert [group.name for group in architecture.groups if group.prunable] == ["0", "2"]
    surgeon = Surgeon(model, architecture)
    surgeon.mask({"0": [1, 5, 7], "2": [0]})
    masked = model(x)
    surgeon.unmask()
    surgeon.cut({"0": [1, 5, 7], "2": [0]})
    assert torch.allclose(model(x), masked, atol=1e-5)


class GlobalResponse(nn.Module):
    """Every channel's norm over all positions, by the mean of all (ConvNeXt V2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        norms = x.norm(dim=1, keepdim=True)
        return x + self.bias + self.weight * x * (norms / (norms.mean(-1, keepdim=True) + 1e-6))


class ResponseNorm(GlobalResponse):
    """With a name by which it is tried out."""


def test_channels_go_through_a_normalisation_by_their_response() -> None:
    torch.manual_seed(0)
    kind = norm_of(ResponseNorm(8), (2, 5, 8))
    assert kind is not None
    assert (kind.kind, kind.dim) == ("response", -1)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), ResponseNorm(8), nn.Linear(8, 2))
    x = torch.randn(2, 5, 3)
    surgeon = Surgeon(model, Recorder(model, x).architecture)
    surgeon.mask({"0": [1, 2, 7]})
    masked = model(x)
    surgeon.unmask()
    surgeon.cut({"0": [1, 2, 7]})
    torch.testing.assert_close(model(x), masked, rtol=1e-5, atol=1e-5)
    assert model[2].weight.shape == (5,)


def test_channels_go_through_a_normalisation_of_whole_maps() -> None:
    torch.manual_seed(0)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shape = nn.Parameter(torch.rand(8)), (8, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.view(self.shape)

    last = nn.Conv2d(8, 2, 3, padding=1)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.GELU(), Scale(), last)
    x = torch.randn(2, 3, 5, 4)
    surgeon = Surgeon(model, Recorder(model, x).architecture)
    surgeon.mask({"0": [1, 2, 7]})
    masked = model(x)
    surgeon.unmask()
    surgeon.cut({"0": [1, 2, 7]})
    torch.testing.assert_close(model(x), masked, rtol=1e-4, atol=1e-4)
    assert (model[1].num_groups, model[1].num_channels, model[3].shape) == (1, 5, (5, 1, 1))
    surgeon.undo()
    assert (model[1].num_groups, model[1].num_channels, model[3].shape) == (1, 8, (8, 1, 1))

"""Multiply-accumulates are those that PyTorch counts, before and after cuts: by weights that layers
or functions multiply by, and of activations with each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cut_check import counted_macs, prunable
from shared import quick_first
from torch import Tensor, nn
from torch.nn import functional

from elesh.analysis.budgets.knapsack import resource_model
from elesh.trainer import Recorder, Surgeon
from leyline import Budget, PrunedArchitecture


class Attention(nn.Module):
    """Queries by keys, weights by values; a bias needs a gradient, so that nothing is fused."""

    def __init__(
        self, width: int = 16, heads: int = 4, keys: int = 4, biased: bool = False
    ) -> None:
        super().__init__()
        self.size = width // heads
        self.queries = nn.Linear(width, width)
        self.keys, self.values = (nn.Linear(width, keys * self.size) for _ in range(2))
        self.out = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(heads, 1, 1)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        made = [one(x) for one in (self.queries, self.keys, self.values)]
        q, k, v = (x.unflatten(-1, (-1, self.size)).transpose(1, 2) for x in made)
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v, self.bias)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Stream(nn.Module):
    """What is added to a stream that has a width."""

    def __init__(self, *parts: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.enter, self.parts = nn.Linear(6, width), nn.ModuleList(parts)
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for part in self.parts:
            x = x + part(self.norm(x))
        return self.leave(x.mean(1))


class Mixing(nn.Module):
    """Positions are mixed on a transposed map: channels are positions to both layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 9), nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Linear(nn.Module):
    """Linear attention by ``einsum``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).unbind(2)
        state = torch.einsum("bthi,bthj->bhij", k.softmax(1), v)
        return self.out(torch.einsum("bthi,bhij->bthj", q.softmax(-1), state).flatten(2))


class Twice(nn.Module):
    """Its layer is called, and a function multiplies by the weight once more."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        also = functional.linear(x, self.wide.weight, self.wide.bias)
        return self.out(torch.relu(self.wide(x)) * also.sigmoid())


class Tabled(nn.Module):
    """A table of positions is multiplied by the queries of every head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) + q @ self.table.T
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Crossed(nn.Module):
    """``nn.MultiheadAttention`` of few queries and many keys."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(1, 2, 16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        pooled, _ = self.attention(self.seeds.expand(len(x), -1, -1), x, x)
        return x + pooled.mean(1, keepdim=True)


class Constant(nn.Module):
    """Angles that no parameter has a part in, multiplied as rotary positions are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            steps = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
            angles = torch.ones(len(x), 3, 1) @ steps.expand(len(x), 1, -1)
        return x * angles.cos().mean(1).unsqueeze(-1)


class FixedMatrix(nn.Module):
    """Fourier features: multiplied by what no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(16, 3))
        self.leave = nn.Linear(3, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(torch.sin(x @ self.frequencies))


class Codebook(nn.Module):
    """The nearest of several vectors, by products that the outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(9, 16)

    def forward(self, x: Tensor) -> Tensor:
        squares = self.codes.weight.square().sum(1)
        return x + self.codes((x @ self.codes.weight.T - squares).argmax(-1))


class SharedWeight(nn.Module):
    """Two layers with one weight, and a function that uses it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.tanh(self.one(x)))
        return nn.functional.linear(torch.tanh(x), self.one.weight)


class NonLocal(nn.Module):
    """Attention of all positions of a map, without heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(10, 4, 1), nn.Conv2d(10, 4, 1)
        self.value, self.out = nn.Conv2d(10, 8, 1), nn.Conv2d(8, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        mixed = v @ weights.transpose(1, 2)
        return self.out(mixed.unflatten(2, x.shape[2:]))


class Maps(nn.Module):
    """Convolutions, one of them transposed, and what attends to maps."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention = nn.Conv2d(3, 10, 3, padding=1), NonLocal()
        self.up, self.leave = nn.ConvTranspose2d(10, 6, 2, stride=2), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        return self.leave(torch.relu(self.up(x + self.attention(x))))


NETS: dict[str, Callable[[], nn.Module]] = {
    "fused attention": lambda: Stream(Attention(), Attention()),
    "attention with a bias": lambda: Stream(Attention(biased=True), Attention(biased=True)),
    "grouped queries": lambda: Stream(Attention(keys=2)),
    "mixed positions": lambda: Stream(Mixing()),
    "einsum": lambda: Stream(Linear()),
    "called and used": lambda: Stream(Twice()),
    "table of positions": lambda: Stream(Tabled()),
    "cross-attention": lambda: Stream(Crossed()),
    "encoder": lambda: Stream(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)),
    "constant angles": lambda: Stream(Constant(), Attention()),
    "fixed matrix": lambda: Stream(FixedMatrix()),
    "codebook": lambda: Stream(Codebook()),
    "maps": Maps,
}


def inputs(name: str) -> Tensor:
    return torch.randn(2, 3, 6, 6) if name == "maps" else torch.randn(2, 7, 6)


def some(architecture: PrunedArchitecture, seed: int) -> dict[str, list[int]]:
    """Units of every group that may go, another number of each."""
    rng = np.random.default_rng(seed)
    return {
        group.name: rng.permutation(group.size)[: rng.integers(1, group.size)].tolist()
        for group in architecture.groups
        if group.prunable and group.unit_multiple == 1
    }


@pytest.mark.parametrize("name", quick_first(NETS, 5))
def test_macs_are_those_that_pytorch_counts_before_and_after_any_cut(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETS[name]().eval(), inputs(name)
    surgeon = Surgeon(model, Recorder(model, x).architecture)
    assert surgeon.architecture.macs == surgeon.architecture.original_macs == counted_macs(model, x)
    for seed in range(3):
        after = surgeon.cut(some(surgeon.architecture, seed))
        assert after.macs == counted_macs(model, x) <= after.original_macs
        surgeon.undo()
    for block in surgeon.architecture.blocks:
        if block.prunable:
            assert surgeon.cut_layers([block.name]).macs == counted_macs(model, x)
            surgeon.undo()


@pytest.mark.parametrize("name", quick_first(NETS, 5))
def test_a_budget_of_macs_reckons_with_what_a_cut_leaves(name: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]().eval()
    whole = Recorder(model, inputs(name)).architecture
    reckoned = resource_model(whole, Budget(resource="macs", at_most=0.5))
    assert reckoned.total({}) == whole.macs
    for seed in range(3):
        units = some(whole, seed)
        lost = {group: len(gone) for group, gone in units.items()}
        assert reckoned.total(lost) == whole.without(units).macs
        for group in units:
            (_, saved), *_ = reckoned.savings({}, group, [1])
            assert saved == whole.macs - whole.without({group: [0]}).macs


def test_a_head_takes_its_share_of_the_products_along() -> None:
    torch.manual_seed(0)
    model = Stream(Attention()).eval()
    architecture = Recorder(model, torch.randn(2, 7, 6)).architecture
    heads = "parts.0"
    assert heads in prunable(Surgeon(model, architecture))
    each = 7 * 7 * 4 + 7 * 7 * 4  # Scores, and values, of one head.
    assert [product.macs for product in architecture.products] == [4 * each]
    by_weights = 7 * 4 * 4 * 16
    assert architecture.macs - architecture.without({heads: [2]}).macs == each + by_weights


def test_a_weight_of_two_layers_is_counted_once_for_each_call() -> None:
    model, x = Stream(SharedWeight()).eval(), torch.randn(2, 7, 6)
    assert Recorder(model, x).architecture.macs == counted_macs(model, x)

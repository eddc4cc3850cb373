"""Linear layers that people write themselves are cut, measured and refitted as PyTorch's are."""

from __future__ import annotations

import pytest
import torch
from cut_check import counted_macs, cut_and_checked, prunable
from torch import Tensor, nn
from torch.nn import functional

import elesh
from elesh.trainer.network.kinds.hand_written import is_own_linear
from elesh.trainer.network.layers import channel_axes


class Dense(nn.Module):
    """[out, in], by a function."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Matrix(nn.Module):
    """[in, out], by a product; other names."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.shift


class Scaled(Matrix):
    """No linear layer: what it makes is doubled."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Activated(Matrix):
    """Has its activation in it, and a dropout."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x).relu())


class Convolved(Matrix):
    """Of a graph: sums over neighbours (Kipf and Welling, 2017), by a matrix of all pairs."""

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.spmm(adjacency, torch.mm(x, self.kernel)) + self.shift


class Messages(Matrix):
    """The same by a list of edges."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        made = x @ self.kernel
        return torch.zeros_like(made).index_add(0, edges[1], made[edges[0]]) + self.shift


class Chosen(Matrix):
    """None of these: every channel is divided by all."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Rms(nn.Module):
    """A normalisation that does not say what it adds, nor has a name that tells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


class Block(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.enter, self.norm = kind(6, 16), Rms(16)
        self.wide, self.narrow, self.leave = kind(16, 24), kind(24, 16), kind(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.narrow(torch.relu(self.wide(self.norm(x)))))


@pytest.mark.parametrize("kind", [Dense, Matrix])
def test_they_lose_their_channels(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Block(kind).eval(), torch.randn(4, 5, 6)
    surgeon = cut_and_checked(model, x)
    assert prunable(surgeon) == ["enter", "wide"]
    assert surgeon.architecture.macs == counted_macs(model, x)
    surgeon.cut({"wide": [0, 3]})
    assert surgeon.architecture.macs == counted_macs(model, x)
    if isinstance(model.wide, Dense):
        assert (model.wide.out_features, model.narrow.in_features) == (22, 22)


class Graph(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.one, self.two, self.three = kind(6, 12), kind(12, 10), kind(10, 3)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        y = functional.dropout(torch.relu(self.one(x, graph)), 0.5, training=self.training)
        return torch.as_tensor(self.three(torch.relu(self.two(y, graph)), graph))


EDGES = torch.tensor([[0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 0, 2]])


@pytest.mark.parametrize("kind", [Convolved, Messages])
def test_layers_of_graphs_lose_their_channels(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    graph = torch.rand(5, 5) if kind is Convolved else EDGES
    model, inputs = Graph(kind), (torch.randn(5, 6), graph)
    surgeon = cut_and_checked(model, inputs)
    assert prunable(surgeon) == ["one", "two"]
    surgeon.cut({"one": [0, 3]})
    assert surgeon.architecture.macs == counted_macs(model, inputs)


def test_layers_with_an_activation_in_them_lose_their_channels() -> None:
    torch.manual_seed(0)
    model, x = Block(Activated).eval(), torch.randn(4, 5, 6)
    assert prunable(cut_and_checked(model, x)) == ["enter", "wide"]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(96, 6, generator=generator)
    with torch.no_grad():
        y = model(x).argmax(1)
    batches = list(zip(x.split(32), y.split(32), strict=True))
    report = elesh.prune(model, batches, {"macs": 0.8})
    assert report.after.macs <= 0.8 * report.before.macs


def test_a_layer_of_which_every_channel_knows_of_all_is_none() -> None:
    assert not channel_axes(Chosen(4, 3)).produces
    assert channel_axes(Activated(4, 3)).produces
    assert channel_axes(Activated(4, 3).train()).produces


def test_what_computes_something_else_is_none() -> None:
    assert is_own_linear(Matrix(4, 3))
    assert is_own_linear(Matrix(4, 4))
    assert not is_own_linear(Scaled(4, 3))
    assert not is_own_linear(nn.Bilinear(3, 3, 2))


def test_telling_them_changes_nothing() -> None:
    layer, state = Dense(5, 4).train(), torch.get_rng_state()
    before = {key: value.clone() for key, value in vars(layer)["_parameters"].items()}
    assert is_own_linear(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.training
    assert vars(layer).keys() == vars(Dense(5, 4)).keys()
    assert all(torch.equal(before[key], value) for key, value in layer.named_parameters())


class Counting(Dense):
    """Keeps what it was given, and counts."""

    calls, seen = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.seen = self.calls + 1, x
        return super().forward(x)


def test_what_their_code_notes_on_them_while_they_are_told_is_not_there_afterwards() -> None:
    layer = Counting(5, 4)
    assert is_own_linear(layer)
    assert (layer.calls, layer.seen) == (0, None)


@pytest.mark.parametrize("kind", [Matrix, Dense])
@pytest.mark.sampled
def test_they_are_measured_and_refitted_as_layers_of_pytorch(kind: type[nn.Module]) -> None:
    def made(kind: type[nn.Module]) -> nn.Module:
        torch.manual_seed(1)
        plain, model = Block(nn.Linear), Block(kind)
        for one, other in ((model.get_submodule(n), m) for n, m in plain.named_children()):
            if isinstance(other, nn.Linear):
                own = list(one.parameters())
                transposed = isinstance(one, Matrix)
                own[0].data = other.weight.data.T.clone() if transposed else other.weight.data
                own[1].data = other.bias.data
            else:
                one.load_state_dict(other.state_dict())
        return model.eval()

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(96, 6, generator=generator)
    with torch.no_grad():
        y = made(nn.Linear)(x).argmax(1)
    batches = list(zip(x.split(32), y.split(32), strict=True))
    for one in (kind, nn.Linear):
        model = made(one)
        report = elesh.prune(model, batches, {"macs": 0.6})
        assert report.after.macs <= 0.6 * report.before.macs
        with torch.no_grad():
            assert (model(x).argmax(1) == y).float().mean() >= 0.95

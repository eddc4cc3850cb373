"""Sizes that a network's own code has written into it, or keeps under names that nobody knows: its
channels and heads go, and the code says what is left of them."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_check import cut_and_checked, prunable
from torch import Tensor, nn
from torch.nn import functional

import elesh
from elesh.trainer import Recorder, Surgeon
from leyline import InvalidField

IMAGES = torch.randn(2, 3, 16, 16)


class LeNet(nn.Module):
    """As tutorials write it: the number of channels and positions is a number in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 10, 3)
        self.fc1, self.fc2 = nn.Linear(10 * 2 * 2, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = x.view(-1, 10 * 2 * 2)
        return self.fc2(functional.relu(self.fc1(x)))


class Joined(nn.Module):
    """A number counts the channels of two layers, in a helper with an argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 10, 1)
        self.out = nn.Linear(16 * 16 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self._flat(torch.cat([self.one(x), self.two(x)], 1), side=16))

    def _flat(self, x: Tensor, *, side: int) -> Tensor:
        return x.view(-1, 16 * side * side) if side < 0 else x.view(-1, 4096)


class Generator(nn.Module):
    """Lays the outputs of a linear layer out as so many maps."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.conv = nn.Linear(5, 12 * 4 * 4), nn.Conv2d(12, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.enter(x).view(-1, 12, 4, 4).relu())


class Largest(nn.Module):
    """Keeps the larger of two halves; the size of one under a name of its own."""

    def __init__(self, reads: int, makes: int) -> None:
        super().__init__()
        self.kept, self.filter = makes, nn.Conv2d(reads, 2 * makes, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.split(self.filter(x), self.kept, 1)
        return torch.max(one, two)


class Heads(nn.Module):
    """Numbers of heads under names of their own, one for queries and one for keys."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.shared = 8, 4
        self.q, self.k, self.v = nn.Linear(12, 48), nn.Linear(12, 24), nn.Linear(12, 24)
        self.o = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.many, -1).transpose(1, 2)
        k, v = (f(x).view(b, t, self.shared, -1).transpose(1, 2) for f in (self.k, self.v))
        k, v = (y.repeat_interleave(self.many // self.shared, dim=1) for y in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


class Length(nn.Module):
    """Divides by the length of all channels, and multiplies by the root of their number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.gain, self.rate = width**0.5, nn.Parameter(torch.ones(width)), width

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (1 + 0 * self.rate)
        return functional.normalize(x, dim=-1) * self.scale * self.gain


def _lengths() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), Length(16), nn.Linear(16, 3))


def _attention() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), Heads(), nn.Linear(12, 3))


NETS = {
    "lenet": (LeNet, IMAGES, ["conv1", "conv2", "fc1"]),
    "joined": (Joined, IMAGES, ["one", "two"]),
    "generator": (Generator, torch.randn(4, 5), ["enter"]),
    "largest": (
        lambda: nn.Sequential(Largest(3, 6), Largest(6, 6), nn.Conv2d(6, 2, 1)),
        IMAGES,
        ["0.filter", "1.filter"],
    ),
    "lengths": (_lengths, torch.randn(4, 6), ["0"]),
    "heads": (_attention, torch.randn(2, 7, 6), ["0", "1"]),
}


@pytest.mark.parametrize("name", NETS)
def test_what_is_counted_in_the_code_can_go(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, groups = NETS[name]
    surgeon = cut_and_checked(make(), inputs)
    assert prunable(surgeon) == groups


def test_a_number_in_the_code_is_another_one_for_the_cut_network_only() -> None:
    torch.manual_seed(0)
    model = LeNet().eval()
    surgeon = Surgeon(model, Recorder(model, IMAGES).architecture)
    (size,) = surgeon.architecture.group["conv2"].written
    assert (size.module, size.name, size.number, size.width) == ("", "forward", 40, 4)
    surgeon.cut({"conv2": [0, 3, 7]})
    surgeon.cut({"conv2": [1]})
    cut = model(IMAGES)
    assert cut.shape == (2, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IMAGES), cut)
        assert vars(other)["forward"].module is other
    assert LeNet()(IMAGES).shape == (2, 3)
    surgeon.undo()
    assert model(IMAGES).shape == (2, 3)
    assert vars(model)["forward"].numbers == {40: 28}


def test_undoing_the_only_cut_leaves_the_code_as_it_was() -> None:
    torch.manual_seed(0)
    model = LeNet().eval()
    whole = model(IMAGES)
    surgeon = Surgeon(model, Recorder(model, IMAGES).architecture)
    surgeon.cut({"conv2": [2]})
    surgeon.undo()
    assert "forward" not in vars(model)
    assert torch.equal(model(IMAGES), whole)


def test_a_method_that_was_replaced_since_is_not_replaced_again() -> None:
    model = LeNet().eval()
    surgeon = Surgeon(model, Recorder(model, IMAGES).architecture)
    own = model.forward
    vars(model)["forward"] = lambda x: own(x)
    with pytest.raises(InvalidField, match=r"model\.forward"):
        surgeon.cut({"conv2": [2]})
    assert surgeon.architecture.group["conv2"].size == 10


def test_roots_of_sizes_are_set_and_what_only_training_reads_is_not() -> None:
    torch.manual_seed(0)
    model = _lengths().eval()
    surgeon = Surgeon(model, Recorder(model, torch.randn(4, 6)).architecture)
    surgeon.cut({"0": range(7)})
    assert (model[1].scale, model[1].rate) == (3.0, 16)
    surgeon.undo()
    assert (model[1].scale, model[1].rate) == (4.0, 16)


class Repeated(nn.Module):
    """One number is the size of two layers that nothing connects."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(8, 12), nn.Linear(8, 12)])
        self.down = nn.ModuleList([nn.Linear(12, 8), nn.Linear(12, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).view(-1, 12).relu())
        return x


def test_a_number_that_is_the_size_of_several_layers_stands_in_the_way() -> None:
    torch.manual_seed(0)
    groups = Recorder(Repeated().eval(), torch.randn(4, 8)).architecture.group
    for name in ("up.0", "up.1"):
        reason = groups[name].reason  # Another number of rows may be found out late.
        assert "has another shape (a size in the code)" in reason or "view(-1, 12)" in reason
        assert not groups[name].written


def test_a_network_with_numbers_in_its_code_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LeNet().eval()
    Surgeon(model, Recorder(model, IMAGES).architecture).cut({"conv2": [0, 3], "fc1": [5]})
    elesh.save(model, tmp_path / "pruned")
    loaded = elesh.load(tmp_path / "pruned", LeNet()).eval()
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_a_network_with_numbers_in_its_code_is_exported_after_a_cut() -> None:
    model = LeNet().eval()
    recorder = Recorder(model, IMAGES)
    Surgeon(model, recorder.architecture).cut({"conv2": [1, 4]})
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=dynamic)
    more = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(program.module()(more), model(more), atol=1e-6)


def _kept(function: object) -> object:
    """Wraps a method, as decorators for arguments of former names do."""

    @functools.wraps(function)  # type: ignore[arg-type]
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)  # type: ignore[operator]

    return wrapper


class DecoratedAttention(nn.Module):
    """[B, T, 16] to [B, T, 16]; as wide inside as outside, which it keeps once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = 16, 4
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    @_kept
    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part(x).view(b, t, -1, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        made = (weights @ v).transpose(1, 2).reshape(b, t, self.embed_dim)
        return torch.as_tensor(x + self.out(made))


def test_a_size_in_a_decorated_method_that_heads_and_a_width_may_mean_is_the_heads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), DecoratedAttention(), nn.Linear(16, 5))
    surgeon = cut_and_checked(model, torch.randn(2, 7, 3))
    assert "1" in prunable(surgeon)
    surgeon.cut({"1": [1]})
    assert model[1].embed_dim == 12

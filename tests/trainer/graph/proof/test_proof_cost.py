"""What finding the groups of a network costs: faults of many blocks are found together."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from elesh.trainer import Recorder
from elesh.trainer.graph import reach
from elesh.trainer.graph.dependencies import Sources
from elesh.trainer.graph.proof.drawn import some_of
from elesh.trainer.graph.proof.random_copy import random_copy
from leyline import InvalidField, Level

CALLS = [0]
WIDTH = 12


class Block(nn.Module):
    """A residual block with a size kept beside its code: its channels cannot go."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).view(-1, WIDTH).relu())


class Free(Block):
    """The same without it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Deep(nn.Module):
    """Many such blocks, and one hidden layer that can be pruned."""

    def __init__(self, depth: int, kind: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([kind() for _ in range(depth)])
        self.free, self.head = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        for block in self.blocks:
            x = block(x)
        return self.head(self.free(x).relu())


def calls_for(depth: int) -> int:
    CALLS[0] = 0
    architecture = Recorder(Deep(depth), torch.randn(4, 8)).architecture
    assert architecture.group["free"].prunable
    refused = [g for g in architecture.groups if g.name.startswith("blocks.") and g.name != "head"]
    assert refused
    assert not any(group.prunable for group in refused if group.original_size == 12)
    return CALLS[0]


def test_many_faulty_blocks_take_as_many_passes_as_few() -> None:
    assert calls_for(16) <= calls_for(3) + 4


@pytest.mark.parametrize("depth", [2, 12])
def test_a_network_without_faults_is_run_nine_times_whatever_its_depth(depth: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), Deep(depth, Free))
    CALLS[0] = 0
    architecture = Recorder(model, torch.randn(4, 6)).architecture
    assert sum(group.prunable for group in architecture.groups) == depth + 2
    assert sum(block.prunable for block in architecture.blocks) == depth
    # Traced; masked, cut and trained; masked and cut; the same of whole layers, with training.
    assert CALLS[0] == 9


@pytest.mark.parametrize("collecting", [True, False])
def test_no_garbage_is_searched_for_meanwhile_and_afterwards_as_before(collecting: bool) -> None:
    seen: list[bool] = []

    class Watched(Deep):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(gc.isenabled())
            if x.shape[1] != 8:
                raise ValueError("too wide")
            return super().forward(x)

    try:
        (gc.enable if collecting else gc.disable)()
        Recorder(Watched(2, Free), torch.randn(4, 8))
        assert gc.isenabled() is collecting
        with pytest.raises(InvalidField, match="too wide"):
            Recorder(Watched(2, Free), torch.randn(4, 9))
        assert gc.isenabled() is collecting
    finally:
        gc.enable()
    assert seen
    assert not any(seen)


class Dense(nn.Module):
    """Every layer reads what all layers before it made, side by side."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6 + 4 * n, 4) for n in range(depth)])
        self.head = nn.Linear(6 + 4 * depth, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)).relu())
        return self.head(torch.cat(parts, 1))


def test_a_deeper_dense_network_has_its_channels_followed_as_often_from_each_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    followed, plain = [0], reach._Queue.__iter__

    def counted(queue: reach._Queue) -> Iterator[Any]:
        for step in plain(queue):
            followed[0] += 1
            yield step

    monkeypatch.setattr(reach._Queue, "__iter__", counted)

    def steps(depth: int) -> float:
        followed[0] = 0
        torch.manual_seed(0)  # Of few samples, a channel may be silent in all.
        architecture = Recorder(Dense(depth), torch.randn(3, 6)).architecture
        assert sum(group.prunable for group in architecture.groups) == depth
        return followed[0] / depth

    assert steps(24) <= 1.5 * steps(8)


class Sized(Deep):
    """Sizes that the network's own code knows, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        for block in self.blocks:
            x = block.down(block.up(x).view(-1, WIDTH).relu())
        return self.head(self.free(x).relu())


class WithTrainingHeads(Deep):
    """A head in training mode behind every block."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth, Free)
        self.extra = nn.ModuleList([nn.Linear(8, 2) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        answers = torch.zeros(())
        for block, extra in zip(self.blocks, self.extra, strict=True):
            x = block(x)
            if self.training:
                answers = answers + extra(x).sum()
        return self.head(self.free(x).relu()) + answers


@pytest.mark.parametrize("depth", [3, 12])
def test_heads_of_training_mode_take_no_trials(depth: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), WithTrainingHeads(depth))
    CALLS[0] = 0
    groups = Recorder(model, torch.randn(4, 6)).architecture.group
    assert groups["1.free"].prunable
    assert groups["0"].prunable  # What all heads read.
    assert CALLS[0] <= 15


def test_faults_of_the_networks_own_code_take_a_run_each() -> None:
    took = []
    for depth in (3, 12):
        CALLS[0] = 0
        model = nn.Sequential(nn.Linear(6, 8), Sized(depth))
        named = Recorder(model, torch.randn(4, 6)).architecture.group
        assert named["1.free"].prunable
        assert not any(named[f"1.blocks.{i}.up"].prunable for i in range(depth))
        took.append(CALLS[0])
    assert took[1] - took[0] <= 12


class Parallel(nn.Module):
    """Two branches side by side behind one normalisation: one of them has to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + (self.one(y) + self.two(y))


@pytest.mark.parametrize("depth", [2, 9])
def test_branches_in_parallel_take_no_trials_of_their_own(depth: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), Deep(depth, Parallel))
    CALLS[0] = 0
    blocks = Recorder(model, torch.randn(4, 6)).architecture.blocks
    kept = [block for block in blocks if "no gradient reaches" in block.reason]
    assert [block.branch for block in kept] == [f"1.blocks.{i}.two" for i in range(depth)]
    assert sum(block.prunable for block in blocks) == depth
    assert CALLS[0] == 9


def test_the_copy_has_random_weights_and_takes_little_memory() -> None:
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(24)])
    before = copy.deepcopy(model.state_dict())
    copied = random_copy(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in copied.parameters()}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(s.nbytes() for s in storages.values()) < parameters / 4
    weights = [module.weight for module in copied if isinstance(module, nn.Linear)]
    assert not any(torch.equal(a, b) for a, b in pairwise(weights))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_layers_with_rows_of_about_one_length_share_their_random_weights() -> None:
    model = nn.Sequential(*[nn.Linear(200 + 6 * n, 206 + 6 * n) for n in range(24)])
    copied = random_copy(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in copied.parameters()}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(s.nbytes() for s in storages.values()) < parameters / 5
    for layer in copied:
        assert isinstance(layer, nn.Linear)
        assert 0.5 < layer.weight.std().item() * (layer.in_features / 2) ** 0.5 < 2


def test_rows_of_a_large_weight_overlap_and_are_all_different() -> None:
    model = nn.Sequential(nn.Embedding(300, 240), nn.Linear(240, 512), nn.Linear(512, 30))
    copied = random_copy(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in copied.parameters()}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(s.nbytes() for s in storages.values()) < parameters / 8
    wide = copied[1].weight
    assert wide.shape == (512, 240)
    assert int(torch.linalg.matrix_rank(wide)) == 240
    assert len(wide.unique(dim=0)) == 512
    assert math.gcd(wide.stride(0), 240) == 1


class Flat(nn.Linear):
    """Multiplies by its weight as it lies in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.view(-1).view(self.weight.shape), self.bias)


class Head(nn.Module):
    """Adds what depends on another layer's weight as it lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 16)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.up.weight.view(-1).mean() * 0
        out: Tensor = self.down(self.up(x).relu()) + mean
        return out


@pytest.mark.parametrize("network", [nn.Sequential(Flat(64, 256), Flat(256, 16)), Head()])
def test_code_may_take_weights_as_they_lie_in_memory(network: nn.Module) -> None:
    example = torch.randn(3, 64)
    assert Recorder(network, example).architecture.groups
    assert random_copy(network, overlapping=False)(example).shape == (3, 16)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 100])
def test_groups_of_one_size_lose_different_numbers_of_units_in_the_first_trial(size: int) -> None:
    layers = [nn.Linear(3, size), *(nn.Linear(size, size) for _ in range(5)), nn.Linear(size, 3)]
    groups = Recorder(nn.Sequential(*layers), torch.randn(2, 3)).architecture.groups[:-1]
    counts = list(some_of(groups, np.random.default_rng(0)).values())
    assert len(counts) == 6
    assert all(0 < count < size for count in counts)
    assert all(count >= size // 3 for count in counts)
    if size > 2:
        assert all(one != two for one, two in pairwise(counts))


def test_what_modules_keep_of_an_earlier_pass_is_copied_without_its_history() -> None:
    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = [super().forward(x)]
            return self.kept[0]

    model = nn.Sequential(nn.Linear(4, 6), Keeping(6, 3))
    model(torch.randn(2, 4))
    assert Recorder(model, torch.randn(2, 4)).architecture.group["0"].prunable
    assert model[1].kept[0].grad_fn is not None


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].handle = open(__file__)  # noqa: SIM115
    with pytest.raises(Exception, match=r"0\.handle"):
        Recorder(model, torch.randn(2, 4))
    model[0].handle.close()


class Attending(nn.Module):
    """Several attentions, one after the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(depth)])
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(1))


class Attention(nn.Module):
    """Four heads of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, 16)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("depth", [1, 6])
def test_what_heads_depend_on_is_asked_of_all_attentions_at_once(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    grad = torch.autograd.grad

    def counted(outputs: Any, *args: Any, **others: Any) -> Any:
        asked.append(len(outputs))
        return grad(outputs, *args, **others)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    heads = [
        group
        for group in Recorder(Attending(depth), torch.randn(2, 2, 64)).architecture.groups
        if group.level is Level.HEAD
    ]
    assert [(group.size, group.prunable) for group in heads] == [(4, True)] * depth
    assert asked.count(depth) >= 4  # Once a head, for all of them.
    assert len(asked) <= 6


def test_heads_are_looked_for_only_where_something_is_a_softmax(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walked: list[Any] = []
    behind = Sources.behind

    def noted(sources: Sources, link: Any) -> Any:
        walked.append(link)
        return behind(sources, link)

    monkeypatch.setattr(Sources, "behind", noted)
    Recorder(nn.Sequential(nn.Linear(6, 8), Deep(3, Free)), torch.randn(4, 6))
    assert not walked
    Recorder(Attending(1), torch.randn(2, 2, 64))
    assert walked

"""Looking at a network leaves network, random states and training as they were."""

from __future__ import annotations

import copy
import random
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.network import state
from elesh.trainer.network.state import preserve_state, preserved
from elesh.trainer.network.traversal import alive
from elesh.trainer.surgery.lineage import lineage_of
from leyline import InvalidField

_OF_THE_FILE, _OF_A_PROPERTY = random.Random(3), random.Random(6)
_OF_A_FUNCTION, _OF_A_DATA_SET = np.random.default_rng(7), np.random.default_rng(8)


class Drawing(nn.Module):
    """Draws from every kind of generator, counts, caches, and keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.norm, self.dropout = nn.BatchNorm1d(24), nn.Dropout(0.1)
        self.rows = nn.Embedding(5, 24, max_norm=0.5)
        self.calls, self.cache, self.seen = 0, dict[str, Any](), list[float]()
        self.own = random.Random(1)
        self.numpy, self.torch = np.random.default_rng(2), torch.Generator().manual_seed(2)
        self.last_input: Tensor | None = None
        self.register_buffer("bank", torch.zeros(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.own.random() + self.numpy.random() + _OF_THE_FILE.random())
        self.cache["drawn"] = torch.rand(2, generator=self.torch)
        self.last_input = x
        self.bank = torch.cat([self.bank, x.detach()])[-16:]
        h = self.dropout(self.norm(self.first(x).relu())) + self.rows(torch.tensor(1))
        skip = random.random() < 0.25 or np.random.rand() < 0.25
        if not (self.training and skip):
            h = h + self.middle(h)
        return self.last(h.relu())


def everything(model: Drawing) -> dict[str, Any]:
    """All that could be moved, comparable."""
    legacy = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (legacy[1].tobytes(), legacy[2:]),
        "torch": torch.get_rng_state().tolist(),
        "file": _OF_THE_FILE.getstate(),
        "own": (model.own.getstate(), str(model.numpy.bit_generator.state)),
        "generator": model.torch.get_state().tolist(),
        "state": {name: t.tolist() for name, t in model.state_dict().items()},
        "plain": (model.calls, list(model.cache), list(model.seen), model.last_input is None),
        "flags": [module.training for module in model.modules()],
        "grads": [p.grad is None for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "names": [sorted(vars(module)) for module in model.modules()],
    }


def test_recorder_and_measure_leave_network_and_random_states_as_they_were() -> None:
    torch.manual_seed(0)
    model, (x, y) = Drawing(), (torch.randn(32, 8), torch.randint(0, 4, (32,)))
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=torch.Generator())
    model.dropout.eval()
    before, shuffled = everything(model), loader.generator.get_state()
    recorder = Recorder(model, x[:4])
    assert everything(model) == before
    recorder.measure(loader, epoch=1)
    recorder.project(loader)
    groups = [group.name for group in recorder.architecture.groups if group.prunable]
    recorder.moments(loader, groups)
    assert everything(model) == before
    assert torch.equal(loader.generator.get_state(), shuffled)


def drawn_in_a_function() -> float:
    return float(_OF_A_FUNCTION.normal())


class DrawsElsewhere(nn.Module):
    """Draws through a function, a property and what the class is made in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 24), nn.Linear(24, 4)

    @property
    def scale(self) -> float:
        return 1 + _OF_A_PROPERTY.random() / 10

    @staticmethod
    def rate() -> float:
        return drawn_in_a_function() / 100

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu() * self.scale + self.rate())


def made_here() -> tuple[nn.Module, random.Random, np.random.Generator]:
    enclosed, within = random.Random(4), np.random.default_rng(5)

    def noise() -> float:
        return float(within.normal()) / 100

    class Made(DrawsElsewhere):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + noise() + enclosed.random()

    return Made(), enclosed, within


class Augmented(Dataset[tuple[Tensor, int]]):
    """Samples that are moved by a generator of the file."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((8,), index / 32) + _OF_A_DATA_SET.random(), index % 4


def test_generators_that_code_reaches_by_functions_and_closures_are_as_they_were() -> None:
    model, enclosed, within = made_here()

    def states() -> list[Any]:
        found = [_OF_A_FUNCTION, within, _OF_A_DATA_SET]
        return [str(each.bit_generator.state) for each in found] + [
            _OF_A_PROPERTY.getstate(),
            enclosed.getstate(),
        ]

    before = states()
    recorder = Recorder(model, torch.randn(4, 8))
    assert states() == before
    recorder.measure(DataLoader(Augmented(), 8), epoch=1)
    assert states() == before


def test_what_a_body_raises_does_not_keep_the_state_from_coming_back() -> None:
    model = Drawing()
    before = everything(model)

    def disturb() -> None:
        with preserve_state(model, 0):
            model(torch.randn(3, 8))
            model.extra = 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disturb()
    assert everything(model) == before


def trained(watched: bool) -> list[Tensor]:
    """Weights after some epochs, with or without a measurement after each."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    _OF_THE_FILE.seed(0)
    x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))
    model = Drawing()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    recorder = Recorder(model, x[:4]) if watched else None
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True)
    for epoch in range(1, 4):
        for inputs, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        if recorder is not None:
            recorder.measure(loader, epoch=epoch)
    return [*(p.detach().clone() for p in model.parameters()), *model.buffers()]


def test_training_with_telemetry_is_bit_for_bit_training_without() -> None:
    for one, other in zip(trained(watched=True), trained(watched=False), strict=True):
        assert torch.equal(one, other)


def test_what_a_hook_refers_to_is_not_moved() -> None:
    outside = nn.BatchNorm1d(16)
    means: list[float] = []

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    model = Network()

    def normalise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        means.append(float(output.detach().mean()))
        return outside(output)

    model.first.register_forward_hook(normalise)
    x, y = torch.randn(12, 8), torch.randint(0, 4, (12,))
    before = copy.deepcopy(outside.state_dict())
    Recorder(model, x).measure([(x, y)], epoch=1)
    assert all(torch.equal(outside.state_dict()[name], value) for name, value in before.items())
    assert outside.training
    assert means == []


def test_a_buffer_that_changes_its_shape_comes_back_as_the_same_object() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bank", torch.ones(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.bank.resize_(4, 3).fill_(7)
            return x

    model = Growing()
    bank = model.bank
    with preserved(model):
        model(torch.zeros(1))
    assert model.bank is bank
    assert torch.equal(bank, torch.ones(2, 3))


def test_a_lazy_layer_is_refused_by_name() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(InvalidField, match=r"0\.weight"):
        Recorder(model, torch.randn(2, 4))


def test_descriptors_of_what_a_network_was_are_not_gone_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are thousands, never change, and every evaluation of a cut would pay for them."""
    model, visited = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), list[object]()
    parts = state._parts

    def counted(thing: object, *named: Any) -> Any:
        visited.append(thing)
        return parts(thing, *named)

    monkeypatch.setattr(state, "_parts", counted)
    with preserved(model):
        before = len(visited)
    Surgeon(model, Recorder(model, torch.randn(2, 4)).architecture)
    assert lineage_of(model) is not None
    visited.clear()
    with preserved(model):
        assert len(visited) <= before + 1, "the record itself"


def test_objects_of_a_class_that_had_none_are_found() -> None:
    class Base:
        pass

    class Rare(Base):
        pass

    def look() -> list[object]:
        return alive(Base)

    assert look() == look() == []
    first = Rare()
    assert look() == [first]
    del first
    assert look() == look() == []
    second, third = Rare(), Rare()
    assert len(look()) == 2
    del second
    assert look() == [third]


def test_looking_for_objects_disturbs_no_other_thread() -> None:
    """A tuple that a thread is making cannot grow while anybody refers to it (SystemError)."""
    errors: list[BaseException] = []
    over = threading.Event()

    def makes_tuples() -> None:
        while not over.is_set():
            try:
                tuple(str(number) for number in range(300))
            except SystemError as error:
                errors.append(error)

    thread, interval = threading.Thread(target=makes_tuples), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        found = [alive(threading.Thread) for _ in range(8)]
    finally:
        sys.setswitchinterval(interval)
        over.set()
        thread.join()
    assert all(any(each is thread for each in threads) for threads in found)
    assert not errors

"""Processes that train one network together are cut alike, rolled back alike, and go on alike: bit
for bit, whatever fails on one of them. Each test is one job of two real processes, which do all of
them."""

from __future__ import annotations

import os
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as distributed
from torch import nn
from torch.multiprocessing import get_context
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from elesh import Settings, analyze
from elesh.trainer import Evaluation, Recorder, Session, Surgeon
from elesh.trainer.session.all_ranks import AllRanks
from elesh.trainer.surgery.optimizers import require_whole
from leyline import ChannelPruningTarget, InvalidField, StructuralPruningDecision

pytestmark = pytest.mark.slow
NOWHERE = "redis://127.0.0.1:1/0"
X, Y = torch.randn(64, 12, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 5


class Rank:
    """One process's part: its network, its share of the data, its end of the session."""

    def __init__(self, rank: int, **how: Any) -> None:
        torch.manual_seed(rank)  # DistributedDataParallel makes the weights alike
        self.rank = rank
        self.model = nn.Sequential(
            nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 5)
        )
        self.wrapped = DistributedDataParallel(self.model, **how)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.x, self.y = X[rank::2], Y[rank::2]
        self.recorder = Recorder(self.wrapped, self.x[:4])
        self.surgeon = Surgeon(self.wrapped, self.recorder.architecture, optimizer=self.optimizer)
        self.session = Session("case", NOWHERE) if rank == 0 else None
        self.ranks = AllRanks(self.session, self.surgeon)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(self.wrapped(self.x), self.y))
            self.optimizer.step()

    def decide(self, *units: int) -> None:
        """Put a decision into rank 0's inbox."""
        bundle = self.recorder.measure([(self.x, self.y)], epoch=1, run_id="case")
        merged = self.ranks.merged(bundle)
        if merged is None or self.session is None:
            return
        assert merged.metadata.samples == 64
        target = ChannelPruningTarget(
            layer_name="0", channel_indices=units, original_indices=units,
            importance=(0.1,) * len(units), channels_before=24, channels_after=24 - len(units),
        )  # fmt: skip
        found = analyze(merged, settings=Settings())
        update = {"channels": (target,), "approved_for_application": True, "rejection_reason": ""}
        decisions: list[StructuralPruningDecision] = [found.model_copy(update=update)]
        self.session.decisions = lambda: [decisions.pop()] if decisions else []  # type: ignore[method-assign]

    def everything(self) -> list[torch.Tensor]:
        states = [dict(self.optimizer.state[p]) for p in self.model.parameters()]
        moments = [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]
        return [t.detach().clone() for t in (*self.model.parameters(), *moments)]

    def alike(self) -> bool:
        """Whether the other rank has the same, bit for bit."""
        found: list[Any] = [None, None]
        distributed.all_gather_object(found, self.everything())
        return len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


_LOSSES = count(0.1, 1e-9)
"""No two are the same: a mask moves real ones."""


def good() -> Evaluation:
    return Evaluation(0.9, next(_LOSSES))


def cut_and_train_on(rank: int) -> None:
    me = Rank(rank)
    assert me.ranks.resume() == 0
    me.train(5)
    me.decide(3, 7)
    (outcome,) = me.ranks.end_epoch(1, good)
    assert outcome.result == "applied", outcome.detail
    assert me.model[0].out_features == 22
    assert me.alike()
    me.train(20)
    assert me.alike()
    assert me.ranks.end_epoch(2, lambda: Evaluation(0.1, 2.0))[0].result == "rolled_back"
    assert me.model[0].out_features == 24
    assert me.alike()
    me.train(5)
    assert me.alike()


def one_fails_after_the_cut(rank: int) -> None:
    me = Rank(rank, static_graph=True)
    me.ranks.resume()
    me.train(3)
    me.decide(3)
    before = me.everything()

    def evaluate() -> Evaluation:
        if rank == 1 and me.model[0].out_features == 23:
            raise MemoryError("on one rank only")
        return good()

    (outcome,) = me.ranks.end_epoch(1, evaluate)
    assert outcome.result == "refused"
    assert "rank 1: MemoryError" in outcome.detail
    assert all(map(torch.equal, before, me.everything()))
    me.train(3)
    assert me.alike()


def shares_are_averaged_and_masks_reach_all(rank: int) -> None:
    me = Rank(rank, find_unused_parameters=True)
    me.ranks.resume()
    me.train(2)
    me.decide(*range(20))
    seen: list[torch.Tensor] = []

    def evaluate() -> Evaluation:
        with torch.no_grad():
            seen.append(me.model.eval()(X))
        me.model.train()
        return Evaluation((0.9 if len(seen) == 1 else 0.0) if rank else 1.0, 0.5)

    (outcome,) = me.ranks.end_epoch(1, evaluate)
    assert outcome.result == "rolled_back"
    assert (outcome.accuracy_before, outcome.accuracy_masked) == (0.95, 0.5)
    assert not torch.equal(*seen[:2])
    assert me.model[0].out_features == 24
    assert me.alike()


JOBS = (cut_and_train_on, one_fails_after_the_cut, shares_are_averaged_and_masks_reach_all)


def run_both(meeting: str, answers: Any) -> None:
    """Both ranks, forked from one process that has imported what they need, and does nothing."""
    torch.set_num_threads(1)
    import_module("torch._dynamo")  # as the first optimizer of a process does
    context = get_context("fork")
    ranks = [context.Process(target=run, args=(rank, meeting, answers)) for rank in (0, 1)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()


def run(rank: int, meeting: str, answers: Any) -> None:
    """Every job, one after the other, until one fails: then the other rank waits in vain for it."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for job in JOBS:
        try:
            job(rank)
        except BaseException as error:
            answers.put((job.__name__, rank, f"{type(error).__name__}: {error}"))
            raise
        answers.put((job.__name__, rank, ""))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """By job and rank: empty, or what failed."""
    context, meeting = get_context("spawn"), tmp_path_factory.mktemp("ranks") / "meeting"
    queue = context.SimpleQueue()
    process = context.Process(target=run_both, args=(str(meeting), queue))
    process.start()
    process.join(600)
    for left in (*psutil.Process(process.pid).children(), process) if process.is_alive() else ():
        left.kill()
    found = dict[tuple[str, int], str]()
    while not queue.empty():
        name, rank, said = queue.get()
        found[name, rank] = said
    return found


@pytest.mark.parametrize("job", [job.__name__ for job in JOBS])
def test_two_ranks(job: str, answers: dict[tuple[str, int], str]) -> None:
    assert [answers.get((job, rank), "did not come to it") for rank in (0, 1)] == ["", ""]


def test_sharded_networks_are_refused_with_the_way_out(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
        architecture = Recorder(model, X[:4]).architecture
        fully_shard(model)
        with pytest.raises(InvalidField, match="prune before it is sharded"):
            require_whole(model)
        with pytest.raises(InvalidField, match="sharded over processes"):
            Surgeon(model, architecture)
        with pytest.raises(InvalidField, match="sharded over processes"):
            Recorder(model, X[:4])
    finally:
        distributed.destroy_process_group()

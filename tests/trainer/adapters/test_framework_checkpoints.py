"""A framework's checkpoint of a cut network carries its architecture, and loading one of before or
after a cut brings the network, its averages and its optimizers to that architecture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from elesh import Settings, analyze
from elesh.trainer import Evaluation, Recorder, Session, Surgeon
from elesh.trainer.adapters.epochs import EveryEpoch, classification
from elesh.trainer.recovery.checkpoints import KEY, Loading, bring, cut_like, pack, unpack
from leyline import (
    ChannelPruningTarget,
    CheckpointBundle,
    InvalidField,
    Malformed,
    PrunedArchitecture,
    StructuralPruningDecision,
)

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()
NOWHERE = "redis://127.0.0.1:1/0"

LOSSES = count(0.1, 1e-9)
"""No two are the same: a mask moves real ones."""


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 2))


class CutsOnce(Session):
    """Answers its first checkpoint itself, by a decision that removes two channels."""

    layer = "0"
    waiting: list[StructuralPruningDecision] | None = None
    asked: tuple[int, ...] = ()
    """Epochs of the checkpoints that were published."""

    def publish(self, bundle: CheckpointBundle) -> bool:
        self.asked += (bundle.metadata.epoch,)
        if self.waiting is None:
            size = bundle.architecture.group[self.layer].size
            target = ChannelPruningTarget(
                layer_name=self.layer,
                channel_indices=(0, 1),
                original_indices=(0, 1),
                importance=(0.1, 0.1),
                channels_before=size,
                channels_after=size - 2,
            )
            update = {"channels": (target,), "approved_for_application": True}
            decision = analyze(bundle, settings=Settings())
            self.waiting = [decision.model_copy(update={**update, "rejection_reason": ""})]
        return True

    def decisions(self) -> list[StructuralPruningDecision]:
        found, self.waiting = self.waiting or [], [] if self.waiting is not None else None
        return found


def every(session: Session, **how: Any) -> EveryEpoch:
    settings = {"every": 1, "evaluate": lambda *_: Evaluation(0.9, next(LOSSES)), **how}
    return EveryEpoch(session, [(X, Y)], [(X, Y)], **settings)


# Without a framework


@pytest.fixture(scope="module")
def architecture() -> PrunedArchitecture:
    return Recorder(build(), X[:4]).architecture


def test_an_uncut_network_adds_nothing_to_a_checkpoint(architecture: PrunedArchitecture) -> None:
    model = build()
    Surgeon(model, architecture)
    assert pack(model) is None


def test_a_state_dict_brings_network_and_average_to_its_structure_and_back(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    surgeon, average = Surgeon(model, architecture), AveragedModel(model)
    surgeon.follow("ema", average)
    loading = Loading(surgeon)
    uncut = {name: t.clone() for name, t in model.state_dict().items()}
    surgeon.cut({"0": [3, 7]}, epoch=2, key="first")
    packed, now = pack(model), surgeon.architecture
    assert packed is not None
    cut = {**{name: t.clone() for name, t in model.state_dict().items()}, KEY: packed}
    model.load_state_dict(uncut)
    assert surgeon.architecture.history == ()
    assert [p.shape for p in average.parameters()] == [p.shape for p in model.parameters()]
    model.load_state_dict(cut)
    assert surgeon.architecture == now
    assert [p.shape for p in average.parameters()] == [p.shape for p in model.parameters()]
    fresh = build()
    again = Surgeon(fresh, architecture)
    Loading(again)
    nn.ModuleDict({"model": fresh}).load_state_dict({f"model.{k}": v for k, v in cut.items()})
    assert again.architecture == now
    assert torch.equal(fresh(X), model(X))
    loading.end()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(uncut)


def test_best_weights_that_a_script_kept_are_loaded_whatever_was_cut_since(
    architecture: PrunedArchitecture,
) -> None:
    """Plain state dicts: of the uncut network, and of between two cuts."""
    model = build()
    surgeon, average = Surgeon(model, architecture), AveragedModel(model)
    with Session("run", NOWHERE) as session:
        session.resume(surgeon, ema=average, preflight=False)
        kept = []
        for gone in ([3, 7], [0], [4, 5]):
            kept.append({name: t.clone() for name, t in model.state_dict().items()})
            surgeon.cut({"0": gone})
        for best in (kept[1], kept[0], kept[2]):
            model.load_state_dict(best)
            assert surgeon.architecture.parameters == sum(p.numel() for p in model.parameters())
            assert all(torch.equal(t, best[name]) for name, t in model.named_parameters())
            assert all(map(torch.equal, model.parameters(), average.module.parameters()))


Makes = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@pytest.mark.parametrize(
    "optimizes",
    [
        lambda p: torch.optim.Adam(p, 1e-2),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
    ],
    ids=["adam", "sgd", "lbfgs"],
)
@pytest.mark.parametrize("trains", [False, True])
def test_weights_of_before_a_cut_that_are_loaded_to_look_at_leave_training_as_it_was(
    architecture: PrunedArchitecture, optimizes: Makes, trains: bool
) -> None:
    """A script that evaluates its best weights, or an average, in the network itself."""

    def trained(swaps: bool) -> list[Tensor]:
        model = build()
        optimizer = optimizes(model.parameters())
        surgeon, average = Surgeon(model, architecture, optimizer=optimizer), AveragedModel(model)
        surgeon.follow("ema", average)
        loading = Loading(surgeon)

        def loss() -> Tensor:
            optimizer.zero_grad()
            found = functional.cross_entropy(model(X), Y)
            found.backward()
            return found

        def train() -> None:
            optimizer.step(lambda: float(loss().detach()))
            average.update_parameters(model)

        best = {name: t.clone() for name, t in model.state_dict().items()}
        for gone in ([3, 7], [0]):
            train()
            surgeon.cut({"0": gone})
        train()
        if swaps:
            own = {name: t.clone() for name, t in model.state_dict().items()}
            model.load_state_dict(best)
            if trains:
                train()
            model.load_state_dict(own)
        train()
        loading.end()
        return [*model.parameters(), *average.parameters()]

    alike = map(torch.equal, trained(swaps=True), trained(swaps=False))
    assert all(alike) != trains, "an optimizer that trained another structure begins anew"


def test_an_average_that_came_while_other_weights_were_looked_at_follows_the_network(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    surgeon, average = Surgeon(model, architecture, optimizer=optimizer), AveragedModel(model)
    surgeon.follow("ema", average)
    loading = Loading(surgeon)
    best = {name: t.clone() for name, t in model.state_dict().items()}
    surgeon.cut({"0": [3, 7]})
    functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    kept = average.module[0].weight.clone()
    own = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(best)
    late = AveragedModel(model)
    surgeon.follow("late", late)
    model.load_state_dict(own)
    loading.end()
    assert torch.equal(average.module[0].weight, kept)
    assert torch.equal(late.module[0].weight, model[0].weight)
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("loads", [True, False], ids=["load_state_dict", "data"])
def test_an_evaluation_of_weights_of_before_the_cut_refuses_it_and_says_what_to_name(
    architecture: PrunedArchitecture, loads: bool
) -> None:
    model = build()
    surgeon = Surgeon(model, architecture)
    average = {name: t.clone() for name, t in model.state_dict().items()}

    def give(weights: Mapping[str, Tensor]) -> None:
        if loads:
            model.load_state_dict(weights)
        else:
            for name, parameter in model.named_parameters():
                parameter.data = weights[name]

    def evaluate() -> Evaluation:
        own = {name: t.clone() for name, t in model.state_dict().items()}
        give(average)
        found = classification(model, [(X, Y)])
        give(own)
        return Evaluation(0.9, found.loss)

    with CutsOnce("run", NOWHERE) as session:
        session.resume(surgeon, preflight=False)
        session.publish(Recorder(model, X[:4]).measure([(X, Y)], epoch=100, run_id="run"))
        before = [p.detach().clone() for p in model.parameters()]
        (decision,) = session.decisions()
        outcome = session.apply(decision, surgeon, evaluate)
    assert outcome.result == "refused"
    assert "elesh.attach(..., ema=average)" in outcome.detail
    assert all(map(torch.equal, model.parameters(), before))


def test_loading_some_of_the_weights_of_before_a_cut_says_which_others_are_empty(
    architecture: PrunedArchitecture, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    surgeon = Surgeon(model, architecture)
    loading = Loading(surgeon)
    kept, answers = {name: t.clone() for name, t in model.state_dict().items()}, model(X)
    first = {name: t for name, t in kept.items() if name.startswith("0.")}
    surgeon.cut({"0": [3, 7]})
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(first, strict=False)
    (said,) = [record for record in caplog.records if "no content" in record.getMessage()]
    assert "2.weight" in str(vars(said))
    assert "0.weight" not in str(vars(said))
    caplog.clear()
    rest = {name: t for name, t in kept.items() if name not in first}
    model.load_state_dict(rest, strict=False)
    assert not caplog.records
    assert torch.equal(model(X), answers)
    loading.end()


def test_a_checkpoint_of_other_channels_is_told_apart_though_shapes_are_alike(
    architecture: PrunedArchitecture,
) -> None:
    first, second = build(), build()
    Surgeon(first, architecture).cut({"0": [3, 7]}, key="first")
    surgeon = Surgeon(second, architecture)
    surgeon.cut({"0": [1, 2]}, key="second")
    Loading(surgeon)
    second.load_state_dict({**first.state_dict(), KEY: pack(first)})
    assert surgeon.architecture.history[0].original_indices == (3, 7)


def test_what_is_packed_is_read_back_and_damage_is_refused(
    architecture: PrunedArchitecture,
) -> None:
    model = build()
    surgeon = Surgeon(model, architecture)
    surgeon.cut({"0": [3, 7]}, epoch=2, key="first")
    packed = pack(model)
    assert packed is not None
    assert unpack(packed).now == surgeon.architecture
    with pytest.raises(Malformed, match=KEY):
        unpack(packed[:-3])
    fresh = build()
    cut_like(fresh, packed)
    fresh.load_state_dict(model.state_dict())
    other = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(InvalidField, match="one of another"):
        bring(Surgeon(other, Recorder(other, X[:4]).architecture), packed)


def test_labels_of_positions_are_judged_where_they_are_not_ignored() -> None:
    logits = torch.zeros(2, 3, 5)
    logits[..., 1] = 10.0

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits

    labels = torch.tensor([[1, 1, -100], [0, -100, -100]])
    judged = classification(Fixed(), [(torch.zeros(2, 3), labels)])
    assert judged.accuracy == pytest.approx(2 / 3)
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert judged.loss == pytest.approx(float(expected))

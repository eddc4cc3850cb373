"""What a run will need is tried when it begins; what fails is refused before any change."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from elesh.trainer import Evaluation, Recorder, Session, Surgeon
from elesh.trainer.session.preflight import preflight, require_passed, table
from leyline import InvalidField

NOWHERE = "redis://127.0.0.1:1/0"


class Network(nn.Module):
    """Channels, heads and a residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down, self.answer = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(functional.gelu(self.up(x)))
        return self.answer(x.mean(1))


class World:
    """A run about to begin."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.x = Network(), torch.randn(4, 5, 8)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        recorder = Recorder(self.model, self.x)
        self.surgeon = Surgeon(self.model, recorder.architecture, optimizer=self.optimizer)
        self.evaluated = 0

    def evaluate(self) -> Evaluation:
        """Draws, and forgets to go back to training."""
        self.evaluated += 1
        self.model.eval()
        return Evaluation(0.5, float(torch.rand(())))

    def state(self) -> tuple[Any, ...]:
        weights = [t.tolist() for t in self.model.state_dict().values()]
        schedule = str(self.schedule.state_dict())
        return weights, str(self.optimizer.state_dict()), schedule, self.model.training


def results(report: Any) -> dict[str, str]:
    return {check.name: check.result for check in report}


@pytest.mark.slow
def test_all_is_tried_and_nothing_is_changed() -> None:
    world = World()
    before, drawn = copy.deepcopy(world.state()), (random.getstate(), torch.get_rng_state())
    report = preflight(world.surgeon, world.x, world.evaluate, {"scheduler": world.schedule})
    assert set(results(report).values()) == {"ok"}, table(report)
    assert world.evaluated == 1
    assert world.state() == before
    assert random.getstate() == drawn[0]
    assert torch.equal(torch.get_rng_state(), drawn[1])
    assert not world.surgeon.masked
    for kind in ("channel", "head", "layer"):
        assert results(report)[f"training after a cut of a {kind}"] == "ok"


@pytest.mark.slow
def test_a_session_prints_one_table_and_tells_it_in_the_first_checkpoint_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, sent = World(), list[Any]()
    session = Session("run", NOWHERE)
    monkeypatch.setattr(session, "_queue", lambda stream, bundle, *rest: sent.append(bundle))
    session.resume(world.surgeon, evaluate=world.evaluate, scheduler=world.schedule)
    assert capsys.readouterr().out.count("Elesh preflight") == 1
    recorder = Recorder(world.model, world.x, architecture=world.surgeon.architecture)
    data = [(world.x, torch.randint(0, 4, (4,)))]
    for epoch in (1, 2):
        session.publish(recorder.measure(data, epoch=epoch, run_id="run"))
    assert results(sent[0].metadata.preflight)["evaluate"] == "ok"
    assert sent[1].metadata.preflight is None
    assert "preflight" not in sent[1].metadata.model_dump()
    session.close()


@pytest.mark.slow
def test_an_evaluation_that_fails_is_refused_when_the_run_begins() -> None:
    world = World()
    before = copy.deepcopy(world.state())

    def evaluate() -> Evaluation:
        raise RuntimeError("no such file")

    session = Session("run", NOWHERE)
    with pytest.raises(InvalidField, match="no such file"):
        session.resume(world.surgeon, evaluate=evaluate)
    assert world.state() == before
    session.close()


@pytest.mark.slow
def test_figures_that_are_no_numbers_are_refused() -> None:
    world = World()
    report = preflight(world.surgeon, world.x, lambda: Evaluation(0.5, float("nan")))
    assert results(report)["evaluate"] == "failed"
    with pytest.raises(InvalidField, match="finite"):
        require_passed(report)


@pytest.mark.slow
def test_a_mask_that_does_not_act_is_found() -> None:
    world = World()
    fixed = torch.zeros(4, 4)
    world.model.forward = lambda x: fixed  # type: ignore[method-assign]
    assert results(preflight(world.surgeon, world.x))["mask"] == "failed"


@pytest.mark.slow
def test_training_that_a_cut_breaks_is_found_before_it_is_made() -> None:
    world = World()
    whole = sum(p.numel() for p in world.model.parameters())

    class Picky(Network):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and sum(p.numel() for p in self.parameters()) != whole:
                raise RuntimeError("the loss wants all")
            return super().forward(x)

    world.model.__class__ = Picky
    report = preflight(world.surgeon, world.x)
    assert results(report)["training after a cut of a channel"] == "failed"
    assert any("the loss wants all" in check.detail for check in report)
    assert max(map(len, table(report).splitlines())) <= 80


def test_a_part_whose_state_does_not_come_back_is_found() -> None:
    class Forgets:
        def __init__(self) -> None:
            self.step = 0

        def state_dict(self) -> dict[str, Any]:
            self.step += 1
            return {"step": self.step}

        def load_state_dict(self, state: Any) -> None:
            pass

    report = preflight(World().surgeon, parts={"part": Forgets()})
    assert results(report)["restore points"] == "failed"
    assert results(report)["mask"] == "not_run"


class Looking(torch.optim.Optimizer):
    """A wrapper with state of its own, of which deepcopy alone makes no working copy."""

    def __init__(self, optimizer: torch.optim.Optimizer, made: Any) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state, self.defaults, self.made = defaultdict(dict), {}, made

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("kept", self.made(p))


@pytest.mark.slow
def test_wrapped_optimizers_are_tried_with_the_state_that_a_step_gives_them() -> None:
    for made, result in ((Tensor.clone, "ok"), (lambda p: object(), "failed")):
        world = World()
        wrapper = Looking(world.optimizer, made)
        surgeon = Surgeon(world.model, world.surgeon.architecture, optimizer=wrapper)
        report = preflight(surgeon, world.x)
        assert results(report)["training after a cut of a channel"] == "ok", table(report)
        assert results(report)["restore points"] == result
        assert not wrapper.state
        assert not world.optimizer.state


def test_a_preflight_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    session = Session("run", NOWHERE)
    session.resume(world.surgeon, evaluate=world.evaluate, preflight=False)
    assert world.evaluated == 0
    assert "preflight" not in capsys.readouterr().out
    session.close()


@pytest.mark.slow
def test_an_average_that_nobody_named_is_told_and_does_not_end_the_run() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    example = torch.randn(4, 8)
    surgeon = Surgeon(model, Recorder(model, example).architecture)
    average = AveragedModel(model)
    report = preflight(surgeon, example)
    (found,) = (check for check in report if check.name == "optimizers and averages")
    assert found.result != "failed"
    assert "nothing is cut until it is named" in found.detail
    assert surgeon.blocked() == surgeon.unnamed_average()
    del average

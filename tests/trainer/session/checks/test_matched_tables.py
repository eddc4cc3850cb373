"""Of a table, a cut in a run comes nearer to the outputs before, mask and cut alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trainer_nets import close, same

from elesh.analysis import analyze
from elesh.settings import Settings
from elesh.trainer import Evaluation, Recorder, Surgeon, apply_decision
from elesh.trainer.session import apply
from leyline import Reconstructed

_SETTINGS = Settings(
    structured_pruning={
        "channel_analysis": {"min_channels_per_layer": 2, "max_predicted_shift": 1e9}
    }
)


def rows(seed: int, count: int = 512) -> Tensor:
    return torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    """A trained perceptron whose batch normalisations lag behind."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()),
        nn.Linear(32, 4),
    )
    optimizer, x = torch.optim.Adam(model.parameters(), 1e-2), rows(1)
    labels = (x[:, :4] * x[:, 4:8]).argmax(1)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


class Cut:
    """A fifth of the units goes."""

    def __init__(self) -> None:
        self.model = network()
        self.uncut = copy.deepcopy(self.model).eval()
        x = rows(1)
        self.batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(64)]
        recorder = Recorder(self.model, x[:2])
        self.bundle = recorder.measure(self.batches, epoch=120, batch_statistics=True)
        self.decision = analyze(self.bundle, _SETTINGS)
        self.surgeon = Surgeon(self.model, recorder.architecture)
        self.seen: list[Tensor] = []

    def apply(self, accuracies: list[float], skip: tuple[str, ...] = ()) -> Any:
        figures = iter(accuracies)

        @torch.no_grad()
        def evaluate() -> Evaluation:
            self.model.eval()
            self.seen.append(self.model(rows(2)))
            return Evaluation(next(figures), float(self.seen[-1].square().mean()))

        changes = {
            "approved_for_application": True,
            "rejection_reason": "",
            "reconstruction": Reconstructed(applied=True, batch_statistics=True, skip=skip),
        }
        return apply_decision(
            self.decision.model_copy(update=changes),
            self.surgeon,
            evaluate,
            reconstruct=self.bundle.covariance,
            batches=self.batches,
        )

    def apart(self) -> float:
        """From the uncut network, for rows that nothing was fitted on."""
        with torch.no_grad():
            self.model.eval()
            return float((self.model(rows(2)) - self.uncut(rows(2))).square().mean())


def unmatched(monkeypatch: pytest.MonkeyPatch, made: Callable[[], Cut]) -> Cut:
    with monkeypatch.context() as patch:
        patch.setattr(apply, "matched_parameters", lambda *args, **options: {})
        case = made()
        assert case.apply([0.9, 0.9, 0.9]).result == "applied"
    return case


def test_unseen_rows_come_nearer_than_by_solving_layers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, case = unmatched(monkeypatch, Cut), Cut()
    assert case.apply([0.9, 0.9, 0.9]).result == "applied"
    assert case.surgeon.architecture.model_hash == plain.surgeon.architecture.model_hash
    assert case.apart() < 0.9 * plain.apart()


def test_mask_and_cut_compute_the_same_and_what_fails_leaves_nothing_behind() -> None:
    case = Cut()
    before = copy.deepcopy(case.model.state_dict())
    assert case.apply([0.9, 0.5]).result == "rolled_back"
    assert same(before, dict(case.model.state_dict())), "the mask left something behind"
    assert case.apply([0.9, 0.9, 0.9]).result == "applied"
    assert close(case.seen[3], case.seen[4]), "mask and cut differ"
    case.surgeon.undo()
    assert same(before, dict(case.model.state_dict()))


def test_layers_that_are_to_keep_their_weights_do() -> None:
    case = Cut()
    head = copy.deepcopy(case.model[6].state_dict())
    assert case.apply([0.9, 0.9, 0.9], skip=("6",)).result == "applied"
    assert torch.equal(case.model[6].bias, head["bias"])


@pytest.mark.parametrize("step", ["matched_parameters", "wanted_of_a_table"])
def test_what_cannot_be_matched_is_cut_without_and_says_so(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fails(*args: Any, **given: Any) -> Any:
        raise RuntimeError("out of memory")

    plain = unmatched(monkeypatch, Cut)
    monkeypatch.setattr(apply, step, fails)
    case = Cut()
    outcome = case.apply([0.9, 0.9, 0.9])
    assert (outcome.result, outcome.fallbacks) == ("applied", ("outputs_not_matched",))
    assert "outputs not matched: RuntimeError: out of memory" in outcome.detail
    assert same(dict(plain.model.state_dict()), dict(case.model.state_dict()))

"""Batch statistics are part of a cut: under the mask, in the cut, and as a worker measures it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trainer_nets import batches, build, close, example, same

from elesh.analysis import analyze
from elesh.program.measure import Bench
from elesh.settings import Settings
from elesh.trainer import Evaluation, Recorder, Surgeon, apply_decision
from elesh.trainer.export import Exporter, calibration_inputs
from elesh.trainer.session import apply
from elesh.trainer.surgery.reconstruction.after_cut import (
    batch_statistics,
    put_batch_statistics,
    reestimate_batch_statistics,
)
from elesh.trainer.surgery.reconstruction.layer_by_layer import (
    outputs_before,
    solved_layer_by_layer,
)
from leyline import Level, Reconstructed

_DATA = batches(2, 16)
_SETTINGS = Settings(
    structured_pruning={
        "channel_analysis": {"min_channels_per_layer": 2, "max_predicted_shift": 1e9}
    }
)


class _Cut:
    """A network, what is decided of it, and what it should be after the cut."""

    def __init__(self) -> None:
        self.model = build("ResNet")
        self.recorder = Recorder(self.model, example())
        self.bundle = self.recorder.measure(_DATA, epoch=120, batch_statistics=True)
        asked = self.bundle.parameters.reconstruction
        assert asked is not None
        assert asked.batch_statistics
        changes = {
            "approved_for_application": True,
            "rejection_reason": "",
            "reconstruction": Reconstructed(applied=True, batch_statistics=True),
        }
        self.decision = analyze(self.bundle, _SETTINGS).model_copy(update=changes)
        assert self.decision.units
        self.surgeon = Surgeon(self.model, self.recorder.architecture)
        self.seen: list[Tensor] = []

    def wanted(self, *, estimated: bool = True, solved: bool | None = None) -> nn.Module:
        """The network as plain calls make it: cut, refitted, solved layer by layer by one pass over
        all samples, as whose its batch statistics then move; they are those of a pass of its own
        where that is left out."""
        model = copy.deepcopy(self.model)
        architecture = self.recorder.architecture
        before = outputs_before(model, architecture, _DATA)
        surgeon = Surgeon(model, architecture)
        surgeon.cut(self.decision.units, reconstruct=self.bundle.covariance)
        if estimated if solved is None else solved:
            lost = before.without(architecture, self.decision.units)
            assert solved_layer_by_layer(model, lost, batch_statistics=estimated)
        elif estimated:
            reestimate_batch_statistics(model, _DATA)
        return model

    def apply(self, accuracies: list[float], given: Any = _DATA) -> Any:
        figures: Iterator[float] = iter(accuracies)

        def evaluate() -> Evaluation:
            self.seen.append(self.model(example()).detach())
            return Evaluation(next(figures), float(self.seen[-1].square().mean()))

        return apply_decision(
            self.decision,
            self.surgeon,
            evaluate,
            reconstruct=self.bundle.covariance,
            batches=given,
        )


def test_mask_and_cut_have_the_statistics_of_the_network_after_the_cut() -> None:
    case = _Cut()
    before, wanted = copy.deepcopy(case.model.state_dict()), case.wanted()
    assert case.apply([0.9, 0.5]).result == "rolled_back"
    assert same(before, dict(case.model.state_dict())), "the mask left statistics behind"
    outcome = case.apply([0.9, 0.9, 0.9])
    assert (outcome.result, outcome.detail) == ("applied", "")
    assert close(case.seen[3], case.seen[4]), "mask and cut differ"
    assert close(case.seen[4], wanted(example()))
    case.surgeon.undo()
    assert same(before, dict(case.model.state_dict()))
    assert case.apply([0.9, 0.9, 0.5]).result == "rolled_back"
    assert same(before, dict(case.model.state_dict())), "the cut left statistics behind"


def test_without_batches_statistics_stay_and_the_outcome_says_so() -> None:
    case = _Cut()
    wanted = case.wanted(estimated=False)
    outcome = case.apply([0.9, 0.9, 0.9], given=())
    assert outcome.result == "applied"
    assert "batch statistics not estimated anew" in outcome.detail
    assert outcome.fallbacks == ("statistics_not_estimated",)
    assert close(case.model(example()), wanted(example()))


def test_what_cannot_be_solved_layer_by_layer_is_refitted_as_before_and_the_outcome_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    case = _Cut()
    wanted = case.wanted(solved=False)
    monkeypatch.setattr(apply, "outputs_before", fails)
    outcome = case.apply([0.9, 0.9, 0.9])
    assert outcome.result == "applied"
    assert "not solved one behind the other: RuntimeError: out of memory" in outcome.detail
    assert outcome.fallbacks == ("layers_not_solved",)
    assert close(case.model(example()), wanted(example()))


def test_a_single_sample_estimates_nothing_and_the_outcome_says_so() -> None:
    case = _Cut()
    outcome = case.apply([0.9, 0.9, 0.9], given=[(x[:1], y[:1]) for x, y in _DATA[:1]])
    assert outcome.result == "applied"
    assert "batch statistics not estimated anew" in outcome.detail
    assert outcome.fallbacks == ("statistics_not_estimated",)


def test_a_worker_measures_with_the_statistics_that_the_trainer_will_have() -> None:
    case = _Cut()
    case.recorder.architecture = case.surgeon.architecture
    inputs = calibration_inputs(_DATA)
    held_out = batches(1, 32, seed=9)[0]
    network = Exporter(case.model).export(case.bundle.architecture, held_out, inputs)
    bench = Bench(network, case.bundle.architecture)
    entries = [
        (Level.CHANNEL, name, unit) for name, units in case.decision.units.items() for unit in units
    ]
    model, sampled = case.wanted(estimated=False), copy.deepcopy(case.model)
    running, architecture = batch_statistics(model), case.bundle.architecture
    reestimate_batch_statistics(sampled, [(inputs, None)])
    Surgeon(sampled, architecture).cut(case.decision.units)
    losses = {}
    for estimated in (False, True):
        if estimated:
            own = batch_statistics(sampled)
            reestimate_batch_statistics(model, [(inputs, None)])
            for path, after in batch_statistics(model).items():
                by = after / own[path] if path.endswith("var") else after - own[path]
                moved = running[path] * by if path.endswith("var") else running[path] + by
                put_batch_statistics(model, {path: moved})
        with torch.no_grad():
            found = cross_entropy(model(held_out[0]), held_out[1], reduction="none")
        bench.refit = bench.refitting((), estimated)
        losses[estimated] = torch.from_numpy(bench.outcomes(entries).losses)
        torch.testing.assert_close(losses[estimated], found.double(), rtol=1e-2, atol=1e-3)
    assert (losses[True] - losses[False]).abs().max() > 0.03, "nothing was estimated"


def test_statistics_that_synchronise_with_other_processes_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm = nn.SyncBatchNorm(3)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    before = copy.deepcopy(norm.state_dict())
    assert reestimate_batch_statistics(norm, [(torch.randn(4, 3), None)]) == 0
    assert same(before, dict(norm.state_dict()))

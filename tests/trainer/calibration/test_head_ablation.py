"""Heads are masked one at a time: what is told of them is what their masks do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_nets import build, inputs
from torch import Tensor, nn
from torch.nn import functional

from elesh.trainer import Recorder, Surgeon, merge_ranks
from elesh.trainer.calibration.head_ablation import PASSES, masked_loss_increases, most_doubtful
from elesh.trainer.network.calling import Inputs, call, main_output
from leyline import CheckpointBundle, Level, PruningGroup

SAMPLES = 24
Data = list[tuple[Inputs, Tensor]]


def data_for(name: str) -> Data:
    """Three batches of one network, the last one smaller."""
    generator = torch.Generator().manual_seed(3)
    sizes = (10, 10, SAMPLES - 20)
    return [(inputs(name, n), torch.randint(0, 2, (n,), generator=generator)) for n in sizes]


def heads_of(recorder: Recorder) -> list[PruningGroup]:
    return [group for group in recorder.architecture.groups if group.level is Level.HEAD]


def losses(model: nn.Module, data: Data) -> np.ndarray:
    """[N]: the cross-entropy of every sample."""
    with torch.no_grad():
        found = [
            functional.cross_entropy(main_output(call(model, x)), y, reduction="none")
            for x, y in data
        ]
    return torch.cat(found).double().numpy()


@pytest.mark.parametrize("name", ["own", "native", "BERT"])
@pytest.mark.sampled
def test_a_masked_heads_loss_increase_is_that_of_the_surgeons_mask(name: str) -> None:
    model, data = build(name), data_for(name)
    recorder = Recorder(model, inputs(name))
    groups, rows = heads_of(recorder), np.array([0, 7, 9, 12, 23])
    surgeon, plain = Surgeon(model, recorder.architecture), losses(model, data)
    known = np.log(np.expm1(plain))[rows]
    found = masked_loss_increases(model, recorder.architecture, groups, data, rows, known)
    for group in groups:
        for head in range(group.size):
            surgeon.mask({group.name: [head]})
            loss_increases = losses(model, data) - plain
            surgeon.unmask()
            assert found[group.name][:, head] == pytest.approx(loss_increases[rows], abs=1e-5)
            assert np.abs(loss_increases).max() > 1e-4


def test_where_every_sample_is_masked_the_increase_is_measured_and_not_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("elesh.trainer.calibration.head_ablation.PASSES", 100)
    model, data = build("own"), data_for("own")
    recorder = Recorder(model, inputs("own"))
    bundle = recorder.measure(data, epoch=1)
    surgeon, plain = Surgeon(model, bundle.architecture), losses(model, data)
    for group in heads_of(recorder):
        gate = bundle.gates[group.name]
        assert gate.removal_rise is not None
        assert gate.removal_error is not None
        for head in range(group.size):
            surgeon.mask({group.name: [head]})
            loss_increases = losses(model, data) - plain
            surgeon.unmask()
            assert gate.removal_rise[head] == pytest.approx(loss_increases.mean(), abs=1e-6)
            error = loss_increases.std() / np.sqrt(SAMPLES)
            assert gate.removal_error[head] == pytest.approx(error, rel=1e-3)


_SEEN: list[int] = []
"""Not in the hook's closure: what a hook holds is preserved."""


def _see(_: object, args: tuple[torch.Tensor, ...]) -> None:
    _SEEN.append(len(args[0]))


def test_masking_costs_at_most_its_passes_over_the_samples_and_leaves_no_hook() -> None:
    model, data = build("own"), data_for("own")
    recorder = Recorder(model, inputs("own"))

    def rows(ahead: float) -> int:
        _SEEN.clear()
        handle = model.register_forward_pre_hook(_see)
        recorder.measure(data, epoch=1, ahead=ahead)
        handle.remove()
        return sum(_SEEN)

    # One pass over all, and each head's mask on the doubtful ones.
    heads = sum(group.size for group in heads_of(recorder))
    doubtful = PASSES * SAMPLES // heads
    assert rows(0) == SAMPLES + doubtful * heads <= SAMPLES * (1 + PASSES)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_the_most_doubtful_samples_are_those_of_the_smallest_margins() -> None:
    known = np.array([3.0, -0.5, 9.0, 0.1, -4.0, 0.5, 2.0, -8.0])
    assert most_doubtful(known, 3).tolist() == [1, 3]
    assert most_doubtful(known, 8).tolist() == [3]
    assert most_doubtful(known, 100).tolist() == [3]  # never none: ranks must have the same fields
    assert most_doubtful(known, 1).tolist() == list(range(8))


def test_heads_are_not_masked_where_samples_have_no_margins() -> None:
    def measured(**loss: object) -> CheckpointBundle:
        recorder = Recorder(build("own"), inputs("own"), **loss)  # type: ignore[arg-type]
        return recorder.measure(data_for("own"), epoch=1)

    own = measured(loss=functional.cross_entropy)
    assert all(gate.removal_error is None for gate in own.gates.values())
    usual = measured()
    levels = usual.architecture.group
    masked = {n for n, gate in usual.gates.items() if gate.removal_error is not None}
    assert masked == {n for n in usual.gates if levels[n].level is Level.HEAD}


def test_the_errors_of_ranks_merge_to_that_of_all_their_samples() -> None:
    data = data_for("own")
    recorder = Recorder(build("own"), inputs("own"))
    parts = [recorder.measure([batch], epoch=1) for batch in data]
    merged = merge_ranks(parts)
    for group in heads_of(recorder):
        errors = [part.gates[group.name].removal_error for part in parts]
        counts = [part.metadata.samples for part in parts]
        squares = [(n * e) ** 2 for n, e in zip(counts, errors, strict=True) if e is not None]
        expected = np.sqrt(np.sum(squares, axis=0)) / SAMPLES
        found = merged.gates[group.name].removal_error
        assert found is not None
        assert found == pytest.approx(expected, rel=1e-5)

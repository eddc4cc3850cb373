"""What several consumers read together is lost together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elesh.analysis.candidates import Candidates
from elesh.analysis.selection.reconstruction_order import ReconstructionOrder
from elesh.trainer import Recorder
from elesh.trainer.calibration.shared_inputs import SharedInputs


class Two(nn.Module):
    """Two equal layers read the same units; the second one's outputs count so many times."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5)
        self.b.load_state_dict(self.a.state_dict())
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return self.a(hidden) + self.factor * self.b(hidden)


def costs(factor: float) -> np.ndarray:
    model = Two(factor).eval()
    batches = [(torch.randn(256, 6), torch.randint(0, 5, (256,))) for _ in range(2)]
    recorder = Recorder(model, batches[0][0][:2])
    bundle = recorder.measure(batches, epoch=1)
    candidates = Candidates.of([recorder.architecture.group["first"]], 1)
    return ReconstructionOrder(candidates, bundle.gates).costs


@pytest.mark.parametrize(("factor", "times"), [(1.0, 4.0), (-1.0, 0.0), (2.0, 9.0)])
def test_slopes_of_readers_of_one_tensor_are_summed_before_they_are_squared(
    factor: float, times: float
) -> None:
    assert np.allclose(costs(factor), times * costs(0.0), rtol=0.01, atol=1e-6)


def test_a_reader_of_what_lay_in_the_same_memory_before_gets_nothing() -> None:
    shared, x = SharedInputs(), torch.ones(2, 3)
    shared.see(("gone", 1), x)
    shared.see(("here", 1), x)
    assert shared.together(("here", 1), x, 2 * x) == []
    ((axis, inputs, slopes),) = shared.left()
    assert axis == ("here", 1)
    assert inputs is x
    assert torch.equal(slopes, 2 * x)
    assert not list(shared.left())

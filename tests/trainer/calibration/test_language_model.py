"""A causal language model with its own loss and sampler: what a user gives to ``Recorder``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attention_nets import build, inputs
from torch import Tensor
from torch.nn import functional

from elesh.trainer import Recorder
from leyline import Level


def next_token_loss(output: Any, tokens: Tensor) -> Tensor:
    """One loss a text: the mean cross-entropy of each token after what came before it."""
    logits = output.logits[:, :-1].transpose(1, 2)
    return functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)


class NextTokens:
    """Texts drawn from the model's own predictions, token by token, seeded."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, output: Any) -> Tensor:
        odds = output.logits[:, :-1].softmax(-1)
        drawn = torch.multinomial(odds.flatten(0, 1), 1, generator=self.generator)
        drawn = drawn.view(odds.shape[:2])
        return torch.cat([drawn[:, :1], drawn], 1)  # the first token is nobody's prediction


def measured(**options: Any) -> tuple[Recorder, Any]:
    model, batch = build("GPT-2"), inputs("GPT-2", 4)
    recorder = Recorder(model, batch, loss=next_token_loss, **options)
    return recorder, recorder.measure([(batch, batch["input_ids"])], epoch=1)


@pytest.mark.slow
def test_a_language_model_is_measured_with_its_own_loss_and_sampler() -> None:
    recorder, bundle = measured(sample_labels=NextTokens(3))
    assert bundle.metadata.labels == "sampled"
    prunable = {group.name for group in recorder.architecture.groups if group.prunable}
    assert bundle.gates.keys() == prunable
    assert {g.level for g in recorder.architecture.groups if g.prunable} == {
        Level.CHANNEL,
        Level.HEAD,
    }
    for gate in bundle.gates.values():
        assert gate.projections.shape[0] == 4
        assert np.abs(gate.projections).max() > 0
        assert (gate.second_order >= 0).all()
    _, again = measured(sample_labels=NextTokens(3))
    assert again.blobs().get("gates") == bundle.blobs().get("gates")


def test_without_a_sampler_the_true_tokens_serve_and_the_statistics_say_so() -> None:
    _, bundle = measured()
    assert bundle.metadata.labels == "true"

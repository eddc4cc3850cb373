"""Mixtures of experts: hidden units of experts and the width around them can go, and what is
measured of a sample is that sample's, whichever rows its experts read."""

from __future__ import annotations

import mixtures
import numpy as np
import pytest
import torch
from cut_check import counted_macs, cut_and_checked, prunable
from torch import Tensor, nn

from elesh.trainer import Recorder, Surgeon
from leyline import InvalidField

TOKENS = torch.randn(2, 40, 10, generator=torch.Generator().manual_seed(0))
ALL = {"enter", *(f"mixture.experts.{n}.up" for n in range(4))}


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return mixtures.Around(kind()).eval()


@pytest.mark.parametrize("kind", [*mixtures.MIXTURES.values(), mixtures.Dense])
def test_units_of_experts_and_the_width_around_them_can_go(kind: type[nn.Module]) -> None:
    surgeon = cut_and_checked(built(kind), TOKENS)
    assert set(prunable(surgeon)) == ALL


@pytest.mark.parametrize("kind", mixtures.MIXTURES.values())
@pytest.mark.parametrize("samples", [24, 23])
def test_what_is_measured_of_experts_is_each_samples_own(
    kind: type[nn.Module], samples: int
) -> None:
    x = torch.randn(samples, 8, 10, generator=torch.Generator().manual_seed(1))
    labelled = [(x, torch.randint(5, (samples, 8), generator=torch.Generator().manual_seed(2)))]
    found = [
        Recorder(built(each), TOKENS).measure(labelled, epoch=0).gates
        for each in (kind, mixtures.Dense)
    ]
    for name in ALL:
        ours, dense = (each[name] for each in found)
        assert ours.projections.shape[0] == samples
        np.testing.assert_allclose(ours.projections, dense.projections, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(ours.first_order, dense.first_order, rtol=1e-3, atol=1e-5)


def test_experts_that_the_example_does_not_reach_hold_up_the_width_and_no_other_expert() -> None:
    torch.manual_seed(0)
    model = mixtures.Around(mixtures.ByNumbers(experts=16)).eval()
    x = TOKENS[:, :3]
    surgeon = cut_and_checked(model, x)
    found = set(prunable(surgeon))
    groups = surgeon.architecture.groups
    assert found
    assert all(name.endswith(".up") for name in found)
    unseen = {g.name for g in groups if "the example inputs do not reach it" in g.reason}
    ups = {f"mixture.experts.{n}.up" for n in range(16)}
    assert ups == found | (unseen & ups)
    assert "which the example inputs do not reach" in surgeon.architecture.group["enter"].reason


@pytest.mark.parametrize("kind", mixtures.MIXTURES.values())
def test_an_expert_that_no_sample_reaches_any_more_is_left_alone_and_the_others_are_measured(
    kind: type[nn.Module],
) -> None:
    model = built(kind)
    recorder = Recorder(model, TOKENS)
    prunable = {group.name for group in recorder.architecture.groups if group.prunable}
    with torch.no_grad():
        model.mixture.router.bias[3] = -50.0  # type: ignore[union-attr, index, operator]
    labelled = [(TOKENS.repeat(12, 1, 1), torch.randint(5, (24, 40)))]
    bundle = recorder.measure(labelled, epoch=0)
    # The width around all is what the unreached one reads, too.
    assert prunable - bundle.gates.keys() == {"enter", "mixture.experts.3.up"}
    assert bundle.covariance is not None
    assert all(values.isfinite().all() for values in bundle.covariance.means.values())


def test_where_no_sample_reaches_any_consumer_it_is_said_so() -> None:
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), Unless(nn.Linear(8, 5)))
    recorder = Recorder(model, TOKENS)
    model[2].closed = True
    with pytest.raises(InvalidField, match=r"samples that reach a consumer, found 2\.layer"):
        recorder.measure([(TOKENS, torch.randint(5, (2, 40)))], epoch=0)


class Unless(nn.Module):
    """A layer that can be gone around."""

    closed = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :5] if self.closed else self.layer(x)


class Showing(nn.Module):
    """An expert that hands out what it is made of beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.up(x))
        return torch.cat([self.down(inner), inner], -1)


class Shown(nn.Module):
    """Only the first of two siblings is reached; the second may read what the first shows."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(10, 16), nn.Linear(28, 5)
        self.parts = nn.ModuleList([Showing(), nn.Linear(12, 12)])

    def forward(self, x: Tensor) -> Tensor:
        made = self.parts[0](self.enter(x))
        if x.shape[1] > 100:
            made = torch.cat([made[..., :16], self.parts[1](made[..., 16:])], -1)
        left: Tensor = self.leave(made)
        return left


def test_what_a_sibling_that_is_not_reached_could_be_given_stays() -> None:
    torch.manual_seed(0)
    architecture = Recorder(Shown().eval(), TOKENS).architecture
    assert "parts.1 may read it" in architecture.group["parts.0.up"].reason


IDS = torch.randint(5, 99, (2, 16), generator=torch.Generator().manual_seed(3))
WAYS = ("grouped_mm", "batched_mm", "eager")


def mixtral(way: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4,
        use_cache=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation(way)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_experts_in_one_tensor_lose_hidden_units_and_the_width_around_them(way: str) -> None:
    model, x = mixtral(way), {"input_ids": IDS}
    surgeon = cut_and_checked(model, x)
    experts = [f"model.layers.{n}.mlp.experts" for n in range(2)]
    heads = [f"model.layers.{n}.self_attn" for n in range(2)]
    hidden = [f"{name}.gate_up_proj" for name in experts]
    assert prunable(surgeon) == ["model.embed_tokens", *heads, *hidden]
    group = surgeon.architecture.group
    assert {group[name].unit_multiple for name in hidden} == {8 if way == "grouped_mm" else 1}
    assert set(experts) <= set(group["model.embed_tokens"].layers)
    assert "chooses experts" in group["model.layers.0.mlp.gate.weight"].reason
    router, mixture = 4 * 32, 3 * 32 * 24 * 2
    attention = 2 * 32 * 32 + 2 * 32 * 16
    by_weights = 16 * (2 * (router + mixture + attention) + 99 * 32)
    attended = 2 * 2 * 16 * 16 * 32  # Scores and values, in two layers.
    assert surgeon.architecture.macs == by_weights + attended
    if way == "eager":  # PyTorch counts no products that are grouped.
        assert surgeon.architecture.macs == counted_macs(model, x)
    surgeon.cut({hidden[0]: range(8), "model.embed_tokens": range(8, 16)})
    inner = model.get_submodule(experts[0])
    assert (inner.hidden_dim, inner.intermediate_dim) == (24, 16)
    surgeon.undo()
    assert (inner.hidden_dim, inner.intermediate_dim) == (32, 24)


@pytest.mark.slow
def test_what_is_measured_of_experts_in_one_tensor_does_not_depend_on_how_they_compute() -> None:
    ids = torch.randint(5, 99, (5, 16), generator=torch.Generator().manual_seed(4))
    labelled = [({"input_ids": ids}, ids.roll(-1, 1))]
    found = [
        Recorder(mixtral(way), {"input_ids": IDS}).measure(labelled, epoch=0).gates for way in WAYS
    ]
    assert len(found[0]) == 5
    for name, ours in found[0].items():
        for other in found[1:]:
            np.testing.assert_allclose(ours.projections, other[name].projections, atol=1e-4)
            np.testing.assert_allclose(ours.first_order, other[name].first_order, atol=1e-6)


@pytest.mark.slow
def test_units_of_experts_that_are_multiplied_at_once_go_by_eights() -> None:
    model = mixtral("grouped_mm")
    surgeon = Surgeon(model, Recorder(model, {"input_ids": IDS}).architecture)
    with pytest.raises(InvalidField, match="a multiple of 8"):
        surgeon.cut({"model.layers.0.mlp.experts.gate_up_proj": [0, 1, 2]})

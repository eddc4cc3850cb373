"""Heads of attentions that are written in unusual ways are found, masked and cut all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from attention_nets import Own, Vit, inputs
from torch import Tensor, nn

from elesh.trainer import Recorder, Surgeon
from leyline import Level, PruningGroup


def loses(model: nn.Module, batch: Any, units: Mapping[str, Sequence[int]]) -> Surgeon:
    """Masks and cuts these units, checks that both are the same, trains, and takes it back."""
    model.eval()
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    surgeon = Surgeon(model, Recorder(model, batch).architecture)
    left_alone = [g.reason for g in surgeon.architecture.groups if g.name in units and g.reason]
    assert not left_alone
    plain = model(batch)
    surgeon.mask(units)
    masked = model(batch)
    surgeon.unmask()
    surgeon.cut(units)
    torch.testing.assert_close(model(batch), masked, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, masked, atol=1e-3)
    left = sum(parameter.numel() for parameter in model.parameters())
    assert left == surgeon.architecture.parameters
    model.train()(batch).square().mean().backward()
    model.eval()
    surgeon.undo()
    assert all(torch.equal(whole[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model(batch), plain)
    return surgeon


def heads_of(surgeon: Surgeon) -> list[PruningGroup]:
    return [group for group in surgeon.architecture.groups if group.level is Level.HEAD]


class Normalised(Own):
    """Batch normalisation of queries, keys and values, scores that saturate, a flat activation in
    front of the output projection (LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(12) for _ in range(3))
        self.val_attn_dim = 12

    def forward(self, x: Tensor) -> Tensor:
        made = [f(x) for f in (self.q, self.k, self.v)]
        normed = [f(y.flatten(0, 1)).view_as(y) for f, y in zip(self.norms, made, strict=True)]
        q, k, v = map(self.split, normed)
        mixed = (q @ k.mT * 3e2).softmax(-1) @ v
        joined = mixed.transpose(1, 2).reshape(*x.shape[:2], self.val_attn_dim)
        return self.out(nn.functional.hardtanh(joined - 1))


def test_heads_are_found_where_gradients_vanish_and_batches_are_normalised() -> None:
    torch.manual_seed(0)
    surgeon = loses(Vit(Normalised), inputs("own"), {"attention.0": [1], "attention.1": [0, 3]})
    for group in heads_of(surgeon):
        assert (group.prunable, group.size) == (True, 4)
        assert len([part for part in group.slices if "running" in part.tensor]) == 6


class Reduced(nn.Module):
    """Keys and values at fewer positions, whose layer keeps the width of what comes in (Segformer),
    between normalisations that add different numbers (Twins)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 8), nn.Linear(8, 2)
        self.first, self.inner = nn.LayerNorm(8, eps=1e-5), nn.LayerNorm(8, eps=1e-3)
        self.reduce = nn.Conv1d(8, 8, 2, stride=2)
        self.attention = Own(4, 2)
        self.attention.q, self.attention.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention.k, self.attention.v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.enter(x))
        width, at = x.shape[-1], self.attention
        fewer = self.reduce(x.mT).reshape(x.shape[0], width, -1).mT
        fewer = self.inner(fewer)
        q, k, v = (at.split(f(y)) for f, y in ((at.q, x), (at.k, fewer), (at.v, fewer)))
        return self.leave(x + at.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)))


def test_a_width_goes_with_that_of_keys_at_fewer_positions() -> None:
    torch.manual_seed(0)
    surgeon = loses(Reduced(), torch.randn(2, 6, 3), {"reduce": [0, 3, 4], "attention": [2]})
    group = surgeon.architecture.group["reduce"]
    assert {"enter", "reduce"} <= set(group.layers)
    assert {norm.module: norm.eps for norm in group.norms} == {"first": 1e-5, "inner": 1e-3}


class NormedTogether(Own):
    """All queries and all keys are normalised over the channels of all heads (OLMo 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(12, eps=1e-6), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        made = self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x)
        q, k, v = map(self.split, made)
        weights = torch.softmax(q @ k.mT / self.head_dim**0.5, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_heads_go_that_are_normalised_together_over_those_that_stay() -> None:
    torch.manual_seed(0)
    model, batch = Vit(NormedTogether), inputs("own")
    surgeon = loses(model, batch, {"attention.0": [1], "attention.1": [0, 3]})
    first, _ = heads_of(surgeon)
    found = {norm.module: (norm.kind, norm.width) for norm in first.norms}
    assert found == {"attention.0.q_norm": ("rms", 3), "attention.0.k_norm": ("layer", 3)}
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.int64))]
    measured = Recorder(model, batch).measure(labelled, epoch=0)
    assert all(np.isfinite(head.gradient_sensitivity).all() for head in measured.heads.values())


class Talking(Own):
    """Layers mix the scores of all heads, and the weights (CaiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.weights = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
        scores = self.scores((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.weights(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_heads_that_layers_mix_go_with_their_channels_of_these_layers() -> None:
    torch.manual_seed(0)
    surgeon = loses(Vit(Talking), inputs("own"), {"attention.0": [1], "attention.1": [0, 3]})
    first, second = heads_of(surgeon)
    assert [site.module for site in first.sites] == [
        "attention.0.out", "attention.0.weights", "attention.0.scores",
    ]  # fmt: skip
    assert {part.tensor for part in second.slices} >= {
        "attention.1.scores.weight", "attention.1.weights.bias", "attention.1.q.weight",
    }  # fmt: skip


class Coincident(nn.Module):
    """Four samples of two tokens: what the output projection reads is as large as the scores of two
    heads, and its width is the number of samples (Swin, by windows)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.attention = nn.Linear(3, 4), nn.Linear(4, 2), Own(2, 2)
        for name in ("q", "k", "v", "out"):
            setattr(self.attention, name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.attention(self.enter(x)))


def test_an_output_projection_as_large_as_the_scores_mixes_no_heads() -> None:
    torch.manual_seed(0)
    surgeon = loses(Coincident(), torch.randn(4, 2, 3), {"attention": [1], "enter": [0, 2]})
    (group,) = heads_of(surgeon)
    assert [site.module for site in group.sites] == ["attention.out"]


class Configured(Own):
    """Reads the number of heads in a configuration that all layers share (Phi-3)."""

    shared = SimpleNamespace(num_attention_heads=4, width=16)

    def __init__(self) -> None:
        super().__init__()
        self.config = self.shared
        del self.n_head

    def split(self, x: Tensor) -> Tensor:
        shape = (self.config.num_attention_heads, self.head_dim)
        return x.unflatten(-1, shape).transpose(1, 2)


def test_a_layer_that_reads_its_heads_in_a_configuration_gets_one_of_its_own() -> None:
    torch.manual_seed(0)
    model: Any = Vit(Configured)
    surgeon = loses(model, inputs("own"), {"attention.0": [1]})
    assert model.attention[0].config is Configured.shared
    surgeon.cut({"attention.0": [1]})
    counts = [layer.config.num_attention_heads for layer in model.attention]
    assert (counts, Configured.shared.num_attention_heads) == ([3, 4], 4)


def test_an_attention_of_fewer_heads_may_stand_between_two_of_more() -> None:
    """While the last heads of both are asked what they depend on, no gradient reaches it."""

    class Attention(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.num_heads, self.qkv, self.out = heads, nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
            weights = (q @ k.transpose(-1, -2)).softmax(-1)
            return torch.as_tensor(self.out((weights @ v).transpose(1, 2).flatten(2)))

    torch.manual_seed(0)
    enter = nn.Linear(5, 800), nn.Linear(800, 16)  # So many parameters that all are asked at once.
    model = nn.Sequential(*enter, *map(Attention, (4, 2, 4)), nn.Linear(16, 3))
    loses(model, torch.randn(2, 2, 5), {"2": [0], "3": [1], "4": [2]})


def test_attentions_that_are_asked_at_once_are_told_apart_by_weights_of_functions() -> None:
    """Queries without a part of the bias, and a bias of positions that is nearly all of it (Swin
    V2): a sigmoid is flat there."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.qkv, self.out = 4, nn.Linear(16, 48), nn.Linear(16, 16)
            self.table = nn.Parameter(torch.full((4, 6, 6), 9.0))

        def forward(self, x: Tensor) -> Tensor:
            bias, length = self.qkv.bias.clone(), len(self.qkv.bias) // 3
            bias[length : 2 * length].zero_()
            q, k, v = nn.functional.linear(x, self.qkv.weight, bias).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
            weights = (q @ k.transpose(-1, -2) + 16 * self.table.sigmoid()).softmax(-1)
            return torch.as_tensor(x + self.out((weights @ v).transpose(1, 2).flatten(2)))

    torch.manual_seed(0)
    # So many parameters that all are asked at once.
    enter = nn.Linear(5, 9000), nn.Linear(9000, 16)
    model = nn.Sequential(*enter, *(Attention() for _ in range(3)), nn.Linear(16, 2))
    surgeon = loses(model, torch.randn(3, 6, 5), {"2": [1], "3": [0, 3], "4": [2]})
    assert [group.size for group in heads_of(surgeon)] == [4, 4, 4]

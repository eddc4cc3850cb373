"""Heads of an attention whose queries, head by head in rows, are multiplied by a table of relative
positions that is a parameter (BoTNet): the table is shared, and the heads go."""

from __future__ import annotations

import torch
from cut_check import counted_macs, cut_and_checked, prunable
from torch import Tensor, nn


class ByProduct(nn.Module):
    """[B, T, 16] to [B, T, 16]."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.dim_head = heads, 16 // heads
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(7, 16 // heads))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        parts = self.qkv(x).reshape(b, t, 3, self.num_heads, self.dim_head).permute(2, 0, 3, 1, 4)
        q, k, v = parts.reshape(3, b * self.num_heads, t, self.dim_head)
        weights = (q @ k.transpose(-2, -1) / 2 + q @ self.table.transpose(-2, -1)).softmax(-1)
        made = (weights @ v).reshape(b, self.num_heads, t, self.dim_head).transpose(1, 2)
        return torch.as_tensor(self.out(made.reshape(b, t, -1)))


def test_heads_that_share_a_table_that_queries_are_multiplied_by_go() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 16), ByProduct(), nn.Linear(16, 5)), torch.randn(3, 7, 5)
    surgeon = cut_and_checked(model, x)
    assert "1" in prunable(surgeon)
    assert surgeon.architecture.macs == counted_macs(model, x)
    surgeon.cut({"1": [2]})
    assert model[1].num_heads == 3
    assert model[1].table.shape == (7, 4)


class Pooled(nn.Module):
    """Queries are the largest of pairs (Hiera): [B, T, 16] to [B, T / 2, 16]."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, 16 // heads
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        parts = self.qkv(x).reshape(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = parts
        q = q.reshape(b, self.heads, 2, t // 2, self.head_dim).amax(2)
        made = ((q @ k.transpose(-2, -1) / 2).softmax(-1) @ v).transpose(1, 2)
        return torch.as_tensor(self.proj(made.reshape(b, t // 2, -1)))


def test_queries_that_are_the_largest_of_several_go_with_their_head() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 16), Pooled(), nn.Linear(16, 5)), torch.randn(3, 8, 5)
    surgeon = cut_and_checked(model, x)
    assert "1" in prunable(surgeon)
    surgeon.cut({"1": [2]})
    assert model[1].qkv.weight.shape == (36, 16)

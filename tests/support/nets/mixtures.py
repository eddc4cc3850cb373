"""Mixtures of experts as people write them: [B, T, 10] to [B, T, 5]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MIXTURES", "Around", "Dense"]


class Expert(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(functional.gelu(self.up(x)))
        return made


class Mixture(nn.Module):
    """Two of several experts for each token."""

    def __init__(self, width: int = 16, hidden: int = 12, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = torch.topk(self.router(rows).softmax(-1), 2)
        return self.combined(rows, weights, chosen).reshape(x.shape)

    def combined(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        raise NotImplementedError


class ByBooleans(Mixture):
    def combined(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            used = (chosen == number).any(-1)
            share = weights[chosen == number].unsqueeze(-1)
            out[used] += share * expert(x[used])
        return out


class ByNumbers(Mixture):
    def combined(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            if len(rows):
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out


class Sorted(Mixture):
    """Tokens sorted by their experts, one run of rows for each."""

    def combined(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = x[order // 2].split(counts)
        made = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        back = torch.cat(made)[order.argsort()].view(*chosen.shape, -1)
        return (back * weights.unsqueeze(-1)).sum(1)


class Dense(Mixture):
    """The same function: all experts read all tokens, and most are multiplied by zero."""

    def combined(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        shares = torch.zeros(len(x), len(self.experts)).scatter(1, chosen, weights)
        made = [expert(x) * shares[:, n, None] for n, expert in enumerate(self.experts)]
        return torch.stack(made, -1).sum(-1)


MIXTURES = {"by booleans": ByBooleans, "by numbers": ByNumbers, "sorted": Sorted}


class Around(nn.Module):
    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.enter, self.norm, self.mixture = nn.Linear(10, 16), nn.LayerNorm(16), mixture
        self.leave = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        made: Tensor = self.leave(x + self.mixture(self.norm(x)))
        return made

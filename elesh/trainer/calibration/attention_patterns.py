"""Attention patterns, read where they are computed, whatever the module returns.

Promises: nothing is changed or recomputed in the network. While :class:`AttentionWeights` is
entered, what every softmax (or fused attention kernel) gives is noted, masks and rotary positions
included; at the input of an attention's output projection, the last one belongs to it if its shape
says so. Where none does (compiled code, another formula) there is none, and the statistics say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from leyline import PruningGroup

from .accumulators import Doubles, cosines, single

PATTERN_SAMPLES = 128
"""Samples that patterns are compared over; the cost is quadratic in heads."""

_SOFTMAX = {torch.softmax, Tensor.softmax, functional.softmax}


class AttentionWeights(TorchFunctionMode):
    """While entered, notes the latest attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: Tensor | None = None

    def take(self) -> Tensor | None:
        """The latest weights, [..., queries, keys]; they are given out once."""
        latest, self._latest = self._latest, None
        return latest

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SOFTMAX:
            self._latest = result.detach()
        elif func is functional.scaled_dot_product_attention:
            with torch.no_grad():
                self._latest = _fused_weights(*args, **(kwargs or {}))
        return result


def _fused_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``scaled_dot_product_attention`` multiplied the values by, without dropout."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-1, -2) * factor
    if is_causal:
        attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1).nan_to_num()  # a query that may see nothing gets nothing


@dataclass
class PatternTally:
    """Sums over the patterns of one attention; H units."""

    group: PruningGroup
    rows: int = 0
    """Distributions seen of every unit."""
    missed: bool = False
    """Whether weights were not seen, or not as expected, at some call."""
    entropy: Doubles = field(init=False)
    bound: Doubles = field(init=False)
    divergence: Doubles = field(init=False)
    gram: Tensor | None = None

    def __post_init__(self) -> None:
        size = self.group.size
        self.entropy, self.bound = np.zeros(size), np.zeros(size)
        self.divergence = np.zeros((size, size))

    def see(self, weights: Tensor | None, tokens: int, share: float) -> None:
        """Take in the weights of one call.

        Args:
            weights: [..., queries, keys], where any were seen.
            tokens: query tokens of all samples together.
            share: of the samples that are still to be looked at, counted from the first.
        """
        units, heads = self.group.size, 0 if weights is None else _heads(weights, tokens)
        scattered = self.group.sites[0].indices is not None
        if weights is None or scattered or not heads or heads % units:
            self.missed = True
            return
        each, (queries, keys) = heads // units, weights.shape[-2:]
        patterns = weights.reshape(-1, units, each, queries, keys).float()
        patterns = patterns[: round(len(patterns) * share)]
        if len(patterns):
            self._add(patterns.transpose(0, 1).reshape(units, -1, keys))

    def _add(self, patterns: Tensor) -> None:
        """Take in [H, R, keys]."""
        own = _entropy(patterns).sum(1, dtype=torch.float64)
        if not torch.isfinite(own).all():
            self.missed = True
            return
        self.entropy += own.cpu().numpy()
        seen = (patterns > 0).sum(-1).clamp(min=1).log()
        self.bound += seen.sum(1, dtype=torch.float64).cpu().numpy()
        for i in range(len(patterns) - 1):
            mixed = _entropy((patterns[i] + patterns[i + 1 :]) / 2).sum(1, dtype=torch.float64)
            apart = (mixed - (own[i] + own[i + 1 :]) / 2).cpu().numpy()
            self.divergence[i, i + 1 :] += apart
            self.divergence[i + 1 :, i] += apart
        flat = patterns.flatten(1)
        gram = (flat @ flat.T).cpu()
        self.gram = gram if self.gram is None else self.gram + gram
        self.rows += patterns.shape[1]

    def fields(self) -> dict[str, Any]:
        """The pattern fields of ``HeadImportanceData``; none where a pattern was missed."""
        if self.missed or not self.rows or self.gram is None:
            return {}
        others = max(1, self.group.size - 1)
        diversity = self.divergence.sum(1) / (self.rows * others)
        return {
            "entropy": single(np.maximum(self.entropy / self.rows, 0)),
            "entropy_bound": single(self.bound / self.rows),
            "diversity": single(np.clip(diversity, 0, math.log(2))),
            "similarity": cosines(self.gram),
        }


def _heads(weights: Tensor, tokens: int) -> int:
    """Of how many heads these are the weights at so many query tokens; 0 if they are not."""
    if weights.ndim < 3 or weights.shape[-1] == 0 or not tokens:
        return 0
    heads, rest = divmod(weights.numel() // weights.shape[-1], tokens)
    # Heads stand before the queries, or are folded into the samples with the heads varying faster.
    placed = weights.ndim == 3 or weights.shape[-3] == heads
    return heads if placed and not rest else 0


def _entropy(patterns: Tensor) -> Tensor:
    """Shannon entropy over the last axis, in nats."""
    return -torch.xlogy(patterns, patterns).sum(-1)

"""What a layer reads for all samples at once (a table of relative positions), beside what it reads
of each sample, is masked and cut with that, and left out of what is measured."""

from __future__ import annotations

import torch
from cut_check import counted_macs, cut_and_checked, prunable
from test_export import check
from torch import Tensor, nn

from elesh.trainer import Recorder


class RelativePositions(nn.Module):
    """Keys of contents and of positions by one layer, as DeBERTa shares it: [B, T, 6] to [B, T, 5].

    Args:
        alone: whether positions have a layer of their own.
    """

    def __init__(self, alone: bool = False) -> None:
        super().__init__()
        self.enter, self.table = nn.Linear(6, 16), nn.Embedding(7, 16)
        self.norm, self.table_norm = nn.LayerNorm(16), nn.LayerNorm(16)
        self.query, self.key, self.leave = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.between: nn.Module | None = None
        if alone:
            self.between = nn.Sequential(nn.Linear(1, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.enter(x))
        if self.between is not None:
            steps = torch.arange(7.0)
            bias = self.between((steps[:, None] - steps)[None, ..., None])[..., 0]
        else:
            bias = self.query(x) @ self.key(self.table_norm(self.table.weight)[None]).mT
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 4
        return torch.as_tensor(self.leave((scores + bias).softmax(-1) @ x))


X = torch.randn(7, 7, 6, generator=torch.Generator().manual_seed(0))


def test_a_width_that_a_table_for_all_samples_shares_is_cut_and_measured() -> None:
    torch.manual_seed(0)
    model = RelativePositions()
    surgeon = cut_and_checked(model, X)
    width = surgeon.architecture.group["enter"]
    tables = {"table.weight", "table_norm.weight", "table_norm.bias"}
    assert tables <= {part.tensor for part in width.slices if width.prunable}
    assert surgeon.architecture.macs == counted_macs(model, X)
    labels = torch.zeros(7, 7, dtype=torch.long)
    found = Recorder(model, X).measure([(X, labels)], epoch=1)
    assert "enter" in found.gates


def test_it_is_masked_in_the_exported_network_too() -> None:
    torch.manual_seed(0)
    check(nn.Sequential(RelativePositions(), nn.Flatten()), X[:5], X)


def test_a_layer_that_reads_for_all_samples_only_is_left_alone() -> None:
    torch.manual_seed(0)
    surgeon = cut_and_checked(RelativePositions(alone=True), X)
    assert "between.0" not in prunable(surgeon)
    reason = surgeon.architecture.group["between.0"].reason
    assert "not divided evenly among samples" in reason

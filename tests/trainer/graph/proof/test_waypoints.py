"""Two runs of a network are compared at the inputs of its layers, and memory is taken once for
layers that read one tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elesh.trainer.graph.proof.waypoints import Waypoints


class Overwriting(nn.Linear):
    """Writes over what it is given, once this was read."""

    def forward(self, x: Tensor) -> Tensor:
        made = super().forward(x)
        x.zero_()
        return made


class Parallel(nn.Module):
    """Layers that each read what the network is given, as under a mask: a copy of their own."""

    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(6, 4) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x * 1) for layer in self.layers]


def _points(network: Parallel) -> Waypoints:
    return Waypoints({f"layers.{n}": layer for n, layer in enumerate(network.layers)})


@torch.no_grad()
def test_what_layers_are_given_alike_is_kept_once() -> None:
    network = Parallel(nn.Linear)
    points = _points(network)
    points.remember()
    network(torch.randn(5, 6))
    assert len({seen.kept.data_ptr() for seen in points._seen.values()}) == 1
    points.remember()
    for number, layer in enumerate(network.layers):
        layer(torch.full((5, 6), float(number)))
    assert len({seen.kept.data_ptr() for seen in points._seen.values()}) == 3


@torch.no_grad()
def test_a_layer_that_writes_over_what_it_is_given_changes_nothing_for_others() -> None:
    network, x = Parallel(Overwriting), torch.randn(5, 6)
    points = _points(network)
    points.remember()
    expected = network(x)
    points.compare()
    found = network(x)
    assert not points.faults
    assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))
    points.compare()
    network(x + 1)
    assert [fault.place for fault in points.faults] == ["layers.0", "layers.1", "layers.2"]

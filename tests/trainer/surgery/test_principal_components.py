"""A turned stream computes the same and carries most in few channels, or keeps every weight."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.surgery.reconstruction.principal_components import turn_streams

WIDTH, KINDS = 16, {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Residual(nn.Module):
    """A block beside an identity path; its channels are scaled by ``gamma`` where it has one."""

    def __init__(self, kind: str, post: bool, gamma: bool) -> None:
        super().__init__()
        self.norm, self.post = KINDS[kind](WIDTH), post
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.gamma = nn.Parameter(0.5 + torch.rand(WIDTH)) if gamma else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, WIDTH] to the same."""
        branch = self.down(torch.relu(self.up(x if self.post else self.norm(x))))
        branch = branch if self.gamma is None else branch * self.gamma
        return torch.as_tensor(self.norm(x + branch) if self.post else x + branch)


class Transformer(nn.Module):
    """Symbols, positions, two blocks, and a mean over positions before the answers."""

    def __init__(
        self, kind: str = "layer", post: bool = False, gamma: bool = False, tied: bool = False
    ) -> None:
        super().__init__()
        self.symbols = nn.Embedding(9, WIDTH)
        self.positions = nn.Parameter(0.5 * torch.randn(1, 6, WIDTH))
        self.blocks = nn.Sequential(*(Residual(kind, post, gamma) for _ in range(2)))
        self.norm, self.head = KINDS[kind](WIDTH), nn.Linear(WIDTH, 9)
        if tied:
            self.head.weight = self.symbols.weight
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                    for parameter in module.parameters():
                        parameter.add_(0.4 * torch.randn(WIDTH))
            shared = torch.randn(5, WIDTH)  # Most of what is written lies in few directions.
            self.symbols.weight.copy_(torch.randn(9, 5) @ shared + 0.1 * self.symbols.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 6] to [B, 9]."""
        x = self.blocks(self.symbols(x) + self.positions)
        return torch.as_tensor(self.head(self.norm(x).mean(1)))


def network(**options: object) -> tuple[Transformer, Tensor]:
    torch.manual_seed(0)
    return Transformer(**options).eval(), torch.randint(9, (200, 6))  # type: ignore[arg-type]


def turned(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    architecture = Recorder(model, x[:2]).architecture
    return turn_streams(model, architecture, [(x, None)], x[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_turned_network_computes_the_same(kind: str) -> None:
    model, x = network(kind=kind)
    before = copy.deepcopy(model)
    assert turned(model, x)
    assert not torch.equal(model.symbols.weight, before.symbols.weight)
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_turned_network_loses_less_with_half_of_its_width(kind: str) -> None:
    model, x = network(kind=kind)
    given, whole = copy.deepcopy(model), model(x).detach()
    turned(model, x)

    def moved(network: nn.Module, lost: Sequence[int]) -> float:
        cut = copy.deepcopy(network)
        surgeon = Surgeon(cut, Recorder(cut, x[:2]).architecture, restore_points=0)
        group = next(g for g in surgeon.architecture.groups if g.norms)
        surgeon.cut({group.name: list(lost)})
        return float((cut(x).detach() - whole).square().mean())

    def carried(network: nn.Module) -> Tensor:
        rows = (network.symbols(x) + network.positions).flatten(0, 1)  # type: ignore[operator]
        return torch.as_tensor(rows.square().mean(0).detach())

    weakest = [carried(m).argsort()[: WIDTH // 2].tolist() for m in (model, given)]
    assert moved(model, weakest[0]) < 0.5 * moved(given, weakest[1])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"post": True}, "something else|elsewhere"),
        ({"gamma": True}, "something else"),
        ({"tied": True}, "tied"),
    ],
)
def test_what_cannot_be_turned_keeps_every_weight_and_says_why(
    options: dict[str, bool], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = network(**options)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO):
        assert turned(model, x) == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    said = [r.getMessage() for r in caplog.records if "not rotated" in r.getMessage()]
    assert said
    assert all(any(w in line for w in reason.split("|")) for line in said)


def test_a_frozen_copy_is_no_reason_to_turn_its_weights_apart_from_it() -> None:
    model, x = network()
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    assert turned(model, x) == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

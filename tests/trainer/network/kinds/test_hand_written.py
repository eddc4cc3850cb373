"""Networks as people write them by hand lose all of their width: masking is cutting, counts are
exact, a cut is undone bit for bit, and the network trains on."""

from __future__ import annotations

import pytest
import torch
import trainer_nets
import written_nets
from cut_check import cut_and_checked, prunable
from shared import quick_first
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.network.calling import call
from leyline import Level

UNITS = {
    "gpt": {"blocks.0.attention": 4, "blocks.0.wide": 24, "blocks.1.wide": 24},
    "listed": {
        "embed": 16, "blocks.0.attention.linears": 4, "blocks.0.wide": 24,
        "blocks.1.attention.linears": 4, "blocks.1.wide": 24,
    },
    "sloped": {
        "embed": 16, "blocks.0.attention": 4, "blocks.0.wide": 24, "blocks.1.attention": 4,
        "blocks.1.wide": 24,
    },
    "positions": {"embed": 16},
    "late positions": {"embed": 16},
    "two ranks": {"both": 10, "enter": 12},
    "unused stream": {
        "enter": 12, "blocks.0.inner": 14, "blocks.0.skip": 10, "blocks.1.inner": 14,
    },
    "configured": {
        "embed": 16, "blocks.0.attention": 4, "blocks.0.wide": 24, "blocks.1.attention": 4,
        "blocks.1.wide": 24,
    },
    "constants": {"first": 12, "second": 10},
    "modulated": {"adapt": 16},
    "gated": {"first": 12, "second": 10},
    "recurrent": {"conv": 12, "embed": 40, "gru": 6, "lstm": 6},
    "padded": {"stem": 12, "inner": 14},
    "upscaled": {"0": 16, "3": 8, "5": 8},
    "decoder": {"wide.0": 10, "up.1": 6},
    "unflattened": {"0": 14, "2": 12, "6": 8},
    "linear attention": {"enter": 16, "o": 4},
    "bag": {"0": 12, "1": 10},
    "checked": {"left": 6, "right": 8, "joined.conv": 10, "even.conv": 10},
    "map attention": {"enter": 10, "out#2": 4},
    "gated positions": {"enter": 12},
    "reversible": {"enter": 12},
    "masked steps": {"enter": 12, "inner": 10},
    "folded heads": {"out": 4},
    "unequal parts": {"enter": 16, "wide": 16, "wide#2": 8},
    "parts of the stream": {"enter": 10, "enter#2": 3, "enter#3": 3, "wide": 20},
}  # fmt: skip
"""By network: its prunable groups and their sizes."""


@pytest.mark.parametrize("name", quick_first(written_nets.NETS, 6))
def test_all_of_a_hand_written_network_can_go(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = written_nets.NETS[name]
    model = make().eval()
    surgeon = Surgeon(model, Recorder(model, inputs).architecture)
    groups = surgeon.architecture.groups
    assert {group.name: group.size for group in groups if group.prunable} == UNITS[name]
    left = [g.reason for g in groups if not g.prunable and g.reason != "network output"]
    left = [reason for reason in left if "read by all of its states in the next step" not in reason]
    left = [reason for reason in left if reason != "no layer consumes it"]  # Positions.
    assert all("the code pads its channels by a fixed number" in reason for reason in left)
    assert len(left) == (name == "padded")

    units = trainer_nets.units(surgeon.architecture)
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    surgeon.mask(units)
    masked = call(model, inputs)
    surgeon.unmask()
    after = surgeon.cut(units)
    assert (call(model, inputs) - masked).abs().max() <= 1e-5 * masked.abs().max()
    assert after.parameters == sum(p.numel() for p in model.parameters())
    call(model.train(), inputs).square().mean().backward()
    model.eval()

    surgeon.undo()
    held = model.state_dict()
    assert all(torch.equal(before[path], tensor) for path, tensor in held.items())
    call(model, inputs)  # Its sizes are as before, too.


def test_buffers_are_cut_with_the_channels_that_they_lie_along() -> None:
    torch.manual_seed(0)
    make, inputs = written_nets.NETS["constants"]
    model = make().eval()
    surgeon = Surgeon(model, Recorder(model, inputs).architecture)
    offset = model.get_buffer("offset").clone()
    surgeon.cut({"first": [2, 11]})
    kept = [unit for unit in range(12) if unit not in (2, 11)]
    assert torch.equal(model.get_buffer("offset"), offset[kept])
    assert len(model.get_buffer("norm.running_var")) == 10
    assert model.get_buffer("mean").shape == (1, 3, 1, 1)
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_where_heads_take_the_width_of_the_stream_a_unit_is_a_share_of_both() -> None:
    torch.manual_seed(0)
    make, inputs = written_nets.NETS["gpt"]
    model = make().eval()
    surgeon = Surgeon(model, Recorder(model, inputs).architecture)
    assert surgeon.architecture.group["blocks.0.attention"].level is Level.HEAD
    surgeon.cut({"blocks.0.attention": [1]})
    attention = model.get_submodule("blocks.1.attention")
    assert (attention.n_head, attention.n_embd) == (3, 12)
    assert call(model, inputs).isfinite().all()


def test_every_group_of_a_network_has_a_name_of_its_own() -> None:
    model = written_nets.SplitAttention().eval()
    architecture = Recorder(model, written_nets.IMAGES).architecture
    assert architecture.group["narrow"].prunable
    assert len(architecture.group) == len(architecture.groups)


class WithLoss(nn.Module):
    """Returns a number beside its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.answer, self.side = nn.Linear(3, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(x).relu()
        return self.answer(x), x.new_zeros(()) + self.side(x).square().mean()


def test_a_network_that_returns_a_number_beside_its_outputs_loses_what_others_lose() -> None:
    surgeon = cut_and_checked(WithLoss(), torch.randn(4, 3))
    assert prunable(surgeon) == ["enter"]


class Policy(nn.Module):
    """Returns a distribution, as agents do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.width = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Distribution:
        x = self.body(x).tanh()
        return Independent(Normal(self.mean(x), nn.functional.softplus(self.width(x))), 1)


def test_a_network_that_returns_a_distribution_can_be_cut() -> None:
    assert prunable(cut_and_checked(Policy(), torch.randn(4, 3))) == ["body"]


class Cosines(nn.Module):
    """Answers are told by their angle to weights that are no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.weight = nn.Linear(3, 8), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        rows = nn.functional.normalize(self.weight)
        return torch.as_tensor(nn.functional.normalize(self.enter(x)) @ rows.T)


def test_a_matrix_that_no_layer_has_is_listed_with_a_reason() -> None:
    group = Recorder(Cosines().eval(), torch.randn(2, 3)).architecture.group["weight"]
    assert (
        group.reason == "weight is used by the network's own code, not by a layer that Elesh knows"
    )


MAPS = 10


class FixedMaps(nn.Module):
    """The number of maps is kept beside the network's code, where others may ask for it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.up = nn.Linear(3, 10 * 16), nn.ConvTranspose2d(10, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.up(self.wide(x).view(-1, MAPS, 4, 4)))


def test_a_reason_names_the_line_of_code_that_stands_in_the_way() -> None:
    group = Recorder(FixedMaps().eval(), torch.randn(2, 3)).architecture.group["wide"]
    assert not group.prunable
    assert "in test_hand_written.py, line" in group.reason
    assert "return torch.as_tensor(self.up(self.wide(x).view(-1, MAPS, 4, 4)))" in group.reason


class LaidOut(nn.Module):
    """Answers are laid out as an image, and as the parts of a mixture, some of them changed."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.image, self.parts = nn.Linear(3, 8), nn.Linear(8, 48), nn.Linear(8, 12)
        self.one, self.two = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.enter(x).relu()
        score = (self.one(x) * self.two(x)).sum(1)
        mean, scale = self.parts(x).view(-1, 2, 6).unbind(1)
        image = self.image(x).tanh().view(-1, 3, 4, 4)
        return image, torch.cat([mean, scale.exp()], 1).view(-1, 3, 4), score


def test_what_is_returned_in_another_layout_is_an_output_and_what_is_summed_is_not() -> None:
    groups = Recorder(LaidOut().eval(), torch.randn(4, 3)).architecture.group
    assert groups["enter"].prunable
    assert {groups[name].reason for name in ("image", "parts")} == {"network output"}
    assert groups["one"].reason == "the network returns a sum over its channels (Sum after one)"

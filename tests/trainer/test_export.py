"""What is exported computes what the network computes, plain and masked, and is never pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attention_nets
import kind_nets
import msgpack
import pytest
import safetensors.torch
import torch
import trainer_nets
from torch import Tensor, nn
from torch.nn import functional

from elesh.demo.network import DigitsNet
from elesh.program.program import Program
from elesh.trainer import Recorder, Surgeon
from elesh.trainer.export import Exporter
from elesh.trainer.network.calling import call, main_output
from leyline import ContractError, InvalidField, NetworkExport, PrunedArchitecture

NETS = ["Vgg", "ResNet", "Dense", "Mobile", "Vit", "Shared", "Unet", "Gated"]
ATTENTION = ["native", "encoder", "BERT", "GPT-2", "Llama"]
IN_CI = ("native", "Llama")


def run(
    network: NetworkExport, dead: dict[tuple[str, int | None], list[int]] | None = None
) -> Tensor:
    """The exported network's outputs on its own held-out inputs, some gates closed."""
    program = Program.read(network.program)
    tensors = safetensors.torch.load(network.held_out)
    inputs = {k.removeprefix("inputs/"): v for k, v in tensors.items() if k.startswith("inputs/")}
    count = len(next(iter(inputs.values())))
    samples = program.batch or count
    inputs = {name: x[torch.arange(samples) % count] for name, x in inputs.items()}
    gates = []
    for slot in program.gates:
        gate = torch.ones(samples, slot.size)
        gate[:, (dead or {}).get((slot.module, slot.dim), [])] = 0
        gates.append(gate)
    with torch.no_grad():
        return program.run(safetensors.torch.load(network.weights), inputs, gates)[:count]


def closed(
    architecture: PrunedArchitecture, units: dict[str, Any], layers: list[str]
) -> dict[tuple[str, int | None], list[int]]:
    """The gates that a cut closes."""
    dead: dict[tuple[str, int | None], list[int]] = {}
    for name, chosen in units.items():
        group = architecture.group[name]
        for site in (*group.sites, *group.norms):
            dead.setdefault((site.module, site.dim), []).extend(site.all_of(chosen))
    return dead | {(architecture.block[name].branch, None): [0] for name in layers}


def check(model: nn.Module, inputs: Any, example: Any) -> None:
    model.eval()
    architecture = Recorder(model, example).architecture
    state = {name: value.clone() for name, value in model.state_dict().items()}
    network = Exporter(model).export(architecture, (inputs, torch.zeros(5, dtype=torch.long)))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.allclose(run(network), main_output(call(model, inputs)), atol=1e-5)
        units = trainer_nets.units(architecture)
        blocks = [b.name for b in architecture.blocks if b.prunable][-1:]
        surgeon = Surgeon(model, architecture)
        surgeon.mask(units)
        surgeon.mask_layers(blocks)
        masked = main_output(call(model, inputs))
        surgeon.unmask()
    assert units or blocks
    assert torch.allclose(run(network, closed(architecture, units, blocks)), masked, atol=1e-5)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


class Steps(nn.Module):
    """[B, T, 10] to [B, 5]."""

    def __init__(self, inner: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(10, 8), inner, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.leave(self.inner(self.enter(x))[0][:, -1]))


def test_a_network_with_autocast_in_its_forward_pass_is_exported_in_its_own_precision() -> None:
    model = trainer_nets.build("Vgg").eval()
    architecture = Recorder(model, trainer_nets.example()).architecture
    inputs = torch.randn(8, *trainer_nets.example().shape[1:])
    with torch.no_grad():
        expected = model(inputs)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    exported = Exporter(model).export(architecture, (inputs, torch.zeros(8, dtype=torch.long)))
    assert torch.allclose(run(exported), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("inner", "width"),
    [
        (nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True), 12),
        (nn.GRU(8, 6, batch_first=True), 6),
    ],
)
def test_states_of_recurrent_layers_are_silent_in_the_exported_network_too(
    inner: nn.RNNBase, width: int
) -> None:
    check(Steps(inner, width), torch.randn(5, 7, 10), torch.randn(2, 7, 10))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_the_exported_network_is_the_network_plain_and_masked(name: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, *trainer_nets.example().shape[1:])
    check(trainer_nets.build(name), inputs, trainer_nets.example())


class Between(nn.Module):
    """Two convolutions with something between them that is no layer with weights."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.head, self.between = nn.Linear(8, 5), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.between(self.first(x).relu()))
        return torch.as_tensor(self.head(x.mean((2, 3))))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: torch.xlogy(x.mT, x + 1),
        lambda x: functional.adaptive_max_pool2d(x, 3),
        lambda x: functional.interpolate(x, scale_factor=2, mode="bicubic"),
        lambda x: torch.roll(x, (1, 2), (2, 3)),
        lambda x: functional.hardshrink(x),
        lambda x: torch.addcmul(x, x, x, value=0.1),
    ],
    ids=["mT and xlogy", "adaptive_max_pool2d", "bicubic", "roll", "hardshrink", "addcmul"],
)
@pytest.mark.sampled
def test_operators_that_are_not_core_ones_are_exported_if_they_only_compute(
    between: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    check(Between(between), torch.randn(5, 3, 8, 8), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.soak)
        for name in ATTENTION
    ],
)
def test_transformers_are_exported_plain_and_masked(name: str) -> None:
    check(attention_nets.build(name), attention_nets.inputs(name, 5), attention_nets.inputs(name))


def test_weights_that_are_standardised_see_only_the_inputs_that_are_kept() -> None:
    torch.manual_seed(0)
    check(kind_nets.standardised(), torch.randn(5, 3, 8, 8), torch.randn(2, 3, 8, 8))


def test_a_program_is_traced_once_for_an_architecture() -> None:
    model = trainer_nets.build("Vgg").eval()
    architecture = Recorder(model, trainer_nets.example()).architecture
    held_out = (trainer_nets.example(), torch.zeros(len(trainer_nets.example()), dtype=torch.long))
    exporter = Exporter(model)
    first = exporter.export(architecture, held_out)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    model.forward = None  # type: ignore[assignment, method-assign]
    second = exporter.export(architecture, held_out)
    assert second.program == first.program
    assert second.weights != first.weights


@pytest.mark.parametrize("name", ["Vgg", "heads"])
@pytest.mark.sampled
def test_after_a_cut_the_program_is_that_of_a_new_trace_without_tracing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if name == "Vgg":
        model, inputs = trainer_nets.build(name).eval(), trainer_nets.example()
    else:
        model, inputs = DigitsNet(width=16, heads=4, blocks=(1, 1)).eval(), torch.rand(3, 1, 8, 8)
    held_out = (inputs, torch.zeros(len(inputs), dtype=torch.long))
    surgeon = Surgeon(model, Recorder(model, inputs).architecture)
    exporter = Exporter(model)
    exporter.export(surgeon.architecture, held_out)
    prunable = [group for group in surgeon.architecture.groups if group.prunable]
    surgeon.cut({group.name: [0] for group in prunable if group.unit_multiple == 1})
    again = Exporter(model).export(surgeon.architecture, held_out)
    monkeypatch.setattr("elesh.trainer.export._trace", None)
    assert exporter.export(surgeon.architecture, held_out).program == again.program


@pytest.mark.slow
def test_a_cut_of_a_layer_is_traced_anew() -> None:
    model, inputs = DigitsNet(width=16, heads=4, blocks=(2, 1)).eval(), torch.rand(3, 1, 8, 8)
    held_out = (inputs, torch.zeros(len(inputs), dtype=torch.long))
    surgeon = Surgeon(model, Recorder(model, inputs).architecture)
    exporter = Exporter(model)
    exporter.export(surgeon.architecture, held_out)
    surgeon.cut_layers([next(b.name for b in surgeon.architecture.blocks if b.prunable)])
    network = exporter.export(surgeon.architecture, held_out)
    with torch.no_grad():
        assert torch.allclose(run(network), model(inputs), atol=1e-5)


@pytest.mark.parametrize("name", ["ResNet", "Vit"])
@pytest.mark.sampled
def test_one_call_is_enough_to_trace_a_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "export", None)
    torch.manual_seed(0)
    inputs = torch.randn(5, *trainer_nets.example().shape[1:])
    check(trainer_nets.build(name), inputs, trainer_nets.example())


def test_a_number_of_samples_that_one_call_does_not_show_is_traced_symbolically() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            return self.second(torch.cat([y, y[:1]]).view(len(x) + 1, -1)[:-1])

    check(Counting(), torch.randn(5, 4), torch.randn(2, 4))


def test_a_weight_that_is_read_through_a_view_of_it_is_that_of_now() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
            self.same = [self.second.weight.detach()]

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x))) + self.same[0].mean(1)

    torch.manual_seed(0)
    model, inputs = Alias().eval(), torch.randn(5, 4)
    architecture = Recorder(model, inputs, ignored_layers=["second"]).architecture
    exporter, held_out = Exporter(model), (inputs, torch.zeros(5, dtype=torch.long))
    exporter.export(architecture, held_out)
    with torch.no_grad():
        model.second.weight.mul_(2)
        assert torch.allclose(
            run(exporter.export(architecture, held_out)), model(inputs), atol=1e-5
        )


def test_a_network_that_cannot_be_traced_is_refused_by_name() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else self.layer(-x)

    model, inputs = Branching(), torch.randn(4, 4)
    architecture = Recorder(model, inputs).architecture
    with pytest.raises(InvalidField, match=r"torch\.export can trace"):
        Exporter(model).export(architecture, (inputs, torch.zeros(4, dtype=torch.long)))
    assert not model.layer._forward_pre_hooks


@pytest.mark.parametrize(
    "operator",
    [
        "aten.from_file.default",
        "aten.save.default",
        "os.system",
        "builtins.eval",
        "aten.__class__.default",
        "inductor.resize_storage_bytes_.default",
        "operator.attrgetter",
    ],
)
def test_a_program_that_names_anything_but_arithmetic_is_refused_unrun(operator: str) -> None:
    fields = {
        "format": 1,
        "model_hash": "0" * 16,
        "weights": {},
        "inputs": {"x": "0"},
        "gates": [],
        "nodes": [["y", operator, [{"value": "x"}], {}]],
        "output": "y",
    }
    with pytest.raises(InvalidField, match="operator"):
        Program.read(msgpack.packb(fields))


@pytest.mark.parametrize(
    "change",
    [
        {"output": "nowhere"},
        {"nodes": [["y", "aten.relu.default", [{"value": "later"}], {}]]},
        {"nodes": [["y", "aten.relu.default", [{"dtype": "float99"}], {}]]},
        {"nodes": [["y", "aten.relu.default", [{"value": "x", "more": "x"}], {}]]},
        {"nodes": [["y"]]},
        {"nodes": 3},
        {"gates": [[1]]},
        {"format": 2},
    ],
)
def test_a_malformed_program_is_a_named_error(change: dict[str, Any]) -> None:
    fields = {
        "format": 1,
        "model_hash": "0" * 16,
        "weights": {},
        "inputs": {"x": "0"},
        "gates": [],
        "nodes": [["y", "aten.relu.default", [{"value": "x"}], {}]],
        "output": "y",
    }
    assert Program.read(msgpack.packb(fields)).output == "y"
    with pytest.raises(ContractError, match="program"):
        Program.read(msgpack.packb(fields | change))

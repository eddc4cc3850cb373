"""What the recorder measures of whole layers, beside what follows from its definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layer_nets import (
    REMOVABLE,
    WITH_LAYERS,
    Residual,
    conv,
    made,
)
from torch import Tensor, nn
from trainer_nets import Vit, batches, example

from elesh.trainer import Recorder, Surgeon
from leyline import LayerBlock


def gated(model: nn.Module, block: LayerBlock, samples: int) -> tuple[nn.Module, Tensor]:
    """A copy whose branch is multiplied by a gate for each sample."""
    copied, gates = copy.deepcopy(model), torch.ones(samples, requires_grad=True)

    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        scaled = first * gates.view(-1, *[1] * (first.ndim - 1))
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    copied.get_submodule(block.branch).register_forward_hook(scale)
    return copied, gates


@pytest.mark.parametrize("name", WITH_LAYERS)
@pytest.mark.sampled
def test_gate_gradients_are_those_of_a_real_gate(name: str) -> None:
    model = made(name)
    recorder = Recorder(model, example())
    bundle = recorder.measure(batches(1), epoch=1)
    ((inputs, labels),) = batches(1)
    assert list(bundle.layers) == REMOVABLE[name]
    for block in REMOVABLE[name]:
        copied, gates = gated(model, recorder.architecture.block[block], len(inputs))
        loss = nn.functional.cross_entropy(copied(inputs), labels, reduction="sum")
        (expected,) = torch.autograd.grad(loss, gates)
        measured = bundle.layers[block]
        scale = expected.abs().max().item()
        assert measured.first_order[0] == pytest.approx(expected.mean().item(), abs=1e-4 * scale)
        assert measured.taylor[0] == pytest.approx(expected.abs().mean().item(), rel=1e-3)


class LastIsABlock(nn.Module):
    """Nothing but a linear head follows the block: the outputs are linear in its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = Residual(conv(6), nn.ReLU(), conv(6))
        self.fc = nn.Linear(6, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(torch.relu(self.stem(x))).mean((2, 3)))


def test_a_layers_predicted_loss_increase_is_exact_for_linear_outputs_of_two_classes() -> None:
    torch.manual_seed(1)
    model = LastIsABlock().eval()
    with torch.no_grad():
        model.fc.weight.copy_(2 * torch.randn(2, 6))  # beyond where two orders hold
    data = [(5 * x, y % 2) for x, y in batches()]
    bundle = Recorder(model, example()).measure(data, epoch=1)

    def losses() -> Tensor:
        with torch.no_grad():
            found = [nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in data]
        return torch.cat(found).double()

    plain, surgeon = losses(), Surgeon(model, bundle.architecture)
    surgeon.mask_layers(["block"])
    loss_increases = losses() - plain
    measured = bundle.layers["block"]
    assert measured.removal_rise is not None
    assert measured.removal_error is not None
    assert measured.removal_rise[0] == pytest.approx(loss_increases.mean().item(), rel=1e-4)
    error = loss_increases.std(correction=0).item() / len(loss_increases) ** 0.5
    assert measured.removal_error[0] == pytest.approx(error, rel=1e-4)
    second_order = 0.5 * measured.second_order[0] - measured.first_order[0]
    assert abs(second_order - loss_increases.mean().item()) > 1e-3


def test_layers_have_no_predicted_loss_increase_where_samples_have_no_margins() -> None:
    recorder = Recorder(made("ResNet"), example(), loss=nn.functional.cross_entropy)
    layers = recorder.measure(batches(1), epoch=1).layers.values()
    assert [data.removal_rise for data in layers] == [None, None]
    assert [data.removal_error for data in layers] == [None, None]


def test_layers_are_measured_where_few_samples_have_the_losss_derivatives() -> None:
    recorder = Recorder(made(WITH_LAYERS[0]), example())
    given = batches(2)
    few = recorder.measure(given, epoch=1, loss_samples=1).layers
    whole, first = (recorder.measure(part, epoch=1).layers for part in (given, given[:1]))
    assert few
    for name, layer in few.items():
        assert torch.equal(*(torch.from_numpy(x[name].projections) for x in (few, whole)))
        assert layer.similarity == pytest.approx(whole[name].similarity)
        assert layer.taylor == pytest.approx(first[name].taylor)
        assert layer.first_order == pytest.approx(first[name].first_order)
        assert layer.removal_rise == pytest.approx(first[name].removal_rise)


def test_similarity_and_gradient_flow_are_those_of_the_stream() -> None:
    model = made("Vit")
    recorder = Recorder(model, example())
    bundle = recorder.measure(batches(1), epoch=1)
    ((inputs, labels),) = batches(1)
    assert isinstance(model, Vit)
    x = model.patch(inputs).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls.expand(len(x), -1, -1), x], 1) + model.pos
    streams = [x]
    for block in model.blocks:
        streams.append(streams[-1] + block.attention(block.norm1(streams[-1])))
        streams.append(streams[-1] + block.mlp(block.norm2(streams[-1])))
    logits = model.fc(model.norm(streams[-1])[:, 0])
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    norms = [gradient.norm() for gradient in torch.autograd.grad(loss, streams)]
    for number, block_name in enumerate(REMOVABLE["Vit"]):
        before, after = streams[number], streams[number + 1]
        cosine = nn.functional.cosine_similarity(before, after, dim=-1).mean().item()
        low, high = sorted((norms[number].item(), norms[number + 1].item()))
        measured = bundle.layers[block_name]
        assert measured.similarity[0] == pytest.approx(cosine, abs=1e-5)
        assert measured.gradient_flow[0] == pytest.approx(low / high, rel=1e-4)


@pytest.mark.parametrize("name", ["ResNet", "Vit", "InPlace"])
def test_measuring_leaves_no_hook_and_no_frozen_parameter(name: str) -> None:
    model = made(name)
    frozen = next(model.parameters()).requires_grad_(False)
    recorder = Recorder(model, example())
    recorder.measure(batches(1), epoch=1)
    with pytest.raises(RuntimeError):
        recorder.measure([(torch.zeros(2, 7), torch.zeros(2))], epoch=1)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert [p.requires_grad for p in model.parameters()] == [
        p is not frozen for p in model.parameters()
    ]


def test_projections_do_not_depend_on_how_samples_are_batched() -> None:
    model = made("Vit")
    recorder = Recorder(model, example())
    whole = [(torch.cat([x for x, _ in batches()]), torch.cat([y for _, y in batches()]))]
    one, two = recorder.measure(batches(), epoch=1), recorder.measure(whole, epoch=1)
    for block in REMOVABLE["Vit"]:
        a, b = one.layers[block], two.layers[block]
        for field in ("taylor", "gradient_flow", "similarity", "first_order"):
            assert getattr(a, field)[0] == pytest.approx(getattr(b, field)[0], rel=1e-3, abs=1e-5)


# From measurement to removal.

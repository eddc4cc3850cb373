"""Gate statistics are the derivatives that their definitions say."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from trainer_nets import activations, batches, build, example, measured

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.calibration.losses import directions, margins, rival_direction
from elesh.trainer.calibration.midpoint import first_to_go
from leyline import GateSite, Level

SITES = ["Vgg", "ResNet", "Dense", "Mobile", "Vit", "Shared", "Unet", "Gated"]


def gated(
    model: nn.Module, sites: tuple[GateSite, ...], unit: int, gate: float, x: Tensor
) -> Tensor:
    """The outputs with everything that one unit sends multiplied by ``gate``."""

    def hook(site: GateSite) -> Callable[..., tuple[Tensor]]:
        def scaled(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            factors = torch.ones(args[0].shape[site.dim], dtype=args[0].dtype)
            factors[list(site.of(unit))] = gate
            shape = [1] * args[0].ndim
            shape[site.dim] = -1
            return (args[0] * factors.view(shape),)

        return scaled

    handles = [model.get_submodule(s.module).register_forward_pre_hook(hook(s)) for s in sites]
    with torch.no_grad():
        outputs = model(x)
    for handle in handles:
        handle.remove()
    return outputs


def keep_halved(model: nn.Module, sites: tuple[GateSite, ...], units: Collection[int]) -> None:
    """Multiply what these units send by one half from now on."""

    def halve(site: GateSite) -> Callable[..., tuple[Tensor]]:
        def scaled(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0].movedim(site.dim, -1).clone()
            x[..., site.all_of(units)] *= 0.5
            return (x.movedim(-1, site.dim),)

        return scaled

    for site in sites:
        model.get_submodule(site.module).register_forward_pre_hook(halve(site))


@pytest.mark.parametrize("ahead", [0, 0.4], ids=["here", "midpoint"])
@pytest.mark.parametrize("name", SITES)
@pytest.mark.sampled
def test_projections_are_the_derivatives_of_random_projections_of_the_outputs(
    name: str, ahead: float
) -> None:
    model = build(name)
    recorder = Recorder(model, example(), seed=5)
    bundle = recorder.measure(batches(1), epoch=3, look_ahead=ahead)
    exact = copy.deepcopy(model).double()
    groups = [g for g in bundle.architecture.groups if g.prunable and g.level is Level.CHANNEL]
    here = recorder.measure(batches(1), epoch=3, look_ahead=0)
    halved = first_to_go(here, groups, ahead)
    for group in groups:
        keep_halved(exact, group.sites, halved.get(group.name, ()))
    x, step = batches(1)[0][0].double(), 1e-5
    v = directions(model(batches(1)[0][0]), torch.Generator().manual_seed(5), 1).double()
    assert torch.allclose(v.sum(1), torch.zeros(6).double(), atol=1e-5)
    for group in groups:  # Each level is measured where its own units are halved.
        G = bundle.gates[group.name].projections
        for unit in (0, group.size - 1):
            up = gated(exact, group.sites, unit, 1 + step, x)
            down = gated(exact, group.sites, unit, 1 - step, x)
            numerical = (v * (up - down)).sum(1).numpy() / (2 * step)
            if unit in halved.get(group.name, ()):
                numerical *= 2  # Its gate moved by half a step.
            assert np.allclose(G[:, unit], numerical, rtol=1e-3, atol=1e-4 * np.abs(G).max())


def test_first_order_is_the_derivative_of_the_loss_and_signed() -> None:
    model = build("ResNet")
    bundle, exact, step = measured(model), copy.deepcopy(model).double(), 1e-5
    group = bundle.architecture.group["blocks.1.conv2"]
    for unit in (0, 7):
        losses = [
            sum(
                functional.cross_entropy(
                    gated(exact, group.sites, unit, gate, x.double()), y, reduction="sum"
                ).item()
                for x, y in batches()
            )
            / 12
            for gate in (1 + step, 1 - step)
        ]
        found = bundle.gates[group.name].first_order[unit]
        assert math.isclose(found, (losses[0] - losses[1]) / (2 * step), rel_tol=1e-3, abs_tol=1e-6)
    assert bundle.gates[group.name].first_order.min() < 0


def test_second_order_is_the_mean_square_gate_gradient_sample_by_sample() -> None:
    """With a loss of one's own the labels are the true ones, so that it can be recomputed."""
    model, name = build("ResNet"), "stem"

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, labels, reduction="none")

    bundle = Recorder(model, example(), loss=loss).measure(batches(), epoch=1)
    assert bundle.metadata.labels == "true"
    sites, squares = bundle.architecture.group[name].sites, np.zeros(8)
    for inputs, labels in batches():
        for i in range(len(inputs)):
            squares += gate_gradients(model, sites, inputs[i : i + 1], labels[i : i + 1]) ** 2
    assert np.allclose(bundle.gates[name].second_order, squares / 12, rtol=1e-4)


def gate_gradients(
    model: nn.Module, sites: tuple[GateSite, ...], x: Tensor, y: Tensor
) -> np.ndarray[Any, Any]:
    seen = activations(model, sites, x)
    gradients = torch.autograd.grad(functional.cross_entropy(next(seen), y), list(next(seen)))
    return sum(
        (a * g).sum((0, 2, 3)) for a, g in zip(next(seen), gradients, strict=True)
    ).detach().numpy()  # fmt: skip


def test_sampled_labels_give_the_fisher_diagonal_of_the_models_own_predictions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(1, 4).expand(4000, 4).contiguous()
    labels = torch.zeros(4000, dtype=torch.long)
    bundle = Recorder(model, x[:2]).measure([(x, labels)], epoch=1)
    assert bundle.metadata.labels == "sampled"
    hidden = torch.relu(model[0](x[:1]))
    odds = model(x[:1]).softmax(-1)[0]
    per_class = hidden[0] * (model[2].weight.T @ (odds[:, None] - torch.eye(3)))[:, :].T
    exact = (odds[:, None] * per_class**2).sum(0).detach().numpy()
    assert np.allclose(bundle.gates["0"].second_order, exact, rtol=0.1, atol=1e-6)


def test_the_predicted_loss_increase_is_exact_for_linear_outputs_of_two_classes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    data = [(3 * x, y % 2) for x, y in batches(3)]
    bundle = Recorder(model, example()).measure(data, epoch=1)
    (gate,) = bundle.gates.values()
    surgeon, losses = Surgeon(model, bundle.architecture), []
    for masked in [(), *((unit,) for unit in range(6))]:
        surgeon.unmask()
        surgeon.mask({gate.layer_name: masked})
        outputs = torch.cat([model(x).detach() for x, _ in data])
        losses.append(float(functional.cross_entropy(outputs, torch.cat([y for _, y in data]))))
    measured_rise = np.array(losses[1:]) - losses[0]
    assert gate.removal_rise is not None
    np.testing.assert_allclose(gate.removal_rise, measured_rise, rtol=1e-4, atol=1e-6)
    second_order = 0.5 * gate.second_order - gate.first_order
    assert np.abs(second_order - measured_rise).max() > 1e-3


def test_margins_are_those_of_the_cross_entropy_even_where_it_vanishes() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 90.0, -20.0], [5.0, -60.0, 7.0]])
    labels = torch.tensor([0, 1, 1])
    found = functional.softplus(margins(logits.double(), labels))
    expected = functional.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(found, expected)
    assert found[1] == pytest.approx(math.exp(-90))


def test_the_rival_direction_has_the_variance_of_draws_from_the_wrong_classes() -> None:
    logits, labels = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]]).double(), torch.tensor([1])
    odds = torch.tensor([2.0, -torch.inf, 0.0, -1.0, 0.5]).double().softmax(0)
    covariance = odds.diag() - torch.outer(odds, odds)
    found = rival_direction(logits, labels)[0]
    assert found[1] == 0
    assert abs(found.sum()) < 1e-12
    assert found.square().sum().item() == pytest.approx(covariance.trace().item())
    # Two wrong classes leave one difference: there it is exact for every movement.
    three = rival_direction(logits[:, :3], labels)[0]
    odds = torch.tensor([2.0, -torch.inf, 0.0]).double().softmax(0)
    torch.testing.assert_close(torch.outer(three, three), odds.diag() - torch.outer(odds, odds))


def test_two_classes_have_one_rival_and_no_variance() -> None:
    logits, labels = torch.tensor([[2.0, 1.0], [0.0, 90.0]]), torch.tensor([1, 1])
    assert (rival_direction(logits, labels) == 0).all()


def test_only_single_labels_and_the_default_loss_have_a_predicted_loss_increase() -> None:
    own = measured(build("Vgg"), loss=functional.cross_entropy)
    assert all(gate.removal_rise is None for gate in own.gates.values())
    assert all(gate.removal_rise is not None for gate in measured(build("Vgg")).gates.values())


def test_labels_that_the_loss_ignores_leave_the_second_order() -> None:
    data = batches(2)
    data[0][1][:3] = -100
    recorder = Recorder(build("Vgg"), example())
    mixed, plain = recorder.measure(data, epoch=1), recorder.measure(data[1:], epoch=1)
    assert all(gate.removal_rise is None for gate in mixed.gates.values())
    assert all(gate.removal_rise is not None for gate in plain.gates.values())


def test_projected_outputs_move_by_minus_the_columns_of_what_is_cut() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.ReLU(), nn.Linear(6, 5)).eval()
    recorder = Recorder(model, example(), seed=5)
    (gate,) = recorder.measure(batches(), epoch=1).gates.values()
    before = recorder.project(batches())
    surgeon = Surgeon(model, recorder.architecture)
    recorder.architecture = surgeon.cut({gate.layer_name: [1, 4]})
    moved = recorder.project(batches()) - before
    np.testing.assert_allclose(moved, -gate.projections[:, [1, 4]].sum(1), rtol=1e-3, atol=1e-4)

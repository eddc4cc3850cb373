"""The statistics are what their definitions say, and measuring leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from trainer_nets import NETS, activations, batches, build, example, measured, same, units

from elesh.trainer import Recorder, Surgeon
from elesh.trainer.calibration.losses import class_axis, cross_entropy, directions
from leyline import CheckpointBundle, InvalidField, Level, NotFinite, ShapeMismatch, checkpoint_id

SITES = ["Vgg", "ResNet", "Dense", "Mobile", "Vit", "Shared", "Unet", "Gated"]


def test_taylor_importance_is_the_documents_formula() -> None:
    model = build("Vgg")
    bundle = measured(model)
    for name, width in (("features.0", 1), ("features.4", 4)):
        group = bundle.architecture.group[name]
        sums, count = np.zeros(group.size), 0
        for inputs, labels in batches():
            seen = activations(model, group.sites, inputs)
            loss = functional.cross_entropy(next(seen), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, list(next(seen)))
            product = (next(seen)[0] * gradient).abs().flatten(1).unflatten(1, (group.size, -1))
            sums += product.sum((0, 2)).detach().numpy()
            count += len(inputs) * product.shape[2]
        assert product.shape[2] == (4 if width == 4 else 64)
        assert np.allclose(bundle.channels[name].taylor_importance, sums / count, rtol=1e-4)


def test_magnitude_is_the_norm_of_all_weights_that_produce_a_channel() -> None:
    model = build("ResNet")
    bundle = measured(model)
    weights = [model.blocks[1].conv2, model.blocks[1].shortcut[0], model.blocks[2].conv2]
    expected = torch.cat([w.weight.flatten(1) for w in weights], 1).norm(dim=1)
    found = bundle.channels["blocks.1.conv2"].magnitude_importance
    assert np.allclose(found, expected.detach().numpy(), rtol=1e-5)
    up = measured(build("Unet")).channels["up"].magnitude_importance
    assert np.allclose(
        up, build("Unet").up.weight.detach().transpose(0, 1).flatten(1).norm(dim=1), rtol=1e-5
    )


def test_activation_frequency_and_correlations_are_those_of_the_consumers_input() -> None:
    model = build("Vgg")
    bundle = measured(model)
    group = bundle.architecture.group["features.4"]
    found = [list(activations(model, group.sites, x))[1][0] for x, _ in batches()]
    rows = torch.cat(found).unflatten(1, (12, 4)).transpose(1, 2).reshape(-1, 12).detach()
    data = bundle.channels["features.4"]
    assert np.allclose(data.activation_frequency, (rows.abs() > 1e-3).float().mean(0))
    normed = rows / rows.norm(dim=0)
    assert data.channel_correlations is not None
    assert np.allclose(data.channel_correlations, normed.T @ normed, atol=1e-5)


def test_duplicated_channels_correlate_and_a_silent_one_only_with_itself() -> None:
    model = build("Vgg")
    with torch.no_grad():
        model.features[0].weight[1] = 2 * model.features[0].weight[0]
        model.features[0].bias[1] = 2 * model.features[0].bias[0]
        model.features[1].weight[2], model.features[1].bias[2] = 0, 0
        for statistic in (model.features[1].running_mean, model.features[1].weight):
            statistic[1] = statistic[0]
        model.features[1].running_var[1] = model.features[1].running_var[0]
        model.features[1].bias[:2] = 0
        model.features[1].running_mean[:2] = 0
    data = measured(model).channels["features.0"]
    assert data.channel_correlations is not None
    assert data.channel_correlations[0, 1] > 0.999
    assert data.activation_frequency[2] == 0
    assert data.channel_correlations[2].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_every_prunable_group_is_measured_and_only_those(name: str) -> None:
    bundle = measured(build(name))
    groups = [group for group in bundle.architecture.groups if group.prunable]
    assert list(bundle.gates) == [group.name for group in groups]
    assert list(bundle.channels) == [g.name for g in groups if g.level is not Level.HEAD]
    assert {gate.projections.shape[0] for gate in bundle.gates.values()} == {12}
    assert all(np.abs(gate.projections).max() > 0 for gate in bundle.gates.values())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_two_identical_measurements_give_identical_bundles(name: str) -> None:
    model = build(name)
    recorder = Recorder(model, example())
    one, two = (recorder.measure(batches(), epoch=1) for _ in range(2))
    assert one.blobs()["statistics"] == two.blobs()["statistics"]
    assert one.blobs().get("gates") == two.blobs().get("gates")
    assert one.document == two.document
    other = Recorder(model, example(), seed=1).measure(batches(), epoch=1)
    assert other.blobs().get("gates") != one.blobs().get("gates")


def state_of(model: nn.Module) -> tuple[Any, ...]:
    return (
        {
            key: (id(value), value.detach().clone())
            for key, value in model.state_dict(keep_vars=True).items()
        },
        [module.training for module in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state(),
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["Vgg", "ResNet", "Vit"])
@pytest.mark.sampled
def test_measuring_leaves_no_trace_even_if_it_fails(name: str, fails: bool) -> None:
    model = build(name).train()
    next(model.modules()).register_forward_hook(lambda *_: None)
    model(example()).sum().backward()
    next(model.parameters()).requires_grad_(False)
    next(model.children()).eval()
    recorder = Recorder(model, example())
    before = state_of(model)

    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches()
        torch.rand(3)
        raise RuntimeError("the disk is gone")

    if fails:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            recorder.measure(broken(), epoch=1)
    else:
        recorder.measure(batches(), epoch=1)
    assert same(before, state_of(model))


def test_buffers_that_the_forward_pass_moves_come_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.two(torch.relu(self.one(x)))
            self.last = x.detach().mean(0)
            return x

    model = Counting()
    recorder = Recorder(model, torch.randn(2, 3))
    buffer = model.last
    recorder.measure([(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))], epoch=1)
    assert (model.calls.item(), model.last is buffer, model.last.tolist()) == (0, True, [0, 0])


@pytest.mark.parametrize("mode", ["frozen", "no_grad", "inference", "train"])
@pytest.mark.sampled
def test_statistics_do_not_depend_on_how_the_network_is_used(mode: str) -> None:
    expected, model = measured(build("ResNet")), build("ResNet")
    model.train(mode == "train").requires_grad_(mode != "frozen")
    with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode != "no_grad"):
        bundle = measured(model)
    assert bundle.blobs().get("gates") == expected.blobs().get("gates")
    assert bundle.blobs()["statistics"] == expected.blobs()["statistics"]


def test_measuring_under_autocast_is_measuring_without_it() -> None:
    model = build("ResNet")
    expected = measured(model).gates["blocks.1.conv1"].projections
    with torch.autocast("cpu", torch.bfloat16):
        found = measured(model).gates["blocks.1.conv1"].projections
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)


def test_a_network_with_autocast_in_its_forward_pass_is_measured_in_its_own_precision() -> None:
    model = build("ResNet")
    expected = measured(model).gates["blocks.1.conv1"].projections
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    assert model(example()).dtype == torch.bfloat16
    found = measured(model).gates["blocks.1.conv1"].projections
    assert np.array_equal(found, expected)
    assert model(example()).dtype == torch.bfloat16


def test_a_low_precision_model_is_measured_in_single_precision() -> None:
    model = build("Vgg").bfloat16()
    recorder = Recorder(model, example().bfloat16())
    bundle = recorder.measure([(x.bfloat16(), y) for x, y in batches()], epoch=1)
    assert bundle.gates["features.0"].projections.dtype == np.float32


def test_masked_units_measure_as_nothing() -> None:
    model = build("Vgg")
    recorder = Recorder(model, example())
    surgeon = Surgeon(model, recorder.architecture)
    surgeon.mask({"features.0": [2]})
    gate = recorder.measure(batches(), epoch=1).gates["features.0"]
    assert np.abs(gate.projections).max(0).argmin() == 2
    assert np.abs(gate.projections[:, 2]).max() == 0


def test_after_a_cut_the_recorder_takes_the_surgeons_architecture() -> None:
    model = build("ResNet")
    recorder = Recorder(model, example())
    original = recorder.architecture
    surgeon = Surgeon(model, original)
    surgeon.cut(units(original))
    with pytest.raises(ShapeMismatch, match=r"model\.stem\.weight"):
        recorder.measure(batches(), epoch=1)
    recorder.architecture = surgeon.architecture
    bundle = recorder.measure(batches(), epoch=1)
    assert bundle.architecture.original_parameters == original.parameters
    assert bundle.architecture.group["stem"].removed == len(units(original)["stem"])
    known = Recorder(model, example(), architecture=surgeon.architecture)
    assert known.measure(batches(), epoch=1).blobs().get("gates") == bundle.blobs().get("gates")


def test_metadata_says_what_was_measured() -> None:
    recorder = Recorder(build("Vgg"), example(), seed=4)
    bundle = recorder.measure(
        batches(3), epoch=7, run_id="r", step=9, accuracy=0.5, loss=1.5, note="n", max_samples=14
    )
    metadata = bundle.metadata
    assert metadata.checkpoint_id == checkpoint_id("r", 7, recorder.architecture.model_hash)
    assert (metadata.epoch, metadata.step, metadata.samples, metadata.seed) == (7, 9, 14, 4)
    assert (metadata.accuracy, metadata.loss, metadata.note) == (0.5, 1.5, "n")
    assert bundle.gates["features.0"].projections.shape == (14, 8)


def test_a_bundle_survives_its_folder(tmp_path: Any) -> None:
    bundle = measured(build("Dense"))
    loaded = CheckpointBundle.load(bundle.save(tmp_path / "b"))
    assert loaded.document == bundle.document
    assert loaded.blobs().get("gates") == bundle.blobs().get("gates")


def test_a_loss_may_be_a_mean_or_one_number_a_sample() -> None:
    found = []
    for reduction in ("mean", "none"):

        def loss(outputs: Tensor, labels: Tensor, how: str = reduction) -> Tensor:
            return functional.cross_entropy(outputs, labels, reduction=how)

        bundle = Recorder(build("Vgg"), example(), loss=loss).measure(batches(), epoch=1)
        found.append(bundle.gates["features.0"].first_order)
    assert np.allclose(*found, rtol=1e-4, atol=1e-7)


def test_ones_own_sampler_is_used_and_seeded() -> None:
    def sampler(outputs: Tensor) -> Tensor:
        return outputs.detach() + torch.randn_like(outputs)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).sum(1) / 2

    data = [(x, torch.zeros(len(x), 5)) for x, _ in batches()]
    recorder = Recorder(build("Vgg"), example(), loss=loss, sample_labels=sampler, outputs="values")
    one, two = (recorder.measure(data, epoch=1) for _ in range(2))
    assert one.metadata.labels == "sampled"
    assert one.blobs().get("gates") == two.blobs().get("gates")


def test_directions_are_centred_for_logits_only() -> None:
    values, generator = torch.zeros(4, 5), torch.Generator()
    assert directions(values, generator, 1).sum(1).abs().max() < 1e-5
    assert directions(values, generator).sum(1).abs().max() > 0.1
    assert directions(torch.zeros(4, 1), generator, 1).abs().max() > 0


def test_values_need_a_loss() -> None:
    with pytest.raises(InvalidField, match="loss"):
        Recorder(build("Vgg"), example(), outputs="values")


def test_sequences_and_images_of_classes_are_measured() -> None:
    tokens = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = [(torch.randn(5, 7, 4), torch.randint(0, 3, (5, 7)))]
    assert Recorder(tokens, data[0][0]).measure(data, epoch=1).gates["0"].projections.shape == (
        5,
        8,
    )
    pixels = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    images = [(torch.randn(5, 3, 6, 6), torch.randint(0, 4, (5, 6, 6)))]
    assert Recorder(pixels, images[0][0]).measure(images, epoch=1).channels["0"].size == 8


def test_shares_of_classes_lie_where_they_add_up_to_one() -> None:
    """Of an image, as PyTorch's cross-entropy has them, as classes are measured."""
    shape, generator = (3, 5, 4, 6), torch.Generator().manual_seed(0)
    logits, classes = torch.zeros(shape), torch.randint(5, (3, 4, 6), generator=generator)
    shares = functional.one_hot(classes, 5).float()
    assert class_axis(logits, classes) == 1
    assert class_axis(logits, shares.movedim(-1, 1)) == 1
    assert class_axis(logits.movedim(1, -1), shares) == 3
    for axis in (1, 3):
        loss = cross_entropy(logits.movedim(1, axis), shares.movedim(-1, axis))
        assert torch.allclose(loss, torch.tensor(3 * 4 * 6 * math.log(5)))


def test_rows_that_belong_to_one_sample_are_put_together() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.two(torch.relu(self.one(x.reshape(-1, 4))))
            return rows.reshape(len(x), -1, 3).mean(1)

    torch.manual_seed(0)
    model, x = Folded(), torch.randn(5, 7, 4)
    labels = torch.zeros(5, dtype=torch.long)
    folded = Recorder(model, x).measure([(x, labels)], epoch=1)
    single = Recorder(model, x).measure([(x[i : i + 1], labels[:1]) for i in range(5)], epoch=1)
    assert np.allclose(folded.gates["one"].first_order, single.gates["one"].first_order, atol=1e-6)
    assert folded.gates["one"].projections.shape == (5, 8)


def test_no_samples_are_refused() -> None:
    with pytest.raises(InvalidField, match="batches"):
        Recorder(build("Vgg"), example()).measure([], epoch=1)


def test_weights_that_are_not_finite_are_named() -> None:
    model = build("Vgg")
    recorder = Recorder(model, example())
    with torch.no_grad():
        model.features[4].weight[0, 0] = math.nan
    with pytest.raises(NotFinite, match=r"outputs.*features\.4\.weight is not finite"):
        recorder.measure(batches(), epoch=1)


def test_statistics_that_are_not_finite_name_group_and_field() -> None:
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, labels, reduction="none") * math.inf

    with pytest.raises(NotFinite, match=r"features\.0/taylor_importance"):
        Recorder(build("Vgg"), example(), loss=loss).measure(batches(), epoch=1)


def test_what_consumers_read_that_are_never_called_has_no_statistics_and_they_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.skip = False

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.one(x))
            return self.three(x if self.skip else torch.relu(self.two(x)))

    model = Fickle()
    recorder = Recorder(model, torch.randn(2, 3))
    model.skip = True
    bundle = recorder.measure([(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))], epoch=1)
    assert bundle.gates.keys() == bundle.channels.keys() == {"two"}
    assert "consumers=['two']" in caplog.text

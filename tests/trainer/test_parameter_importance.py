"""Parameter importance on the trainer's side: safe sketches, masks on the right tensors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from elesh.analysis import CountMinSketch, element_keys
from elesh.analysis.sketch.parameter_masks import Marking, analyze_parameters
from elesh.trainer.weight_masks import ParameterTracker, apply_masks, identifiers
from leyline import BlobRef, IdempotencyKey, IdentityMismatch, Level, NotFinite, PruningMasks

KEY = IdempotencyKey(1, "0" * 16, "rq", Level.PARAMETER)


def network(seed: int = 0) -> nn.Sequential:
    """Ten inputs of which the last five never differ from zero: their weights are dead."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))


def batches(seed: int = 0, count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 32, 10, generator=generator)
    inputs[:, :, 5:] = 0
    labels = torch.randint(0, 3, (count, 32), generator=generator)
    return list(zip(inputs, labels, strict=True))


def masks_of(tracker: ParameterTracker) -> PruningMasks:
    known = tracker.export()
    samples = {name: values.astype(np.float64) for name, values in known.samples.items()}
    return analyze_parameters(KEY, known.parameters, known.sketch, samples, Marking())[0]


def test_dead_weights_are_masked_and_the_outputs_stay_the_same() -> None:
    model = network()
    tracker = ParameterTracker(model)
    tracker.observe(batches())
    before = model(batches(1)[0][0])
    assert apply_masks(model, masks_of(tracker)) >= 5 * 16
    assert not model[0].weight[:, 5:].any()
    assert model[0].weight[:, :5].any()
    torch.testing.assert_close(model(batches(1)[0][0]), before)


def test_what_the_sketch_says_is_never_below_the_latest_importance() -> None:
    model = network()
    tracker = ParameterTracker(model, momentum=0.9)
    for seed in range(3):
        tracker.observe(batches(seed))
    known, latest = tracker.export(), ParameterTracker(model, momentum=0.9)
    latest.observe(batches(2))
    for parameter in known.parameters:
        keys = element_keys(parameter.identifier, np.arange(int(np.prod(parameter.shape))))
        assert (known.sketch.estimate(keys) >= latest.export().sketch.estimate(keys)).all()


def test_ranks_merge_to_the_sum_of_their_importance() -> None:
    model = network()
    ranks = [ParameterTracker(model, seed=7) for _ in range(2)]
    for number, rank in enumerate(ranks):
        rank.observe(batches(number))
    one, two = (rank.export() for rank in ranks)
    merged = CountMinSketch.from_bytes(one.sketches_blob())
    merged.merge(two.sketch)
    samples = {
        name: one.samples[name].astype(np.float64) + two.samples[name] for name in one.samples
    }
    masks, report = analyze_parameters(KEY, one.parameters, merged, samples, Marking())
    assert report.samples == sum(map(len, samples.values()))
    assert masks.masks


def test_a_pass_leaves_gradients_weights_and_generators_alone() -> None:
    model = network()
    model(batches()[0][0]).sum().backward()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    ParameterTracker(model).observe(batches())
    assert torch.equal(torch.get_rng_state(), state)
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert all(
        torch.equal(old, p.grad)
        for old, p in zip(gradients, model.parameters(), strict=True)
        if p.grad is not None
    )


def test_a_cut_starts_the_history_anew() -> None:
    model = network()
    tracker = ParameterTracker(model)
    tracker.observe(batches())
    model[0] = nn.Linear(10, 12)
    model[2] = nn.Linear(12, 3)
    tracker.observe(batches())
    assert tracker.export().parameters == identifiers(model)


def test_infinite_importance_is_named_and_changes_nothing() -> None:
    model = network()
    tracker = ParameterTracker(model)
    tracker.observe(batches())
    total = tracker.export().sketch.total
    with torch.no_grad():
        model[2].bias[0] = torch.inf
    with pytest.raises(NotFinite, match="importance of"):
        tracker.observe(batches())
    assert tracker.export().sketch.total == total


def test_a_mask_for_another_tensor_is_refused_and_nothing_changes() -> None:
    model, other = network(), nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    tracker = ParameterTracker(other)
    tracker.observe(batches())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IdentityMismatch, match="weight"):
        apply_masks(model, masks_of(tracker))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_packed_masks_do_the_same_as_inline_ones() -> None:
    model, copied = network(), network()
    tracker = ParameterTracker(model)
    tracker.observe(batches())
    masks = masks_of(tracker)
    packed = b"".join(mask.bits for mask in masks.masks)
    reference = BlobRef(uri="redis:x", size=len(packed), sha256="0" * 64, codec="raw")
    bare = PruningMasks(
        idempotency_key=masks.idempotency_key,
        masks=tuple(mask.model_copy(update={"bits": b""}) for mask in masks.masks),
        marking_threshold=masks.marking_threshold,
        confidence=masks.confidence,
        packed=reference,
    )
    assert apply_masks(model, masks) == apply_masks(copied, bare, packed)
    assert all(map(torch.equal, model.parameters(), copied.parameters()))

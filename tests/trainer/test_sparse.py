"""Masks in PyTorch's sparse formats hold just what the masks leave."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_parameter_importance import batches, masks_of, network
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from elesh.trainer.sparse_masks import as_semi_structured, as_sparse, two_of_four
from elesh.trainer.weight_masks import ParameterTracker, apply_masks, kept_elements
from leyline import BlobRef, InvalidField, ShapeMismatch


@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_workers_masks_become_sparse_weights_that_compute_the_same(
    layout: str, packed: bool
) -> None:
    model = network()
    tracker = ParameterTracker(model)
    tracker.observe(batches())
    masks, blob = masks_of(tracker), b""
    if packed:
        blob = b"".join(mask.bits for mask in masks.masks)
        ref = BlobRef(uri="redis:x", size=len(blob), sha256="0" * 64, codec="raw")
        bare = tuple(mask.model_copy(update={"bits": b""}) for mask in masks.masks)
        masks = masks.model_copy(update={"masks": bare, "packed": ref})
    kept = kept_elements(model, masks, blob)
    sparse = as_sparse(model[0].weight, kept["0.weight"], layout)
    assert sparse.layout == getattr(torch, f"sparse_{layout}")
    assert sparse.values().numel() == int(kept["0.weight"].sum()) < model[0].weight.numel()
    apply_masks(model, masks, blob)
    assert torch.equal(sparse.to_dense(), model[0].weight)
    x = batches(4)[0][0]
    torch.testing.assert_close((sparse @ x.T).T + model[0].bias, model[0](x))


def test_kept_zeros_stay_in_the_pattern_and_convolutions_can_be_sparse() -> None:
    weight = torch.zeros(2, 3, 2, 2)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    assert as_sparse(weight, keep).values().numel() == int(keep.sum())
    with pytest.raises(ShapeMismatch, match=r"a matrix for csr.*flatten"):
        as_sparse(weight, keep, "csr")
    with pytest.raises(ShapeMismatch, match="bool of shape"):
        as_sparse(weight, keep.float())


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 4), (3, 8), (2, 4, 3, 1), (2, 2, 2, 2), (8,)]),
    masked=st.floats(0, 1),
)
def test_two_of_four_stay_and_no_other_two_are_worth_more(
    seed: int, shape: tuple[int, ...], masked: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).round(decimals=1)
    keep = torch.rand(shape, generator=generator) > masked
    stays = two_of_four(weight, keep)
    assert stays.shape == weight.shape
    fours = (x.reshape(-1, 4) for x in (weight.abs(), keep, stays))
    for sizes, allowed, chosen in zip(*fours, strict=True):
        assert int(chosen.sum()) == 2
        worth = lambda pair: (int(allowed[pair].sum()), float(sizes[pair].sum()))  # noqa: E731, B023
        best = max(worth(list(pair)) for pair in itertools.combinations(range(4), 2))
        assert worth(chosen.nonzero().flatten().tolist()) == pytest.approx(best)


def test_the_selection_fits_the_2_4_format() -> None:
    """Packed and unpacked by PyTorch's own conversion, which runs anywhere."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).half()
    pruned = weight * two_of_four(weight)
    values, meta = sparse_semi_structured_from_dense_cutlass(pruned)
    assert values.shape == (32, 32)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), pruned)


def test_a_2_4_tensor_that_cannot_be_made_says_why() -> None:
    weight = torch.randn(32, 64)
    keep = two_of_four(weight)
    if not torch.cuda.is_available():
        with pytest.raises(InvalidField, match=r"weight\.device: expected cuda, found cpu"):
            as_semi_structured(weight, keep)
    with pytest.raises(InvalidField, match=r"weight\.dtype: expected one of float16"):
        as_semi_structured(weight.double(), keep)
    crowded = keep.clone()
    crowded[3, 8:12] = True
    with pytest.raises(InvalidField, match="found 4 in row 3 from column 8"):
        as_semi_structured(weight, crowded)
    with pytest.raises(ShapeMismatch, match="multiple of four"):
        two_of_four(torch.randn(4, 6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the 2:4 format needs a CUDA device")
def test_a_2_4_layer_computes_what_the_masked_one_does() -> None:
    layer = nn.Linear(64, 32, bias=False).half().cuda()
    keep = two_of_four(layer.weight)
    x = torch.randn(16, 64, dtype=torch.float16, device="cuda")
    expected = x @ (layer.weight * keep).T
    layer.weight = nn.Parameter(as_semi_structured(layer.weight, keep))
    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)

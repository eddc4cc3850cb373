"""Masks of single parameters in PyTorch's sparse formats: coo, csr and 2:4 semi-structured.

Promises: what a sparse tensor holds is, element for element, the masked weight; a format that a
tensor, a device or a dtype does not allow is an error that says what would. Nothing is changed in
the network.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from leyline import InvalidField, ShapeMismatch

_GROUP, _KEPT = 4, 2
_DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float32)


def as_sparse(weight: Tensor, keep: Tensor, layout: Literal["coo", "csr"] = "coo") -> Tensor:
    """The kept elements of a weight as a sparse tensor of its shape; exact zeros that are kept
    stay explicit, so that the pattern is the mask's.

    Args:
        weight: any shape; a matrix for ``csr``.
        keep: of the same shape, bool (:func:`elesh.trainer.weight_masks.kept_elements`).
        layout: ``coo`` takes 8 bytes an axis and element beside the value; ``csr``, which
            multiplies faster, 8 bytes an element and a row.

    Raises:
        ShapeMismatch: if mask and weight differ in shape, or ``csr`` is asked for and the weight
            is no matrix.
    """
    _require_mask(weight, keep)
    if layout == "csr" and weight.ndim != 2:
        hint = "use coo, or weight.flatten(1) of a convolution"
        raise ShapeMismatch("weight", "a matrix for csr", tuple(weight.shape), hint=hint)
    places = keep.to(weight.device).nonzero(as_tuple=True)
    values = weight.detach()[places]
    coo = torch.sparse_coo_tensor(
        torch.stack(places), values, weight.shape, is_coalesced=True, check_invariants=True
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return coo.to_sparse_csr() if layout == "csr" else coo


def two_of_four(weight: Tensor, keep: Tensor | None = None) -> Tensor:
    """[of the weight's shape] bool: in every four neighbours along a row, the two that stay.

    Elements that ``keep`` marks go first, then the smaller magnitudes; of equal ones the later
    goes. Rows are those of the weight as a matrix, outputs by inputs times kernel. Exactly two of
    four stay, as the 2:4 format of NVIDIA's sparse tensor cores asks for (Mishra et al. 2021,
    "Accelerating sparse deep neural networks").

    Raises:
        ShapeMismatch: if the mask has another shape, or rows are no whole number of fours.
    """
    matrix = _matrix(weight)
    if keep is not None:
        _require_mask(weight, keep)
    order = matrix.detach().abs().float()
    if keep is not None:
        # Marked ones come after every other one, and among themselves by magnitude still.
        order = order - (order.max() + 1) * ~keep.to(weight.device).reshape(order.shape)
    fours = order.reshape(-1, _GROUP)
    places = fours.sort(dim=1, descending=True, stable=True).indices[:, :_KEPT]
    stays = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, places, True)
    return stays.reshape(weight.shape)


def as_semi_structured(weight: Tensor, keep: Tensor) -> SparseSemiStructuredTensor:
    """The kept elements of a weight as a 2:4 semi-structured matrix, for its linear layer:
    ``layer.weight = nn.Parameter(as_semi_structured(layer.weight, keep))``.

    Args:
        weight: as a matrix, outputs by inputs times kernel; on a CUDA device of compute capability
            8.0 or newer; float16, bfloat16, int8 or float32.
        keep: of its shape, at most two of every four neighbours along a row
            (:func:`two_of_four`).

    Raises:
        ShapeMismatch: if mask and weight differ in shape, or rows are no whole number of fours.
        InvalidField: naming the device or dtype that has no such format, or the first four of
            which more than two stay.
    """
    _require_mask(weight, keep)
    matrix = _matrix(weight)
    fours = keep.to(weight.device).reshape(-1, _GROUP)
    crowded = (fours.sum(1) > _KEPT).nonzero()
    if len(crowded):
        row, column = divmod(int(crowded[0]) * _GROUP, matrix.shape[1])
        found = f"{int(fours[crowded[0]].sum())} in row {row} from column {column}"
        raise InvalidField("keep", "at most two of every four", found, hint="two_of_four selects")
    if weight.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise InvalidField("weight.dtype", f"one of {allowed}", str(weight.dtype))
    if weight.device.type != "cuda":
        hint = "PyTorch has the 2:4 format for CUDA only; as_sparse works everywhere"
        raise InvalidField("weight.device", "cuda", weight.device.type, hint=hint)
    sparse: SparseSemiStructuredTensor = to_sparse_semi_structured(
        matrix.detach() * fours.reshape(matrix.shape)
    )
    return sparse


def _require_mask(weight: Tensor, keep: Tensor) -> None:
    if keep.shape != weight.shape or keep.dtype != torch.bool:
        expected = f"bool of shape {tuple(weight.shape)}"
        raise ShapeMismatch("keep", expected, f"{keep.dtype} of shape {tuple(keep.shape)}")


def _matrix(weight: Tensor) -> Tensor:
    """Outputs by everything else, with rows of whole fours."""
    matrix = weight.flatten(1) if weight.ndim > 1 else weight.reshape(1, -1)
    if matrix.shape[1] % _GROUP:
        found = f"{matrix.shape[1]} of a weight of shape {tuple(weight.shape)}"
        raise ShapeMismatch("weight", "rows of a multiple of four elements", found)
    return matrix

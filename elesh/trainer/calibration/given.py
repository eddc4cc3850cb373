"""Batches in the form that a network takes: in the precision of its parameters if it needs that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from elesh.observe import get_logger
from elesh.trainer.network.calling import (
    Inputs,
    Pair,
    call,
    device_of,
    first_samples,
    map_tensors,
    tensors_in,
)
from elesh.trainer.network.state import preserve_state

_log = get_logger(__name__)


def as_taken(model: nn.Module, batches: Sequence[Pair]) -> Sequence[Pair]:
    """The batches with inputs in the dtype of the network's parameters, if it fails with them as
    they are and does not with those: frameworks that train in bfloat16 cast each batch on its way
    in, and Elesh's batches do not go that way. The same batches in every other case."""
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    some = first_samples(batches[0][0], 2) if batches else ()
    others = {x.dtype for x in tensors_in(some) if x.is_floating_point()} - own
    if len(own) != 1 or not others or _runs(model, some):
        return batches
    dtype = own.pop()

    def cast(inputs: Inputs) -> Inputs:
        found: Inputs = map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
        return found

    if not _runs(model, cast(some)):
        return batches
    given, taken = ", ".join(map(str, sorted(others, key=str))), str(dtype)
    _log.info("batches are given in the dtype of the network", given=given, dtype=taken)
    return [(cast(inputs), labels) for inputs, labels in batches]


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    device = device_of(model)
    with preserve_state(model, 0), torch.no_grad():
        try:
            call(model, map_tensors(lambda x: x.to(device), inputs))
        except RuntimeError:  # what PyTorch raises where dtypes do not go together
            return False
    return True

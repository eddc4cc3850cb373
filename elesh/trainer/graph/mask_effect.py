"""Whether a mask of a group has any effect on the network, and its samples can be told apart.

Promises: a group stays prunable only if its mask changes some output. Where the forward pass goes
around the modules (compiled or traced parts), a mask has no effect, and what is measured under it
would prove nothing. Nor does one whose consumers read rows that no sum over samples can be taken
of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elesh.trainer.network.calling import (
    Inputs,
    batch_size,
    call,
    device_of,
    packed_in,
    tensors_in,
)
from elesh.trainer.network.gates import Axis, GateMeter, axis_of
from elesh.trainer.network.layers import channel_axes
from elesh.trainer.network.state import seed_generators
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import PrunedArchitecture, PruningGroup

__all__ = ["with_acting_masks"]

_REASON = "masking it changes no output, so a cut cannot be judged under a mask"
_MIXED = "its consumers read rows that samples do not share evenly (a packed sequence's steps)"


def with_acting_masks(
    copied: nn.Module, inputs: Inputs, architecture: PrunedArchitecture
) -> PrunedArchitecture:
    """The architecture with every group whose mask has no effect marked.

    Args:
        copied: a copy of the network in evaluation mode with random weights.
    """
    candidates = [group for group in architecture.groups if group.prunable]
    moving, mixed = _moving(copied, inputs, candidates)
    untried = [g for g in candidates if g.name not in moving and g.name not in mixed]
    reasons = dict.fromkeys(_silent(copied, inputs, architecture, untried), _REASON)
    reasons |= dict.fromkeys(mixed, _MIXED)
    if not reasons:
        return architecture
    groups = tuple(
        group.model_copy(update={"prunable": False, "reason": reasons[group.name]})
        if group.name in reasons
        else group
        for group in architecture.groups
    )
    return PrunedArchitecture.build(architecture.tensors, architecture.layers, groups)


def _moving(
    copied: nn.Module, inputs: Inputs, groups: Sequence[PruningGroup]
) -> tuple[set[str], set[str]]:
    """Those of the groups along whose gates the outputs have a gradient: not all of those that have
    an effect, but at the cost of one pass; and those of which a consumer reads rows that the
    samples do not share evenly."""
    packed = packed_in(inputs)
    steps = 0 if packed is None else packed.data.shape[0]
    samples, rows = batch_size(inputs), dict[Axis, int]()

    def watch(axis: Axis, x: Tensor) -> None:
        rows[axis] = 0 if x.is_nested else x.shape[0]

    def mixes(axis: Axis) -> bool:
        count = rows.get(axis, 0)
        return count % samples != 0 or (count == steps != samples)

    axes = dict.fromkeys(axis_of(site) for group in groups for site in group.sites)
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad(), GateMeter(copied, axes, watch) as meter:
            meter.expect(1)
            with _kept_whole(copied, groups) as heads:
                outputs = [t for t in tensors_in(call(copied, inputs)) if t.requires_grad]
            outputs += heads
            drawn = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
            products = [(t * d).sum() for t, d in zip(outputs, drawn, strict=True)]
            sums, _ = meter.backward(torch.stack(products).sum(), keep=False)
    except Exception:  # Whatever the user's network raises: each mask is tried, then.
        return set(), set()
    mixed = {g.name for g in groups if any(mixes(axis_of(site)) for site in g.sites)}
    return {
        group.name
        for group in groups
        for site in group.sites
        if axis_of(site) in sums
        and bool(sums[axis_of(site)][0, sorted(site.all_of(range(group.size)))].any())
    }, mixed


@contextlib.contextmanager
def _kept_whole(copied: nn.Module, groups: Sequence[PruningGroup]) -> Iterator[list[Tensor]]:
    """What leaves layers that none of the groups shrinks: scores and boxes of a detector, before it
    chooses among them."""
    shrinking, seen = {layer for group in groups for layer in group.layers}, list[Tensor]()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            seen.append(output)

    handles = [
        module.register_forward_hook(note)
        for name, module in copied.named_modules()
        if name not in shrinking and channel_axes(module).site_dim is not None
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _silent(
    copied: nn.Module,
    inputs: Inputs,
    architecture: PrunedArchitecture,
    groups: Sequence[PruningGroup],
) -> set[str]:
    """Those of the groups that can lose all units but one under a mask, and no output changes."""
    if not groups:
        return set()
    surgeon = Surgeon(copied, architecture, restore_points=0)

    def outputs() -> list[Tensor]:
        seed_generators(device_of(copied), 0)
        with torch.no_grad():
            return [t for t in tensors_in(call(copied, inputs)) if t.is_floating_point()]

    plain, found = outputs(), set()
    for group in groups:
        surgeon.mask({group.name: range(group.size - group.unit_multiple)})
        try:
            masked = outputs()
        finally:
            surgeon.unmask()
        if all(torch.equal(a, b) for a, b in zip(plain, masked, strict=True)):
            found.add(group.name)
    return found

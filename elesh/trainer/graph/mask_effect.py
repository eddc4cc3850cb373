"""Whether a mask of a group has any effect on the network.

Promises: a group stays prunable only if its mask changes some output. Where the forward pass goes
around the modules (compiled or traced parts), a mask has no effect, and what is measured under it
would prove nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elesh.trainer.network.calling import Inputs, call, device_of, tensors_in
from elesh.trainer.network.gates import GateMeter, axis_of
from elesh.trainer.network.state import seed_generators
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import PrunedArchitecture, PruningGroup

__all__ = ["with_acting_masks"]

_REASON = "masking it changes no output, so a cut cannot be judged under a mask"


def with_acting_masks(
    copied: nn.Module, inputs: Inputs, architecture: PrunedArchitecture
) -> PrunedArchitecture:
    """The architecture with every group whose mask has no effect marked.

    Args:
        copied: a copy of the network in evaluation mode with random weights.
    """
    candidates = [group for group in architecture.groups if group.prunable]
    moving = _moving(copied, inputs, candidates)
    silent = _silent(copied, inputs, architecture, [g for g in candidates if g.name not in moving])
    if not silent:
        return architecture
    groups = tuple(
        group.model_copy(update={"prunable": False, "reason": _REASON})
        if group.name in silent
        else group
        for group in architecture.groups
    )
    return PrunedArchitecture.build(architecture.tensors, architecture.layers, groups)


def _moving(copied: nn.Module, inputs: Inputs, groups: Sequence[PruningGroup]) -> set[str]:
    """Those of the groups along whose gates the outputs have a gradient: not all of those that have
    an effect, but at the cost of one pass."""
    axes = dict.fromkeys(axis_of(site) for group in groups for site in group.sites)
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad(), GateMeter(copied, axes, lambda axis, x: None) as meter:
            meter.expect(1)
            outputs = [t for t in tensors_in(call(copied, inputs)) if t.requires_grad]
            drawn = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
            products = [(t * d).sum() for t, d in zip(outputs, drawn, strict=True)]
            sums, _ = meter.backward(torch.stack(products).sum(), keep=False)
    except Exception:  # Whatever the user's network raises: each mask is tried, then.
        return set()
    return {
        group.name
        for group in groups
        for site in group.sites
        if axis_of(site) in sums
        and bool(sums[axis_of(site)][0, sorted(site.all_of(range(group.size)))].any())
    }


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

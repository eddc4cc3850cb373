"""Groups over which a product of two activations sums: queries and keys of one head, two towers.

A channel of one operand goes with that of the other at its place. Code may divide the product by
the root of how many there are, read off a shape, so that what is left weighs more after a cut. It
may divide the operands by their lengths. And it may take the number of channels that the product
weighs (values) from that of its operands.

Promises: which of these a network does is not guessed but tried, on these groups alone; networks
without such groups are not run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import nn

from elesh.trainer.graph.attention import in_shares
from elesh.trainer.network.kinds.matrices import (
    is_behind,
    layer_at,
    place_behind,
    plain_name,
    weight_path,
)
from elesh.trainer.network.layers import channel_axes, made_dim
from elesh.trainer.network.sizes import common_holder
from leyline import NormSite, PruningGroup

__all__ = ["weighed"]

Passes = Callable[[Mapping[str, PruningGroup], Collection[str], Sequence[str]], bool]
"""Whether groups, of which some stand for others and without some, may lose units together: by the
names of these three."""
Changed = tuple[dict[str, PruningGroup], set[str]]
"""What stands for groups, by their names, and the names of those that go with them."""


def weighed(groups: Sequence[PruningGroup], model: nn.Module, passes: Passes) -> Changed | None:
    """How the groups over which products sum have to go; None if it is known already."""
    plain = [g for g in groups if any(is_behind(model, site.module) for site in g.sites)]
    names = [group.name for group in plain]
    if not plain or passes({}, (), names):
        return None
    divided = {group.name: _divided(group) for group in plain}
    if passes(divided, (), names):
        return divided, set()
    changed, gone = dict[str, PruningGroup](), set[str]()
    for group in plain:
        for one, others in _ways(group, groups, model):
            if gone.isdisjoint(others) and passes({group.name: one}, others, [group.name]):
                changed[group.name] = one
                gone.update(others)
                break
    return (changed, gone) if changed else None


def _ways(
    group: PruningGroup, groups: Sequence[PruningGroup], model: nn.Module
) -> Iterator[tuple[PruningGroup, Sequence[str]]]:
    """Each with the names of others that go with it."""
    for one in (group, _with_both(group, model)):
        yield one, ()
        yield _divided(one), ()
    for other in groups:
        near = common_holder(other.layers) == common_holder(group.layers)
        if near and other is not group and other.size == group.size:
            for one in (group, _divided(group)):
                yield in_shares((one, other), group.size), (other.name,)


def _with_both(group: PruningGroup, model: nn.Module) -> PruningGroup:
    """Masked behind the layers of the other operand, too."""
    slices, norms = {(part.tensor, part.dim): part for part in group.slices}, list[NormSite]()
    for layer in dict.fromkeys(group.layers).keys() - {plain_name(s.module) for s in group.sites}:
        module = layer_at(model, layer)
        attribute, dim = channel_axes(module).outputs[0]
        part = slices.get((weight_path(layer, module, attribute), dim))
        if part is not None and plain_name(layer) == layer:
            span = part.model_dump(include={"start", "width", "indices"})
            path, axis = place_behind(layer), made_dim(module)
            norms.append(NormSite(module=path, dim=axis, kind="operand", eps=0.0, **span))
    return group.model_copy(update={"norms": (*group.norms, *norms)})


def _divided(group: PruningGroup) -> PruningGroup:
    """With a product that is divided by the root of how many units there are."""
    norms = (NormSite(**site.model_dump(), kind="scores", eps=0.0) for site in group.sites)
    return group.model_copy(update={"norms": (*group.norms, *norms)})

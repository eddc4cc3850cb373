"""Layers that can be removed whole: branches added to a stream that continues without them.

A :class:`LayerBlock` lists everything that its removal takes: the modules that others stand in for
and the tensors inside. Parameters and multiply-accumulates after a removal are therefore counted
exactly without the network, and the trainer cuts by the same list.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field

from leyline.base import Count, Fraction, Label, Message, Name, Text

from .parts import PruningGroup

SkipStrategy = Literal["identity", "residual", "linear_projection", "conv_projection"]
BlockKind = Literal["attention", "conv", "linear", "other"]


class StandIn(Message):
    """What takes a module's place when the layer is removed."""

    module: Name
    """Path of the module."""
    kind: Literal["identity", "zero"]
    """Passes its first input on, or answers with zeros of that shape."""
    extra_outputs: Count = 0
    """How many outputs (all None) follow the first; 0 means a plain tensor."""


class LayerBlock(Message):
    """A residual branch: ``out = stream + branch``; without it, ``out = stream``."""

    name: Name
    """Unique in the architecture."""
    kind: BlockKind
    """The kind of its heaviest part: attention before convolution before linear."""
    depth: Fraction
    """Where it ends among the layers: 0 at the inputs, 1 at the outputs."""
    strategy: SkipStrategy
    """``identity``: a module of this block becomes an identity; ``residual``: the addition stays
    and its branch becomes zero; projections: the shortcut is, or would have to be, a layer."""
    skip_potential: Fraction
    """How well the strategy can stand in for the layer (FACTS, "Selection")."""
    branch: Label = ""
    """The module whose output is the branch's contribution: masked and measured there."""
    entry: Label = ""
    """A module whose first input is the stream."""
    dim: int = Field(default=-1, ge=-1, le=1)
    """The channel axis of stream and contribution."""
    stand_ins: tuple[StandIn, ...] = ()
    """All that is replaced when it is removed."""
    tensors: tuple[Name, ...] = ()
    """Paths of the parameters and buffers that go with it."""
    prunable: bool = True
    reason: Text = ""
    """Why it is left alone, where it is not prunable."""
    removed: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that are replaced; everything inside them goes, too."""
        return tuple(stand_in.module for stand_in in self.stand_ins)


def inside_any(module: str, outer: Collection[str]) -> bool:
    """Whether ``module`` is one of ``outer`` or a part of one, by path."""
    while module:
        if module in outer:
            return True
        module = module.rpartition(".")[0]
    return False


def inside(module: str, outer: str) -> bool:
    """Whether ``module`` is ``outer`` or a part of it, by path."""
    return module == outer or module.startswith(f"{outer}.")


def groups_left(
    groups: Collection[PruningGroup], gone: Collection[str], replaced: Collection[str]
) -> tuple[PruningGroup, ...]:
    """The groups without what lay in removed blocks; a group that lay wholly in them is gone.

    Args:
        gone: paths of the blocks' tensors.
        replaced: paths of their modules.
    """
    left = []
    for group in groups:
        slices = tuple(part for part in group.slices if part.tensor not in gone)
        sites = tuple(s for s in group.sites if not inside_any(s.module, replaced))
        if not slices and group.slices:
            continue
        update = {
            "slices": slices,
            "sites": sites,
            "norms": tuple(s for s in group.norms if not inside_any(s.module, replaced)),
            "written": tuple(w for w in group.written if not inside_any(w.module, replaced)),
            "layers": tuple(x for x in group.layers if not inside_any(x, replaced)),
        }
        if group.sites and not sites and group.prunable:
            update |= {"prunable": False, "reason": "its consumers were removed"}  # type: ignore[dict-item]
        left.append(group.model_copy(update=update))
    return tuple(left)

"""The parts of an architecture: tensors, layers, and groups of units that can be removed.

A :class:`PruningGroup` names, for every unit, the slices of all tensors that go with it and the
places where its signal enters its consumers. Plain descriptions; what a removal does to them is
computed in :mod:`leyline.network.architecture`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from leyline.base import Count, Epoch, Label, Message, Name, NonNegative, Text
from leyline.errors import InvalidField
from leyline.identity import Level, ParameterIdentifier

Owner = Literal["host", "seed"]
NormKind = Literal[
    "layer", "deviation", "rms", "response", "map", "weights", "states", "scores", "operand"
]
"""How a normalisation uses its units: see :class:`NormSite`."""
MAX_AXIS = 1 << 24
"""The longest axis whose parts may be removed: a cut lists its indices one by one."""


class TensorDescriptor(ParameterIdentifier):
    """One parameter or buffer of the network, in ``state_dict`` naming."""

    kind: Literal["parameter", "buffer"] = "parameter"
    owner: Owner = "host"
    """Host network or a seed grafted onto it (the gradient isolation invariant)."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class LayerDescriptor(Message):
    """One leaf module: its weight is used ``positions`` times a sample, so that its
    multiply-accumulates are ``weight elements * positions``."""

    name: Name
    kind: Name
    """For example ``conv2d``, ``linear``, ``batchnorm``."""
    weight: str = ""
    """Path of the tensor that is multiplied, empty where there is none."""
    positions: Count = 0
    """How often a sample uses the weight: output positions of a convolution, tokens of a linear."""


class ProductCut(Message):
    """An axis of a product of activations that becomes shorter with the units of a group."""

    group: Name
    dim: int = Field(ge=0, le=7)
    """Axis of the product's ``shape``."""
    width: int = Field(ge=1)
    """By how much it becomes shorter with each unit."""


class ActivationProduct(Message):
    """What a module multiplies without a weight: queries by keys, attention weights by values. Its
    multiply-accumulates for one sample are the product of its ``shape``."""

    module: Label = ""
    """The innermost module that was called meanwhile; empty: the network itself."""
    shape: tuple[Count, ...]
    """Lengths of the axes that units are a part of, behind the product of all others."""
    cuts: tuple[ProductCut, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return math.prod(self.shape)

    def without(self, units: Mapping[str, int]) -> ActivationProduct:
        """After so many units of each group were removed."""
        shape = list(self.shape)
        for cut in self.cuts:
            shape[cut.dim] -= cut.width * units.get(cut.group, 0)
        same = tuple(shape) == self.shape
        return self if same else self.model_copy(update={"shape": tuple(shape)})

    def among(self, groups: Collection[str]) -> ActivationProduct:
        """Where only these groups are left."""
        cuts = tuple(cut for cut in self.cuts if cut.group in groups)
        return self if cuts == self.cuts else self.model_copy(update={"cuts": cuts})

    def renamed(self, names: Mapping[str, str]) -> ActivationProduct:
        """With other names of groups."""
        renamed = (c.model_copy(update={"group": names.get(c.group, c.group)}) for c in self.cuts)
        return self.model_copy(update={"cuts": tuple(renamed)}) if self.cuts else self


class Span(Message):
    """Where the units of a group lie along one axis: unit ``u`` owns the ``width`` indices from
    ``start + u * width``, or ``indices[u * width : (u + 1) * width]`` where they are listed."""

    start: Count = 0
    """First index of unit 0, where none are listed."""
    width: int = Field(default=1, ge=1)
    """Indices a unit owns."""
    indices: tuple[int, ...] | None = None
    """All indices, unit by unit, where they do not simply follow each other."""

    def of(self, unit: int) -> range | tuple[int, ...]:
        """The indices that unit ``unit`` owns."""
        if self.indices is not None:
            return self.indices[unit * self.width : (unit + 1) * self.width]
        return range(self.start + unit * self.width, self.start + (unit + 1) * self.width)

    def all_of(self, units: Iterable[int]) -> list[int]:
        """The indices of several units, in the order of the units."""
        if self.indices is None and self.width == 1:
            return [self.start + unit for unit in units]
        return [index for unit in units for index in self.of(unit)]


class TensorSlice(Span):
    """The part of a tensor that goes with the units of a group: indices along ``dim``."""

    tensor: Name
    """Path of the tensor."""
    dim: int = Field(ge=0, le=7)


class GateSite(Span):
    """Where a unit's signal enters its consumer: axis ``dim`` of the module's first input.

    A mask is applied here, and gate gradients are measured here: everything behind this point
    behaves as if the unit had been cut.
    """

    module: Name
    """Name of the consuming module."""
    dim: int = Field(ge=-8, le=7)
    """Axis of its first input; negative ones count from the end."""

    @property
    def axis(self) -> tuple[str, int]:
        """Module and axis; sites of several groups may share them."""
        return self.module, self.dim


class NormSite(GateSite):
    """Where units enter a normalisation over channels: masked, it takes its statistics over the
    channels that are kept, just as after the cut."""

    kind: NormKind
    """Whether mean and variance are normalised, mean and (unbiased) deviation, the mean square
    only, each channel's norm over all positions by the mean of all channels' (global response
    normalisation), or mean and variance over channels and positions together (group normalisation
    of one group). ``weights``: the module is a convolution that standardises each row of its
    weight, of which ``dim`` is an axis. ``states``: it is a recurrent layer whose states these are,
    and masked ones are not fed; ``dim`` is -2, of [states, samples]. ``scores``: a product sums
    over these channels, and code divides by the root of how many there are; ``operand``: it sums
    over them, and they are masked here too, of its other operand, whose length is normalised."""
    eps: NonNegative
    """What the normalisation adds to the variance, deviation or mean square."""


class WrittenSize(Message):
    """Where a network's own code keeps how many units a group has, ``width`` times: an attribute of
    a module, or a number that is written in one of its methods. Either becomes smaller by ``width``
    with each unit; it may count the units of other groups, too."""

    module: Label = ""
    """Empty: the network itself."""
    name: Name
    """The attribute's, or the method's."""
    number: Count | None = None
    """As it is written in the method; none where it is an attribute."""
    kept_as: Literal["number", "root", "inverse_root"] = "number"
    """What an attribute keeps of it: scales are square roots."""
    width: int = Field(default=1, ge=1)


class PruningGroup(Message):
    """Units that can be removed one by one, each with all the tensor slices coupled to it.

    ``origin[u]`` is the number that unit ``u`` had in the original network, so that what was cut
    can always be stated in original numbering.
    """

    name: Name
    """Unique in the architecture."""
    level: Level = Level.CHANNEL
    layers: tuple[str, ...] = ()
    """The layers that produce the units (several where residual additions couple them)."""
    original_size: int = Field(ge=1)
    """Units before the first cut."""
    origin: tuple[int, ...]
    """The original number of each unit that is present, rising."""
    slices: tuple[TensorSlice, ...]
    """Everything that is cut with a unit."""
    sites: tuple[GateSite, ...]
    """Where a unit is masked and measured."""
    norms: tuple[NormSite, ...] = Field(default=(), exclude_if=operator.not_)
    """Normalisations over these channels. Left out of messages where there are none."""
    written: tuple[WrittenSize, ...] = Field(default=(), exclude_if=operator.not_)
    """Where the network's code keeps their number under no name that is known. Left out of messages
    where there are none."""
    prunable: bool = True
    """Whether units of it may be removed."""
    reason: Text = ""
    """Why the group is left alone, where it is not prunable."""
    unit_multiple: int = Field(default=1, ge=1)
    """The number of units kept must be a multiple of this (grouped convolutions)."""

    @property
    def size(self) -> int:
        """Units present now."""
        return len(self.origin)

    @property
    def removed(self) -> int:
        """Units removed since the original network."""
        return self.original_size - self.size

    @model_validator(mode="after")
    def _origin_is_sound(self) -> Self:
        rising = all(map(operator.lt, self.origin, self.origin[1:]))
        inside = not self.origin or 0 <= self.origin[0] <= self.origin[-1] < self.original_size
        if not (rising and inside):
            raise InvalidField(
                f"groups.{self.name}.origin",
                f"rising unit numbers below original_size {self.original_size}",
                self.origin,
            )
        return self


class PruningRecord(Message):
    """One removal in the history of an architecture, in original numbering."""

    epoch: Epoch
    idempotency_key: Name
    """Of the decision; ``manual`` where there was none."""
    group: Name
    """The group that lost units, or the block that was removed whole (level ``layer``)."""
    level: Level = Level.CHANNEL
    original_indices: tuple[int, ...]

"""A network for trying masks and cuts: applied quickly, and undone bit for bit.

Promises: what a trial masks and cuts is what Masks and a Surgeon would; only tensors that shrink
are copied, and of these no weight that may be a window of what it was; nothing of the architecture
is built anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from elesh.trainer.graph.hazards import (
    met_in_training,
    read_in_training,
    require_repeatable,
    train_once,
    trainable_example,
)
from elesh.trainer.network.calling import Inputs, call, device_of, tensors_in
from elesh.trainer.network.kinds.matrices import Multiplying, bare_matrices, is_behind
from elesh.trainer.network.kinds.outputs import read_by
from elesh.trainer.network.kinds.weight_norms import gains_after, weight_norm_of
from elesh.trainer.network.layers import channel_axes, named_tensors
from elesh.trainer.network.sizes import (
    constants,
    cut_by_place,
    put_sizes,
    refit,
    refit_heads,
    size_names,
    sizes_of,
)
from elesh.trainer.network.state import drop_cached, seed_generators
from elesh.trainer.surgery.masks import Masks
from elesh.trainer.surgery.tensors import point_to
from leyline import GateSite, PrunedArchitecture, PruningGroup, Span

from .products import Cuts
from .random_copy import in_any_layout
from .waypoints import narrowed

__all__ = ["Trial", "TrialCuts", "Units"]

Ints = npt.NDArray[np.int64]
Units = Mapping[str, Sequence[int]]
"""Units by group name."""


class Trial:
    """A network and example inputs to try changes on.

    Args:
        compared: from what the network returns to what has to be equal; None: all of it.
    """

    def __init__(
        self,
        copied: nn.Module,
        inputs: Inputs,
        compared: Callable[[Any], Any] | None = None,
    ) -> None:
        self.copied, self._inputs, self._compared = copied, inputs, compared
        self._matrices = bare_matrices(copied)
        self._in_training: tuple[Inputs | None, set[str]] | None = None
        self.products = Cuts()
        """What is multiplied, and what of it is left where units are cut."""

    def run(self) -> Any:
        """What the network returns, the random generators seeded."""
        self.copied.eval()
        drop_cached(self.copied)
        seed_generators(device_of(self.copied), 0)
        with Multiplying(self._matrices) if self._matrices else contextlib.nullcontext():
            output = call(self.copied, self._inputs)
        # Most are positions and tokens that are only added: they need not be watched again.
        self._matrices = {n: one for n, one in self._matrices.items() if one.layout is not None}
        return output

    def compared(self, output: Any) -> list[Tensor]:
        """What has to be equal of what the network returned: floating-point tensors."""
        if self._compared is not None:
            output = self._compared(output)
        return [t for t in tensors_in(output) if t.is_floating_point()]

    def outputs(self) -> list[Tensor]:
        """Both in turn."""
        return self.compared(self.run())

    def require_repeatable(self) -> None:
        """See :func:`~.hazards.require_repeatable`; nothing may be cut or masked."""
        require_repeatable(self.copied, self._inputs)

    def train(self) -> None:
        """Forward in training mode, ready to go backward; moves running statistics.

        Branches that only training uses (auxiliary heads) must fit, too, and what is changed in
        place must still be there for the backward pass. Nothing is done if the whole network is
        known not to run so.
        """
        example = self._in_training[0] if self._in_training else self._inputs
        if example is not None:
            train_once(self.copied, example)

    def in_training(self) -> set[str]:
        """The parameters that the whole network reaches in training mode; nothing may be cut."""
        return self._found_in_training()[1]

    def read_in_training(self, layers: Collection[str]) -> Mapping[str, Sequence[str]]:
        """See :func:`~.hazards.read_in_training`; nothing may be cut."""
        example = self.example_in_training
        return {} if example is None else read_in_training(self.copied, example, layers)

    def met_in_training(self, vectors: Mapping[str, int]) -> Mapping[str, str]:
        """See :func:`~.hazards.met_in_training`; nothing may be cut."""
        example = self.example_in_training
        return {} if example is None else met_in_training(self.copied, example, vectors)

    @property
    def example_in_training(self) -> Inputs | None:
        """What the whole network runs with in training mode; nothing may be cut."""
        return self._found_in_training()[0]

    def trained_wrongly(self) -> bool:
        """Whether :meth:`train` ran with inputs that the whole network does not run with: what
        was found there says nothing. From then on it takes others."""
        if self._in_training is not None:
            return False
        return self._found_in_training()[0] is not self._inputs

    def _found_in_training(self) -> tuple[Inputs | None, set[str]]:
        if self._in_training is None:
            self._in_training = trainable_example(self.copied, self._inputs)
        return self._in_training


class TrialCuts:
    """Masks and cuts of one network, each taken back."""

    def __init__(self, copied: nn.Module, architecture: PrunedArchitecture) -> None:
        self._copied, self.architecture = copied, architecture
        self.tensors = named_tensors(copied)
        self.whole = {path: tensor.data for path, tensor in self.tensors.items()}
        self._indices: dict[int, Ints] = {}
        self._beside: dict[str, Sequence[GateSite]] = {}

    @contextlib.contextmanager
    def masked(self, units: Units) -> Iterator[None]:
        """The network with these units silent."""
        masks = Masks(self._copied)
        masks.set(self.architecture, units)
        try:
            yield
        finally:
            masks.clear()

    @contextlib.contextmanager
    def cut(self, units: Units) -> Iterator[Cut]:
        """The network without these units."""
        cut = Cut(self, units)
        try:
            cut.apply(units)
            yield cut
        finally:
            cut.restore(list(cut.units))

    def paths(self, names: Iterable[str]) -> set[str]:
        """The tensors that these groups are parts of."""
        return {part.tensor for name in names for part in self.architecture.group[name].slices}

    def lost(self, units: Units) -> dict[str, dict[int, Ints]]:
        """By tensor and axis, which indices go."""
        gone: dict[str, dict[int, list[Ints]]] = {}
        for name, chosen in units.items():
            group, rows = self.architecture.group[name], np.array(chosen, dtype=np.int64)
            for part in group.slices:
                axes = gone.setdefault(part.tensor, {})
                axes.setdefault(part.dim, []).append(self._places(part, rows))
        return _joined(gone)

    def lost_inputs(self, units: Units) -> dict[str, dict[int, Ints]]:
        """By consumer and axis of its input, which channels go."""
        gone: dict[str, dict[int, list[Ints]]] = {}
        for name, chosen in units.items():
            group, rows = self.architecture.group[name], np.array(chosen, dtype=np.int64)
            for site in (*group.sites, *self._read_beside(group)):
                axes = gone.setdefault(site.module, {})
                axes.setdefault(site.dim, []).append(self._places(site, rows))
        return _joined(gone)

    def _read_beside(self, group: PruningGroup) -> Sequence[GateSite]:
        """What layers read of channels that are masked behind those that make them."""
        if group.name not in self._beside:
            behind = any(is_behind(self._copied, site.module) for site in group.sites)
            own = [read_by(self._copied, part) for part in group.slices] if behind else []
            self._beside[group.name] = [site for site in own if site is not None]
        return self._beside[group.name]

    def _places(self, span: Span, units: Ints) -> Ints:
        """The indices that units own."""
        if span.indices is None and span.width == 1:
            return units + span.start
        if span.indices is None:
            return (span.start + units[:, None] * span.width + np.arange(span.width)).reshape(-1)
        listed = self._indices.get(id(span))
        if listed is None:
            listed = self._indices[id(span)] = np.array(span.indices).reshape(-1, span.width)
        return listed[units].reshape(-1)

    def put(self, paths: Collection[str], units: Units) -> None:
        """Give these tensors, and the modules that hold them, the sizes that ``units`` leave."""
        lost = self.lost(units)
        gains = gains_after(self._copied, self.whole, lost) if self._normed else {}
        for path in {*paths, *self._normed, *gains}:
            whole = gains.get(path, self.whole[path])
            own = narrowed(whole, lost.get(path, {}), path in self._in_any_layout)
            point_to(self.tensors[path], own)
        for module, sizes in self._sizes.items():
            put_sizes(module, sizes)
        for module, buffers in self._constants.items():
            module._buffers.update(buffers)
        for module in self._touched({*paths, *lost}):
            refit(module, module in self._by_place)
        groups = self.architecture.group
        left = [(groups[n], groups[n].size - len(set(gone))) for n, gone in units.items()]
        refit_heads(self._copied, left)

    def _touched(self, paths: Collection[str]) -> list[nn.Module]:
        """The modules that hold these tensors, or one under another name."""
        holders = self._holders
        found = (module for path in paths for module in holders[id(self.tensors[path])])
        return list(dict.fromkeys(found))

    @cached_property
    def _in_any_layout(self) -> set[str]:
        """The parameters that need not be contiguous: what is left of them is not copied."""
        found = in_any_layout(self._copied)
        return {path for path, tensor in self.tensors.items() if id(tensor) in found}

    @cached_property
    def _normed(self) -> set[str]:
        """The gains of normalised weights, which compensate for what directions lose."""
        norms = ((path, weight_norm_of(one)) for path, one in self._copied.named_modules())
        return {f"{path}.{norm.gain}".lstrip(".") for path, norm in norms if norm is not None}

    @cached_property
    def _by_place(self) -> set[nn.Module]:
        return cut_by_place(self._copied, self.architecture)

    @cached_property
    def mixing(self) -> dict[str, nn.Module]:
        """The layers that mix channels, by name; grouped convolutions only if these are masked at
        their inputs."""
        return {
            name: module
            for name, module in (
                *self._copied.named_modules(),
                *bare_matrices(self._copied).items(),
            )
            if name and (axes := channel_axes(module)).site_dim is not None
            if module in self._by_place or not axes.blocks
        }

    @cached_property
    def _holders(self) -> dict[int, list[nn.Module]]:
        """By id of a tensor."""
        found: dict[int, list[nn.Module]] = {}
        for module in self._copied.modules():
            sized_by_parts = isinstance(module, (nn.MultiheadAttention, nn.Transformer))
            inside = module.parameters() if sized_by_parts or weight_norm_of(module) else ()
            for tensor in (*module._parameters.values(), *module._buffers.values(), *inside):
                found.setdefault(id(tensor), []).append(module)
        return found

    @cached_property
    def _constants(self) -> dict[nn.Module, dict[str, Tensor]]:
        return {module: found for module in self._copied.modules() if (found := constants(module))}

    @cached_property
    def _sizes(self) -> dict[nn.Module, dict[str, Any]]:
        names = size_names(self.architecture)
        written = {size.module for group in self.architecture.groups for size in group.written}
        return {
            module: sizes
            for path, module in self._copied.named_modules()
            if (sizes := sizes_of(module, names)) or path in written
        }


def _joined(parts: Mapping[str, Mapping[int, Sequence[Ints]]]) -> dict[str, dict[int, Ints]]:
    return {
        path: {dim: _whole(lists) for dim, lists in axes.items()} for path, axes in parts.items()
    }


def _whole(lists: Sequence[Ints]) -> Ints:
    return lists[0] if len(lists) == 1 else np.concatenate(lists)


class Cut:
    """A cut that is on, and can be taken back group by group."""

    def __init__(self, cuts: TrialCuts, units: Units) -> None:
        self._cuts = cuts
        self.units: dict[str, Sequence[int]] = {}

    def apply(self, units: Units) -> None:
        """Cut these units, too."""
        self.units |= units
        self._cuts.put(self._cuts.paths(units), self.units)

    def restore(self, names: Collection[str]) -> None:
        """Take back what was cut of these groups."""
        paths = self._cuts.paths(names)
        self.units = {name: gone for name, gone in self.units.items() if name not in names}
        self._cuts.put(paths, self.units)

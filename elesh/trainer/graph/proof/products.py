"""The products of activations in a network, and how they shrink with the units of groups.

Queries by keys, attention weights by values, what ``einsum`` makes of two activations. Every
product is noted in the traced pass, and noted again while units of all groups are cut: which axis
became shorter, and by how much, says how much of it goes with each unit. Which groups may be meant
is read off the autograd graph: those of the layers and parameters that the operands were made of.

Promises: products inside a layer whose weight is counted are not counted again; one whose shrinking
the groups do not explain keeps its size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elesh.trainer.graph.dependencies import factors
from elesh.trainer.network.calls import Call, Calls, multiplies
from elesh.trainer.network.kinds.matrices import weight_path
from elesh.trainer.network.layers import channel_axes
from elesh.trainer.network.multihead import NATIVE
from leyline import (
    ActivationProduct,
    LayerDescriptor,
    ProductCut,
    PrunedArchitecture,
    PruningGroup,
)

__all__ = ["Cuts", "Product", "Products", "traced_products"]

Sizes = tuple[int, ...]
Axes = tuple[tuple[int, ...], ...]
MadeOf = tuple[str, int | None]
"""A tensor, and the axis of it that has channels; None: any axis."""
Makers = frozenset[MadeOf]
_MOST_WALKED = 500
"""Functions between a product and what it is made of."""
_aten = torch.ops.aten


def _matrices(first: int) -> Callable[[Sequence[Any], Any], list[Sizes]]:
    def sizes(args: Sequence[Any], output: Tensor) -> list[Sizes]:
        return [(*args[first].shape, args[first + 1].shape[-1])]

    return sizes


def _convolved(args: Sequence[Any], output: Tensor) -> list[Sizes]:
    x, weight, transposed = args[0], args[1], args[6]
    at = x if transposed else output  # Every position there meets the whole weight.
    return [(at.shape[0] * math.prod(at.shape[2:]), *weight.shape)]


def _attended(args: Sequence[Any], output: Any) -> list[Sizes]:
    query, key, value = args[:3]
    scores = (math.prod(query.shape[:-2]), query.shape[-2])
    positions = key.shape[-2]
    return [(*scores, query.shape[-1], positions), (*scores, positions, value.shape[-1])]


def _operands(first: int, batched: bool) -> Axes:
    one, two = first, first + 1
    return (((one, two),) if batched else ()) + ((one,), (one, two), (two,))


@dataclass(frozen=True)
class _Kind:
    """An operation that multiplies."""

    name: str
    """The same of what may stand for each other: a fused attention, and its steps."""
    sizes: Callable[[Sequence[Any], Any], list[Sizes]]
    """Of each product in it, of which its multiply-accumulates are the product."""
    operands: tuple[Axes, ...]
    """Of each, which operands have each of these axes."""


_ATTENTION = _Kind(
    "matrices", _attended, (((0, 1, 2), (0,), (0, 1), (1,)), ((0, 1, 2), (0,), (1,), (2,)))
)
_CONVOLUTION = _Kind("convolution", _convolved, (((0,), *[(1,)] * 5),))
_KINDS = {
    _aten.mm.default: _Kind("matrix", _matrices(0), (_operands(0, False),)),
    _aten.addmm.default: _Kind("matrix", _matrices(1), (_operands(1, False),)),
    _aten.bmm.default: _Kind("matrices", _matrices(0), (_operands(0, True),)),
    _aten.baddbmm.default: _Kind("matrices", _matrices(1), (_operands(1, True),)),
    _aten.convolution.default: _CONVOLUTION,
}
for _name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention",
              "cudnn_attention", "fused_attention_overrideable"):  # fmt: skip
    if _fused := getattr(_aten, f"_scaled_dot_product_{_name}", None):
        _KINDS[_fused.default] = _ATTENTION


@dataclass
class _Noted:
    """One call of an operation that multiplies."""

    kind: _Kind
    sizes: list[Sizes]
    place: tuple[str, int]
    """The module it was inside of, and how many modules had been called before."""
    function: Any = None
    """That autograd has of it."""


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, notes every operation that multiplies.

    Args:
        place: where it happens.
    """

    supports_higher_order_operators = True

    def __init__(self, place: Callable[[], tuple[str, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._place = place
        self._last: Tensor | None = None
        self.noted: list[_Noted] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._last is not None:
            self._note_function()
        output = func(*args, **(kwargs or {}))
        kind = _KINDS.get(func)
        if kind is not None:
            self.noted.append(_Noted(kind, kind.sizes(args, output), self._place()))
            self._last = output if isinstance(output, Tensor) else output[0]
        return output

    def __exit__(self, *error: Any) -> None:
        if self._last is not None:
            self._note_function()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _note_function(self) -> None:
        """Autograd tells of what was made last, once the operation is over."""
        assert self._last is not None
        self.noted[-1].function, self._last = self._last.grad_fn, None


@dataclass(frozen=True)
class Product:
    """What was multiplied in the traced pass, all samples together."""

    kind: str
    entered: int
    """How many modules had been called before."""
    module: str
    sizes: Sizes
    makers: tuple[Makers, ...] = ()
    """By axis: what the operands were made of."""
    weight: str = ""
    """The parameter that one of the operands is."""
    free: tuple[int, ...] = ()
    """Axes that this does not have."""
    counted: bool = False
    """Whether it is counted by the layer that was called for it, whatever becomes shorter."""
    part: bool = False
    """Whether it is by a part of the packed projections of ``nn.MultiheadAttention``, which are
    multiplied otherwise once heads are gone."""

    def varies(self, samples: int) -> bool:
        """Whether cuts may change what no weight counts: a convolution has as many positions."""
        rows = math.prod(self.sizes[n] for n in self.free)
        return any(self.makers) and (
            not self.weight or (self.kind != "convolution" and rows > samples)
        )


def traced_products(
    products: Products, calls: Calls, paths: Mapping[int, str]
) -> tuple[Product, ...]:
    """Everything that was multiplied while modules were called.

    Args:
        paths: of parameters, and of buffers that are leaves of the graph, by their ids.
    """
    walk, modules = _Walk(calls.made, paths), calls.modules
    found = []
    for one in products.noted:
        module, entered = one.place
        own = module in modules and multiplies(modules[module])
        place, weight = 0, None
        if one.function is not None:
            place, weight = next(factors(one.function), (0, None))
        path = "" if weight is None else paths.get(id(weight), "")
        for sizes, axes in zip(one.sizes, one.kind.operands, strict=True):
            counted = own and not path
            part = one.kind.name == "matrix" and isinstance(modules.get(module), NATIVE)
            free = tuple(n for n, operands in enumerate(axes) if path and place not in operands)
            further = free if one.kind.name == "matrix" else ()
            makers = tuple(walk.makers(one.function, axes[: len(sizes)], further))
            product = Product(
                one.kind.name,
                entered,
                module,
                sizes,
                () if counted else makers,
                path,
                free,
                counted,
                part=part and not path,
            )
            found.append(product)
    return tuple(found)


class _Walk:
    """Walks back from products to what their operands were made of."""

    def __init__(self, made: Sequence[Call], paths: Mapping[int, str]) -> None:
        self._paths = paths
        self._known: dict[Any, tuple[Makers, tuple[Any, ...]]] = {}
        self._makers = {
            one.output: one
            for one in made
            if one.output is not None and channel_axes(one.module).produces
        }

    def makers(self, function: Any, axes: Axes, further: Collection[int]) -> Iterator[Makers]:
        """By axis, given the operands that have it; those of ``further`` axes with what went into
        their makers, too: channels may be positions to these."""
        if function is None:
            return
        operands = [source for source, _ in function.next_functions]
        for number, axis in enumerate(axes):
            found = set[MadeOf]()
            for made, behind in (self._behind(operands[n]) for n in axis):
                found |= made
                for source in behind if number in further else ():
                    found |= self._behind(source)[0]
            yield frozenset(found)

    def _behind(self, function: Any) -> tuple[Makers, tuple[Any, ...]]:
        """What something was made of, and what went into the layers of these."""
        if function not in self._known:
            self._known[function] = self._walked(function)
        return self._known[function]

    def _walked(self, function: Any) -> tuple[Makers, tuple[Any, ...]]:
        found, inputs = set[MadeOf](), list[Any]()
        seen, queue = set[Any](), [function]
        while queue and len(seen) < _MOST_WALKED:
            one = queue.pop()
            if one is None or one in seen:
                continue
            seen.add(one)
            call = self._makers.get(one)
            if call is not None:
                axes = channel_axes(call.module).outputs
                found.update((weight_path(call.name, call.module, a), dim) for a, dim in axes)
                inputs += [source for source, _ in call.inputs]
            elif hasattr(one, "variable"):
                found.add((self._paths.get(id(one.variable), ""), None))
            elif weights := [weight for _, weight in factors(one)]:
                found.update((self._paths.get(id(weight), ""), None) for weight in weights)
            else:
                queue += [source for source, _ in one.next_functions]
        return frozenset(found), tuple(inputs)


@dataclass(frozen=True)
class _Seen:
    """What was multiplied while units were cut."""

    lost: dict[str, int]
    """How many of each group."""
    mixing: Collection[str]
    """The layers that were seen being called."""
    sizes: dict[tuple[str, str], list[Sizes]]
    """By the layer that was called last and the kind of operation."""


@dataclass
class Cuts:
    """What was multiplied in the traced pass, and while units were cut.

    Args:
        traced: in the traced pass.
        entered: the modules that were called there, in order.
        samples: that the inputs have.
    """

    traced: tuple[Product, ...] = ()
    entered: Sequence[str] = ()
    samples: int = 1
    _seen: list[_Seen] = field(default_factory=list)

    @cached_property
    def wanted(self) -> bool:
        """Whether cuts may make a difference."""
        return any(product.varies(self.samples) for product in self.traced)

    def add(self, lost: Mapping[str, int], mixing: Collection[str], products: Products) -> None:
        """What was multiplied with so many units of groups gone."""
        found: dict[tuple[str, str], list[Sizes]] = defaultdict(list)
        for one in products.noted:
            found[one.place[0], one.kind.name] += one.sizes
        self._seen.append(_Seen(dict(lost), mixing, found))

    def counted(
        self, found: PrunedArchitecture
    ) -> tuple[tuple[LayerDescriptor, ...], tuple[ActivationProduct, ...]]:
        """The layers of an architecture, and the products of one sample beside them, with what goes
        of each with the units of groups."""
        samples = self.samples
        groups = {group.name: group for group in found.groups if group.prunable}
        fitting = [one for one in self._seen if one.lost.keys() <= groups.keys()]
        seen = max(fitting, key=lambda one: len(one.lost), default=_Seen({}, (), {}))
        holding: dict[str, list[tuple[int, PruningGroup]]] = defaultdict(list)
        for group in groups.values():
            for part in group.slices if group.name in seen.lost else ():
                holding[part.tensor].append((part.dim, group))
        times: dict[Any, int] = defaultdict(int)
        weights = {layer.weight for layer in found.layers if layer.weight}
        less: dict[str, int] = defaultdict(int)
        # By weight: how many of the positions of its layers are among the products.
        for product, sizes in self._paired(seen):
            shape, widths, axes = _shrinking(product, sizes, seen.lost, holding)
            if ".parametrizations." in f".{product.module}.":
                continue  # It makes a weight, whatever the samples are.
            if product.weight in weights:
                # Its layer counts it, unless what it multiplies becomes less, too.
                if axes.isdisjoint(product.free):
                    continue
                less[product.weight] += round(
                    math.prod(product.sizes[n] for n in product.free) / samples
                )
            times[product.module, shape[1:], widths] += shape[0]
        products = tuple(
            ActivationProduct(
                module=module,
                shape=(round(each / samples), *shape),
                cuts=tuple(ProductCut(group=g, dim=dim, width=width) for g, dim, width in widths),
            )
            for (module, shape, widths), each in times.items()
        )
        layers = list[LayerDescriptor]()
        for layer in found.layers:
            gone = min(less[layer.weight], layer.positions) if layer.weight in less else 0
            left = layer.positions - gone
            layers.append(layer.model_copy(update={"positions": left}) if gone else layer)
            less[layer.weight] -= gone
        return tuple(layers), products

    def _paired(self, seen: _Seen) -> Iterator[tuple[Product, Sizes]]:
        """Every product that no layer counts by itself, with its sizes in the cut network; its own
        where these are not known, as after another layer than there (experts that are chosen)."""
        last, after = "", [""]
        for name in self.entered:
            last = name if name in seen.mixing else last
            after.append(last)
        keyed: dict[tuple[str, str], list[Product]] = defaultdict(list)
        for one in self.traced:
            keyed[after[one.entered], one.kind].append(one)
        for key, alike in keyed.items():
            sizes = seen.sizes.get(key, [])
            same = [len(one) for one in sizes] == [len(one.sizes) for one in alike]
            for product, left in zip(
                alike, sizes if same else [p.sizes for p in alike], strict=True
            ):
                if not product.counted:
                    yield product, left


def _shrinking(
    product: Product,
    left: Sizes,
    lost: Mapping[str, int],
    holding: Mapping[str, Sequence[tuple[int, PruningGroup]]],
) -> tuple[Sizes, tuple[tuple[str, int, int], ...], set[int]]:
    """The lengths of the axes that become shorter, behind the product of all others; by how much
    with a unit of which group; and which axes these are."""
    rest, shape, cuts, axes = 1, list[int](), list[tuple[str, int, int]](), set[int]()
    for axis, (size, smaller) in enumerate(zip(product.sizes, left, strict=True)):
        widths: Mapping[str, int] = {}
        if product.part:
            widths = _of_projection(product, axis, holding) if axis else {}
        elif smaller < size and product.makers:
            near = {
                group.name: group
                for path, dim in product.makers[axis]
                for at, group in holding.get(path, ())
                if dim in (None, at)
            }
            widths = _widths(size, size - smaller, list(near.values()), lost)
        if not widths:
            rest *= size
            continue
        common = math.gcd(size, *widths.values())
        rest *= common
        axes.add(axis)
        shape.append(size // common)
        cuts += [(name, len(shape), width // common) for name, width in widths.items()]
    return (rest, *shape), tuple(cuts), axes


def _widths(
    size: int, gone: int, groups: Sequence[PruningGroup], lost: Mapping[str, int]
) -> Mapping[str, int]:
    """By how much an axis becomes shorter with each unit of which group, if ``gone`` of it are gone
    where so many units of each were lost; empty if that is not known."""
    alone: list[tuple[bool, dict[str, int]]] = []
    for group in groups:
        width, over = divmod(gone, lost[group.name])
        if not over and width * group.size <= size:
            alone.append((width * group.size != size, {group.name: width}))
    if alone:  # All of the axis, rather than a part.
        return min(alone, key=lambda one: one[0])[1]
    total = sum(lost[group.name] for group in groups)
    if total and not gone % total:
        width = gone // total
        if width * sum(group.size for group in groups) <= size:
            return {group.name: width for group in groups}
    for number, one in enumerate(groups):
        for two in groups[number + 1 :]:
            if pair := _both(size, gone, (one, two), (lost[one.name], lost[two.name])):
                return pair
    return {}


def _of_projection(
    product: Product, axis: int, holding: Mapping[str, Sequence[tuple[int, PruningGroup]]]
) -> Mapping[str, int]:
    """By how much an axis of the product by a part of packed projections becomes shorter: what it
    reads, or its share of what all of these make."""
    found: dict[str, int] = {}
    for path, _ in product.makers[-1]:
        for dim, group in holding.get(path, ()) if path.endswith("in_proj_weight") else ():
            width, over = divmod(product.sizes[axis], group.size)
            if dim == 2 - axis and not over:
                found[group.name] = width
    return found


def _both(
    size: int, gone: int, groups: Sequence[PruningGroup], lost: Sequence[int]
) -> Mapping[str, int]:
    """Widths of two groups that fill an axis together."""
    one, two = groups
    determinant = one.size * lost[1] - two.size * lost[0]
    if not determinant:
        return {}
    first, over = divmod(size * lost[1] - two.size * gone, determinant)
    second, rest = divmod(one.size * gone - size * lost[0], determinant)
    fits = not over and not rest and first > 0 and second > 0
    return {one.name: first, two.name: second} if fits else {}

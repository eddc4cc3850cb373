"""Parameters that code multiplies by without a layer around them: ``x @ self.w``, ``einsum`` and
the like.

Promises: such a parameter counts as a layer, named after its path (``attention.w_q()``: no tensor
has that name), whose channels lie where the product says; where something is to be masked, measured
or traced there, the product is made by a call of what stands for the layer (:class:`BareMatrix`),
with the same values; nothing is put into the network, and one without such parameters is looked at
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from elesh.trainer.network.kinds.outputs import LayerOutput, output_of
from elesh.trainer.network.layers import ChannelAxes, channel_axes, forget_axes, teach_layer
from elesh.trainer.network.traversal import modules_in


class Axis(NamedTuple):
    """An axis of a parameter, and of what it multiplies or makes."""

    own: int
    there: int


@dataclass(frozen=True)
class Layout:
    """How a product reads a parameter."""

    reads: tuple[Axis, ...]
    """What is summed over."""
    makes: tuple[Axis, ...]
    """What is the product's alone."""
    beside: tuple[int, ...] = ()
    """Axes of the parameter that the other operand has, too, and that are not summed over: each
    of some experts multiplies its own part."""


class BareMatrix(nn.Module):
    """Stands for the layer that a parameter would be. Where it is called, it is given what the
    parameter multiplies, and what makes the product of that.

    Args:
        siblings: what stands for others of the module that holds it.
    """

    def __init__(self, weight: nn.Parameter, siblings: Mapping[str, BareMatrix]) -> None:
        super().__init__()
        self.weight = weight
        self._siblings = siblings
        self.layout: Layout | None = None
        """As it was multiplied last; None before that."""
        self._several = False
        self.calling = False

    def forward(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """The product of ``x`` and the parameter."""
        self.calling = True  # Whoever watches beside sees a product.
        try:
            return product(x)
        finally:
            self.calling = False

    def note(self, layout: Layout, bias: nn.Parameter | None) -> None:
        """Say how it is multiplied, and what is added to the product at once."""
        self._several |= self.layout not in (None, layout)
        self.layout = layout
        for one in self._siblings.values():
            forget_axes(one)
        if bias is not None:
            self._parameters["bias"] = bias

    def times(self, made: Tensor) -> int:
        """How often the parameter was multiplied for a product."""
        layout = self.layout
        assert layout is not None
        parts = (*(axis.own for axis in layout.makes), *layout.beside)
        return made.numel() // max(1, math.prod(self.weight.shape[axis] for axis in parts))

    def axes(self) -> ChannelAxes:
        """Where its channels lie; of several axes on a side, along the first one of the parameter
        (heads come before their widths) that does not count experts."""
        if self.layout is None:
            return ChannelAxes()
        refusal = "products read the parameter in several ways" if self._several else ""
        added = (("bias", 0),) if "bias" in self._parameters else ()
        reads, makes = self._first(self.layout.reads), self._first(self.layout.makes)
        return ChannelAxes(
            (("weight", makes.own), *added),
            (("weight", reads.own),),
            reads.there,
            True,
            refusal,
            made_dim=makes.there,
        )

    def _first(self, axes: Sequence[Axis]) -> Axis:
        layouts = ((one, one.layout) for one in self._siblings.values())
        experts = {
            one.weight.shape[axis] for one, own in layouts if own is not None for axis in own.beside
        }
        left = [axis for axis in axes if self.weight.shape[axis.own] not in experts]
        return (left or axes)[0]


teach_layer(BareMatrix, BareMatrix.axes)

_CALLED = "()"
"""What the name of such a layer ends with."""
_STANDING: WeakKeyDictionary[nn.Module, dict[str, BareMatrix]] = WeakKeyDictionary()
"""What stands for parameters, by the module that holds them."""


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, or what stands for a parameter or for the place behind a layer.

    Raises:
        AttributeError: if there is neither.
    """
    if not path.endswith(_CALLED):
        return model.get_submodule(path)
    owner, _, name = path.removesuffix(_CALLED).rpartition(".")
    holder = model.get_submodule(owner)
    if holder._parameters.get(name) is not None:
        return _standing_for(holder, name)
    layer = holder._modules.get(name)
    if layer is None:
        raise AttributeError(f"{path.removesuffix(_CALLED)} is no parameter and no layer")
    return output_of(layer)


def place_behind(layer: str) -> str:
    """What the place behind a layer is called."""
    return layer if layer.endswith(_CALLED) else layer + _CALLED


def is_behind(model: nn.Module, path: str) -> bool:
    """Whether this is the place behind a layer."""
    return path.endswith(_CALLED) and isinstance(layer_at(model, path), LayerOutput)


def plain_name(layer: str) -> str:
    """The path of the parameter that a layer's name is made of; the name of other layers."""
    return layer.removesuffix(_CALLED)


def weight_path(layer: str, module: nn.Module, attribute: str) -> str:
    """The path of a tensor of a layer: what stands for one is named after its weight."""
    own = isinstance(module, BareMatrix) and attribute == "weight"
    return plain_name(layer) if own else f"{layer}.{attribute}"


def _standing_for(holder: nn.Module, name: str) -> BareMatrix:
    parameter = holder._parameters[name]
    assert parameter is not None
    known = _STANDING.setdefault(holder, {})
    if name not in known or known[name].weight is not parameter:
        known[name] = BareMatrix(parameter, known)
    return known[name]


def bare_matrices(model: nn.Module) -> dict[str, BareMatrix]:
    """By name, what stands for the parameters of several axes that no layer holds which is known;
    each once."""
    found: dict[str, BareMatrix] = {}
    seen = set[int]()
    for path, module in modules_in(model).items():
        if not module._parameters or ".parametrizations." in f".{path}.":
            continue
        if type(module).__module__.startswith("torch.nn.") and not isinstance(module, _LISTS):
            continue
        axes = channel_axes(module)
        if axes.outputs or axes.inputs or axes.refusal:
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or not _is_matrix(parameter):
                continue
            seen.add(id(parameter))
            full = f"{path}.{name}" if path else name
            found[full + _CALLED] = _standing_for(module, name)
    return found


_LISTS = (nn.ParameterList, nn.ParameterDict)


def _is_matrix(parameter: Tensor) -> bool:
    if isinstance(parameter, nn.UninitializedParameter) or not parameter.is_floating_point():
        return False
    return parameter.ndim > 1 and parameter.numel() > 1


def calling_matrices(model: nn.Module, matrices: Mapping[str, BareMatrix]) -> list[RemovableHandle]:
    """Have products by these parameters made by calling what stands for them, in every pass of the
    model until the handles are removed; to be put on before other hooks."""
    modes: list[Multiplying] = []

    def begin(module: nn.Module, args: Any) -> None:
        modes.append(Multiplying(matrices))
        modes[-1].__enter__()  # type: ignore[no-untyped-call]

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if modes:
            modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    return [
        model.register_forward_pre_hook(begin, prepend=True),
        model.register_forward_hook(end, always_call=True),
    ]


class _Seen(NamedTuple):
    """A parameter, or what was moved about of it, as an operand."""

    matrix: BareMatrix
    axes: tuple[int | None, ...]
    """By axis of the operand: which one of the parameter it is; None for one of size 1."""


class _Product(NamedTuple):
    """A product of two operands, as ``einsum`` would write it: by letters, dots for all before."""

    operands: tuple[int, int]
    """Which arguments."""
    letters: tuple[str, str]
    made: str
    bias: Any = None


class Multiplying(TorchFunctionMode):
    """While entered, products by these parameters are made by calling what stands for them."""

    def __init__(self, matrices: Mapping[str, BareMatrix]) -> None:
        super().__init__()
        self._known: Any = WeakTensorKeyDictionary()
        for matrix in matrices.values():
            shape = matrix.weight.shape
            self._known[matrix.weight] = _Seen(matrix, tuple(range(len(shape))))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in _PRODUCTS:
            read, names = _PRODUCTS[func]
            return self._multiplied(func, read, *_in_places(names, args, given))
        made = func(*args, **given)
        if func in _MOVES and isinstance(made, Tensor) and args and isinstance(args[0], Tensor):
            seen = self._known.get(args[0])
            axes = None if seen is None else _moved(func, args, given, args[0], made)
            if seen is not None and axes is not None:
                at = tuple(None if axis is None else seen.axes[axis] for axis in axes)
                self._known[made] = _Seen(seen.matrix, at)
        return made

    def _multiplied(self, func: Any, read: _Read, args: Any, given: dict[str, Any]) -> Any:
        product = read(*args, **given)
        found = None if product is None else self._found(product, args)
        if product is None or found is None:
            return func(*args, **given)
        matrix, place, layout = found
        if matrix.calling:
            return func(*args, **given)
        matrix.note(layout, product.bias)

        def made(x: Tensor) -> Tensor:
            changed = _with(args, place, x)
            result: Tensor = func(*changed, **given)
            return result

        return matrix(_at(args, place), made)

    def _found(self, product: _Product, args: Any) -> tuple[BareMatrix, int, Layout] | None:
        """The parameter in a product, the place of the other operand, and how it is read."""
        if product.bias is not None and not _is_parameter(product.bias):
            return None
        both = [self._known.get(_at(args, place)) for place in product.operands]
        if (both[0] is None) == (both[1] is None):
            return None
        which = 0 if both[1] is None else 1
        layout = _layout(product, which, both[which])
        other = product.operands[1 - which]
        return None if layout is None else (both[which].matrix, other, layout)


def _is_parameter(x: Any) -> bool:
    return isinstance(x, nn.Parameter)


def _in_places(
    names: Sequence[str], args: Any, given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments, those that were given by name in their places as far as none is left out."""
    placed, left = list(args), dict(given)
    for name in names[len(args) :]:
        if name not in left:
            break
        placed.append(left.pop(name))
    return tuple(placed), left


def _at(args: Any, place: int) -> Any:
    """An operand: an argument, or in a list of them."""
    listed = len(args) == 2 and isinstance(args[1], (tuple, list))
    return args[1][place - 1] if listed else args[place]


def _with(args: Any, place: int, x: Tensor) -> tuple[Any, ...]:
    if len(args) == 2 and isinstance(args[1], (tuple, list)):
        listed = list(args[1])
        listed[place - 1] = x
        return args[0], listed
    return (*args[:place], x, *args[place + 1 :])


def _layout(product: _Product, which: int, seen: _Seen) -> Layout | None:
    """How a product reads the operand ``which``; None where it sums over no axis of it, or makes
    none."""
    own, others, made = product.letters[which], product.letters[1 - which], product.made
    axes = dict(zip(own, seen.axes, strict=False))
    if len(own) != len(seen.axes) or len(set(own)) != len(own) or "." in own:
        return None
    wide = sorted((axis, letter) for letter, axis in axes.items() if axis is not None)
    reads = [Axis(a, _dim(others, one)) for a, one in wide if one in others and one not in made]
    makes = [Axis(a, _dim(made, one)) for a, one in wide if one in made and one not in others]
    beside = tuple(a for a, one in wide if one in made and one in others)
    return Layout(tuple(reads), tuple(makes), beside) if reads and makes else None


def _dim(letters: str, letter: str) -> int:
    """An axis by its letter; counted from the end behind dots."""
    place = letters.index(letter)
    return place - len(letters) if "." in letters[:place] else place


def _linear(input: Any, weight: Any, bias: Any = None) -> _Product:
    return _Product((0, 1), (".i", "oi"), ".o", bias)


def _matmul(left: Any, right: Any, *rest: Any, **others: Any) -> _Product | None:
    """Of matrices, and of one with many."""
    if rest or others or not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    if right.ndim == 2 and left.ndim >= 1:
        return _Product(
            (0, 1), ("ti" if left.ndim == 2 else ".i", "io"), "to" if left.ndim == 2 else ".o"
        )
    if left.ndim == 2 and right.ndim > 2:
        return _Product((0, 1), ("oi", ".it"), ".ot")
    if right.ndim == 3 and left.ndim >= 3:
        shared = left.shape[-3] == right.shape[0]
        return _Product((0, 1), (".nti" if shared else ".ti", "nio"), ".nto")
    return None


def _reversed_matmul(left: Any, right: Any) -> _Product | None:
    found = _matmul(right, left)
    return None if found is None else found._replace(operands=(1, 0))


def _addmm(input: Any, left: Any, right: Any, *rest: Any, **scales: Any) -> _Product | None:
    return None if rest or scales else _Product((1, 2), ("ti", "io"), "to", input)


def _conv(input: Any, weight: Any, bias: Any = None, *rest: Any, **others: Any) -> _Product | None:
    groups = others.get("groups", rest[3] if len(rest) > 3 else 1)
    if groups != 1 or input.ndim != weight.ndim:
        return None
    return _Product(
        (0, 1), ("nixyz"[: input.ndim], "oiuvw"[: weight.ndim]), "noXYZ"[: input.ndim], bias
    )


def _einsum(equation: Any, *operands: Any) -> _Product | None:
    if not isinstance(equation, str) or "->" not in equation:
        return None
    listed = operands[0] if len(operands) == 1 else operands
    given, _, made = equation.replace(" ", "").replace("...", ".").partition("->")
    letters = given.split(",")
    if len(listed) != 2 or len(letters) != 2:
        return None
    return _Product((1, 2), (letters[0], letters[1]), made)


_Read = Callable[..., _Product | None]
_WEIGHTED = ("input", "weight", "bias")
_PRODUCTS: dict[Any, tuple[_Read, tuple[str, ...]]] = {
    functional.linear: (_linear, _WEIGHTED),
    torch.addmm: (_addmm, ("input", "mat1", "mat2")),
    torch.einsum: (_einsum, ()),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), (_conv, _WEIGHTED)),
    **dict.fromkeys((torch.matmul, Tensor.matmul), (_matmul, ("input", "other"))),
    **dict.fromkeys((torch.mm, torch.bmm, Tensor.mm, Tensor.bmm), (_matmul, ("input", "mat2"))),
    Tensor.__matmul__: (_matmul, ()),
    Tensor.__rmatmul__: (_reversed_matmul, ()),
}
"""What multiplies: how its arguments are read, and their names in order."""
_MOVES = {
    torch.t, torch.transpose, torch.permute, torch.movedim, torch.swapaxes, torch.unsqueeze,
    torch.squeeze, torch.select, torch.clone,
    Tensor.t, Tensor.transpose, Tensor.permute, Tensor.movedim, Tensor.swapaxes, Tensor.unsqueeze,
    Tensor.squeeze, Tensor.select, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.float,
    Tensor.half, Tensor.bfloat16, Tensor.type_as, Tensor.__getitem__,
    vars(torch._C.TensorBase)["T"].__get__, vars(torch._C.TensorBase)["mT"].__get__,
}  # fmt: skip
"""What moves the axes of a parameter about, or takes one place of some."""
_DISTINCT = (2, 3, 5, 7, 11, 13, 17, 19)


def _moved(
    func: Any, args: Any, given: Any, x: Tensor, made: Tensor
) -> tuple[int | None, ...] | None:
    """By axis of what is made, which axis of ``x`` it is: told by doing the same to a tensor all of
    whose axes differ; None where values or sizes are picked."""
    if made.ndim == x.ndim and made.shape == x.shape and func in _SAME:
        return tuple(range(x.ndim))
    if func in _SAME or x.ndim > len(_DISTINCT) or not all(map(_plain, _flat(args[1:]))):
        return None
    sizes = _DISTINCT[: x.ndim]
    try:
        with torch._C.DisableTorchFunction():
            like = func(torch.empty(sizes, device="meta"), *args[1:], **given)
    except Exception:  # A place beyond these sizes.
        return None
    if like.ndim != made.ndim:
        return None
    axes = [sizes.index(size) if size in sizes else None for size in like.shape]
    fits = all(
        n == 1 if axis is None else n == x.shape[axis]
        for n, axis in zip(made.shape, axes, strict=True)
    )
    return tuple(axes) if fits else None


_SAME = {
    Tensor.contiguous, Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.type_as,
    Tensor.clone, torch.clone,
}  # fmt: skip


def _plain(part: Any) -> bool:
    """Whether an argument says places or axes, and picks no several values."""
    return part is None or part is Ellipsis or isinstance(part, int) or part == slice(None)


def _flat(parts: Sequence[Any]) -> Iterator[Any]:
    for part in parts:
        if isinstance(part, (tuple, list)):
            yield from _flat(part)
        else:
            yield part

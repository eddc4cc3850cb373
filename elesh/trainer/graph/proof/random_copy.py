"""A copy of a network for tracing and cutting, with random weights that all have an effect.

Promises: the network is not changed, and only what is never written is shared; the weights of the
copy lie in pools: tensors whose rows are about equally long are windows of the same numbers.
Rows of a large weight that its layer only multiplies by, or takes rows of, overlap each other, so
that the pool has a small share of the network's numbers.
"""

from __future__ import annotations

import copy
import copyreg
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from elesh.trainer.network.calling import summary, tensors_in
from elesh.trainer.network.calls import multiplies_once
from elesh.trainer.network.traversal import bind_functions, modules_in, parameters_in
from leyline import InvalidField

__all__ = ["in_any_layout", "random_copy"]

_SHARE = 32
"""Of the numbers that a network has, those of a kind whose rows overlap get this part at most, or
four thousand if that is more."""
_FEW = 4096
_STEP = 61
"""Windows of a pool begin a multiple of so many numbers apart, so that no two layers are alike."""
_WINDOWS = 64
_DRAWN = 32_749, 65_521, 131_071, 262_139
"""So many numbers are drawn, the least that does; longer pools repeat them. Primes: no two rows are
alike."""
_HELD_BY_ALL = frozenset(vars(nn.Module()))
"""Attributes of every module."""
_Kind = tuple[int, torch.device]
"""Weights of one kind share a pool: about how long their rows are, and where they are."""
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, type, torch.dtype))
"""Types of values that a copy shares with what it is a copy of."""


def random_copy(
    model: nn.Module, dtype: torch.dtype = torch.float32, overlapping: bool = True
) -> nn.Module:
    """A copy with every parameter in ``dtype``, random, and with gradients.

    Args:
        overlapping: whether rows of large weights may overlap: these are not contiguous.

    Raises:
        InvalidField: if the model cannot be copied, naming the attribute that cannot.
    """
    made: dict[Any, Any] = {}
    lazy = (UninitializedBuffer, UninitializedParameter)
    parameters = [one for one in parameters_in(model).values() if not isinstance(one, lazy)]
    try:
        with torch.inference_mode(False):
            pool = _Pool(dtype, parameters, in_any_layout(model) if overlapping else ())
            made |= {id(parameter): pool.parameter(parameter) for parameter in parameters}
            copied = _with_computed(model, made)
            with torch.no_grad():
                _prepare_buffers(copied, dtype)
    except Exception as error:
        found = next(_uncopied(model, made), "") or summary(error)
        raise InvalidField("model", "a model that copy.deepcopy can copy", found) from error
    return copied


def _with_computed(model: nn.Module, made: dict[Any, Any]) -> nn.Module:
    """The copy; tensors with a history, which few hold and nothing copies, without theirs."""
    copied: nn.Module
    copies = dict(made)
    try:
        copied = _copied(model, copies)
    except RuntimeError:
        computed = list(_computed(model))
        if not computed:
            raise
        made |= {id(tensor): tensor.detach().clone() for tensor in computed}
        copies = dict(made)
        copied = _copied(model, copies)
    bind_functions(copied, copies)
    return copied


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Tensors with a history that modules keep from an earlier pass."""
    for module in model.modules():
        held = vars(module).items()
        kept = [
            x for name, x in held if type(x) not in _ATOMS and name != "_modules" and not _bare(x)
        ]
        yield from (x for x in tensors_in(kept) if not x.is_leaf)


def _bare(value: Any) -> bool:
    """Whether this is an empty container."""
    return type(value) in (dict, OrderedDict, list, set) and not value


def _copied(module: nn.Module, known: dict[Any, Any]) -> Any:
    """What ``copy.deepcopy`` gives, in a third of the time; ``known`` is its memo."""
    if id(module) in known:
        return known[id(module)]
    kind: Any = type(module)
    if not _is_copied_plainly(kind):
        return copy.deepcopy(module, known)
    made = known[id(module)] = kind.__new__(kind)
    state: dict[str, Any] = module.__getstate__()  # type: ignore[no-untyped-call]
    held = vars(made)
    for name, value in state.items():  # Not what was compiled of it.
        sort = type(value)
        if sort in _ATOMS:
            held[name] = value
        elif name in _HELD_BY_ALL and not value and sort in (dict, OrderedDict):
            held[name] = sort()  # Hooks that are not there.
        else:
            held[name] = _copied_value(value, known)
    return made


def _copied_value(value: Any, known: dict[Any, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS or (kind is tuple and _ATOMS.issuperset(map(type, value))):
        return value
    if id(value) in known:
        return known[id(value)]
    if kind is Tensor and _is_alone(value):
        memories = known.setdefault("torch", {})  # As deepcopy knows them.
        memory = value.untyped_storage()._cdata
        if memory not in memories:
            made = known[id(value)] = value.clone()
            memories[memory] = made.untyped_storage()
            return made
    if kind in (list, set) and _ATOMS.issuperset(map(type, value)):
        return known.setdefault(id(value), kind(value))
    if kind in (dict, OrderedDict):
        made = known[id(value)] = kind()
        if not value:
            return made
        for name, part in value.items():
            if type(name) is not str:
                del known[id(value)]
                return copy.deepcopy(value, known)
            made[name] = _copied_value(part, known)
        return made
    return _copied(value, known) if isinstance(value, nn.Module) else copy.deepcopy(value, known)


def _is_alone(tensor: Tensor) -> bool:
    """Whether a tensor has nothing but numbers, all that lie in its memory."""
    plain = tensor.layout is torch.strided and tensor.is_leaf and not tensor.requires_grad
    whole = plain and tensor.is_contiguous() and not (tensor.is_meta or tensor.is_inference())
    return whole and tensor.nbytes == tensor.untyped_storage().nbytes() and not vars(tensor)


@lru_cache(1024)
def _is_copied_plainly(kind: type) -> bool:
    """Whether a type of module does not define how it is copied."""
    usual = (
        "__reduce_ex__",
        "__reduce__",
        "__getstate__",
        "__setstate__",
        "__deepcopy__",
        "__new__",
    )
    base = _ConvNd if issubclass(kind, _ConvNd) else nn.Module  # Fills in what old versions lacked.
    same = all(getattr(kind, name, None) is getattr(base, name, None) for name in usual)
    same = same and not any(vars(base).get("__slots__") for base in kind.__mro__)
    return same and kind not in copyreg.dispatch_table


def in_any_layout(model: nn.Module) -> set[int]:
    """The ids of weights that all modules which hold them only multiply by, or take rows of."""
    plain, others = set[int](), set[int]()
    for module in modules_in(model).values():
        rows = type(module).forward is nn.Embedding.forward and module.max_norm is None
        held = [id(one) for one in module._parameters.values() if one is not None]
        if multiplies_once(module) or (rows and "forward" not in vars(module)):
            plain.update(held)
        else:
            others.update(held)
    return plain - others


class _Pool:
    """Random numbers that parameters are windows of.

    Args:
        overlapping: ids of those whose rows may overlap.
    """

    def __init__(
        self, dtype: torch.dtype, parameters: Iterable[Tensor], overlapping: Collection[int] = ()
    ) -> None:
        self._dtype = dtype
        generator = torch.Generator().manual_seed(0)
        kinds: dict[_Kind, list[Tensor]] = defaultdict(list)
        longest = 0
        for one in parameters:
            if one.ndim > 1 and one.is_floating_point():
                kinds[_kind(one)].append(one)
            elif one.is_floating_point():
                longest = max(longest, one.numel())
        total = sum(one.numel() for alike in kinds.values() for one in alike)
        enough = max(_FEW, total // _SHARE)
        self._overlapping = {
            id(one)
            for alike in kinds.values()
            for one in alike
            if id(one) in overlapping and one.numel() > enough
        }
        self._sizes = {
            kind: max(self._least(one, enough) for one in alike) + min(len(alike), _WINDOWS) * _STEP
            for kind, alike in kinds.items()
        }
        self._fan_in = {
            kind: _fan_in(max(alike, key=lambda one: one.numel())) for kind, alike in kinds.items()
        }
        most = max(self._sizes.values(), default=0)
        count = next((one for one in _DRAWN if most <= one), _DRAWN[-1])
        self._drawn = torch.randn(count, generator=generator, dtype=dtype)
        self._numbers: dict[_Kind, Tensor] = {}
        self._windows = Counter[_Kind]()
        self._small = torch.rand(longest + _WINDOWS * _STEP, generator=generator, dtype=dtype) + 0.5
        self._made = 0

    def parameter(self, like: Tensor) -> nn.Parameter:
        """A parameter of that shape; positive where it has a single axis."""
        if not like.is_floating_point():
            return nn.Parameter(like.detach().clone(), requires_grad=False)
        if like.ndim < 2:
            self._made += 1
            start = self._made % _WINDOWS * _STEP
            own = self._small.narrow(0, start, like.numel()).view(like.shape)
            return nn.Parameter(own.to(like.device))
        key = _kind(like)
        known = self._numbers.get(key)
        if known is None:
            fan_in = self._fan_in[key]
            known = _numbers(self._drawn, self._sizes[key], fan_in)
            known = self._numbers[key] = known.mul_((2 / fan_in) ** 0.5).to(like.device)
        self._windows[key] += 1
        start = self._windows[key] % _WINDOWS * _STEP
        if like.shape[-1] == 2:  # Code may view pairs as complex numbers: these begin at even ones.
            start -= start % 2
        if start + like.numel() <= len(known):
            return nn.Parameter(known.narrow(0, start, like.numel()).view(like.shape))
        row = known.narrow(0, start, _fan_in(like)).view(like.shape[1:])
        strides = _apart(len(known) - start, like), *row.stride()
        return nn.Parameter(known.as_strided(like.shape, strides, start))

    def _least(self, weight: Tensor, enough: int) -> int:
        """How many numbers suffice for a weight."""
        if id(weight) not in self._overlapping:
            return weight.numel()
        return max(enough, _fan_in(weight) + len(weight))


def _apart(numbers: int, weight: Tensor) -> int:
    """How far rows of a weight begin from each other, of so many numbers: as far as they can where
    no row is another one moved by whole channels."""
    row = _fan_in(weight)
    most = (numbers - row) // max(1, len(weight) - 1)
    return next(apart for apart in range(most, 0, -1) if math.gcd(apart, row) == 1)


def _kind(weight: Tensor) -> _Kind:
    """The scale of a pool's numbers suits all of one kind."""
    return round(math.log2(_fan_in(weight))), weight.device


def _numbers(drawn: Tensor, size: int, seed: int) -> Tensor:
    """[size] random numbers, a tensor of its own."""
    first = seed * _STEP % max(1, len(drawn) - size)
    if size <= len(drawn):
        return drawn[first : first + size].clone()
    made = drawn.new_empty(size)
    for start in range(0, size, len(drawn)):
        part = made[start : start + len(drawn)]
        part.copy_(drawn[: len(part)])
    return made


def _fan_in(weight: Tensor) -> int:
    return max(1, weight.numel() // max(1, len(weight)))


def _prepare_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Buffers in ``dtype``; running statistics random."""
    generator = torch.Generator().manual_seed(0)
    for module in modules_in(model).values():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
        if isinstance(module, _NormBase):
            for buffer in (module.running_mean, module.running_var):
                if buffer is not None:
                    buffer.copy_(torch.rand(buffer.shape, generator=generator).add_(0.5))


def _uncopied(model: nn.Module, made: dict[Any, Any]) -> Iterator[str]:
    """Attributes that cannot be copied."""
    held = ("_parameters", "_buffers", "_modules")
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in held:
                continue
            try:
                copy.deepcopy(value, dict(made))
            except Exception as error:
                yield f"{path}.{name}".lstrip(".") + f": {summary(error)}"

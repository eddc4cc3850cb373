"""What autograd saves in a forward pass, as far as it is needed to see where derivatives are zero.

Promises: a zero stays zero, and what is none stays none. Of tensors without a zero only the shape
is kept, and random numbers stand for theirs. Of others, a number whose magnitude is between 2^-14
and 57,344 stays within an eighth of what it was; larger ones become that, smaller ones may become
zero. What lives on anyway (weights, buffers, inputs) is kept as it is.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

_BYTE = torch.float8_e5m2
_LARGEST = torch.finfo(_BYTE).max
_FEWEST = 1024
"""Of fewer numbers nothing is gained."""
_DEVICES = ("cpu", "cuda")
"""That convert to bytes."""
_LOWEST, _HIGHEST = 0.4, 0.7
"""What stands for numbers lies between these: no usual function is flat there."""
_DRAWN, _STEP, _WINDOWS = 32_749, 61, 16
"""So many numbers are drawn and repeated; windows of them begin a multiple of so many apart."""


class _Stand:
    """Random numbers that stand for those of tensors: all are windows of the same ones."""

    def __init__(self) -> None:
        self._longest = 0
        self._made = 0
        self._numbers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def reserve(self, count: int) -> int:
        """Where a window of so many numbers begins."""
        self._made += 1
        start = self._made % _WINDOWS * _STEP
        self._longest = max(self._longest, start + count)
        return start

    def window(self, shape: torch.Size, kind: tuple[torch.dtype, torch.device], at: int) -> Tensor:
        """The numbers that stand for a tensor of this shape, which nobody may change."""
        numbers = self._numbers.get(kind)
        if numbers is None or len(numbers) < self._longest:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.rand(min(_DRAWN, self._longest), generator=generator)
            drawn = drawn.mul_(_HIGHEST - _LOWEST).add_(_LOWEST).to(kind[1], kind[0])
            numbers = drawn.repeat(-(-self._longest // len(drawn)))
            self._numbers[kind] = numbers
        return numbers.narrow(0, at, math.prod(shape)).view(shape)


@dataclass(frozen=True)
class NonZero:
    """What is kept of a tensor without a zero."""

    shape: torch.Size
    kind: tuple[torch.dtype, torch.device]
    start: int
    stand: _Stand

    def numbers(self) -> Tensor:
        """Others in their place, none of them zero."""
        return self.stand.window(self.shape, self.kind, self.start)


Packed = Tensor | tuple[Tensor, torch.dtype] | NonZero
"""A tensor; or its numbers in bytes and what they were in; or that none of them is zero."""


class Bytes(saved_tensors_hooks):
    """While entered, of floating-point numbers that are saved it is kept where they are zero: in a
    byte each, or in nothing where none of them is.

    Args:
        alive: tensors that are there anyway.
        watching: a mode that shall not see how they are put into bytes.
        unread: asked of a tensor that is saved, whether nobody will read its numbers: zeros of its
            shape are kept.
    """

    def __init__(
        self,
        alive: Iterable[Tensor],
        watching: TorchDispatchMode | None = None,
        unread: Callable[[Tensor], bool] | None = None,
    ) -> None:
        self._alive = {x.untyped_storage().data_ptr() for x in alive if x.layout is torch.strided}
        self._watching, self._unread = watching, unread or _all_are_read
        self._zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._stand = _Stand()
        self._known: dict[int, tuple[weakref.ref[Any], dict[Any, Packed]]] = {}
        super().__init__(self.pack, unpacked)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        # The graph keeps this for as long as it lives: what refers to the graph, as the mode that
        # watched does, would keep it for ever, since garbage is not searched for inside of it.
        self._known, self._stand = {}, _Stand()
        self._watching, self._unread = None, _all_are_read

    def pack(self, x: Tensor) -> Packed:
        """What is kept of a tensor: the same of the same."""
        if (
            type(x) is nn.Parameter
            or x.numel() < _FEWEST
            or not x.is_floating_point()
            or type(x) is not Tensor
            or x.layout is not torch.strided
            or x.is_nested
            or x.device.type not in _DEVICES
        ):
            return _without_history(x)
        storage = x.untyped_storage()
        address = storage.data_ptr()
        if address in self._alive:
            return _without_history(x)
        if self._unread(x):
            return self._zero(x).expand(x.shape)
        of, packed = self._known.get(address, (None, {}))
        if of is None or of() is not storage:
            packed = {}
            self._known[address] = weakref.ref(storage), packed
        key = x.storage_offset(), x.shape, x.stride(), x.dtype, x._version
        if key not in packed:
            packed[key] = self._reduced(x.detach())
        return packed[key]

    def _zero(self, like: Tensor) -> Tensor:
        key = like.dtype, like.device
        if key not in self._zeros:
            self._zeros[key] = torch.zeros((), dtype=like.dtype, device=like.device)
        return self._zeros[key]

    def _reduced(self, x: Tensor) -> Packed:
        with torch.no_grad():
            if self._watching is not None and _get_current_dispatch_mode() is self._watching:
                with _pop_mode_temporarily():
                    return self._unwatched(x)
            return self._unwatched(x)

    def _unwatched(self, x: Tensor) -> Packed:
        if bool(x.all()):
            return NonZero(
                x.shape, (x.dtype, x.device), self._stand.reserve(x.numel()), self._stand
            )
        if x.untyped_storage().nbytes() <= x.numel():
            return x
        return x.clamp(-_LARGEST, _LARGEST).to(_BYTE), x.dtype


def _without_history(x: Tensor) -> Tensor:
    """Itself if it has none: a function that keeps what it made, with its history, would live for
    ever."""
    return x if x.grad_fn is None else x.detach()


def _all_are_read(x: Tensor) -> bool:
    return False


def unpacked(packed: Packed) -> Tensor:
    """The tensor that :meth:`Bytes.pack` was given, as far as it was kept."""
    if isinstance(packed, NonZero):
        return packed.numbers()
    return packed if isinstance(packed, Tensor) else packed[0].to(packed[1])


class _NothingThereError(BaseException):
    """Somebody went backward; no error of a network's own, which others may catch."""


T = TypeVar("T")


def without_saving(run: Callable[[], T]) -> tuple[T, Versions | None]:
    """What ``run`` returns, with a history that cannot be gone back, and whether it could be. Where
    the network goes backward itself meanwhile, it runs again, all is saved, and nothing is told."""
    saved = Versions()
    try:
        with saved:
            return run(), saved
    except _NothingThereError:
        return run(), None


class Versions(saved_tensors_hooks):
    """While entered, nothing is saved but whether it is changed later: going backward is not
    possible, and whether it would be is told by :attr:`changed`."""

    def __init__(self) -> None:
        self._saved: list[tuple[Tensor, int]] = []
        self._nothing: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        super().__init__(self._pack, self._unpack)

    @property
    def changed(self) -> bool:
        """Whether something was changed in place after it was saved."""
        return any(x._version != version for x, version in self._saved)

    def _pack(self, x: Tensor) -> None:
        if type(x) is nn.Parameter:  # It lives on anyway.
            self._saved.append((x, x._version))
            return
        own = x.detach()  # It has the version of what it was made of, which lives on without data.
        if type(own) is Tensor and own.layout is torch.strided and not own.is_nested:
            key = own.dtype, own.device
            if key not in self._nothing:
                self._nothing[key] = torch.empty(0, dtype=own.dtype, device=own.device)
            own.data = self._nothing[key]
        self._saved.append((own, x._version))

    def _unpack(self, packed: None) -> Tensor:
        raise _NothingThereError("nothing was saved for going backward")

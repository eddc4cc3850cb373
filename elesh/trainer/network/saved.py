"""What autograd saves in a forward pass, in a quarter of the memory or in none.

Promises: a zero stays zero, and a number whose magnitude is between 2^-14 and 57,344 stays within
an eighth of what it was; larger ones become that, smaller ones may become zero. What lives on
anyway (weights, buffers, inputs) is kept as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
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

Packed = Tensor | tuple[Tensor, torch.dtype]
"""A tensor, or its numbers in bytes and what they were in."""


class Bytes(saved_tensors_hooks):
    """While entered, floating-point numbers that are saved are kept in a byte each.

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
        self._known: dict[int, tuple[weakref.ref[Any], dict[Any, Packed]]] = {}
        super().__init__(self.pack, unpacked)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._known.clear()  # What lives on is the graph's; it shall not live as long as this.
        self._unread = _all_are_read

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
            return x
        storage = x.untyped_storage()
        address = storage.data_ptr()
        if address in self._alive:
            return x
        if self._unread(x):
            return self._zero(x).expand(x.shape)
        if storage.nbytes() <= x.numel():
            return x
        of, packed = self._known.get(address, (None, {}))
        if of is None or of() is not storage:
            packed = {}
            self._known[address] = weakref.ref(storage), packed
        key = x.storage_offset(), x.shape, x.stride(), x.dtype, x._version
        if key not in packed:
            packed[key] = self._in_bytes(x.detach()), x.dtype
        return packed[key]

    def _zero(self, like: Tensor) -> Tensor:
        key = like.dtype, like.device
        if key not in self._zeros:
            self._zeros[key] = torch.zeros((), dtype=like.dtype, device=like.device)
        return self._zeros[key]

    def _in_bytes(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self._watching is not None and _get_current_dispatch_mode() is self._watching:
                with _pop_mode_temporarily():
                    return x.clamp(-_LARGEST, _LARGEST).to(_BYTE)
            return x.clamp(-_LARGEST, _LARGEST).to(_BYTE)


def _all_are_read(x: Tensor) -> bool:
    return False


def unpacked(packed: Packed) -> Tensor:
    """The tensor that :meth:`Bytes.pack` was given, as far as it was kept."""
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

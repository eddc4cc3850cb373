"""Trees of tensors and plain values (what ``state_dict`` gives) as bytes and back, bit for bit.

Promises: a tree read back equals the one written in every bit, stride and device; what cannot be
written is refused by its place in the tree; nothing is pickled, and reading runs no code.
Subclasses of numbers, texts and containers become plain ones (but for Counter, which schedulers
rely on).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from leyline import InvalidField, Malformed
from leyline.errors import brief

__all__ = ["copy_tree", "pack_tree", "put_home", "unpack_tree"]

_TUPLE, _TENSOR, _COUNTER, _INTEGER, _ARRAY, _SET, _FROZEN, _DTYPE, _DEVICE = range(9)
_PLAIN = (bool, float, str, bytes, type(None))
_INT64 = range(-(2**63), 2**63)


def copy_tree(
    tree: Any, where: str = "state", copied: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """A copy that shares nothing with the original.

    Args:
        where: the name of the tree, for errors.
        copied: makes the copies of tensors. By default they are detached, on the CPU, and remember
            the device that they come from; :func:`put_home` brings them back there.

    Raises:
        InvalidField: naming the place of a value that is neither a tensor nor plain.
    """
    if isinstance(tree, Tensor):
        return (copied or _kept)(tree)
    if isinstance(tree, np.ndarray | np.generic):
        return tree.copy()
    if isinstance(tree, bool | None | torch.dtype | torch.device):
        return tree
    plain: type[Any]
    for plain in (int, float, str, bytes):
        if isinstance(tree, plain):
            return plain(tree)
    if isinstance(tree, Mapping):
        items = {key: copy_tree(value, f"{where}.{key}", copied) for key, value in tree.items()}
        return Counter(items) if isinstance(tree, Counter) else items
    for kind in (list, tuple, set, frozenset):
        if isinstance(tree, kind):
            return kind(copy_tree(value, f"{where}.{i}", copied) for i, value in enumerate(tree))
    raise InvalidField(
        where,
        "tensors, numbers, texts and containers of these",
        type(tree).__name__,
        hint="a state_dict must hold only what can be written without pickle",
    )


def _kept(tensor: Tensor) -> Tensor:
    home, tensor = tensor.device, tensor.detach()
    kept = tensor.clone() if home.type == "cpu" else tensor.cpu()
    kept.home = home  # type: ignore[attr-defined]
    return kept


def home_of(tensor: Tensor) -> torch.device:
    """The device that a tensor of a copied tree was on."""
    home: torch.device = getattr(tensor, "home", tensor.device)
    return home


def put_home(tree: Any) -> Any:
    """A copy of a copied tree with its tensors on the devices that they came from."""
    return copy_tree(tree, copied=lambda tensor: tensor.to(home_of(tensor), copy=True))


def pack_tree(tree: Any) -> tuple[bytes, bytes]:
    """A copied tree as msgpack and the safetensors that it points into."""
    tensors: dict[str, Tensor] = {}

    def refer(tensor: Tensor) -> msgpack.ExtType:
        name = str(len(tensors))
        tensors[name] = tensor.contiguous()
        strides = None if tensor.is_contiguous() else list(tensor.stride())
        return msgpack.ExtType(_TENSOR, msgpack.packb([name, strides, str(home_of(tensor))]))

    def encode(value: Any) -> Any:
        kind = type(value)
        if kind is int and value in _INT64:
            return value
        if kind is dict:
            return {encode(key): encode(item) for key, item in value.items()}
        if kind is list:
            return [encode(item) for item in value]
        if kind in _PLAIN:
            return value
        if isinstance(value, Tensor):
            return refer(value)
        code, content = _special(value)
        return msgpack.ExtType(code, msgpack.packb(encode(content)))

    body: bytes = msgpack.packb(encode(tree))
    return body, save(tensors)


def _special(value: Any) -> tuple[int, Any]:
    """The code and the content of a value that msgpack has no type for."""
    if isinstance(value, np.ndarray | np.generic):
        return _ARRAY, [value.dtype.str, list(value.shape), value.tobytes()]
    contents: dict[type, tuple[int, Callable[[Any], Any]]] = {
        tuple: (_TUPLE, list),
        Counter: (_COUNTER, dict),
        int: (_INTEGER, str),
        set: (_SET, list),
        frozenset: (_FROZEN, list),
        torch.dtype: (_DTYPE, str),
        torch.device: (_DEVICE, str),
    }
    kind = next((kind for kind in contents if isinstance(value, kind)), None)
    if kind is None:
        raise InvalidField("state", "a copied tree", type(value).__name__)
    code, content = contents[kind]
    return code, content(value)


def unpack_tree(body: bytes, tensors: bytes) -> Any:
    """The tree of :func:`pack_tree`.

    Raises:
        Malformed: if the bytes are not such a tree.
    """
    try:
        stored = load(tensors)

        def read(data: bytes) -> Any:
            return msgpack.unpackb(data, ext_hook=hook, strict_map_key=False)

        def hook(code: int, data: bytes) -> Any:
            content = read(data)
            if code == _TENSOR:
                return _tensor(stored[content[0]], *content[1:])
            return _READ[code](content)

        return read(body)
    except Exception as error:
        # Whatever the libraries raise on damaged bytes.
        raise Malformed("state", "a tree of tensors and plain values", brief(error)) from None


def _tensor(tensor: Tensor, strides: list[int] | None, home: str) -> Tensor:
    if strides is not None:
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
    tensor.home = torch.device(home)  # type: ignore[attr-defined]
    return tensor


def _array(content: list[Any]) -> Any:
    dtype, shape, data = content
    array = np.frombuffer(data, np.dtype(dtype)).reshape(shape).copy()
    return array if shape else array[()]


_READ: dict[int, Callable[[Any], Any]] = {
    _TUPLE: tuple,
    _COUNTER: Counter,
    _INTEGER: int,
    _ARRAY: _array,
    _SET: set,
    _FROZEN: frozenset,
    _DTYPE: lambda name: getattr(torch, name.removeprefix("torch.")),
    _DEVICE: torch.device,
}

"""Arrays as safetensors blobs: bounded, little-endian, float32 or float16, never pickle.

The reader checks sizes before it reads, the header before it parses, and every dtype, shape and
value before use. Limits are explicit because a header is attacker-controlled: safetensors itself
allows 100 MB of it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import WithJsonSchema

from .base import unique_keys
from .errors import ContractError, Malformed, NotFinite, ShapeMismatch, TooLarge

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 65_536
MAX_DIMS = 4
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Floats = npt.NDArray[np.float32]
Array = Annotated[
    npt.NDArray[np.float32],
    WithJsonSchema(
        {
            "type": "string",
            "format": "safetensors-tensor",
            "description": "a float32 or float16 tensor of the blob, little-endian",
        }
    ),
]


def pack_arrays(
    arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The safetensors bytes of float32/float16 arrays: wider types first, so that every array is
    aligned, then by name. The same arrays give the same bytes, and those of safetensors itself.

    Raises:
        ShapeMismatch: for any other dtype or more than four dimensions.
        NotFinite: if an array holds NaN or infinity.
    """
    return b"".join(array_chunks(arrays, metadata))


def array_chunks(
    arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes]:
    """The bytes of :func:`pack_arrays` piece by piece: the header, then one array after another."""
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    plain = {}
    for name, given in arrays.items():
        array = np.asarray(given)
        dtype = array.dtype.newbyteorder("<")
        if dtype not in _CODES or array.ndim > MAX_DIMS:
            expected = f"float32 or float16, at most {MAX_DIMS} dimensions"
            raise ShapeMismatch(name, expected, f"{array.dtype} with {array.ndim}")
        require_finite(name, array)
        plain[name] = array.astype(dtype, order="C", copy=False)
    ordered = sorted(plain.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, array in ordered:
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, array in ordered:
        yield array.tobytes()


def unpack_arrays(
    data: bytes | memoryview, *, field: str = "blob"
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Read-only views on the arrays of ``data`` and the blob's metadata; nothing is copied.

    Raises:
        Malformed, TooLarge, ShapeMismatch: if the blob is not exactly what it says. Values are
            not looked at here: :func:`require_finite` does that where the array is used.
    """
    view = memoryview(data)
    header, body = _header(view, field)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Malformed(f"{field}.__metadata__", "a map of strings", metadata)
    if len(header) > MAX_TENSORS:
        raise TooLarge(field, f"at most {MAX_TENSORS} tensors", len(header))
    entries = [(name, _Entry.read(f"{field}.{name}", entry)) for name, entry in header.items()]
    arrays, end = {}, 0
    for name, entry in sorted(entries, key=lambda item: (item[1].begin, item[1].end)):
        # Each tensor begins where the one before it ends: no overlap and no hole.
        size = entry.dtype.itemsize * math.prod(entry.shape)
        if entry.begin != end or entry.end != end + size or entry.end > len(body):
            expected = f"[{end}, {end + size}] within {len(body)} bytes"
            raise Malformed(
                f"{field}.{name}.data_offsets", expected, f"[{entry.begin}, {entry.end}]"
            )
        end = entry.end
        arrays[name] = np.ndarray(entry.shape, entry.dtype, body[entry.begin : end])
    if end != len(body):
        raise Malformed(field, f"{end} bytes of tensor data", f"{len(body)} bytes")
    return arrays, metadata


def _header(view: memoryview, field: str) -> tuple[dict[str, Any], memoryview]:
    if len(view) < 8:
        raise Malformed(field, "a safetensors blob of at least 8 bytes", f"{len(view)} bytes")
    (length,) = struct.unpack("<Q", view[:8])
    # A length that the blob cannot hold is no large header: these are other bytes, or cut short.
    if length > len(view) - 8:
        raise Malformed(f"{field}.header", f"{length} bytes", f"{len(view) - 8} bytes (truncated)")
    if length > MAX_HEADER_BYTES:
        raise TooLarge(f"{field}.header", f"at most {MAX_HEADER_BYTES} bytes", length)
    try:
        text = str(view[8 : 8 + length], "utf-8")
        header = json.loads(text, object_pairs_hook=unique_keys)
    except ContractError as error:
        raise error.inside(f"{field}.header") from None
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{field}.header", "JSON", str(error)) from None
    if not isinstance(header, dict):
        raise Malformed(f"{field}.header", "a JSON object", header)
    return header, view[8 + length :]


class _Entry(NamedTuple):
    """One tensor of a header whose types, dimensions and sizes have been checked."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def read(cls, field: str, entry: Any) -> _Entry:
        """The entry that a header holds, or an error that names it."""
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise Malformed(field, "dtype, shape and data_offsets", entry)
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype = _DTYPES.get(code) if isinstance(code, str) else None
        if dtype is None:
            raise ShapeMismatch(f"{field}.dtype", "F32 or F16", code)
        # Zeros left out, since numpy bounds the product of the other sizes in an empty array too.
        if not _are_sizes(shape) or len(shape) > MAX_DIMS or math.prod(filter(None, shape)) > 2**48:
            raise ShapeMismatch(f"{field}.shape", f"at most {MAX_DIMS} sizes", shape)
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise Malformed(f"{field}.data_offsets", "two byte offsets", offsets)
        return cls(dtype, tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**40 for n in value)


def require_finite(field: str, array: npt.NDArray[Any]) -> None:
    """Refuse NaN and infinity, naming the first place.

    Raises:
        NotFinite: with the index of the first offending element.
    """
    # A sum is quicker than a look at each of millions, and finite only if all of them are.
    wide = np.float32 if array.dtype == np.float16 else None
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum(dtype=wide)):
            return
    finite = np.isfinite(array)
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise NotFinite(f"{field}{list(place)}", "a finite number", float(array[place]))

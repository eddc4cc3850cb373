"""Blobs of arrays: byte for byte what safetensors writes, and nothing but what it should read."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import leyline as ll
from contracts import examples
from leyline import arrays
from leyline.arrays import pack_arrays, unpack_arrays
from leyline.network.bundle import statistics_arrays, unpack_statistics

Arrays = dict[str, npt.NDArray[Any]]
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
finite = hnp.arrays(
    st.sampled_from([np.float32, np.float16]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    elements=st.floats(-1024, 1024, width=16),
)


@given(st.dictionaries(names, finite, max_size=5))
def test_blobs_are_those_of_the_safetensors_library(items: Arrays) -> None:
    data = pack_arrays(items)
    assert data == safetensors.numpy.save(items)
    for read in (unpack_arrays(data)[0], safetensors.numpy.load(data)):
        assert read.keys() == items.keys()
        for name, array in items.items():
            assert read[name].dtype == array.dtype
            assert read[name].shape == array.shape
            assert np.array_equal(read[name], array)


def test_order_and_memory_layout_of_the_arrays_do_not_change_the_bytes() -> None:
    one, two = np.arange(12, dtype="f4").reshape(3, 4), np.ones(2, "f2")
    expected = pack_arrays({"a": one, "b": two})
    assert pack_arrays({"b": two, "a": np.asfortranarray(one)}) == expected
    assert pack_arrays({"b": two.astype(">f2"), "a": one.astype(">f4")}) == expected


def test_metadata_of_a_blob_comes_back() -> None:
    data = pack_arrays({"a": np.zeros(1, "f4")}, {"seed": "7"})
    assert unpack_arrays(data)[1] == {"seed": "7"}
    assert safetensors.numpy.save({"a": np.zeros(1, "f4")}, {"seed": "7"}) == data


def test_arrays_are_views_that_cannot_be_written() -> None:
    array = unpack_arrays(pack_arrays({"a": np.zeros(3, "f4")}))[0]["a"]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize("dtype", ["f8", "i4", "i8", "u1", "bool", "c8", "U3", "O"])
def test_other_types_than_floats_of_32_and_16_bits_are_not_sent(dtype: str) -> None:
    with pytest.raises(ll.ShapeMismatch, match="float32 or float16"):
        pack_arrays({"a": np.zeros(2, dtype)})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_place(bad: float) -> None:
    array = np.zeros((2, 3), "f4")
    array[1, 2] = bad
    with pytest.raises(ll.NotFinite) as caught:
        pack_arrays({"layer/first": array})
    assert caught.value.field == "layer/first[1, 2]"


def blob(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FOUR = b"\0" * 4
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header over the limit": struct.pack("<Q", arrays.MAX_HEADER_BYTES + 1) + b"{",
    "header of 2**64 - 1": b"\xff" * 8 + b"{}",
    "header longer than the blob": struct.pack("<Q", 100) + b"{}",
    "no JSON": blob(b"{"),
    "a list": blob([]),
    "a number": blob(b"7"),
    "UTF-16": blob("{}".encode("utf-16")),
    "no UTF-8": blob(b'{"\xff": 1}'),
    "deep JSON": blob(b'{"a":' + b"[" * 100_000),
    "deep JSON that is closed": blob(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "a number of 5000 digits": blob(b'{"a":' + b"9" * 5000 + b"}"),
    "the same tensor twice": blob(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        FOUR,
    ),
    "the same key twice": blob(
        b'{"a":{"dtype":"F32","shape":[9],"shape":[1],"data_offsets":[0,4]}}', FOUR
    ),
    "no tensor but bytes": blob({}, FOUR),
    "entry is a number": blob({"a": 7}),
    "entry is a list": blob({"a": []}),
    "a key missing": blob({"a": {"dtype": "F32", "shape": [1]}}, FOUR),
    "a key too many": blob({"a": entry([1], [0, 4]) | {"more": 1}}, FOUR),
    "metadata of numbers": blob({"__metadata__": {"a": 1}}),
    "metadata is a list": blob({"__metadata__": []}),
    "unknown type": blob({"a": entry([1], [0, 8], "F64")}, FOUR * 2),
    "type is a list": blob({"a": entry([1], [0, 4], ["F32"])}, FOUR),
    "shape is a number": blob({"a": entry(1, [0, 4])}, FOUR),
    "shape is a map": blob({"a": entry({}, [0, 4])}, FOUR),
    "negative shape": blob({"a": entry([-1], [0, 4])}, FOUR),
    "two negative sizes": blob({"a": entry([-1, -1], [0, 4])}, FOUR),
    "bool in the shape": blob({"a": entry([True], [0, 4])}, FOUR),
    "float in the shape": blob({"a": entry([1.0], [0, 4])}, FOUR),
    "null in the shape": blob({"a": entry([None], [0, 4])}, FOUR),
    "five dimensions": blob({"a": entry([1] * 5, [0, 4])}, FOUR),
    "a size that wraps 64 bits": blob({"a": entry([2**32, 2**32], [0, 0])}),
    "a size beyond 64 bits": blob({"a": entry([2**70], [0, 0])}),
    "nothing times too much": blob({"a": entry([0, 2**39, 2**39, 2**39], [0, 0])}),
    "more than there is": blob({"a": entry([1000], [0, 4000])}, FOUR),
    "less than the shape": blob({"a": entry([2], [0, 4])}, FOUR),
    "offsets backwards": blob({"a": entry([1], [4, 0])}, FOUR),
    "negative offset": blob({"a": entry([1], [-4, 0])}, FOUR),
    "bool offset": blob({"a": entry([1], [False, 4])}, FOUR),
    "float offsets": blob({"a": entry([1], [0.0, 4.0])}, FOUR),
    "infinite offset": blob(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[1e999,4]}}', FOUR),
    "NaN offset": blob(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[NaN,4]}}', FOUR),
    "one offset": blob({"a": entry([1], [0])}, FOUR),
    "three offsets": blob({"a": entry([1], [0, 4, 8])}, FOUR),
    "offsets are text": blob({"a": entry([1], "04")}, FOUR),
    "overlap": blob({"a": entry([2], [0, 8]), "b": entry([1], [4, 8])}, FOUR * 2),
    "the same bytes twice": blob({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, FOUR),
    "a hole": blob({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, FOUR * 3),
    "bytes before": blob({"a": entry([1], [4, 8])}, FOUR * 2),
    "bytes after": blob({"a": entry([1], [0, 4])}, FOUR * 2),
    "one entry too many": blob(
        b'{"'
        + b',"'.join(
            b'%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number
            for number in range(arrays.MAX_TENSORS + 1)
        )
        + b"}"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_blobs_are_named_errors(name: str) -> None:
    with pytest.raises((ll.Malformed, ll.TooLarge, ll.ShapeMismatch)) as caught:
        unpack_arrays(HOSTILE[name], field="statistics")
    assert caught.value.field.startswith("statistics")
    assert str(caught.value).isprintable()


def test_random_bytes_are_malformed_and_only_a_header_that_is_there_is_too_large() -> None:
    """What is corrupt has a stand-in; what is too large has none."""
    for seed in range(20):
        with pytest.raises(ll.Malformed):
            unpack_arrays(random.Random(seed).randbytes(1000), field="statistics")
    length = arrays.MAX_HEADER_BYTES + 1
    with pytest.raises(ll.TooLarge, match="header"):
        unpack_arrays(struct.pack("<Q", length) + b" " * length, field="statistics")


def test_empty_arrays_between_others_are_no_overlap() -> None:
    items = {"b": np.zeros(0, "f4"), "a": np.ones(2, "f4"), "c": np.zeros((3, 0), "f4")}
    assert unpack_arrays(pack_arrays(items))[0].keys() == items.keys()
    header = {"full": entry([1], [0, 4]), "empty": entry([0], [0, 0])}
    assert unpack_arrays(blob(header, FOUR))[0].keys() == header.keys()


@pytest.mark.parametrize("item", examples.STATISTICS, ids=lambda item: type(item).__name__)
def test_damaged_statistics_raise_only_contract_errors(item: Any) -> None:
    data, chance = pack_arrays(statistics_arrays([item])), random.Random(7)
    for end in range(len(data)):
        with pytest.raises(ll.ContractError):
            unpack_statistics(type(item), data[:end], "statistics")
    for _ in range(1500):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] = chance.randrange(256)
        if chance.randrange(2):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        try:
            unpack_statistics(type(item), bytes(damaged), "statistics")
        except ll.ContractError as error:
            str(error).encode()


def importance(**changes: Any) -> dict[str, Any]:
    fields = examples.STATISTICS[0].model_dump()
    return {**fields, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"taylor_importance": np.array(1, "f4")}, ll.ShapeMismatch, "a/taylor_importance"),
        ({"taylor_importance": np.ones((3, 1), "f4")}, ll.ShapeMismatch, "a/taylor_importance"),
        ({"magnitude_importance": np.ones(2, "f4")}, ll.ShapeMismatch, "a/magnitude_importance"),
        ({"magnitude_importance": np.ones(3, "f8")}, ll.ShapeMismatch, "a/magnitude_importance"),
        ({"taylor_importance": -np.ones(3, "f4")}, ll.InvalidField, "a/taylor_importance"),
        (
            {"taylor_importance": np.array([1, np.nan, 1], "f4")},
            ll.NotFinite,
            "a/taylor_importance[1]",
        ),
        (
            {"activation_frequency": np.full(3, 1.5, "f4")},
            ll.InvalidField,
            "a/activation_frequency",
        ),
        (
            {"channel_correlations": np.ones((3, 2), "f4")},
            ll.ShapeMismatch,
            "a/channel_correlations",
        ),
        (
            {"channel_correlations": np.full((3, 3), 5, "f4")},
            ll.InvalidField,
            "a/channel_correlations",
        ),
        (
            {"channel_correlations": np.full((3, 3), np.inf, "f2")},
            ll.NotFinite,
            "a/channel_correlations[0, 0]",
        ),
    ],
)
def test_importance_that_is_not_what_it_says_is_refused_by_name(
    changes: dict[str, Any], error: type[ll.ContractError], field: str
) -> None:
    with pytest.raises(error) as caught:
        ll.ChannelImportanceData(**importance(**changes))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"projections": np.ones(3, "f4")}, "a/projections"),
        ({"projections": np.ones((2, 2), "f4")}, "a/first_order"),
        ({"second_order": np.ones(2, "f4")}, "a/second_order"),
    ],
)
def test_gate_statistics_that_do_not_fit_together_are_refused_by_name(
    changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(ll.ShapeMismatch) as caught:
        ll.GateStatistics(**{**examples.STATISTICS[1].model_dump(), **changes})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"entropy": None}, ll.InvalidField, "a/entropy_bound"),
        ({"similarity": np.ones((3, 2), "f4")}, ll.ShapeMismatch, "a/similarity"),
        ({"similarity": np.full((3, 3), 2, "f4")}, ll.InvalidField, "a/similarity"),
        ({"diversity": np.full(3, 0.8, "f4")}, ll.InvalidField, "a/diversity"),
        ({"entropy": np.full(3, -1, "f4")}, ll.InvalidField, "a/entropy"),
        ({"gradient_sensitivity": np.full(3, np.nan, "f4")}, ll.NotFinite,
         "a/gradient_sensitivity[0]"),
    ],
)  # fmt: skip
def test_head_statistics_that_are_not_what_they_say_are_refused_by_name(
    changes: dict[str, Any], error: type[ll.ContractError], field: str
) -> None:
    with pytest.raises(error) as caught:
        ll.HeadImportanceData(**{**examples.STATISTICS[3].model_dump(), **changes})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("taylor_importance", ll.Malformed),
        ("a/layer_name", ll.Malformed),
        ("", ll.Malformed),
        # What a newer trainer measures is no corrupt data: nothing stands in for it.
        ("a/surprise", ll.UnsupportedVersion),
        ("/x", ll.UnsupportedVersion),
    ],
)
def test_tensors_of_unknown_names_are_refused_by_name(
    name: str, error: type[ll.ContractError]
) -> None:
    data = pack_arrays({name: np.ones(1, "f4")})
    with pytest.raises(error, match=r"expected <layer>/<field of ChannelImportanceData>"):
        unpack_statistics(ll.ChannelImportanceData, data, "statistics")


def test_a_missing_tensor_is_refused_by_name() -> None:
    data = pack_arrays({"a/taylor_importance": np.ones(1, "f4")})
    with pytest.raises(ll.InvalidField, match=r"magnitude_importance: expected this field"):
        unpack_statistics(ll.ChannelImportanceData, data, "statistics")

"""Sealed blobs: open only with key and architecture, and only if nothing was changed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elesh.security import is_sealed, seal, sealing, unseal
from leyline import Unreadable

KEY, HASH = bytes(range(32)), "0123456789abcdef"


@settings(deadline=None)
@given(data=st.binary(max_size=300), piece=st.integers(1, 64), flip=st.integers(0, 10**6))
def test_what_was_sealed_opens_and_what_was_changed_does_not(
    data: bytes, piece: int, flip: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealing, "PIECE", piece)
        sealed = seal(data, "k", KEY, HASH)
        assert is_sealed(sealed)
        assert unseal(sealed, {"k": KEY}, HASH) == data
        changed = bytearray(sealed)
        bit = flip % (8 * len(sealed))
        changed[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(Unreadable):
            unseal(bytes(changed), {"k": KEY}, HASH)


def test_dropped_and_swapped_pieces_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "PIECE", 16)
    sealed = seal(bytes(64), "k", KEY, HASH)
    head, step = len(sealed) - 4 * 32, 32
    first, second = sealed[head : head + step], sealed[head + step : head + 2 * step]
    for broken in (
        sealed[:-step],
        sealed[:head] + second + first + sealed[head + 2 * step :],
        sealed + sealed[-step:],
        sealed[:head],
        b"",
    ):
        with pytest.raises(Unreadable):
            unseal(broken, {"k": KEY}, HASH)


def test_it_opens_for_its_architecture_and_key_alone() -> None:
    sealed = seal(b"statistics", "k", KEY, HASH)
    with pytest.raises(Unreadable, match="architecture"):
        unseal(sealed, {"k": KEY}, "f" * 16)
    with pytest.raises(Unreadable):
        unseal(sealed, {"k": bytes(32)}, HASH)
    with pytest.raises(Unreadable, match="other"):
        unseal(sealed, {"other": KEY}, HASH)


def test_the_same_content_is_the_same_bytes_and_other_content_another_nonce() -> None:
    assert seal(b"a", "k", KEY, HASH) == seal(b"a", "k", KEY, HASH)
    header = len(b"ELS1") + 1 + len(b"k")
    one, two = seal(b"a", "k", KEY, HASH), seal(b"b", "k", KEY, HASH)
    assert one[header : header + 8] != two[header : header + 8]
    # A nonce that serves twice under one key with other bound data gives the key of the tags away.
    elsewhere = seal(b"a", "k", KEY, "0" * len(HASH))
    assert one[header : header + 8] != elsewhere[header : header + 8]
    assert b"statistics" not in seal(b"statistics", "k", KEY, HASH)

"""Signatures: every byte and the stream are covered, keys rotate, secrets never show."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from elesh.security import Key, Keyring, new_key
from elesh.settings import SettingsError
from leyline import BadSignature, NotAuthorized, Unsigned

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KINDS = ("hmac-sha256", "ed25519")


def key(kind: str = "hmac-sha256", name: str = "k", **more: object) -> Key:
    return Key.model_validate({**new_key(kind, name), **more})  # type: ignore[arg-type]


def ring(*keys: Key, sign_with: str = "", required: bool = True) -> Keyring:
    return Keyring({each.id: each for each in keys}, sign_with, required=required)


@pytest.mark.parametrize("kind", KINDS)
@given(envelope=st.binary(max_size=200), flip=st.integers(0, 10_000))
def test_every_bit_of_envelope_and_stream_is_covered(kind: str, envelope: bytes, flip: int) -> None:
    keyring = ring(KEYS[kind], sign_with="k")
    signature = keyring.sign("decisions", envelope)
    assert keyring.check("decisions", envelope, signature, NOW) == "k"
    with pytest.raises(BadSignature):
        keyring.check("outcomes", envelope, signature, NOW)
    if envelope:
        bit = flip % (8 * len(envelope))
        changed = bytearray(envelope)
        changed[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(BadSignature):
            keyring.check("decisions", bytes(changed), signature, NOW)


KEYS = {kind: key(kind) for kind in KINDS}


@given(signature=st.binary(max_size=300))
def test_any_bytes_as_a_signature_are_refused_by_name(signature: bytes) -> None:
    with pytest.raises((BadSignature, Unsigned), match="signature"):
        ring(KEYS["ed25519"]).check("decisions", b"x", signature, NOW)


def test_an_entry_without_a_signature_is_refused_unless_that_is_allowed() -> None:
    with pytest.raises(Unsigned, match="signature on every entry"):
        ring(KEYS["ed25519"]).check("decisions", b"x", None, NOW)
    assert ring(KEYS["ed25519"], required=False).check("decisions", b"x", None, NOW) == ""


def test_a_key_speaks_only_on_its_streams() -> None:
    trainer = ring(key(name="t", may=["checkpoints"]), sign_with="t")
    assert trainer.check("checkpoints", b"x", trainer.sign("checkpoints", b"x"), NOW) == "t"
    with pytest.raises(NotAuthorized, match="decisions"):
        trainer.check("decisions", b"x", trainer.sign("decisions", b"x"), NOW)


def test_a_rotated_key_is_believed_until_its_end_and_a_newer_one_signs() -> None:
    old, new = key(name="old", not_after=NOW + timedelta(days=1)), key(name="new")
    signature = ring(old, sign_with="old").sign("decisions", b"x")
    both = ring(old, new, sign_with="new")
    assert both.check("decisions", b"x", signature, NOW) == "old"
    assert both.sign("decisions", b"x").split(b":")[1] == b"new"
    with pytest.raises(BadSignature, match="old"):
        both.check("decisions", b"x", signature, NOW + timedelta(days=2))


def test_a_public_key_checks_and_cannot_sign() -> None:
    entry = new_key("ed25519", "t")
    public = Key(id="t", kind="ed25519", public=entry["public"])
    signature = ring(Key.model_validate(entry), sign_with="t").sign("checkpoints", b"x")
    assert ring(public).check("checkpoints", b"x", signature, NOW) == "t"
    with pytest.raises(SettingsError, match="sign_with"):
        ring(public, sign_with="t")


def test_secrets_are_in_no_repr_and_no_error(tmp_path: Path) -> None:
    entry = new_key("hmac-sha256", "k")
    assert entry["secret"] not in repr(Key.model_validate(entry))
    file = tmp_path / "keyring.yaml"
    file.write_text(yaml.safe_dump({"keys": [{**entry, "kind": "ed25519"}]}))
    with pytest.raises(SettingsError, match="ed25519") as caught:
        Keyring.load(file)
    assert entry["secret"] not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_secret_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keyring.yaml"
    entry = {"id": "k", "kind": "hmac-sha256", "secret_env": "ELESH_TEST_KEY"}
    file.write_text(yaml.safe_dump({"sign_with": "k", "keys": [entry]}))
    with pytest.raises(SettingsError, match="ELESH_TEST_KEY"):
        Keyring.load(file)
    monkeypatch.setenv("ELESH_TEST_KEY", base64.b64encode(bytes(32)).decode())
    keyring = Keyring.load(file)
    assert keyring.check("x", b"y", keyring.sign("x", b"y"), NOW) == "k"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("keys: []", "keys"),
        ("keys: [{id: k, kind: rot13, secret: x}]", "kind"),
        ("keys: [{id: k, kind: hmac-sha256, secret: short}]", "32 bytes"),
        ("keys: [{id: k, kind: hmac-sha256}]", "secret"),
        ("nothing", "keyring"),
        ("{", "keyring"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "keyring.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=named) as caught:
        Keyring.load(file)
    assert str(file) in str(caught.value)

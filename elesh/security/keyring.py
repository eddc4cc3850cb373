"""The keyring: signs stream entries, and checks signatures before an entry is parsed.

Promises: a signature covers the place where something stands (partition and stream, or the key of
a piece of state) and every byte of it, so that it can neither be changed nor moved; a key may speak
only on the streams that its entry names; a key that was rotated out is still believed until
``not_after``, but no longer signs; comparisons take constant time; no secret is in any ``repr`` or
error.

The file (YAML)::

    sign_with: worker-2025
    keys:
      - {id: worker-2025, kind: hmac-sha256, secret_env: WORKER_KEY, may: [decisions, work, ...]}
      - {id: worker-2024, kind: hmac-sha256, secret: q8Zk..., not_after: 2026-01-31T00:00:00Z}
      - {id: trainer, kind: ed25519, public: 7Vt1..., may: [checkpoints, outcomes]}

HMAC-SHA256 (RFC 2104) where both ends hold the secret; Ed25519 (RFC 8032) where they should not
share one: then only the signer's file has ``private``. Keys are base64 of 32 bytes.
"""

from __future__ import annotations

import base64
import hmac
import os
import secrets
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

import yaml
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from elesh.settings import SettingsError
from leyline import BadSignature, NotAuthorized, Unsigned
from leyline.errors import brief

KEY_ID = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$"
"""What a key may be called."""

_VERSION = b"v2"
_DOMAIN = b"elesh-bus-v2"
_SIZE = 32


class Key(BaseModel):
    """One entry of the keyring."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=KEY_ID)
    kind: Literal["hmac-sha256", "ed25519"]
    secret: SecretStr | None = None
    """HMAC: the shared secret."""
    secret_env: str = ""
    """HMAC: the environment variable that holds it instead."""
    public: str = ""
    """Ed25519: checks."""
    private: SecretStr | None = None
    """Ed25519: signs."""
    private_env: str = ""
    """Ed25519: the environment variable that holds it instead."""
    may: frozenset[str] = frozenset({"*"})
    """Streams that this key may speak on, by short name; ``*`` is all."""
    not_after: datetime | None = None
    """From then on nothing signed by it is believed."""

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        given = {name for name in _PARTS if getattr(self, name)}
        allowed, needed = _NEEDS[self.kind]
        if given - allowed or not given & needed:
            raise ValueError(f"a key of kind {self.kind} has {' or '.join(sorted(needed))}")
        if self.not_after is not None and self.not_after.tzinfo is None:
            raise ValueError("not_after: a time with its offset from UTC")
        for name in given & {"secret", "private", "public"}:
            _raw(self, name)
        return self

    @property
    def signs(self) -> bool:
        """Whether this process can sign with it."""
        return self.kind == "hmac-sha256" or bool(self.private or self.private_env)

    def sign(self, data: bytes) -> bytes:
        """The signature of ``data``."""
        if self.kind == "hmac-sha256":
            return hmac.digest(_secret(self, "secret"), data, "sha256")
        return Ed25519PrivateKey.from_private_bytes(_secret(self, "private")).sign(data)

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether ``signature`` is this key's of ``data``."""
        if self.kind == "hmac-sha256":
            return hmac.compare_digest(self.sign(data), signature)
        public = (
            Ed25519PublicKey.from_public_bytes(_raw(self, "public"))
            if self.public
            else Ed25519PrivateKey.from_private_bytes(_secret(self, "private")).public_key()
        )
        try:
            public.verify(signature, data)
        except InvalidSignature:
            return False
        return True


_PARTS = ("secret", "secret_env", "public", "private", "private_env")
_NEEDS = {
    "hmac-sha256": (frozenset({"secret", "secret_env"}), frozenset({"secret", "secret_env"})),
    "ed25519": (frozenset(_PARTS[2:]), frozenset(_PARTS[2:])),
}


class Keyring:
    """The keys that a process signs with and believes.

    Args:
        keys: by id.
        sign_with: the id of the key that signs; empty: this process signs nothing.
        required: whether entries without a signature are refused.
    """

    def __init__(
        self, keys: Mapping[str, Key], sign_with: str = "", *, required: bool = True
    ) -> None:
        if sign_with and (sign_with not in keys or not keys[sign_with].signs):
            able = ", ".join(sorted(name for name, key in keys.items() if key.signs)) or "none"
            raise SettingsError(f"keyring: sign_with: expected one of {able}, found {sign_with!r}")
        for key in keys.values():
            _require_variables(key)
        self._keys, self.sign_with, self.required = dict(keys), sign_with, required

    @classmethod
    def load(cls, path: Path, *, required: bool = True) -> Self:
        """The keyring of a file.

        Raises:
            SettingsError: naming the file and what is wrong; never a secret.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise SettingsError(f"{path}: cannot be read as a keyring: {reason}") from None
        try:
            file = _File.model_validate(content)
            keys = {key.id: key for key in file.keys}
            if len(keys) != len(file.keys):
                raise SettingsError("keys: expected every id once")
            return cls(keys, file.sign_with, required=required)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "keyring"
            raise SettingsError(f"{path}: {place}: {first['msg']}") from None
        except SettingsError as error:
            raise SettingsError(f"{path}: {error}") from None

    @property
    def keys(self) -> tuple[Key, ...]:
        """All keys, in the order of the file."""
        return tuple(self._keys.values())

    def secrets(self) -> dict[str, bytes]:
        """The secrets of the HMAC keys, by id: what blobs are sealed with."""
        return {key.id: _secret(key, "secret") for key in self.keys if key.kind == "hmac-sha256"}

    def sign(self, place: str, content: bytes) -> bytes:
        """The signature of what stands at ``place``; empty where this process does not sign."""
        if not self.sign_with:
            return b""
        key = self._keys[self.sign_with]
        signature = base64.b64encode(key.sign(_signed(place, content)))
        return b":".join((_VERSION, key.id.encode(), signature))

    def check(
        self,
        place: str,
        content: bytes,
        signature: bytes | None,
        now: datetime,
        *,
        may: Collection[str] = (),
    ) -> str:
        """The id of the key that signed what stands at ``place``; empty where it is
        unsigned and may be.

        Args:
            may: streams, by short name; the key must be allowed to speak on one of them. By
                default the place itself.

        Raises:
            Unsigned: if there is no signature and one is required.
            BadSignature: if it is malformed, of an unknown or expired key, not of these bytes, or
                not of this place.
            NotAuthorized: if its key may speak on none of the streams.
        """
        if not signature:
            if self.required:
                raise Unsigned("signature", "a signature on every entry", "none")
            return ""
        key, raw = self._parsed(signature)
        if key.not_after is not None and now > key.not_after:
            raise BadSignature("signature", f"a key that is valid at {now:%F %T}Z", key.id)
        if not key.verifies(raw, _signed(place, content)):
            wanted = f"a signature of these bytes at this place by {key.id}"
            raise BadSignature("signature", wanted, "another")
        named = may or (place,)
        if not key.may & {"*", *named}:
            wanted = f"a key that may speak on {' or '.join(sorted(named))}"
            raise NotAuthorized("signature", wanted, key.id)
        return key.id

    def _parsed(self, signature: bytes) -> tuple[Key, bytes]:
        parts = signature.split(b":") if len(signature) <= 256 else []
        if len(parts) != 3 or parts[0] != _VERSION:
            raise BadSignature("signature", "v2:<key id>:<base64>", brief(signature))
        key = self._keys.get(parts[1].decode("ascii", "replace"))
        if key is None:
            raise BadSignature("signature", "a key of the keyring", brief(parts[1]))
        try:
            return key, base64.b64decode(parts[2], validate=True)
        except ValueError:
            raise BadSignature("signature", "base64", brief(parts[2])) from None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sign_with: str = ""
    keys: list[Key] = Field(min_length=1)


def new_key(kind: Literal["hmac-sha256", "ed25519"], identity: str) -> dict[str, str]:
    """A fresh entry for the file, with its secret in the clear: for ``elesh keys new`` alone."""
    if kind == "hmac-sha256":
        return {"id": identity, "kind": kind, "secret": _text(secrets.token_bytes(_SIZE))}
    private = Ed25519PrivateKey.generate()
    return {
        "id": identity,
        "kind": kind,
        "private": _text(private.private_bytes_raw()),
        "public": _text(private.public_key().public_bytes_raw()),
    }


def _signed(place: str, content: bytes) -> bytes:
    """What a signature covers: no two pairs of place and content give the same bytes."""
    named = place.encode()
    return b"\0".join((_DOMAIN, b"%d" % len(named), named, content))


def _require_variables(key: Key) -> None:
    """What a key takes from the environment must be there from the beginning."""
    for name in ("secret", "private"):
        if getattr(key, f"{name}_env"):
            _secret(key, name)


def _secret(key: Key, name: str) -> bytes:
    variable = getattr(key, f"{name}_env")
    return _decoded(os.environ.get(variable, ""), variable) if variable else _raw(key, name)


def _raw(key: Key, name: str) -> bytes:
    value = getattr(key, name)
    return _decoded(value.get_secret_value() if isinstance(value, SecretStr) else value, name)


def _decoded(text: str, where: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raw = b""
    if len(raw) != _SIZE:
        raise SettingsError(f"keyring: {where}: expected base64 of {_SIZE} bytes")
    return raw


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()

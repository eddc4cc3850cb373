"""Signatures and encryption: off until a keyring is named."""

from __future__ import annotations

from ._base import Section


class SecuritySettings(Section):
    """Who is believed on the bus, and how blobs are stored; see docs/security.md."""

    keyring: str = ""
    """Path of the keyring file; empty: entries are neither signed nor checked."""
    require_signatures: bool = True
    """With a keyring, whether entries without a signature are refused."""
    blob_key: str = ""
    """Id of the HMAC key of the keyring whose secret seals blobs; empty: blobs are stored plain."""

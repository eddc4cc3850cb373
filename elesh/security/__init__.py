"""Who may publish what on the bus, and who can read what is stored: signatures and sealed blobs.
Pure.

:mod:`.keyring` signs and checks the bytes of stream entries before anything of them is parsed;
:mod:`.sealing` encrypts blobs for one architecture. Neither knows Redis; the bus calls them.
"""

from .keyring import KEY_ID, Key, Keyring, new_key
from .sealing import is_sealed, seal, unseal

__all__ = ["KEY_ID", "Key", "Keyring", "is_sealed", "new_key", "seal", "unseal"]

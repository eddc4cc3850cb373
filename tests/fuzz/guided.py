"""``python -m tests.fuzz.guided [libFuzzer options]``: coverage chooses the bytes (atheris).

The first byte of an input chooses the reader. Ends at the first error that is no named refusal.
"""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["leyline", "elesh"]):
    from leyline import ContractError

    from .readers import readers

_READERS = [reader for _, (reader, _) in sorted(readers().items())]


def one_input(data: bytes) -> None:
    """Refuse or read; anything else is a finding."""
    if data:
        with contextlib.suppress(ContractError):
            _READERS[data[0] % len(_READERS)](data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()

"""Mutated bytes through every reader: what each answered, and how long it took."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

from leyline import ContractError

from .mutate import mutated
from .readers import Reader, readers

Known = Mapping[str, tuple[Reader, list[bytes]]]


@dataclass(frozen=True)
class Result:
    """What became of one input."""

    reader: str
    number: int
    code: str
    """``read``, the code of the refusal, or ``!`` and the error that should not have been."""
    seconds: float


def fuzz(count: int, seed: int) -> list[Result]:
    """``count`` inputs, the readers in turn; the same seed gives the same inputs."""
    known = readers()
    names = sorted(known)
    return [_one(names[n % len(names)], n, seed, known) for n in range(count)]


def _one(
    name: str, number: int, seed: int, known: Mapping[str, tuple[Reader, list[bytes]]]
) -> Result:
    reader, sound = known[name]
    chance = random.Random(f"{seed}:{number}")
    data = mutated(chance.choice(sound), chance)
    begun = time.perf_counter()
    try:
        reader(data)
        code = "read"
    except ContractError as error:
        code = error.code
        if not error.field or len(str(error)) > 4000 or not str(error).isprintable():
            code = f"!unreadable reason of {error.code}"
    except Exception as error:
        code = f"!{type(error).__name__}: {error}"[:200]
    return Result(name, number, code, time.perf_counter() - begun)

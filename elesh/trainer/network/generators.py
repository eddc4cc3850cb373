"""The random generators that a network's code names.

Promises: those are found that a method, a function that it calls, a closure, or a module of the
user's that it imports names; code of installed libraries is not followed further than its own
globals. Nothing is drawn.
"""

from __future__ import annotations

import functools
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_NOT_LOOKED_AT = ("torch.", "builtins", "elesh.", "leyline.")
"""Modules whose classes draw from the global states alone."""
_PLACES = ("stdlib", "platstdlib", "purelib", "platlib")
_INSTALLED = (*map(sysconfig.get_path, _PLACES), str(Path(__file__).parents[2]))
"""Where Python's and other people's code lies, and Elesh's own."""


def drawn_by(kind: type, known: set[type], named: dict[int, dict[str, Any]]) -> Iterator[Any]:
    """Generators that the methods of a class name, functions that may draw from some, and the cells
    of closures.

    Args:
        known: classes that were looked at: they are left out, and ``kind`` is added.
        named: what is known of globals, by their id.
    """
    for ancestor in kind.__mro__:
        if ancestor in known or ancestor.__module__.startswith(_NOT_LOOKED_AT):
            continue
        known.add(ancestor)
        for member in vars(ancestor).values():
            method: Any = member
            if isinstance(member, (staticmethod, classmethod)):
                method = member.__func__
            elif isinstance(member, property):
                method = member.fget
            if isinstance(method, FunctionType):
                yield from method.__closure__ or ()
                yield from named_by(method, named)
            elif isinstance(member, GENERATORS):
                yield member


def named_by(function: FunctionType, named: dict[int, dict[str, Any]]) -> Iterator[Any]:
    """Generators among the globals that a function names, and functions that may draw from some.

    Args:
        named: what is known of globals, by their id.
    """
    found = _drawing(function.__globals__, named)
    if found:
        yield from (found[name] for name in function.__code__.co_names if name in found)


def kept(generator: Any) -> Callable[[], object]:
    """What puts a generator back into its present state."""
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, torch.Generator):
        return functools.partial(_set_generator, generator, generator.get_state())
    bits = generator.bit_generator
    return functools.partial(setattr, bits, "state", bits.state)


def _set_generator(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _drawing(held: dict[str, Any], named: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Of a module's globals: generators, and, where it has any or imports from a module that has,
    functions. Most modules have none, and are looked at once."""
    if (known := named.get(id(held))) is not None:
        return known
    here = list(held.items())
    found = named[id(held)] = {n: value for n, value in here if isinstance(value, GENERATORS)}
    for name, value in here:
        if isinstance(value, ModuleType) and _is_the_users(vars(value)):
            found.update(_drawing(vars(value), named))
        elif isinstance(value, FunctionType) and (theirs := value.__globals__) is not held:
            found.update({name: value} if _is_the_users(theirs) and _drawing(theirs, named) else {})
    if found:
        own = ((n, value) for n, value in here if isinstance(value, FunctionType))
        found.update((n, value) for n, value in own if value.__globals__ is held)
    return found


def _is_the_users(held: dict[str, Any]) -> bool:
    file = held.get("__file__")
    return isinstance(file, str) and not file.startswith(_INSTALLED)

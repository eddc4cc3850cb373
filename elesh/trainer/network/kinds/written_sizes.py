"""Sizes that a network's code keeps in attributes of its own, or has written into it.

Promises: an attribute is set like any other; a number in the code of a method is changed for one
module only, whose class stays as it is, in a function that replaces the method. What is changed so
is copied and pickled with the module.
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from leyline import InvalidField, PruningGroup

POWERS = {"number": 1.0, "root": 0.5, "inverse_root": -0.5}
"""By ``WrittenSize.kept_as``."""
_FEWEST = 5
"""Numbers below this are axes and counts of all kinds."""


_OF_FUNCTIONS = ("__code__", "__defaults__", "__globals__", "__kwdefaults__", "__name__")
"""What exporters ask a method for."""


class OtherNumbers:
    """Replaces a method of a module: the same code with other numbers in it."""

    def __init__(self, module: nn.Module, name: str, numbers: Mapping[int, int]) -> None:
        self.module, self.name, self.numbers = module, name, dict(numbers)

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's: exporters and trainers go by the names of a network's inputs."""
        return inspect.signature(types.MethodType(self._own(), self.module))

    def __getattr__(self, name: str) -> Any:
        if name in _OF_FUNCTIONS:
            return getattr(self._own(), name)
        raise AttributeError(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._own()(self.module, *args, **kwargs)

    def _own(self) -> types.FunctionType:
        """Made anew where it was copied or loaded."""
        function: types.FunctionType | None = vars(self).get("function")
        if function is None:
            function = self.function = _with_numbers(type(self.module), self.name, self.numbers)
        return function

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "function"}


def refit_written(model: nn.Module, group: PruningGroup, lost: int) -> None:
    """Make all sizes that are kept of a group smaller by so many units."""
    for size in group.written:
        module, gone = model.get_submodule(size.module), size.width * lost
        held = vars(module)
        if size.number is None:
            power = POWERS[size.kept_as]
            left = round(held[size.name] ** (1 / power)) - gone
            held[size.name] = left if power == 1 else left**power
            continue
        known = held.get(size.name)
        numbers = known.numbers if isinstance(known, OtherNumbers) else {}
        now = numbers.get(size.number, size.number) - gone
        held[size.name] = OtherNumbers(module, size.name, {**numbers, size.number: now})


def require_own_methods(model: nn.Module, groups: Iterable[PruningGroup]) -> None:
    """Refuse to change numbers in a method that something else has replaced since.

    Raises:
        InvalidField: naming the method.
    """
    for size in (size for group in groups for size in group.written if size.number is not None):
        held = vars(model.get_submodule(size.module)).get(size.name)
        if held is not None and not isinstance(held, OtherNumbers):
            where = ".".join(part for part in ("model", size.module, size.name) if part)
            expected = f"the module's own method, in which {size.number} is to become less"
            hint = "cut the network before its methods are replaced or wrapped (mixed precision)"
            raise InvalidField(where, expected, type(held).__name__, hint=hint)


Lines = Mapping[types.CodeType, Collection[int]]
"""Of the code of methods, the lines that were run."""


def lines_run(model: nn.Module, run: Callable[[], object]) -> Lines:
    """Of the methods of a network's own modules, what this runs."""
    kinds: set[Any] = {type(module) for module in model.modules()}
    methods = (code for kind in kinds for code in _all_code(kind))
    codes = {code for own in methods for code in _nested(own)}
    found: dict[types.CodeType, set[int]] = {}

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        if frame.f_code not in codes:
            return None
        found.setdefault(frame.f_code, set()).add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return found


def numbers_in(module: nn.Module, lines: Lines) -> Iterator[tuple[str, int]]:
    """The names of methods, and the numbers that are written in these lines of each."""
    own: Any = type(module)
    for name, code in _methods(own).items():
        if name not in vars(module):
            constants = (one for kind, one in _operands(code, lines) if kind == "LOAD_CONST")
            yield from ((name, number) for number in dict.fromkeys(_numbers(constants)))


def names_in(module: nn.Module, lines: Lines) -> set[str]:
    """What a module's methods ask for by name in these lines."""
    own: Any = type(module)
    codes = _all_code(own)
    asked = (one for code in codes for kind, one in _operands(code, lines) if kind == "LOAD_ATTR")
    return {name for name in asked if isinstance(name, str)}


def _operands(code: types.CodeType, lines: Lines) -> Iterator[tuple[str, Any]]:
    """The constants and attributes that these lines of some code ask for, each with its kind."""
    for one in _nested(code):
        if own := lines.get(one):
            yield from ((kind, operand) for line, kind, operand in _steps(one) if line in own)


@lru_cache(1024)
def _steps(code: types.CodeType) -> tuple[tuple[int | None, str, Any], ...]:
    """By line: a class is asked about for every group, and its code stays."""
    return tuple(
        (step.positions.lineno, step.opname, step.argval)
        for step in dis.get_instructions(code)
        if step.positions is not None and step.opname in ("LOAD_CONST", "LOAD_ATTR")
    )


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """Some code, and that of functions in it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _nested(one)


@lru_cache(1024)
def _methods(kind: Any) -> dict[str, types.CodeType]:
    """The code of what a network's author has written of a kind of module, but for how it is made;
    none of PyTorch's own."""
    found: dict[str, types.CodeType] = {}
    for base in kind.__mro__:
        if not base.__module__.startswith(("torch.", "builtins")):
            functions = (v for v in vars(base).values() if isinstance(v, types.FunctionType))
            for function in functions:
                if function.__name__ == "forward" or not function.__name__.startswith("__"):
                    found.setdefault(function.__name__, function.__code__)
    return found


@lru_cache(1024)
def _all_code(kind: Any) -> tuple[types.CodeType, ...]:
    """The same, with what decorators have around it: only names can be read there."""
    around = (getattr(kind, name, None) for name in _methods(kind))
    inside = (inspect.unwrap(one) for one in around if isinstance(one, types.FunctionType))
    codes = [one.__code__ for one in inside if isinstance(one, types.FunctionType)]
    return tuple(dict.fromkeys([*_methods(kind).values(), *codes]))


def _numbers(constants: Iterable[Any]) -> Iterator[int]:
    for one in constants:
        if type(one) is int and one >= _FEWEST:
            yield one
        elif isinstance(one, tuple):
            yield from _numbers(one)


def _with_numbers(kind: type, name: str, numbers: Mapping[int, int]) -> types.FunctionType:
    own: Any = getattr(kind, name)
    made = types.FunctionType(
        _replaced(own.__code__, numbers), own.__globals__, name, own.__defaults__, own.__closure__
    )
    made.__kwdefaults__ = own.__kwdefaults__
    return made


def _replaced(constant: Any, numbers: Mapping[int, int]) -> Any:
    """A constant of some code with these numbers replaced by others."""
    if type(constant) is int:
        return numbers.get(constant, constant)
    if type(constant) is tuple:
        return tuple(_replaced(one, numbers) for one in constant)
    if isinstance(constant, types.CodeType):
        inner = tuple(_replaced(one, numbers) for one in constant.co_consts)
        return constant.replace(co_consts=inner)
    return constant

"""The modules and parameters of a network, listed quickly, and once where its structure stands
still: PyTorch's own generators pass every module through as many frames as it lies deep. And all
objects of some types that are alive in the process.

Promises: whoever asks the network is answered as before, other people's code included; afterwards
nothing is left on it.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar, cast

from torch import nn


class _Listed(threading.local):
    lists: tuple[nn.Module, dict[str, nn.Module], dict[str, nn.Parameter]] | None = None
    """A model, its modules and its parameters, while they stand still."""


_LISTED = _Listed()
_LISTING = ("named_parameters", "parameters", "_named_members", "named_modules")
"""The methods by which modules list their parameters; types may have their own."""


@contextlib.contextmanager
def listed_once(model: nn.Module) -> Iterator[None]:
    """While entered, no module or parameter of ``model`` may come, go or be replaced: this module's
    functions, in this thread, list them once. Nothing is put on the model."""
    before = _LISTED.lists
    _LISTED.lists = model, modules_in(model), parameters_in(model)
    try:
        yield
    finally:
        _LISTED.lists = before


def modules_in(model: nn.Module) -> dict[str, nn.Module]:
    """What ``named_modules`` lists, in its order."""
    if _LISTED.lists is not None and _LISTED.lists[0] is model:
        return _LISTED.lists[1]
    kind: Any = type(model)
    if "named_modules" in vars(model) or kind.named_modules is not nn.Module.named_modules:
        return dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    seen, stack = set[int](), [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found[path] = module
            start = f"{path}." if path else ""
            parts = reversed(module._modules.items())
            stack += [(start + name, part) for name, part in parts if part is not None]
    return found


def parameters_in(model: nn.Module) -> dict[str, nn.Parameter]:
    """What ``named_parameters`` lists, in its order."""
    if _LISTED.lists is not None and _LISTED.lists[0] is model:
        return _LISTED.lists[2]
    kind: Any = type(model)
    plain = all(getattr(kind, name) is getattr(nn.Module, name) for name in _LISTING)
    if "named_parameters" in vars(model) or not plain:
        return dict(model.named_parameters())
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in modules_in(model).items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (f"{path}.{name}" if path else name, parameter))
    return dict(found.values())


@contextlib.contextmanager
def standing_still(model: nn.Module) -> Iterator[None]:
    """While entered, no module or parameter of ``model`` may come, go or be replaced: traversals
    from its root take one list that was made before."""
    kind: Any = type(model)
    modules, parameters = modules_in(model), parameters_in(model)

    def named_modules(*args: Any, **others: Any) -> Any:
        if args or others:
            return kind.named_modules(model, *args, **others)
        return iter(modules.items())

    def named_parameters(*args: Any, **others: Any) -> Any:
        if args or others not in ({}, {"recurse": True}):
            return kind.named_parameters(model, *args, **others)
        return iter(parameters.items())

    def get_submodule(target: str) -> Any:
        found = modules.get(target)
        return kind.get_submodule(model, target) if found is None else found

    answers: list[Any] = [named_modules, named_parameters, get_submodule]
    answering = {one.__name__: one for one in answers if one.__name__ not in vars(model)}
    vars(model).update(answering)
    try:
        yield
    finally:
        for name in answering:
            del vars(model)[name]


@contextlib.contextmanager
def quick_modes(model: nn.Module) -> Iterator[None]:
    """While entered, parts in which a mode is nothing but a flag of each module are put into it
    without a call of each; whoever is put in their place takes none of it."""
    plain = [part for part in _plain_parts(model) if "train" not in vars(part)]
    for part in plain:
        vars(part)["train"] = _put_into_mode(part)
    try:
        yield
    finally:
        for part in plain:
            del vars(part)["train"]


def _put_into_mode(module: nn.Module) -> Callable[..., nn.Module]:
    """``module.train``, for one all of whose parts have plain modes."""
    held = [vars(part) for part in modules_in(module).values()]

    def train(mode: bool = True) -> nn.Module:
        for attributes in held:
            attributes["training"] = mode
        return module

    return train


def _plain_parts(module: nn.Module) -> list[nn.Module]:
    """The largest parts of which no module has more to do when it is put into a mode."""
    if all(map(_has_plain_modes, modules_in(module).values())):
        return [module]
    parts = dict.fromkeys(module.children())
    return [part for child in parts for part in _plain_parts(child)]


def _has_plain_modes(module: nn.Module) -> bool:
    """Whether a mode is nothing but the module's own flag."""
    kind = type(module)
    own = "train" in vars(module) or "eval" in vars(module) or "training" not in vars(module)
    return not own and kind.train is nn.Module.train and kind.eval is nn.Module.eval


def deep_copied(model: nn.Module, copies: dict[int, Any] | None = None) -> nn.Module:
    """A copy that computes with its own weights, also where functions replace its methods.

    Args:
        copies: the memo of ``copy.deepcopy``, for what is copied together with it.
    """
    copies = {} if copies is None else copies
    copied = copy.deepcopy(model, copies)
    bind_functions(copied, copies)
    return copied


def bind_functions(copied: nn.Module, copies: Mapping[int, Any]) -> None:
    """Have functions in place of a copied network's methods call the copy.

    ``copy.deepcopy`` shares functions: a decorated or compiled ``forward`` that was put in place of
    the class's encloses the network, and would go on computing with its weights.

    Args:
        copies: by the ``id`` of what was copied (the memo of ``copy.deepcopy``).
    """
    for module in modules_in(copied).values():
        for name, held in list(vars(module).items()):
            if isinstance(held, FunctionType):
                vars(module)[name] = _bound(held, copies, {})


def _bound(thing: Any, copies: Mapping[int, Any], known: dict[int, Any]) -> Any:
    """This, or one of its kind that refers to the copies, where it refers to what was copied."""
    if id(thing) in copies:
        return copies[id(thing)]
    if id(thing) not in known:
        known[id(thing)] = thing  # What refers to itself.
        known[id(thing)] = _made_anew(thing, partial(_bound, copies=copies, known=known))
    return known[id(thing)]


def _made_anew(thing: Any, bound: Callable[[Any], Any]) -> Any:
    """One that refers to what ``bound`` gives for what this refers to; this, if it is the same."""
    if isinstance(thing, MethodType):
        owner = bound(thing.__self__)
        return thing if owner is thing.__self__ else MethodType(thing.__func__, owner)
    if isinstance(thing, partial):
        func, args = bound(thing.func), list(map(bound, thing.args))
        keywords = {name: bound(value) for name, value in thing.keywords.items()}
        return partial(func, *args, **keywords)
    if not isinstance(thing, FunctionType):
        return thing
    if (plain := getattr(thing, "_torchdynamo_orig_callable", None)) is not None:
        own = bound(plain)
        return thing if own is plain else own  # A copy is not compiled.
    defaults = tuple(map(bound, thing.__defaults__ or ()))
    cells = thing.__closure__ or ()
    inside = [(bound(_content(cell)), _content(cell)) for cell in cells]
    pairs = [*inside, *zip(defaults, thing.__defaults__ or (), strict=True)]
    if all(new is old for new, old in pairs):
        return thing
    closure = tuple(
        cell if new is old else CellType(new)
        for cell, (new, old) in zip(cells, inside, strict=True)
    )
    made = FunctionType(thing.__code__, thing.__globals__, thing.__name__, defaults, closure)
    made.__kwdefaults__ = thing.__kwdefaults__
    return made


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # Nothing was put into it yet.
        return None


T = TypeVar("T")
_WITHOUT_OBJECTS: dict[int, tuple[weakref.ref[type], int]] = {}
"""By the ids of types of which nothing was alive: how many references there were to each."""
_COUNTED = getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether every object counts as a reference to its type at once."""


def alive(
    *bases: type, exactly: Collection[type] = (), named: Callable[[str], bool] | None = None
) -> list[Any]:
    """Every object of some types: a process has a million objects and ten thousand types. One pass
    takes a twentieth of a second: who looks for several kinds asks for all of them at once.

    Args:
        bases: types that count with all derived from them.
        exactly: types that count alone.
        named: which names of types count; only for these all types are gone through.
    """
    given = {id(kind) for kind in (*bases, *exactly)}
    kinds = _with_subtypes(*bases) | {id(kind): kind for kind in exactly}
    if named is not None:
        kinds |= {
            number: kind
            for number, kind in _with_subtypes(object).items()
            if named(kind.__name__) and not issubclass(kind, type)
        }
    counts = {number: sys.getrefcount(kind) for number, kind in kinds.items()}
    looked = dict[int, type]()
    for number, kind in kinds.items():
        # Nothing of it is alive, since nothing was and as much refers to the type now: a new object
        # would refer to it, too. So do the arguments, to those that are given.
        of, before = _WITHOUT_OBJECTS.get(number, (None, 0))
        same = _COUNTED and of is not None and of() is kind and before == counts[number]
        if number in given or not same:
            looked[number] = kind
    # An object of a Python class refers to it. No list of all objects is made: a tuple that another
    # thread is making cannot grow while anybody refers to it, and that thread gets a SystemError.
    referrers = gc.get_referrers(*looked.values()) if looked else []
    found = [each for each in referrers if id(type(each)) in looked]
    some = {id(type(each)) for each in found}
    for number, kind in looked.items():
        if number not in some:
            _WITHOUT_OBJECTS[number] = weakref.ref(kind), counts[number]
    return found


def _with_subtypes(*bases: type) -> dict[int, type]:
    """These types and all derived from them, by their ids, as types may hash by Python."""
    found = {id(kind): kind for kind in bases}
    waiting, subtypes = list(bases), cast(Callable[[type], list[type]], type.__subclasses__)
    for kind in waiting:
        for subtype in subtypes(kind):
            if id(subtype) not in found:
                found[id(subtype)] = subtype
                waiting.append(subtype)
    return found


def alive_after_collecting(
    find: Callable[[list[Any]], list[T]], look: Callable[[], list[Any]], among: list[Any] | None
) -> list[T]:
    """What there is to find among all that is alive, and not only waiting to be collected.

    Args:
        look: gives all that is alive.
        among: what it gave a moment ago, if it was called; what it gives after collecting is put
            in its place.
    """
    among = look() if among is None else among
    if not find(among):
        return []
    among.clear()  # it would keep them
    gc.collect()
    among += look()
    return find(among)

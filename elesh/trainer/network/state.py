"""The state of a network and of the random generators, saved and restored; a network that computes
uncompiled and in its own precision meanwhile.

Promises: after :func:`preserved` nothing that a caller can see differs: global random states of
PyTorch, Python and NumPy, generators that the network or its code refers to, and of every module
(those included that hooks and replaced methods refer to) attributes, flags, buffers and caches.
Parameters are not copied: only embeddings that rescale their rows in a forward pass change any.

Compiled networks are unwrapped when they are given, run uncompiled while hooks are on them, and
compiled anew after their structure changed: a compiled function keeps what it was compiled from, it
does not see hooks that come later, and it is no longer compiled after a few changes of shape
(``recompile_limit``). Where nothing was compiled in this process, nothing of the compiler is
imported.

Generators are found that a method, a function that it calls, a closure, or a module of the user's
that it imports names; code of installed libraries is not followed further than its own globals.

Autocast, of the caller or of the network's own ``forward`` (Accelerate wraps it in one), rounds to
bfloat16: what is measured or exported under it says little about a unit.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import operator
import random
import sys
import sysconfig
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import (
    Callable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
)
from dataclasses import dataclass
from pathlib import Path
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from .calling import device_of
from .traversal import modules_in, parameters_in


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, where ``torch.compile(network)``, or a wrapper for several processes or
    devices, was given."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@dataclass(eq=False)
class Uncompiled:
    """While any of these is entered, compiled networks run uncompiled in this process.

    They may be left in any order; the last one restores the compiler's stance of before. One that
    is never left ends with its network: a masked network that is gone stops no compiler.
    """

    model: nn.Module
    _leave: weakref.finalize[[], nn.Module] | None = None
    _entered: ClassVar[int] = 0
    _stance: ClassVar[Any] = None

    def __enter__(self) -> Uncompiled:
        if self._leave is None and "torch._dynamo" in sys.modules:
            if not Uncompiled._entered:
                Uncompiled._stance = torch.compiler.set_stance("force_eager")
            Uncompiled._entered += 1
            self._leave = weakref.finalize(self.model, Uncompiled._one_left)
            self._leave.atexit = False
        return self

    def __exit__(self, *error: object) -> None:
        if self._leave is not None:
            self._leave()
            self._leave = None

    @staticmethod
    def _one_left() -> None:
        Uncompiled._entered -= 1
        if not Uncompiled._entered:
            stance, Uncompiled._stance = Uncompiled._stance, None
            stance.__exit__(None, None, None)


GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_NOT_LOOKED_AT = ("torch.", "builtins", "elesh.", "leyline.")
"""Modules whose classes draw from the global states alone."""
_PLACES = ("stdlib", "platstdlib", "purelib", "platlib")
_INSTALLED = (*map(sysconfig.get_path, _PLACES), str(Path(__file__).parents[2]))
"""Where Python's and other people's code lies, and Elesh's own."""
NOT_FOLLOWED = "_not_followed"
"""An attribute of Elesh's own classes that hold nothing which a forward pass changes, but copies of
the network and of what it once was."""
_DEPTH = 6
"""How many containers and objects deep attributes of a module are followed."""
_SORTS: dict[str, tuple[type, ...]] = {
    "nothing": (Tensor, str, bytes, int, float, type, ModuleType, np.ndarray),
    "mapping": (MutableMapping,),
    "list": (list, deque),
    "set": (set,),
    "tuple": (tuple,),
    "other container": (MutableSequence, MutableSet, frozenset),
    "partial": (functools.partial,),
    "method": (MethodType,),
    "function": (FunctionType,),
    "cell": (CellType,),
}
"""What refers to others, and how; the first that fits."""
_LEFT_ALONE = (
    *(nn.Module, nn.Parameter, torch.optim.Optimizer, Dataset, DataLoader, type, ModuleType),
    *(str, bytes, int, float, complex, type(None), *GENERATORS),
)
"""Not put back: no state of a forward pass, immutable, or put back by other code."""
_PLAIN = frozenset((str, bytes, int, float, bool, complex, type(None), torch.Tensor, nn.Parameter))
"""Types that refer to nothing else."""
_LONG, _MANY = 1000, 20_000
"""Longer containers hold data, and what is further away than so many objects is not the model's."""
_CONSTANT = frozenset((str, bytes, int, float, bool, complex, type(None), nn.Parameter))
_BARE = frozenset((dict, OrderedDict, list, set))
"""Containers of which a module has a dozen empty ones: hooks of all kinds."""
PutBack = Callable[[], None]


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed Python's and NumPy's generators and those of the CPU and of one device.

    Not ``torch.manual_seed``: that seeds those of devices that have nothing to do with the model.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


_plain = threading.local()
"""How many blocks of :func:`full_precision` this thread is in."""
_switching = threading.Lock()
_blocks = 0
_enter, _exit = torch.autocast.__enter__, torch.autocast.__exit__


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """No autocast in this thread, neither on the network's devices nor on the processor.

    The network's own is left out, too, if all its parameters are in single precision or more:
    others may not fit their inputs without it.
    """
    parameters = parameters_in(model).values()
    floating = (p for p in parameters if p.is_floating_point())
    own = all(p.dtype.itemsize >= torch.float32.itemsize for p in floating)
    with contextlib.ExitStack() as stack:
        for kind in {parameter.device.type for parameter in parameters} | {"cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if own:
            stack.enter_context(_without_autocast())
        yield


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Blocks of autocast do nothing in this thread; other threads' do what they did."""
    global _blocks
    with _switching:
        _blocks += 1
        torch.autocast.__enter__, torch.autocast.__exit__ = _entered, _left  # type: ignore[method-assign]
    _plain.depth = getattr(_plain, "depth", 0) + 1
    try:
        yield
    finally:
        _plain.depth -= 1
        with _switching:
            _blocks -= 1
            if not _blocks:
                torch.autocast.__enter__, torch.autocast.__exit__ = _enter, _exit  # type: ignore[method-assign]


def _entered(block: torch.autocast) -> Any:
    return block if getattr(_plain, "depth", 0) else _enter(block)  # type: ignore[no-untyped-call]


def _left(block: torch.autocast, *error: Any) -> Any:
    return False if getattr(_plain, "depth", 0) else _exit(block, *error)


@contextlib.contextmanager
def preserve_state(model: nn.Module, seed: int, *others: Any) -> Iterator[None]:
    """Evaluation mode with gradients, uncompiled, seeded and without autocast; all is preserved.

    Gradients are on even inside a caller's ``no_grad`` or ``inference_mode``; parameters' ``grad``
    is not touched as long as the body uses ``torch.autograd.grad``. Statistics are taken in the
    network's own precision, whatever a caller's or the network's ``autocast`` says.

    Args:
        others: whose generators are preserved, too (data loaders).
    """
    with (
        preserved(model, *others),
        torch.inference_mode(False),
        torch.enable_grad(),
        full_precision(model),
        Uncompiled(model),
    ):
        seed_generators(device_of(model), seed)
        evaluated(model)
        yield


def evaluated(model: nn.Module) -> None:
    """Put a model into evaluation mode, in which all activations have an axis of channels."""
    model.eval()
    drop_cached(model)
    for module in modules_in(model).values():
        if isinstance(module, nn.TransformerEncoder):
            # It would pack padded batches into nested tensors, which have no channel axis.
            module.use_nested_tensor = False


_HELD = ("_parameters", "_buffers", "_modules")


def drop_cached(model: nn.Module) -> None:
    """Have modules let go of what they have worked out of their parameters since they were put into
    evaluation mode (LeViT's biases of positions), as they do when they are put into training; and
    autocast of the casts that it keeps."""
    torch.clear_autocast_cache()
    for module in modules_in(model).values():
        if module.training or type(module).train is nn.Module.train or not _keeps_any(module):
            continue
        modes = [(part, part.training) for part in module.modules()]
        module.train()
        module.eval()
        for part, mode in modes:
            part.training = mode


def _keeps_any(module: nn.Module) -> bool:
    """Whether a module holds tensors that are no parameters, nor buffers."""

    def tensor_in(value: Any) -> bool:
        if isinstance(value, Mapping):
            value = tuple(value.values())
        return isinstance(value, Tensor) or (
            isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value)
        )

    held = vars(module).items()
    return any(tensor_in(value) for name, value in held if name not in _HELD)


@contextlib.contextmanager
def preserved(model: nn.Module, *others: Any) -> Iterator[None]:
    """Put back random states, and what modules hold, whatever the body does.

    Args:
        others: whose generators are preserved, too (data loaders).
    """
    device = device_of(model)
    accelerators = [device] if device.type != "cpu" else []
    modules, generators = _reachable(model, *others)
    restore = [kept(generator) for generator in generators]
    seen: dict[int, Any] = {}
    restore += [put_back for module in modules for put_back in _module(module, seen)]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
        python, legacy = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
            for put_back in restore:
                put_back()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage in cycles: it would go through all that the process holds, again and
    again, where objects are made by the ten thousand and let go by their counts."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def trainable() -> Iterator[None]:
    """What is made inside can be trained, also where the caller is in ``inference_mode``."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _reachable(model: nn.Module, *others: Any) -> tuple[list[nn.Module], list[Any]]:
    """Modules that a call of the model may run, and random generators that it may draw from."""
    modules: list[nn.Module] = []
    generators: list[Any] = []
    seen: dict[int, Any] = {}
    kinds: set[type] = set()
    named: dict[int, dict[str, Any]] = {}
    queue = deque((thing, 0) for thing in (model, *others))
    while queue and len(seen) < _MANY + len(modules):
        thing, depth = queue.popleft()
        if id(thing) in seen or depth > _DEPTH:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, GENERATORS):
            generators.append(thing)
            continue
        if isinstance(thing, nn.Module):
            modules.append(thing)
            depth, parts = 0, [*vars(thing).values(), *drawn_by(type(thing), kinds, named)]
        else:
            parts = list(_parts(thing, named))
            kind: Any = type(thing)
            if _sort_of_type(kind) == "object":  # A data set, a sampler, an augmentation.
                parts += drawn_by(kind, kinds, named)
        # Without those that lead nowhere.
        parts = [p for p in parts if type(p) not in _PLAIN and (type(p) not in _BARE or p)]
        queue += [(part, depth + 1) for part in parts]
    return modules, generators


def _parts(thing: Any, named: dict[int, dict[str, Any]] | None = None) -> Iterator[Any]:
    """What a container, a function or an object refers to."""
    kind: Any = type(thing)
    sort = _sort_of_type(kind)
    if sort == "mapping":
        yield from list(thing.values())
    elif sort in ("list", "set", "tuple", "other container"):
        # Data sets are sequences of millions.
        yield from list(thing) if len(thing) <= _LONG else []
    elif sort == "partial":
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif sort == "method":
        yield from (thing.__self__, thing.__func__)
    elif sort == "function":
        yield from (*(thing.__closure__ or ()), *(thing.__defaults__ or ()))
        yield from named_by(thing, {} if named is None else named)
    elif sort == "cell":
        with contextlib.suppress(ValueError):  # An empty cell.
            yield thing.cell_contents
    elif sort == "object" and hasattr(thing, "__dict__") and not hasattr(thing, NOT_FOLLOWED):
        yield from list(vars(thing).values())


@functools.lru_cache(4096)
def _sort_of_type(kind: Any) -> str:
    """What objects of a type are to those who follow references; asked a hundred thousand times."""
    return next((sort for sort, kinds in _SORTS.items() if issubclass(kind, kinds)), "object")


def _module(module: nn.Module, seen: dict[int, Any]) -> Iterator[PutBack]:
    """What puts a module's attributes back, and what they hold."""
    training = module.training
    yield from _held(vars(module), seen, 0)
    yield lambda: None if module.training == training else setattr(module, "training", training)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        yield _tensor(module.weight)


def _held(thing: Any, seen: dict[int, Any], depth: int) -> Iterator[PutBack]:
    """What puts a container, a tensor or an object back into its present state, with its parts."""
    kind: Any = type(thing)
    if id(thing) in seen or depth > _DEPTH or _type_is_left_alone(kind):
        return
    seen[id(thing)] = thing
    inside: list[Any] = []
    sort = _sort_of_type(kind)
    if sort == "nothing":
        if isinstance(thing, np.ndarray):
            yield functools.partial(np.copyto, thing, thing.copy())
        elif (
            isinstance(thing, Tensor)
            # Parameters are known by themselves, too, not only by their type.
            and not (isinstance(thing, nn.Parameter) or thing.is_meta or is_lazy(thing))
            and thing.layout is torch.strided
        ):
            yield _tensor(thing)
    elif sort == "mapping":
        names, inside = list(thing), list(thing.values())
        yield functools.partial(_refill_mapping, thing, names, inside)
    elif sort == "list":
        inside = list(thing)
        yield functools.partial(_refill, thing, inside)
    elif sort == "set":
        yield functools.partial(_refill, thing, list(thing))
    elif sort == "cell":
        inside = list(_parts(thing))
        for content in inside:
            yield functools.partial(setattr, thing, "cell_contents", content)
    elif sort == "function":
        inside = list(thing.__closure__ or ())
    elif sort in ("tuple", "partial", "method"):
        inside = list(_parts(thing))
    elif hasattr(thing, "__dict__") and not hasattr(thing, NOT_FOLLOWED):
        inside = [vars(thing)]
    empty = [part for part in inside if type(part) in _BARE and not part]
    if empty:
        yield functools.partial(_emptied, empty)
    for part in inside if len(inside) <= _LONG else ():
        if not _never_changes(part) and not (type(part) in _BARE and not part):
            yield from _held(part, seen, depth + 1)


def _never_changes(thing: Any) -> bool:
    kind = type(thing)
    if kind is tuple:  # kernel sizes, strides and so on, half of all that layers hold
        return all(type(part) in _CONSTANT for part in thing)
    return kind in _CONSTANT


def _emptied(containers: list[Any]) -> None:
    for container in containers:
        if container:
            container.clear()


@functools.lru_cache(4096)
def _type_is_left_alone(kind: Any) -> bool:
    return issubclass(kind, _LEFT_ALONE)


def _tensor(tensor: Tensor) -> PutBack:
    saved = tensor.detach().clone()

    def put_back() -> None:
        with torch.no_grad():
            if tensor.shape != saved.shape:
                tensor.data = saved
            elif not torch.equal(tensor, saved):
                with torch.inference_mode(tensor.is_inference()):
                    tensor.data.copy_(saved)

    return put_back


def _refill(thing: Any, items: list[Any]) -> None:
    """Have a list or a set hold these very items again; one that does is not touched."""
    if len(thing) != len(items) or not all(map(operator.is_, thing, items)):
        thing.clear()
        (thing.extend if hasattr(thing, "extend") else thing.update)(items)


def _refill_mapping(thing: Any, names: list[Any], values: list[Any]) -> None:
    """The same of a mapping, by its names and values in order."""
    same = len(thing) == len(names) and all(map(operator.is_, thing, names))
    if not same or not all(map(operator.is_, thing.values(), values)):
        thing.clear()
        thing.update(zip(names, values, strict=True))


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

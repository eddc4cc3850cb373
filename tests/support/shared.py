"""What all test processes of a run share: a folder, in which whoever comes first makes a thing."""

from __future__ import annotations

import fcntl
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def quick_first(cases: Iterable[object], count: int = 1) -> list[object]:
    """The cases of a test for ``parametrize``: the first ones are quick, the others slow."""
    import pytest  # Not where a script imports this file.

    given = list(cases)
    slow = [pytest.param(case, marks=pytest.mark.slow) for case in given[count:]]
    return [*given[:count], *slow]


@cache
def shared_folder() -> Path:
    """The folder that ``conftest.py`` names; outside of a test run one of this process."""
    return Path(os.environ.get("ELESH_TEST_SHARED") or tempfile.mkdtemp(prefix="elesh-shared-"))


@contextmanager
def one_thread() -> Iterator[None]:
    """What is made so has the same bits with any number of threads, and small networks are trained
    no slower where more threads than cores would wait for each other."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(threads)


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder of that name that ``make`` has filled, in this process or another one."""
    folder = shared_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            with one_thread():
                make(folder)
            (folder / "made").touch()
    return folder


def kept(name: str, make: Callable[[], T]) -> T:
    """What ``make`` returned to the first process that asked for that name."""

    def write(folder: Path) -> None:
        (folder / "kept.pickle").write_bytes(pickle.dumps(make()))

    found: T = pickle.loads((once(name, write) / "kept.pickle").read_bytes())
    return found

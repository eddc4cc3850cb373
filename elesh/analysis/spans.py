"""Names for the stages of an analysis, so that a caller can time them; the analysis has no clock.

``@stage("select")`` on a function, or ``with stage("select"):`` around a few lines, names what is
being done. The names go to the observer of :func:`observed`, or nowhere. The compute child observes
them, and its supervisor makes spans of the times. Results never depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

__all__ = ["Observer", "observed", "stage"]

Observer = Callable[[str], AbstractContextManager[None]]
"""Called with the name of a stage; what it returns is entered and left around it."""
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """One stage; they may be nested. Threads that the analysis starts have no stages."""
    observer = _observer.get()
    if observer is None:
        yield
        return
    with observer(name):
        yield


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call ``observer`` for every stage inside the block."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)

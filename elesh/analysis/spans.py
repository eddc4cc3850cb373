"""Names for the spans of an analysis, so that a caller can time them; the analysis has no clock.

``@span("select")`` on a function, or ``with span("select"):`` around a few lines, names what is
being done. The names go to the observer of :func:`observed`, or nowhere. The compute child observes
them, and its supervisor records them in its trace. Results never depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

Observer = Callable[[str], AbstractContextManager[None]]
"""Called with the name of a span; what it returns is entered and left around it."""
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def span(name: str) -> Iterator[None]:
    """One span; they may be nested. Threads that the analysis starts have no spans."""
    observer = _observer.get()
    if observer is None:
        yield
        return
    with observer(name):
        yield


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call ``observer`` for every span inside the block."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)

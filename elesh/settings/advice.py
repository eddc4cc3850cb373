"""Advice on given settings: those that have no effect, and those that are retired. For ``elesh
config check``; loading warns of retired keys.

Promises: whatever is given and not named acts. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ._base import why_retired

if TYPE_CHECKING:
    from . import Settings


CONSTANTS = {
    "bus.stream_length": "streams are trimmed as they are read; where one fills, add workers",
    "worker.preload": "185 MB of idle memory buy the first window its first second",
    "worker.shard_bytes": "only levels of more than 1 GiB are split; layers_per_worker says how",
    "worker.prefetch": "a worker finds its own number from how long analyses take, at most 32",
    "audit.seconds": "an entry is written within seconds; nothing waits for it",
}
"""Keys that are read over for one more version, each with the reason why it is a constant."""


def advisory(settings: Settings) -> tuple[tuple[str, str], ...]:
    """Keys that file, environment or arguments give and nothing depends on, with the reason."""
    found = ((key, reason) for key, reason in _found(settings) if _given(settings, key))
    retired = ((key, f"is retired: {reason}") for key, reason in retired_keys(settings))
    return (*found, *retired)


def retired_keys(section: BaseModel, path: str = "") -> Iterator[tuple[str, str]]:
    """Retired keys that are given, each with the reason why it is not a setting now."""
    for name in sorted(section.model_fields_set):
        reason, value = why_retired(type(section).model_fields[name]), getattr(section, name)
        if reason:
            yield path + name, reason
        elif isinstance(value, BaseModel):
            yield from retired_keys(value, f"{path}{name}.")


def without_constants(values: dict[str, Any]) -> dict[str, str]:
    """Take the keys of :data:`CONSTANTS` out of settings that are given by section; those that were
    there, with their reasons."""
    found = {}
    for key, reason in CONSTANTS.items():
        section, _, name = key.partition(".")
        given = values.get(section)
        if isinstance(given, dict) and name in given:
            values[section] = {other: each for other, each in given.items() if other != name}
            found[key] = reason
    return found


def _found(settings: Settings) -> Iterator[tuple[str, str]]:
    worker, limit = settings.worker, settings.analysis_timeout
    yield "analysis_workers_per_gpu", "starts no worker: elesh plan --gpus counts with it"
    if worker.threads <= settings.parallel_analysis_threads:
        used = f"a worker uses worker.threads, which is {worker.threads}"
        yield "parallel_analysis_threads", f"is the most that may be used: {used}"
    if worker.window_seconds is not None and worker.window_seconds > limit:
        yield "worker.window_seconds", f"is more than analysis_timeout, which is {limit:g}"
    if not settings.bus.security.keyring:
        yield "bus.security.require_signatures", "nothing is checked without bus.security.keyring"


def _given(settings: Settings, key: str) -> bool:
    section, *rest = key.split(".")
    holder = settings
    for name in rest:
        if section not in holder.model_fields_set:
            return False
        holder, section = getattr(holder, section), name
    return section in holder.model_fields_set

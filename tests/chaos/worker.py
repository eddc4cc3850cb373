"""A worker of the chaos driver: the real one with the obedient child, or with a mutation.

``--mutate`` proves that the audit can fail: ``acknowledge-first`` ends an entry before its result
is stored (a worker killed in between loses it), ``forget-records`` settles without looking whether
the key was decided.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

from elesh.bus.core import Bus
from elesh.bus.scripts import Scripts
from elesh.bus.streams.consumer_groups import Groups
from elesh.observe import setup_logging
from elesh.settings import Settings
from elesh.worker import serve
from elesh.worker.compute import process as compute

_WINDOW = 0.5
"""Seconds between acknowledging and storing in the mutant."""


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    for name in ("--url", "--settings", "--name"):
        parser.add_argument(name, required=True)
    parser.add_argument("--mutate", choices=["acknowledge-first", "forget-records"])
    options = parser.parse_args()
    setup_logging("plain")
    compute.CHILD = "tests.chaos.child"
    Bus.stream_length = 10_000_000  # the audit reads every entry in the end
    if options.mutate:
        _MUTATIONS[options.mutate]()
    asyncio.run(serve(options.url, Settings.load(options.settings), options.name))


def _patched(old: str, new: str) -> None:
    """Have ``commit.lua`` run with one line replaced."""
    make = Scripts.__init__

    def init(self: Scripts, client: Any) -> None:
        make(self, client)
        text, _ = self._texts["commit"]
        assert text.count(old) == 1, f"commit.lua has no single {old!r} any more"
        text = text.replace(old, new)
        self._texts["commit"] = text, hashlib.sha1(text.encode()).hexdigest()

    Scripts.__init__ = init  # type: ignore[method-assign]


def _acknowledge_first() -> None:
    _patched("if not owned(source, ARGV[1], ARGV[2], ARGV[3]) then", "if false then")
    commit, renew = Bus.commit, Groups.renew
    ended: set[str] = set()

    async def early(self: Bus, group: str, consumer: str, delivery: Any, *more: Any) -> Any:
        ended.add(delivery.entry_id)
        await self.acknowledge(group, consumer, delivery)
        await asyncio.sleep(_WINDOW)
        return await commit(self, group, consumer, delivery, *more)

    async def unaware(self: Groups, group: str, consumer: str, held: Sequence[Any]) -> Any:
        return await renew(self, group, consumer, [d for d in held if d.entry_id not in ended])

    Bus.commit, Groups.renew = early, unaware  # type: ignore[method-assign]


def _forget_records() -> None:
    _patched("if not stored then", "if true then")

    async def nothing(self: Bus, key: Any) -> None:
        return None

    Bus.record = nothing  # type: ignore[method-assign]


_MUTATIONS = {"acknowledge-first": _acknowledge_first, "forget-records": _forget_records}

if __name__ == "__main__":
    main()

"""``python -m tests.fuzz --count N --seed S``: mutated bytes through every reader, with figures.

``--worker N`` publishes N hostile messages and blobs to a real worker on a server of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import os
import resource
import sys
import tempfile
from pathlib import Path

from .run import fuzz

sys.path.extend(str(Path(__file__).parents[1] / "support" / name) for name in ("", "nets"))


def main() -> int:
    """Fuzz, print what came of it; 1 if anything but a named refusal did."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--worker", type=int, default=0, help="messages to a real worker")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    return _worker(asked.worker, asked.seed) if asked.worker else _readers(asked.count, asked.seed)


def _readers(count: int, seed: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = fuzz(count, seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    codes = collections.Counter(result.code for result in results)
    slowest = max(results, key=lambda result: result.seconds)
    print(f"{count} inputs: {dict(codes.most_common())}")
    print(f"slowest {slowest.seconds * 1000:.1f} ms ({slowest.reader}); memory grew {grown:.0f} MB")
    for result in results:
        if result.code.startswith("!"):
            print(f"{result.reader} seed {seed} input {result.number}: {result.code}")
    return 1 if any(code.startswith("!") for code in codes) else 0


def _worker(count: int, seed: int) -> int:
    from elesh.bus import embedded_server

    from .siege import besiege

    with tempfile.TemporaryDirectory(prefix="elesh-siege-") as name:
        os.environ["ELESH_STATE_DIR"] = name
        with embedded_server(Path(name)) as url:
            found = asyncio.run(besiege(url, "siege", Path(name), count, seed))
    print(f"{found.entries} entries in {found.seconds:.0f} s, {found.rate:.0f} a second")
    print(f"ends: {dict(found.ends.most_common())}")
    peaks = found.supervisor_peak >> 20, found.child_peak >> 20
    print(f"peak memory: supervisor {peaks[0]} MB, compute child {peaks[1]} MB")
    print(*found.violations or ["no violation"], sep="\n")
    return 1 if found.violations or found.entries < count else 0


if __name__ == "__main__":
    sys.exit(main())

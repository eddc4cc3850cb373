"""``python -m tests.fuzz --count N --seed S``: mutated bytes through every reader, with figures."""

from __future__ import annotations

import argparse
import collections
import resource
import sys

from .run import fuzz


def main() -> int:
    """Fuzz, print what came of it; 1 if a reader raised anything but a named refusal."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = fuzz(asked.count, asked.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    codes = collections.Counter(result.code for result in results)
    slowest = max(results, key=lambda result: result.seconds)
    print(f"{asked.count} inputs: {dict(codes.most_common())}")
    print(f"slowest {slowest.seconds * 1000:.1f} ms ({slowest.reader}); memory grew {grown:.0f} MB")
    for result in results:
        if result.code.startswith("!"):
            print(f"{result.reader} seed {asked.seed} input {result.number}: {result.code}")
    return 1 if any(code.startswith("!") for code in codes) else 0


if __name__ == "__main__":
    sys.exit(main())

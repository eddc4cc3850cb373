"""Random networks by the thousand: ``python -m tests.random_graphs --count 10000 --seed 0``.

After any decision the network runs and computes what the masked one did, every minimum, group,
multiple and key/value group holds, and the parameter count is the predicted one. Ends with 1 and
names the seed of every case where something does not hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.extend(
    str(Path(__file__).parent / "support" / name) for name in ("", "nets", "random_networks")
)

from random_cases import Tally, check


def main() -> int:
    """Run the cases; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="The first seed.")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    begun, tallies, failed = time.monotonic(), list[Tally](), 0
    for seed in range(asked.seed, asked.seed + asked.count):
        try:
            tallies.append(check(seed))
        except Exception as error:  # every failure is told, whatever it is
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
        if (seed + 1 - asked.seed) % 500 == 0:
            print(f"{seed + 1 - asked.seed} cases, {failed} failed", flush=True)
    print(
        f"{len(tallies)} of {asked.count} cases hold in {time.monotonic() - begun:.0f} s: "
        f"{sum(t.channels for t in tallies)} channels, {sum(t.heads for t in tallies)} heads and "
        f"{sum(t.layers for t in tallies)} layers went; "
        f"{sum(t.approved for t in tallies)} decisions approved"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m tests.chaos --seed S --minutes M``: one run of the chaos driver, and its verdict."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[1] / "support" / name) for name in ("", "nets"))

from .audit import Facts, Report, audit, p99
from .driver import Chaos, Plan


def main() -> int:
    """Run, audit, print; exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--lease", type=float, default=15.0, help="seconds; the default is Elesh's")
    parser.add_argument("--pause", type=float, default=4.0, help="mean seconds between faults")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between checkpoints")
    parser.add_argument("--mutate", default="", help="break Elesh on purpose; see worker.py")
    parser.add_argument("--folder", type=Path, help="logs and data; default: a new one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="elesh-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - begun:7.1f}  {line}", file=sys.stderr, flush=True)

    plan = Plan(
        seed=options.seed,
        seconds=60 * options.minutes,
        folder=folder,
        workers=options.workers,
        lease=options.lease,
        fault_pause=options.pause,
        producer_pause=options.every,
        mutation=options.mutate,
        tell=tell,
    )
    facts = asyncio.run(_run(plan))
    report = audit(facts)
    figures = _figures(facts, report)
    (folder / "report.json").write_text(json.dumps(figures, indent=2))
    print(json.dumps(figures, indent=2))
    tell(f"{'every promise was kept' if report.clean else 'BROKEN'}; logs in {folder}")
    return 0 if report.clean else 1


async def _run(plan: Plan) -> Facts:
    return await Chaos(plan).run()


def _figures(facts: Facts, report: Report) -> dict[str, object]:
    steps = Counter(event.step for event in facts.telemetry)
    return {
        "events": len(facts.checkpoints),
        "keys": len(set(facts.checkpoints.values())),
        "decisions": len(facts.decisions),
        "dead_letters": Counter(dead_letter.error_code for dead_letter in facts.dead_letters),
        "faults": Counter(str(fault.kind) for fault in facts.faults),
        "steps": steps,
        "listened_for": len(facts.asked),
        "heard": len(facts.asked & facts.answered),
        "recoveries": len(report.recoveries),
        "offered_again_p99_seconds": p99(report.offers),
        "running_again_p99_seconds": p99(report.recoveries),
        "of_which_somebody_had_a_free_hand": p99(report.unattended),
        "violations": report.violations,
    }


if __name__ == "__main__":
    raise SystemExit(main())

"""Workers that a script starts beside itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

_SCRIPT = """
import sys
from pathlib import Path
import psutil
from elesh.demo.fleet import fleet

with fleet("redis://127.0.0.1:1/0", 1, None, Path(sys.argv[1])):
    print(*[child.pid for child in psutil.Process().children()], flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_workers_end_with_a_script_that_is_killed(tmp_path: Path) -> None:
    script = [sys.executable, "-c", _SCRIPT, str(tmp_path)]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(workers) == 1
        process.kill()
        gone, alive = psutil.wait_procs(workers, timeout=60)
    for each in alive:
        each.kill()
    assert gone == workers

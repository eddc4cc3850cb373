"""Every example runs as its first lines say, alone, and cuts something."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("[0-9]*.py"))


FRAMEWORKS = ("lightning", "hf_trainer")
"""Soak: in CI, test_lightning_and_hugging_face.py does what these callbacks do."""
SHORTER = """
import importlib.util, runpy, sys
find, left_out = importlib.util.find_spec, {"onnxscript"}
importlib.util.find_spec = lambda name, *more: None if name in left_out else find(name, *more)
names = runpy.run_path(sys.argv[1], run_name="example")["main"].__globals__
schedule = dict.fromkeys(names.get("SCHEDULE", ()), 1)
names |= {"EPOCHS": 6 if schedule else 2, "SCHEDULE": schedule | {"aggressive_epochs": 3}}
names["main"]()
"""
"""CI trains fewer epochs than the examples do, and leaves ONNX to tests/pruning/test_saved.py."""


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=pytest.mark.soak if path.stem[3:] in FRAMEWORKS else pytest.mark.slow,
        )
        for path in EXAMPLES
    ],
)
def test_an_example_runs_and_ends_smaller(example: Path) -> None:
    ends_smaller("-c", SHORTER, str(example))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.soak
def test_an_example_runs_as_it_stands_there(example: Path) -> None:
    ends_smaller(str(example))


def ends_smaller(*program: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "ELESH_REDIS_URL"}
    done = subprocess.run(
        [sys.executable, *program],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = re.search(r"parameters (\d+) -> (\d+), accuracy ([\d.]+)", done.stdout)
    assert sizes, done.stdout
    before, after, accuracy = int(sizes[1]), int(sizes[2]), float(sizes[3])
    assert after < before, done.stdout + done.stderr
    assert accuracy > 0.5


def test_there_are_examples_and_they_are_numbered() -> None:
    assert [path.name[:2] for path in EXAMPLES] == [f"{n:02d}" for n in range(1, len(EXAMPLES) + 1)]
    assert len(EXAMPLES) >= 3

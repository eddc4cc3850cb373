"""``elesh`` as tests call it: the program itself in this process, or in one of its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import NamedTuple
from unittest.mock import patch

from elesh.cli import main


class Done(NamedTuple):
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


def elesh(*arguments: str, environment: Mapping[str, str] | None = None) -> Done:
    """A command in this process, on a terminal of 200 columns unless ``environment`` says another
    width: a process of its own would spend two seconds on imports."""
    out, err, code = StringIO(), StringIO(), 0
    with (
        patch.dict(os.environ, {"COLUMNS": "200"} | dict(environment or {})),
        patch.object(sys, "argv", ["elesh", *arguments]),
        logging_kept(),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    return Done(code, out.getvalue(), err.getvalue())


def elesh_process(
    *arguments: str, environment: Mapping[str, str], of: Sequence[str] = ("-m", "elesh.cli")
) -> Done:
    """A command in a process of its own: what starts workers, trains, or must be seen to end.

    Args:
        of: how Python is told the program.
    """
    done = subprocess.run(
        [sys.executable, *of, *arguments],
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | dict(environment),
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@contextmanager
def logging_kept() -> Iterator[None]:
    """Handlers and levels of the logs are afterwards as they were."""
    logger, root = logging.getLogger("elesh"), logging.getLogger()
    before = [(each, each.handlers[:], each.level, each.propagate) for each in (logger, root)]
    try:
        yield
    finally:
        for each, handlers, level, propagate in before:
            each.handlers[:], each.propagate = handlers, propagate
            each.setLevel(level)

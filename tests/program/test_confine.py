"""While a program runs, nothing can be opened, and afterwards everything can again."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

from elesh.program.measure import _load_what_is_lazy, confined


def test_no_file_and_no_socket_can_be_opened_inside(tmp_path: Path) -> None:
    open_before = (tmp_path / "before").open("w")
    with confined():
        with pytest.raises(OSError, match="Too many open files"):
            socket.socket()
        with pytest.raises(OSError, match="Too many open files"):
            os.open(tmp_path / "new", os.O_CREAT | os.O_WRONLY)
        with pytest.raises(OSError, match="File too large"):
            os.write(open_before.fileno(), b"x")
    socket.socket().close()
    open_before.write("x")
    open_before.close()
    assert (tmp_path / "before").read_text() == "x"


def test_limits_come_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), confined():
        raise ZeroDivisionError
    with socket.socket() as opened:
        assert opened.fileno() >= 0


def test_what_measures_can_be_imported_without_gradients() -> None:
    with torch.inference_mode(), torch.device("meta"):
        _load_what_is_lazy()

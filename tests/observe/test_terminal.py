"""Text of strangers is shown on a terminal and in logs: it neither steers it nor adds lines."""

from __future__ import annotations

import io
import json
import logging

import pytest
from rich.table import Table
from rich.text import Text

from elesh.observe import get_logger, setup_logging
from elesh.observe.logs import printable
from elesh.observe.terminal import Terminal, escape

HOSTILE = "a\x1b]0;owned\x07b\x1b[2Jc\x9b2Jd\x7fe\u202ef\u2028g\x00h\ud800i\rj\bk"
FORBIDDEN = [c for c in HOSTILE if not "a" <= c <= "z" and c not in "[]2J0;"]


def printed(*things: object) -> str:
    stream = io.StringIO()
    Terminal(file=stream, force_terminal=True, width=200, color_system=None).print(*things)
    return stream.getvalue()


@pytest.mark.parametrize(
    "thing", [HOSTILE, Text(HOSTILE), Text.assemble((HOSTILE, "red")), "[bold]" + HOSTILE + "[/]"]
)
def test_whatever_is_printed_carries_no_control_character(thing: object) -> None:
    table = Table("x", title=HOSTILE)
    table.add_row(thing)  # type: ignore[arg-type]
    shown = printed(thing, table)
    assert not [c for c in FORBIDDEN if c in shown]
    assert "\\u001b[2J" in shown
    assert "\\u009b2J" in shown


def test_a_text_of_one_line_begins_no_other_and_is_no_markup() -> None:
    shown = printed(f"[red]{escape('one' + chr(10) + 'two [bold]three[/] [/]')}[/]")
    assert shown == "one\\u000atwo [bold]three[/] [/]\n"


def test_printable_keeps_what_people_write_and_leaves_json_json() -> None:
    assert printable("Grüße, 你好, \N{MINUS SIGN}1 → 2") == "Grüße, 你好, \N{MINUS SIGN}1 → 2"
    assert printable("a\tb\nc", lines=True) == "a\tb\nc"
    text = json.dumps({"detail": "x\x9b2J\x7f"}, ensure_ascii=False)
    assert json.loads(printable(text)) == {"detail": "x\x9b2J\x7f"}


@pytest.mark.parametrize("style", ["json", "plain"])
def test_a_log_line_is_one_line_whatever_is_in_it(
    style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(style)  # type: ignore[arg-type]
    get_logger("elesh.test").warning("breaker", reason=f"{HOSTILE}\n12:00:00 info decision settled")
    logging.getLogger("elesh").handlers[0].flush()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert not [c for c in FORBIDDEN if c in lines[0]]
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        get_logger("elesh.test").exception("lost")
    logging.getLogger("elesh").handlers[0].flush()
    assert not [c for c in FORBIDDEN if c in capsys.readouterr().err]

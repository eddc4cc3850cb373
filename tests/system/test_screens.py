"""What people see on a terminal of 80 columns, and what scripts get: whole, in order, without a
traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from head_networks import checkpoint as heads_checkpoint
from head_networks import transformer
from rich.console import Console, RenderableType
from station import Station, checkpoint

from elesh import analyze
from elesh.bus import Bus, DeadLetterEntry
from elesh.cli import main
from elesh.demo.screen import report_tables
from elesh.demo.training import Cut, Report
from elesh.operate.actions import operator
from elesh.operate.events import formatted_events
from elesh.operate.explain import print_decision
from elesh.operate.fleet_status import fleet_status, fleet_status_of
from elesh.operate.replay import changes
from elesh.trainer import Evaluation
from leyline import DeadLetter, Level, PruningOutcome, TelemetryEvent, Verification
from leyline.streams import DEAD, OUTCOMES, STREAMS, TELEMETRY


class Done(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Done]


@pytest.fixture
def call(
    redis_url: str,
    partition: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Call:
    """The program itself, in this process, at 80 columns."""
    monkeypatch.setenv("ELESH_REDIS_URL", redis_url)
    monkeypatch.setenv("ELESH_BUS__PARTITION", partition)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["elesh", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        return Done(code, *capsys.readouterr())

    return run


def drawn(*what: RenderableType, width: int = 80) -> str:
    page = io.StringIO()
    Console(file=page, width=width, highlight=False).print(*what, sep="\n")
    return page.getvalue()


REASON = "statistics.stem/taylor_importance: expected shape (64,), found shape (63,), " * 3


def dead_letter() -> DeadLetter:
    return DeadLetter.model_validate(
        {
            "stream": "checkpoints",
            "entry_id": "1736856000250-0",
            "error_code": "shape_mismatch",
            "reason": REASON,
            "deliveries": 4,
            "worker_id": "a-worker-with-a-long-name",
            "at": "2026-01-01T00:00:00Z",
            "original": {"envelope": b"x"},
        }
    )


async def published_dead_letter(bus: Bus) -> str:
    return await bus.publish(DEAD, dead_letter(), source="test")


@pytest.mark.parametrize("width", [80, 140])
def test_nothing_that_people_copy_is_cut_off_in_the_fleet_s_overview(
    station: Station, width: int
) -> None:
    decision = analyze(checkpoint())
    seen = station.on_bus(fleet_status_of)
    backlog = {**seen.backlog, "redeliveries": replace(seen.backlog["redeliveries"], length=3)}
    letters = [DeadLetterEntry("1-0", dead_letter())]
    filled = replace(seen, backlog=backlog, decisions=[decision], dead_letters=letters)
    text = drawn(fleet_status(filled), width=width)
    assert "checkpoints  " not in text, "a stream that holds nothing has no row"
    places = [text.index(each) for each in ("no worker is alive", "shape_mismatch", "redeliveries")]
    assert places == sorted(places), "what needs somebody comes first"
    for whole in (decision.idempotency_key, "shape_mismatch", "redeliveries", decision.run_id):
        assert whole in text
    assert max(map(len, text.splitlines())) <= width
    assert json.dumps(seen.facts(), default=str)


def test_dead_letters_are_listed_whole(station: Station, call: Call) -> None:
    entry = station.on_bus(published_dead_letter)
    listed = call("dead", "list").out
    assert entry in listed
    assert REASON.strip() in listed
    assert "4 deliveries" in listed
    (line,) = call("dead", "list", "--json").out.splitlines()
    assert json.loads(line) == json.loads(call("dead", "show", entry, "--json").out)


def test_an_explanation_has_every_group_gate_and_reason_whole_at_80_columns() -> None:
    bundle = replace(heads_checkpoint(transformer(16, 16)), levels=(Level.CHANNEL, Level.HEAD))
    decision = analyze(bundle)
    page = io.StringIO()
    print_decision(Console(file=page, width=80, highlight=False), decision, bundle)
    text = page.getvalue()
    assert "…" not in text
    names = {gate.name for gate in decision.safety.gates} | set(decision.units)
    assert len(names) > 9
    for name in names:
        assert name in text
    lines = text.splitlines()
    assert sum(line.split()[2:3] == ["removed"] for line in lines) == sum(
        map(len, decision.units.values())
    )


def test_events_are_told_in_the_order_of_their_times_however_many_there_are(
    station: Station,
) -> None:
    async def publish_and_read(bus: Bus) -> list[tuple[int, int]]:
        sent = []
        for number in range(330):
            stream = OUTCOMES if number % 110 == 0 else TELEMETRY
            message = outcome() if stream is OUTCOMES else event()
            sent.append((stream.name, await bus.publish(stream, message, source="test")))
        told = [e async for e in formatted_events(bus, list(STREAMS), follow=False)]
        assert sorted((e.stream, e.entry_id) for e in told) == sorted(sent)
        return [e.order for e in told]

    order = station.on_bus(publish_and_read)
    assert order == sorted(order)


def event() -> TelemetryEvent:
    key, at = "1:0123456789abcdef:ck:channel", datetime(2026, 1, 1, tzinfo=UTC)
    return TelemetryEvent(step="received", worker_id="w", idempotency_key=key, at=at)


def outcome(key: str = "1:0123456789abcdef:ck:channel", **figures: float) -> PruningOutcome:
    return PruningOutcome(idempotency_key=key, run_id="run", epoch=1, result="applied", **figures)


def test_a_diff_names_gates_and_targets_and_shortens_long_values() -> None:
    before = {
        "gates": [{"name": "a", "passed": True}, {"name": "b", "passed": True}],
        "x": "y" * 999,
    }
    after = {"gates": [{"name": "b", "passed": False}], "x": "z"}
    lines = [str(change) for change in changes(before, after)]
    assert lines[1] == "gates[b].passed: True -> False"
    assert lines[0].startswith("gates[a]: {'name': 'a'")
    assert max(map(len, lines)) < 400
    swapped = {"gates": before["gates"][::-1]}  # type: ignore[index]
    (order,) = changes({"gates": before["gates"]}, swapped)
    assert order.path == "gates (order)"
    assert list(changes({"gates": []}, {"gates": [1]})) != []


def test_the_demo_s_cuts_tell_their_level_and_lose_nothing_in_80_columns() -> None:
    decision = analyze(checkpoint())
    assert decision.approved_for_application
    measured = {
        "samples": 10, "measurements": 1, "proposed": 5, "kept": 3, "loss_before": 1.0,
        "loss_rise": 0.0, "loss_rise_interval": {"low": 0.0, "high": 0.0},
        "accuracy_before": 1.0, "accuracy_drop": 0.0045,
        "accuracy_drop_interval": {"low": -0.131, "high": 0.128}, "confidence": 0.95,
        "class_accuracy_drop": 0.0, "worst_class": 0, "gradient_flow_change": 0.0,
    }  # fmt: skip

    safety = decision.safety.model_copy(
        update={"verification": Verification.model_validate(measured)}
    )
    decision = decision.model_copy(update={"safety": safety})
    cut = Cut.of(decision, outcome(decision.idempotency_key), 0.002)
    assert cut is not None
    assert cut.levels == (Level.CHANNEL,)
    report = Report(Evaluation(1, 0), Evaluation(1, 0), decisions=[decision])
    report.outcomes[decision.idempotency_key] = outcome(decision.idempotency_key)
    architecture = checkpoint().architecture
    text = drawn(*report_tables(report, architecture, architecture))
    row = next(line.split() for line in text.splitlines() if "3/5" in line)
    assert row[:3] == [str(decision.epoch), "channel", "3/5"]
    assert "-13.1..12.8%" in row, "80 columns are enough"
    cuts = text[text.index("Cuts: loss increase") :]
    assert "…" not in cuts


WRONG = [
    (["status", "--redis", "redis://localhost:1"], 1, "is unavailable"),
    (["events", "--redis", "nonsense"], 1, "redis://host:port/0"),
    (["status", "--settings", "nope.yaml"], 1, "nope.yaml"),
    (["status", "--json", "--watch"], 1, "--json"),
    (["analyze", "nope"], 1, "nope/checkpoint.json: there is no such file"),
    (["analyze", __file__], 1, "checkpoint.json: expected a folder"),
    (["validate", "nope"], 1, "nope/checkpoint.json"),
    (["explain", "nonsense"], 1, "<epoch>:<model_hash>:<decision_id>:<level>"),
    (["audit", "export", __file__], 1, "there is such a file already"),
    (["audit", "export", "/nowhere/else"], 1, "/nowhere/else"),
    (["audit", "show", "--kind", "nonsense"], 1, "expected one of decision"),
    (["breaker", "trip", "run", "joint"], 1, "expected channel, head, layer"),
    (["breaker", "trip", "run", "nonsense"], 2, "nonsense"),
    (["dead", "show", "1-1"], 1, "elesh dead list"),
    (["dead", "redrive"], 1, "--all"),
    (["plan", "10", "--seconds", "0"], 2, "--seconds"),
    (["plan", "ten"], 2, "integer"),
    (["keys", "new", "a b"], 1, "expected letters"),
    (["profile", "nets:x:build", "--shape", "1"], 1, "nets:x:build"),
    (["trainer", "--json", "/nowhere/figures.json"], 2, "no such folder"),
    (["trace", "nonsense"], 1, "nothing is recorded here"),
    (["history", "nonsense"], 1, "nonsense"),
    (["replay", "--from", __file__], 1, "elesh capture"),
    (["history", "run-\udcff"], 1, "expected UTF-8"),
    (["breaker", "trip", "a:b", "channel"], 1, "a:b"),
    (["worker", "--name", "x" * 600], 1, "--name"),
]


@pytest.mark.parametrize(("arguments", "code", "named"), WRONG, ids=lambda v: str(v)[:40])
def test_what_is_wrong_is_named_with_an_exit_code_and_no_traceback(
    call: Call, arguments: list[str], code: int, named: str
) -> None:
    done = call(*arguments)
    assert done.code == code, done
    assert named in " ".join(done.err.replace("│", " ").split())
    assert done.out == ""


def test_a_run_s_breakers_are_tripped_and_reset_together_or_by_level(call: Call) -> None:
    call("breaker", "trip", "run-a")
    states = [json.loads(line) for line in call("breaker", "show", "--json").out.splitlines()]
    assert {state["level"] for state in states} == {"channel", "head", "layer"}
    assert {state["state"] for state in states} == {"open"}
    call("breaker", "reset", "run-a", "head")
    left = call("breaker", "show", "--json").out
    assert {json.loads(line)["level"] for line in left.splitlines()} == {"channel", "layer"}
    call("breaker", "reset", "run-a")
    assert call("breaker", "show", "--json").out == ""
    assert "no such breaker" in call("breaker", "reset", "run-a").out


@pytest.mark.parametrize(
    ("run", "reason"), [("run-b", "x" * 9000), ("run-b", "\udcff"), ("a:b", "by hand")]
)
def test_an_action_that_cannot_be_written_down_changes_nothing(
    call: Call, run: str, reason: str
) -> None:
    done = call("breaker", "trip", run, "channel", "--reason", reason)
    assert (done.code, len(done.err.splitlines())) == (1, 1), done
    assert call("breaker", "show", "--json").out == ""
    assert "operator" not in call("events", "--stream", "operations").out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.sampled
def test_an_output_that_is_full_is_an_error_of_one_line(buffered: bool) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "elesh.cli", "plan", "1000000"],
            stdout=full, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: the output: no space left on device"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_an_operator_has_a_name_where_the_user_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 10001")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert operator().startswith(f"uid {os.getuid()}@")


@pytest.mark.slow
def test_a_network_is_profiled_from_the_folder_that_the_caller_is_in(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    done = call("profile", "own_nets:build", "--shape", "2,4", "--rounds", "1")
    assert done.code == 0, done.err
    assert (tmp_path / "latency.json").exists()

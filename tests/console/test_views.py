"""What the pages show is what was recorded: pure views, on a real run and on what can go wrong."""

from __future__ import annotations

import asyncio
import math
import re
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from contracts import examples
from elesh.bus import Backlog, BreakerView, Bus, DeadLetterEntry, WorkerState
from elesh.console.charts import dots, gate_bar, intervals, strip, timeline
from elesh.console.decision import HEATS, Comparison, DecisionView, Estimate, decision_view
from elesh.console.export import checkpoint_rows, decision_rows, run_facts, to_csv
from elesh.console.lists import Wanted, decisions_of, paged, problems, run_row, runs_of
from elesh.console.pages import ago, hexdump, percent, points
from elesh.console.reading import Reader
from elesh.console.runs import _latency, _widths, run_view
from elesh.operate.fleet_status import FleetStatus
from elesh.operate.run_history import Entry, RunHistory, Shape, Width
from elesh.settings import Settings
from leyline import IdempotencyKey, InvalidField, Level

NOW = datetime(2025, 1, 14, 12, tzinfo=UTC)


def on_recorded(recorded: Any, action: Any) -> Any:
    async def run() -> Any:
        settings = Settings()
        bus = await Bus.connect(recorded.url, settings.bus)
        try:
            return await action(Reader(bus, settings))
        finally:
            await bus.close()

    return asyncio.run(run())


@pytest.fixture(scope="module")
def history(recorded) -> RunHistory:
    return on_recorded(recorded, lambda reader: reader.whole())


@pytest.fixture(scope="module")
def applied(recorded, history) -> DecisionView:
    """The page of the decision that removed most."""
    run = history.runs[recorded.run_id]
    taken = [key for key, told in run.outcomes.items() if told[0].result == "applied"]
    largest = max((run.decisions[key] for key in taken), key=lambda decided: decided.units)

    async def read(reader: Reader) -> DecisionView:
        context = await reader.context(IdempotencyKey.parse(largest.key))
        assert context is not None
        return decision_view(context, run.outcomes[largest.key])

    return on_recorded(recorded, read)


def fleet(**parts: Any) -> FleetStatus:
    ready = WorkerState(worker_id="w1", ready=True)
    whole = {
        "workers": (ready,),
        "backlog": {},
        "breakers": (),
        "dead_letters": (),
        "decisions": (),
    } | parts
    return FleetStatus(at=NOW, **whole)


def told(history: RunHistory, **parts: Any) -> list[tuple[str, str]]:
    rows = map(run_row, history.recent())
    return [(each.tone, each.what) for each in problems(fleet(**parts), rows)]


def entries() -> list[Entry]:
    names = ("CheckpointReady", "StructuralPruningDecision", "PruningOutcome", "BreakerTransition")
    places = ("checkpoints", "decisions", "outcomes", "telemetry")
    return [
        Entry(examples.MESSAGES[name], stream, f"{1736856000000 + number}-0")
        for number, (name, stream) in enumerate(zip(names, places, strict=True))
    ]


def many(count: int) -> RunHistory:
    """Runs with a checkpoint and a decision each."""
    history = RunHistory()
    ready = examples.MESSAGES["CheckpointReady"]
    decision = examples.MESSAGES["StructuralPruningDecision"]
    for number in range(count):
        name = f"run-{number}"
        metadata = ready.metadata.model_copy(update={"run_id": name})
        decided = decision.model_copy(
            update={
                "run_id": name,
                "idempotency_key": f"{31 + number}:7d78d452c22268b2:ck-{number}:channel",
                "epoch": 31 + number,
                "approved_for_application": number % 2 == 0,
                "rejection_reason": "" if number % 2 == 0 else "too dear",
            }
        )
        renamed = ready.model_copy(update={"metadata": metadata})
        history.take(
            [Entry(renamed, "checkpoints", f"{number + 1}-0"),
             Entry(decided, "decisions", f"{number + 1}-1")]
        )  # fmt: skip
    return history


def test_what_a_run_lost_is_by_its_own_held_out_figures_and_no_sum_over_its_cuts():
    ready = examples.MESSAGES["CheckpointReady"]
    decision = examples.MESSAGES["StructuralPruningDecision"]
    outcome = examples.MESSAGES["PruningOutcome"]
    history = RunHistory()
    for number, (epoch, accuracy) in enumerate(((31, 0.9), (36, 0.8), (41, 0.9))):
        metadata = ready.metadata.model_copy(update={"epoch": epoch, "accuracy": accuracy})
        key = f"{epoch}:7d78d452c22268b2:ck-{number}:channel"
        known = {"idempotency_key": key, "run_id": metadata.run_id, "epoch": epoch}
        cut = {"result": "applied", "accuracy_before": 0.9, "accuracy_after": 0.89}
        history.take(
            [Entry(ready.model_copy(update={"metadata": metadata}), "checkpoints", f"{epoch}-0"),
             Entry(decision.model_copy(update=known), "decisions", f"{epoch}-1"),
             Entry(outcome.model_copy(update=known | cut), "outcomes", f"{epoch}-2")]
        )  # fmt: skip
    gain = run_view(history.runs[ready.metadata.run_id]).gain
    assert gain is not None
    assert gain.cuts == 3
    assert gain.change == 0


@pytest.mark.slow
def test_a_run_is_what_its_trainer_published_and_reported(recorded, history):
    view = run_view(history.runs[recorded.run_id])
    rows = decisions_of([history.runs[recorded.run_id]], Wanted())
    last = recorded.figures["epochs"]
    assert view.epoch == last
    assert [epoch for epoch, _ in view.accuracies] == list(range(1, last + 1))
    assert view.phase == "validation"
    assert [band.phase for band in view.bands] == [
        "preparation", "conservative", "moderate", "aggressive", "validation",
    ]  # fmt: skip
    shares = [share for _, share in view.shares]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= max(band.limit for band in view.bands)
    assert view.gain is not None
    assert view.gain.latency is not None, "measured by the trainer, around each cut"
    assert dict(view.results)["applied"] == sum(m.result == "applied" for m in view.marks) > 0
    assert len(rows) == len(view.marks) == sum(count for _, count in view.results)
    assert all(decided.reason for run, decided in rows if run.result(decided) == "rejected")


def test_pieces_of_a_history_in_any_order_make_the_same_history():
    whole, pieces = RunHistory(), RunHistory()
    whole.take(entries())
    for each in reversed(entries()):
        pieces.take([each])
    assert whole.runs == pieces.runs
    assert whole.transitions == pieces.transitions


def test_a_history_forgets_the_oldest_runs_first_and_counts_them(monkeypatch):
    monkeypatch.setattr("elesh.operate.run_history._RUNS", 50)
    history = many(60)
    assert [run.run_id for run in history.recent()] == [f"run-{n}" for n in range(59, 9, -1)]
    assert history.let_go == 10


def test_a_list_is_paged_and_filtered_and_says_how_many_there_are():
    history = many(120)
    every = runs_of(history, Wanted())
    last = paged(every, 3)
    assert (last.total, last.pages, last.first, len(last.rows)) == (120, 3, 101, 20)
    assert paged(every, 99) == last, "a page past the end is the last"
    assert [run.run_id for run in runs_of(history, Wanted.of({"text": "RUN-11"}))] == [
        f"run-{n}" for n in (*range(119, 109, -1), 11)
    ]
    runs = history.runs.values()
    rejected = decisions_of(runs, Wanted.of({"outcome": "rejected"}))
    assert len(rejected) == 60
    assert len(decisions_of(runs, Wanted.of({"text": "too dear", "first": "140"}))) == 6
    assert decisions_of(runs, Wanted.of({"level": "head"})) == []
    assert [d.epoch for _, d in decisions_of(runs, Wanted.of({"first": "33", "last": "34"}))] == [
        34, 33,
    ]  # fmt: skip
    with pytest.raises(InvalidField, match="outcome"):
        Wanted.of({"outcome": "nonsense"})
    with pytest.raises(InvalidField, match="first"):
        Wanted.of({"first": "-3"})


def test_an_export_has_every_row_and_no_formula():
    history = many(3)
    run = history.runs["run-1"]
    [row] = decision_rows([(run, decided) for decided in run.decisions.values()])
    assert (row["run"], row["result"], row["reason"]) == ("run-1", "rejected", "too dear")
    text = to_csv([row | {"reason": "=cmd()"}])
    assert "'=cmd()" in text
    assert text.count("\r\n") == 2
    assert checkpoint_rows(run)[0]["units a"] == 3
    facts = run_facts(run)
    assert facts["gain"]["parameters"] == (119, 102)
    assert [group["name"] for group in facts["groups"]] == ["a", "b"]


def test_nothing_is_said_where_nothing_is_broken():
    assert told(RunHistory()) == []


def test_what_is_broken_is_said():
    breaker = BreakerView("r", Level.CHANNEL, "open", 3, "boom", NOW, admitted=False)
    assert told(RunHistory(), breakers=(breaker,)) == [
        ("bad", "Breaker of r at level channel is open")
    ]
    assert told(RunHistory(), workers=()) == [("bad", "No worker is alive")]
    wedged = WorkerState(worker_id="w2", ready=False, why="the child is wedged")
    assert told(RunHistory(), workers=(wedged,)) == [("warn", "Worker w2 is not ready")]
    dead_letter = DeadLetterEntry("1-0", None, "unreadable")
    again = DeadLetterEntry("2-0", None, "unreadable", redriven_as="3-0")
    letters = (again, dead_letter)
    assert told(RunHistory(), dead_letters=letters, dead_total=1) == [("warn", "1 dead letter")]
    late = Backlog(5, 5, 0, 300.0, None)
    assert told(RunHistory(), backlog={"checkpoints": late}) == [
        ("warn", "checkpoints: the oldest entry has waited since 11:55:00 UTC")
    ]
    history = RunHistory()
    outcome = examples.MESSAGES["PruningOutcome"].model_copy(update={"result": "rolled_back"})
    history.take([*entries()[:2], Entry(outcome, "outcomes", "1736856000009-0")])
    assert told(history) == [("warn", "digits-7: 1 rolled back")]


def test_every_target_and_spared_unit_has_a_row_a_reason_and_an_error_bar(applied):
    decision = applied.decision
    removed = {(name, unit) for name, units in decision.units.items() for unit in units}
    rows = {(row.explanation.group, row.explanation.unit) for row in applied.units}
    groups = [*decision.channels, *decision.attention_heads, *decision.spared]
    spared = {(group.layer_name, unit.index) for group in groups for unit in group.spared}
    assert rows == removed | spared
    assert removed
    assert all(row.explanation.reason for row in applied.units)
    assert all(row.alone is not None and row.error is not None for row in applied.units)


def test_a_strip_shows_every_unit_of_a_group_once_and_the_removed_ones(applied):
    removed = {strip.group: strip.removed for strip in applied.strips}
    units = applied.decision.units
    assert {name: len(units.get(name, ())) for name in removed} == removed
    for item in applied.strips:
        assert sorted(cell.unit for cell in item.cells) == list(range(len(item.cells)))
        assert {cell.heat for cell in item.cells} <= set(range(HEATS))
        heats = [cell.heat for cell in item.cells]
        assert heats == sorted(heats), "least important first"
        assert len(re.findall('<rect class="h', strip(item, 400))) == len(item.cells)


def test_predicted_stands_beside_measured(applied):
    whos = {c.quantity.split(",")[0]: [e.who for e in c.estimates] for c in applied.comparisons}
    assert "trainer, masked" in whos["accuracy drop"]
    assert "predicted" in whos["loss increase"]
    outcome = applied.outcomes[0]
    [measured] = [
        estimate.value
        for comparison in applied.comparisons
        for estimate in comparison.estimates
        if comparison.percent and estimate.who == "trainer, masked"
    ]
    assert measured == pytest.approx(outcome.accuracy_before - outcome.accuracy_masked)


def test_a_decision_whose_statistics_are_gone_says_so(recorded, applied, redis_url):
    from elesh.operate.replay import DecisionContext

    view = decision_view(DecisionContext(applied.decision, None, missing="expired"))
    assert (view.strips, view.missing) == ((), "expired")
    assert len(view.units) == len(applied.units)
    assert view.result == "approved"


def test_charts_escape_what_they_are_given(history, recorded):
    run = run_view(history.runs[recorded.run_id])
    hostile = '"><script>'
    item = Comparison(hostile, False, (Estimate(hostile, 1.0, 0.5, 2.0),))
    assert "<script>" not in intervals(item, 300)
    from dataclasses import replace

    marks = tuple(replace(mark, title=hostile) for mark in run.marks)
    assert "<script>" not in timeline(replace(run, run_id=hostile, marks=marks), 400, str)


def test_a_chart_of_nothing_is_no_error():
    history = RunHistory()
    history.take(entries()[1:2])
    assert "no accuracy was published" in timeline(run_view(history.runs["digits-7"]), 400, str)
    assert dots([]) == []
    flat = Comparison("q", False, (Estimate("predicted", 0.0),))
    assert "+0" in intervals(flat, 300)


def test_a_bar_is_drawn_for_upper_limits_only():
    assert "80% of the limit" in gate_bar(0.08, 0.1, True)
    assert "150% of the limit" in gate_bar(0.15, 0.1, False)
    assert gate_bar(512, 32, True) == ""
    assert gate_bar(None, 32, True) == ""


def test_figures_nobody_knows_are_dashes():
    assert {percent(None), percent(float("nan")), points(None), ago(None)} == {"\N{EN DASH}"}
    assert points(-0.0056) == "\N{MINUS SIGN}0.56"
    assert (ago(90), ago(150), ago(7300), ago(200000)) == ("90 s", "2 min", "2 h", "2 d")
    assert hexdump(b"ab\x00" * 100).endswith("and 44 bytes more")


def test_the_demo_serves_a_console_beside_it(recorded):
    assert re.search(r"console on http://127\.0\.0\.1:[0-9]+", recorded.output)


@pytest.mark.parametrize(
    ("measured", "spread", "certain"),
    [
        ([(4.0, 3.0), (3.3, 2.2)], 0.1, True),
        ([(4.0, 3.9), (2.6, 2.6)], 0.5, False),
        ([(4.0, 2.6)], None, False),
    ],
)
def test_a_time_of_a_call_is_a_gain_where_repeats_differ_by_less(measured, spread, certain) -> None:
    keys = [str(number) for number in range(len(measured))]
    outcomes = {
        key: [SimpleNamespace(latency_before=before, latency_after=after)]
        for key, (before, after) in zip(keys, measured, strict=True)
    }
    stayed: Any = [SimpleNamespace(key=key) for key in keys]
    found = _latency(SimpleNamespace(outcomes=outcomes), stayed)  # type: ignore[arg-type]
    assert found is not None
    assert found.before == 4.0
    assert found.now == pytest.approx(4.0 * math.prod(after / before for before, after in measured))
    assert (found.spread, found.certain) == (spread and pytest.approx(spread), certain)


def test_a_group_that_went_with_its_layer_is_counted_and_shown() -> None:
    def shape(widths: list[Width], gone: bool) -> Any:
        sizes = {"parameters": 1, "original_parameters": 1, "macs": 1, "original_macs": 1}
        return SimpleNamespace(
            shape=Shape(**sizes, widths=tuple(widths), blocks=(("block.0", gone),), pruned={})
        )

    stem, conv = Width("stem", "channel", 4, 4, ""), Width("block.0.conv", "channel", 6, 5, "")
    found = _widths([shape([stem, conv], False), shape([stem], True)])
    assert [(each.name, each.original, each.size) for each in found] == [
        ("stem", 4, 4),
        ("block.0.conv", 6, 0),
    ]

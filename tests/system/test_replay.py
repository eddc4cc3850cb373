"""Replay: the same bytes again, what changed where not, and a case taken home in one file."""

from __future__ import annotations

import asyncio
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import elesh
from head_networks import checkpoint as heads_checkpoint
from head_networks import transformer
from station import Station, checkpoint, faulty, ready, send
from test_fan_out import IN_PARTS, SHARDED

from elesh.bus import Bus
from elesh.operate.capture import Case, open_case, save_case
from elesh.operate.replay import Replayed, Selection, capture, replay, replay_case
from elesh.settings import Settings
from leyline import CheckpointBundle, ContractError, Level
from leyline.streams import CHECKPOINTS, DEAD, STREAMS


def replayed(station: Station, settings: Settings, selection: Selection) -> list[Replayed]:
    async def run(bus: Bus) -> list[Replayed]:
        return [item async for item in replay(bus, settings, selection)]

    return station.on_bus(run)


def captured(station: Station, key: str, file: Path) -> Case | None:
    return station.on_bus(lambda bus: capture(bus, key, file))


def joint() -> CheckpointBundle:
    return replace(heads_checkpoint(transformer(16, 16)), levels=(Level.CHANNEL, Level.HEAD))


@pytest.fixture(scope="module")
def past(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Station:
    """A station whose worker made a single and a joint decision and is gone."""
    station = Station(redis_url, "past", tmp_path_factory.mktemp("past"))
    worker = station.worker()
    try:
        station.publish(checkpoint(), joint())
        station.wait_decisions(2)
    finally:
        worker.end()
    return station


@pytest.fixture(scope="module")
def decided(past: Station) -> Settings:
    """The settings that decided."""
    return Settings.load(past.folder / "settings-0.yaml")


@pytest.mark.slow
def test_a_run_is_replayed_bit_by_bit_and_nothing_is_published(
    past: Station, decided: Settings
) -> None:
    before = [len(past.read(stream)) for stream in STREAMS]
    items = replayed(past, decided, Selection())
    assert {item.key.level for item in items} == {Level.CHANNEL, Level.JOINT}
    for item in items:
        assert (item.identical, item.differences, item.settings) == (True, (), ()), item.moved
    assert [len(past.read(stream)) for stream in STREAMS] == before
    done = elesh(
        "replay", "--diff", "--settings", str(past.folder / "settings-0.yaml"),
        environment={"ELESH_REDIS_URL": past.url},
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "2 of 2 bit-identical")
    assert len(done.stdout.splitlines()) == 3


def test_a_changed_setting_is_named_with_what_it_moved(past: Station, decided: Settings) -> None:
    channels = decided.structured_pruning.channel_analysis.model_copy(
        update={"min_channels_per_layer": 40}
    )
    pruning = decided.structured_pruning.model_copy(update={"channel_analysis": channels})
    changed = decided.model_copy(update={"structured_pruning": pruning})
    (item,) = replayed(past, changed, Selection(epoch=60, key=str(keys(past)[Level.CHANNEL])))
    assert not item.identical
    assert [str(change) for change in item.settings or ()] == [
        "structured_pruning.channel_analysis.min_channels_per_layer: 16 -> 40"
    ]
    assert any("no longer" in line for line in item.moved), item.moved
    assert any(change.path == "settings_hash" for change in item.differences)


@pytest.mark.parametrize(
    ("factor", "rounding"), [(1 + 1e-7, True), (1.01, False)], ids=["rounding", "another figure"]
)
def test_figures_that_another_processor_rounds_otherwise_are_no_other_decision(
    factor: float, rounding: bool, past: Station
) -> None:
    recorded = past.decisions()[0]
    gates = tuple(
        gate.model_copy(update={"limit": gate.limit * factor}) if gate.limit else gate
        for gate in recorded.safety.gates
    )
    safety = recorded.safety.model_copy(update={"gates": gates})
    now = recorded.model_copy(update={"safety": safety})
    again = Replayed(recorded.key, now, recorded)
    assert again.differences
    assert (again.identical, again.rounding) == (False, rounding)
    fewer = now.model_copy(update={"approved_for_application": False})
    assert not Replayed(recorded.key, fewer, recorded).rounding


def keys(past: Station) -> dict[Level, object]:
    return {decision.key.level: decision.key for decision in past.decisions()}


@pytest.mark.slow
def test_a_case_is_captured_with_all_that_decided_it_and_replayed_from_its_file(
    past: Station, decided: Settings, tmp_path: Path
) -> None:
    for decision in past.decisions():
        file = tmp_path / f"{decision.key.level}.zip"
        case = captured(past, decision.idempotency_key, file)
        assert case is not None
        assert open_case(file) == case
        assert case.decision == decision
        assert case.settings == json.loads(decided.analysis_json)
        assert case.versions["numpy"] == np.__version__
        item = asyncio.run(replay_case(file, None))
        assert (item.identical, item.error) == (True, ""), item.moved
    assert captured(past, "60:0123456789abcdef:none:channel", tmp_path / "none.zip") is None
    done = elesh("replay", "--from", str(file), environment={"ELESH_REDIS_URL": "redis://nowhere"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical" in done.stdout


def rewritten(source: Path, target: Path, name: str, data: bytes, **how: int) -> None:
    """A copy of a case with one member replaced, or with one more."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.namelist():
            if entry != name:
                new.writestr(entry, old.read(entry))
        if data:
            new.writestr(name, data, **how)


BLOB = "blobs/statistics.safetensors"


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda a, b: b.write_bytes(b"nonsense"), "expected a file that elesh capture wrote"),
        (lambda a, b: b.write_bytes(a.read_bytes()[:-30]), "expected"),
        (lambda a, b: rewritten(a, b, BLOB, b"x" * 10), "bytes with sha256"),
        (lambda a, b: rewritten(a, b, BLOB, b"x" * (1 << 24)), "at most"),
        (lambda a, b: rewritten(a, b, BLOB, b""), "a member of that name"),
        (lambda a, b: rewritten(a, b, "event.msgpack", b"\0" * 9999, compress_type=8), "stored"),
        (lambda a, b: rewritten(a, b, "event.msgpack", b"\xc1"), "envelope"),
        (lambda a, b: rewritten(a, b, "manifest.json", b"[" * 10_000), "JSON"),
        (lambda a, b: rewritten(a, b, "manifest.json", b'{"format": 99}'), "format"),
        (lambda a, b: many(b), "at most 64 members"),
    ],
)
def test_a_spoiled_file_is_refused_by_name(
    case_file: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], named: str
) -> None:
    target = tmp_path / "spoiled.zip"
    spoil(case_file, target)
    with pytest.raises(ContractError, match=named) as caught:
        asyncio.run(replay_case(target, None))
    assert "spoiled.zip" in str(caught.value) or "envelope" in str(caught.value)


def test_a_capture_that_fails_leaves_nothing_behind_and_the_old_file_as_it_was(
    tmp_path: Path,
) -> None:
    file = tmp_path / "case.zip"
    file.write_bytes(b"before")
    case = Case(stream="checkpoints", entry_id="1-0", envelope=b"x", decision=None, settings=None)
    with pytest.raises(FileNotFoundError):
        save_case(file, case, tmp_path / "no such folder")
    assert [path.name for path in tmp_path.iterdir()] == ["case.zip"]
    assert file.read_bytes() == b"before"


def many(target: Path) -> None:
    with zipfile.ZipFile(target, "w") as archive:
        for number in range(65):
            archive.writestr(str(number), b"")


@pytest.fixture(scope="module")
def case_file(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captured event without a decision: no worker is needed."""
    folder = tmp_path_factory.mktemp("case")
    station = Station(redis_url, "case", folder)
    station.publish(checkpoint(number=5))
    bundle = checkpoint(number=5)
    key = f"60:{bundle.metadata.model_hash}:ck-5:channel"
    assert captured(station, key, folder / "case.zip") is not None
    return folder / "case.zip"


@pytest.mark.parametrize(
    ("fault", "split", "bundle"),
    [
        ("exit", {"layers_per_worker": 1, "constants": SHARDED}, checkpoint()),
        ("memory:9000000000", {"constants": IN_PARTS}, joint()),
    ],
)
@pytest.mark.slow
def test_shards_and_the_rungs_of_single_parts_are_replayed_as_they_were(
    station: Station, tmp_path: Path, fault: str, split: dict[str, Any], bundle: CheckpointBundle
) -> None:
    """The child fails in the first part alone: the other parts took no rung."""
    faulty(station, fault, f"once:{tmp_path / 'failed'}", **split)
    station.publish(bundle)
    (decision,) = station.wait_decisions(1)
    assert len(decision.parts) > 1
    assert len([part for part in decision.parts if part.fallbacks]) == 1
    settings = Settings.load(station.folder / "settings-0.yaml")
    (item,) = replayed(station, settings, Selection())
    assert (item.identical, item.error) == (True, ""), item.differences
    captured(station, decision.idempotency_key, tmp_path / "case.zip")
    assert asyncio.run(replay_case(tmp_path / "case.zip", None)).identical


@pytest.mark.slow
def test_a_crash_while_several_levels_are_decided_at_once_is_replayed_as_it_was(
    station: Station, tmp_path: Path
) -> None:
    faulty(station, "exit", f"once:{tmp_path / 'failed'}")
    station.publish(joint())
    (decision,) = station.wait_decisions(1)
    assert not decision.parts
    assert [taken.rung for taken in decision.fallbacks] == ["worker_crash"]
    settings = Settings.load(station.folder / "settings-0.yaml")
    (item,) = replayed(station, settings, Selection())
    assert (item.identical, item.error) == (True, ""), item.differences


@pytest.mark.slow
def test_a_decision_that_stood_in_for_corrupt_data_is_replayed_or_says_what_is_gone(
    station: Station, tmp_path: Path
) -> None:
    station.worker()
    station.publish(checkpoint(60))
    (first,) = station.wait_decisions(1)

    async def publish_spoiled(bus: Bus) -> None:
        bundle = checkpoint(61, number=2)
        event = await ready(bus, bundle)
        short = await bus.blobs.put(bytes(bundle.blobs()["statistics"])[:-30])
        await send(bus, CHECKPOINTS, event.model_copy(update={"statistics": short}))

    station.on_bus(publish_spoiled)
    _, stand_in = station.wait_decisions(2)
    assert stand_in.stands_in == first.idempotency_key
    settings = Settings.load(station.folder / "settings-0.yaml")
    items = replayed(station, settings, Selection())
    assert [(item.identical, item.error) for item in items] == [(True, "")] * 2
    captured(station, stand_in.idempotency_key, tmp_path / "case.zip")
    item = asyncio.run(replay_case(tmp_path / "case.zip", None))
    assert item.decision is None
    assert f"{first.idempotency_key} stands in, and its record is not here" in item.error


# Last: this one empties the server.


@pytest.mark.slow
def test_a_case_that_failed_can_be_taken_home_too(station: Station, tmp_path: Path) -> None:
    async def publish_spoiled(bus: Bus) -> None:
        event = await ready(bus, checkpoint())
        nonsense = await bus.blobs.put(b"nonsense")
        await send(bus, CHECKPOINTS, event.model_copy(update={"statistics": nonsense}))

    station.worker()
    station.on_bus(publish_spoiled)
    station.wait_for(lambda: station.read(DEAD), "the dead letter")
    (dead_letter,) = station.on_bus(lambda bus: bus.dead_letters.all())
    assert dead_letter.message is not None
    case = captured(station, dead_letter.message.idempotency_key, tmp_path / "case.zip")
    assert case is not None
    item = asyncio.run(replay_case(tmp_path / "case.zip", None))
    assert item.decision is None
    assert item.error in dead_letter.message.reason

"""Measured in the compute child of a real worker: refusals open the breaker, training goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import proved_networks
import pytest
from proved_networks import inverted
from servers import Server
from station import PATIENCE, Station

from elesh.bus import embedded_server
from elesh.operate.replay import Replayed, Selection, replay
from elesh.settings import Settings
from elesh.trainer import Session
from elesh.worker.compute.process import ComputeChild
from elesh.worker.compute.protocol import Job
from leyline import BreakerTransition, CheckpointBundle, StructuralPruningDecision
from leyline.streams import TELEMETRY

SECTIONS = {"structured_pruning": {"channel_analysis": {"min_channels_per_layer": 4}}}


def numbered(bundle: CheckpointBundle, number: int) -> CheckpointBundle:
    metadata = bundle.metadata.model_copy(update={"checkpoint_id": f"ck-{number}"})
    return replace(bundle, metadata=metadata)


def answers(station: Station, bundles: list[CheckpointBundle]) -> list[StructuralPruningDecision]:
    """What a training session gets for these checkpoints, one after the other."""
    got: list[StructuralPruningDecision] = []
    settings = proved_networks.settings()
    bus = settings.bus.model_copy(update={"partition": station.partition})
    settings = settings.model_copy(update={"bus": bus})
    with Session("proved", station.url, settings) as session:
        for number, bundle in enumerate(bundles):
            session.publish(numbered(bundle, number))
            while len(got) <= number:
                assert session.wait(PATIENCE), "no answer"
                got += session.decisions()
        assert session.missed == 0
    return got


@pytest.mark.slow
def test_a_program_that_nobody_signed_is_not_run_where_signatures_are_asked_for(
    station: Station,
) -> None:
    station.worker(**SECTIONS, verification={"programs": "signed"})
    trained = proved_networks.convolutions()
    (decision,) = answers(station, [trained.at(119)])
    (fallback,) = decision.fallbacks
    assert fallback.rung == "verification_skipped"
    assert "bus.security.keyring" in fallback.reason
    assert not decision.safety.measured


@pytest.mark.parametrize(("programs", "measured"), [("authenticated", False), ("any", True)])
@pytest.mark.slow
def test_a_program_on_a_bus_without_a_password_is_run_only_if_anybodys_is(
    programs: str, measured: bool, tmp_path: Path
) -> None:
    server = Server(tmp_path / "server").start()
    station = Station(server.url, "open", tmp_path)
    try:
        station.worker(**SECTIONS, verification={"programs": programs})
        (decision,) = answers(station, [proved_networks.convolutions().at(119)])
        assert decision.safety.measured is measured
        assert bool(decision.fallbacks) is not measured
    finally:
        for worker in station.workers:
            worker.end()
        server.kill()


@pytest.mark.slow
def test_a_worker_of_the_embedded_server_measures_by_default(tmp_path: Path) -> None:
    """Its URL has no password; its folder, that only the user can read, has one."""
    with embedded_server(tmp_path):
        station = Station(f"redis+embedded://{tmp_path}/redis", "own", tmp_path)
        station.worker(**SECTIONS)
        try:
            (decision,) = answers(station, [proved_networks.convolutions().at(119)])
        finally:
            station.workers[0].end()
    assert decision.safety.measured
    assert not decision.fallbacks


@pytest.mark.slow
def test_three_refused_rankings_open_the_breaker_and_training_goes_on(station: Station) -> None:
    station.worker(**SECTIONS)
    trained = proved_networks.convolutions()
    before = trained.accuracy
    bad, good = inverted(trained, 119), trained.at(119)
    decisions = answers(station, [good, bad, bad, bad, good])
    assert decisions[0].approved_for_application
    assert decisions[0].safety.measured
    assert all("ranking" in decision.rejection_reason for decision in decisions[1:4])
    assert not any(decision.units for decision in decisions[1:4])
    assert not decisions[4].approved_for_application
    assert "breaker" in decisions[4].rejection_reason
    (change,) = [m for m in station.messages(TELEMETRY) if isinstance(m, BreakerTransition)]
    assert (change.before, change.after) == ("closed", "open")
    assert trained.accuracy == before


@pytest.mark.parametrize("preload", [True, False])
@pytest.mark.slow
def test_torch_is_loaded_before_the_first_job_if_it_is_to_be(tmp_path: Path, preload: bool) -> None:
    def has_torch(pid: int) -> bool:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()

    async def loaded() -> bool:
        child = ComputeChild(1 << 32, tmp_path, preload=preload)
        await child.start()
        try:
            assert child.pid is not None
            # What it answers to a job that it cannot do comes after whatever it does first.
            job = Job(kind="level", folder=str(tmp_path), key="none", settings="{}", levels=())
            assert (await child.run(job, timeout=PATIENCE)).failed is not None
            return has_torch(child.pid)
        finally:
            await child.kill()

    assert asyncio.run(loaded()) is preload


@pytest.mark.slow
def test_a_run_is_calibrated_by_what_its_preparation_measured(station: Station) -> None:
    station.worker(**SECTIONS)
    trained = proved_networks.digits()
    later = replace(trained.at(45), network=None)
    decisions = answers(station, [trained.at(25), later, trained.at(30), later])
    first, early, _, calibrated = decisions
    assert len(first.would_be) == 4
    assert early.loss_factor is None, "so few measurements are too few"
    assert calibrated.loss_factor is not None
    assert calibrated.loss_factor.measurements >= 6
    gate = next(g for g in calibrated.safety.gates if g.name == "predicted_loss")
    assert "cuts of this run)" in gate.detail
    settings = Settings.load(station.settings_file(**SECTIONS))
    replayed = station.on_bus(lambda bus: all_of(replay(bus, settings, Selection())))
    assert [each.identical for each in replayed] == [True] * 4


async def all_of(found: AsyncIterator[Replayed]) -> list[Replayed]:
    return [each async for each in found]

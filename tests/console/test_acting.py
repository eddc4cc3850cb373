"""Anybody reads; only who knows the token acts, from a form of ours, and it is written down."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from console_server import TOKEN, Answer, Site, serving_console

from contracts import examples
from elesh.bus import Bus
from elesh.console.access import COOKIE, OperatorAccess
from elesh.console.app import console_app
from elesh.settings import BusSettings, ConsoleSettings, Settings, SettingsError
from elesh.worker.telemetry.auditor import audit_links, write_audit
from leyline import DeadLetter, Level, PruningOutcome
from leyline.streams import CHECKPOINTS, DEAD, DECISIONS, OPERATIONS, OUTCOMES

PAGES = ("/", "/fleet", "/dead", "/audit")
ACTIONS = ("/breakers/trip", "/breakers/reset", "/dead/redrive", "/dead/drop")
TRIP = {"run": "digits-7", "level": "channel", "reason": "looks wrong"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'"


def state(on_bus: Any) -> str:
    return str(on_bus(lambda bus: bus.breakers.view("digits-7", Level.CHANNEL)).state)


def test_without_the_token_nothing_is_changed(site: Site, on_bus):
    for path in (*ACTIONS, "/decisions/1:0123456789abcdef:x:channel/replay"):
        answer = site.post(path, TRIP | {"entry": "1-0"})
        assert answer.status == 403, path
        assert "needs the token" in answer.text
    assert state(on_bus) == "closed"
    assert on_bus(lambda bus: bus.read(OPERATIONS)) == []


def test_a_wrong_token_opens_no_session(site: Site, on_bus):
    assert site.sign_in("correct horse batterx").status == 403
    assert site.cookie == ""
    site.cookie = f"{COOKIE}=0123.4567"
    assert site.post("/breakers/trip", TRIP | {"proof": "89"}).status == 403
    assert state(on_bus) == "closed"


def test_a_form_of_another_session_or_none_is_refused(site: Site, on_bus):
    site.sign_in()
    other = site.proof()
    site.sign_in()
    for proof in ("", "0" * 64, other):
        assert site.post("/breakers/trip", TRIP | {"proof": proof}).status == 403
    assert state(on_bus) == "closed"


def test_an_operator_trips_and_resets_and_it_is_in_the_audit_log(site: Site, on_bus):
    site.sign_in()
    answer = site.post("/breakers/trip", TRIP | {"proof": site.proof()})
    assert answer.status == 303
    assert state(on_bus) == "open"
    assert "looks wrong" in site.get("/fleet").text
    site.post("/breakers/reset", TRIP | {"proof": site.proof(), "reason": "looks right"})
    assert state(on_bus) == "closed"

    async def told(bus: Bus) -> list[tuple[str, str, str]]:
        await write_audit(bus)
        entries = [link.entry.event async for link in audit_links(bus) if link.entry]
        return [(e.action, e.actor, e.reason) for e in entries if e.kind == "operator"]

    assert on_bus(told) == [
        ("breaker_trip", "console@127.0.0.1", "looks wrong; closed to open"),
        ("breaker_reset", "console@127.0.0.1", "looks right; open to closed"),
    ]
    assert "breaker trip" in site.get("/audit").text


def test_a_bearer_needs_no_session(site: Site, on_bus):
    assert site.post("/breakers/trip", TRIP, Authorization="Bearer nonsense").status == 403
    assert site.post("/breakers/trip", TRIP, Authorization=f"Bearer {TOKEN}").status == 303
    assert state(on_bus) == "open"


def test_a_dead_letter_is_redriven_and_dropped(site: Site, on_bus):
    async def dead_letter(bus: Bus) -> str:
        dead_letter = examples.MESSAGES["DeadLetter"]
        return await bus.publish(DEAD, dead_letter, source="elesh")

    dead_letter = on_bus(dead_letter)
    site.sign_in()
    proof = site.proof("/dead")
    site.post("/dead/redrive", {"entry": dead_letter, "proof": proof})
    [entry] = on_bus(lambda bus: bus.read(CHECKPOINTS))
    assert "redriven as" in site.get("/dead").text
    assert entry.entry_id in site.get("/dead").text
    site.post("/dead/drop", {"entry": dead_letter, "proof": proof})
    assert "No dead letters" in site.get("/dead").text
    assert site.post("/dead/drop", {"entry": dead_letter, "proof": proof}).status == 400


def test_a_spoiled_form_is_refused_by_name(site: Site):
    site.sign_in()
    proof = site.proof()
    answer = site.post("/breakers/trip", {"proof": proof, "run": "digits-7"})
    assert (answer.status, "level" in answer.text) == (400, True)
    level = site.post("/breakers/trip", TRIP | {"proof": proof, "level": "nonsense"})
    assert level.status == 400
    assert site.post("/breakers/trip", {"proof": proof, "reason": "x" * 9000}).status == 403


def test_signing_in_leads_to_no_other_site(site: Site):
    for back in ("//evil.example", "https://evil.example", "/\\evil.example"):
        answer = site.post("/login", {"token": TOKEN, "back": back})
        assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()


def test_every_page_allows_its_own_assets_only_and_is_not_kept(site: Site):
    for path in (*PAGES, "/static/console.css", "/runs/none", "/decisions/nonsense"):
        headers = site.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    assert site.get("/runs/none").status == 404
    assert site.get("/decisions/nonsense").status == 400
    assert site.get("/static/../app.py").status == 404


def polled(site: Site, path: str, page: str) -> Answer:
    """What an open tab gets that shows ``page``."""
    [version] = re.findall(r'data-live="([^"]+)"', page)
    parts = re.findall(r'id="(part-[^"]+)" data-hash="([^"]+)"', page)
    known = " ".join(f"{name}={digest}" for name, digest in parts)
    return site.get(path, Elesh_Live=version, Elesh_Parts=known)


def test_an_open_page_gets_what_changed_and_nothing_else(site: Site, on_bus):
    pages = {path: site.get(path).text for path in (*PAGES, "/decisions")}
    for path, page in pages.items():
        again = polled(site, path, page)
        assert (again.status, again.text) == (304, ""), path
    on_bus(lambda bus: bus.breakers.trip("digits-7", Level.CHANNEL, "by hand"))
    give_up = time.monotonic() + 60
    while (answer := polled(site, "/fleet", pages["/fleet"])).status == 304:
        assert time.monotonic() < give_up  # tabs share what was read last for a moment
    told = json.loads(answer.text)
    assert list(told["html"]) == ["part-breakers"]
    assert "by hand" in told["html"]["part-breakers"][1]
    assert told["version"] not in pages["/fleet"]


def test_another_host_name_is_refused(site: Site):
    assert site.get("/", Host="evil.example").status == 400


def test_text_from_the_bus_is_text(site: Site, on_bus):
    async def publish(bus: Bus) -> None:
        dead_letter = examples.MESSAGES["DeadLetter"]
        assert isinstance(dead_letter, DeadLetter)
        spoiled = {"reason": HOSTILE, "field": HOSTILE, "worker_id": HOSTILE, "error_code": HOSTILE}
        spoiled |= {"original": {HOSTILE: HOSTILE.encode()}}
        await bus.publish(DEAD, dead_letter.model_copy(update=spoiled), source="x")
        await bus.publish(CHECKPOINTS, examples.MESSAGES["CheckpointReady"], source="x")
        decision = examples.MESSAGES["StructuralPruningDecision"]
        spoiled = {"rejection_reason": HOSTILE, "approved_for_application": False}
        await bus.publish(DECISIONS, decision.model_copy(update=spoiled), source="x")
        outcome = examples.MESSAGES["PruningOutcome"]
        assert isinstance(outcome, PruningOutcome)
        await bus.publish(OUTCOMES, outcome.model_copy(update={"detail": HOSTILE}), source="x")
        await bus.breakers.trip("digits-7", Level.CHANNEL, HOSTILE)
        await write_audit(bus)

    on_bus(publish)
    for path in (*PAGES, "/runs/digits-7"):
        text = site.get(path).text
        assert "alert(1)" in text, path
        assert "<script>alert" not in text, path
        assert "<img src=x" not in text, path


def test_a_bus_that_is_away_is_said_and_waited_for(partition: str):
    settings = Settings(bus=BusSettings(partition=partition))
    with serving_console("redis://127.0.0.1:1/0", settings) as site:
        answer = site.get("/")
        assert answer.status == 503
        assert "127.0.0.1:1" in answer.text
        assert 'data-live="' in answer.text, "it asks again and is there as soon as the bus is"
        assert site.get("/", Elesh_Live="none").status == 503
        assert site.get("/live").text == "ok"


def test_without_a_token_nobody_can_act(redis_url: str, partition: str):
    with serving_console(redis_url, Settings(bus=BusSettings(partition=partition))) as site:
        assert "Read-only" in site.get("/").text
        assert site.sign_in("").status == 403
        assert site.post("/breakers/trip", TRIP, Authorization="Bearer ").status == 403


def test_a_session_ends_at_logout_and_after_its_time_whoever_kept_the_cookie():
    now = [0.0]
    guard = OperatorAccess("a" * 20, seconds=10, clock=lambda: now[0])
    cookie, other = guard.session(), guard.session()
    assert guard.holds(cookie)
    assert guard.proves(cookie, guard.proof(cookie))
    assert not guard.proves(other, guard.proof(cookie))
    assert not OperatorAccess("a" * 20).holds(cookie), "another process knows nothing of it"
    guard.end(cookie)
    assert not guard.proves(cookie, guard.proof(cookie))
    now[0] = 9.9
    assert guard.holds(other)
    now[0] = 10
    assert not guard.holds(other)
    assert not OperatorAccess("").holds(OperatorAccess("").session())
    assert not OperatorAccess("").knows("")


def test_whoever_guesses_has_to_wait_even_with_the_right_token():
    now = [0.0]
    guard = OperatorAccess("a" * 20, clock=lambda: now[0])
    for number in range(5):
        now[0] = float(number)
        assert not guard.knows(f"{number}", "here")
    assert guard.waits("here") == 56
    assert not guard.knows("a" * 20, "here")
    assert guard.knows("a" * 20, "elsewhere")
    now[0] = 60.5
    assert guard.knows("a" * 20, "here")
    assert guard.waits("here") == 0


def test_a_cookie_that_was_kept_is_worth_nothing_after_logout(site: Site, on_bus):
    site.sign_in()
    proof = site.proof()
    assert site.post("/logout", {"proof": proof}).status == 303
    assert site.post("/breakers/trip", TRIP | {"proof": proof}).status == 403
    assert state(on_bus) == "closed"


def test_guessing_by_login_and_bearer_is_refused_after_a_few_times(site: Site, on_bus):
    statuses = [site.sign_in(f"guess number {number:08}").status for number in range(3)]
    for number in range(3):
        guess = f"Bearer guess {number}"
        statuses.append(site.post("/breakers/trip", TRIP, Authorization=guess).status)
    assert statuses == [403, 403, 403, 403, 403, 429]
    answer = site.post("/breakers/trip", TRIP, Authorization=f"Bearer {TOKEN}")
    assert answer.status == 429
    assert 0 < int(answer.headers["retry-after"]) <= 61
    assert state(on_bus) == "closed"


def test_a_short_token_is_an_error_of_the_settings():
    settings = Settings(console=ConsoleSettings(token="short"))
    with pytest.raises(SettingsError, match=r"console\.token: expected at least 16 characters"):
        console_app("redis://127.0.0.1:1/0", settings)


def test_what_waits_is_told_to_prometheus_without_any_worker(site: Site, on_bus):
    on_bus(lambda bus: bus.publish(CHECKPOINTS, examples.MESSAGES["CheckpointReady"], source="x"))
    figures = site.get("/metrics").text
    assert 'elesh_stream_length{stream="checkpoints"}' in figures
    assert "run=" not in figures

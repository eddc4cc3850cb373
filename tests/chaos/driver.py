"""Runs the fleet, breaks it by schedule, heals it, waits for quiet, and collects the facts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import psutil
import yaml
from redis import Redis
from redis.exceptions import RedisError
from servers import Server

from elesh.bus import Bus, read_dead_letter
from elesh.bus.admission import Work, admit, read
from elesh.settings import BusSettings
from leyline import StructuralPruningDecision, TelemetryEvent, read_envelope, unwrap
from leyline.errors import ContractError
from leyline.streams import CHECKPOINTS, DEAD, DECISIONS, STREAMS, TELEMETRY, WORKERS

from .audit import Facts
from .embedded import PARTITION as EMBEDDED
from .embedded import Embedded
from .faults import Fault, Kind, schedule
from .idle import Life
from .listener import Listener
from .proxy import Proxy

__all__ = ["Chaos", "Plan"]

_PARTITION = "chaos"
_ROOT = Path(__file__).parents[2]
_RESTART_SECONDS = 0.5
"""What a process supervisor waits before it starts a dead process again."""
_CATCH_SECONDS = 2.0
"""So long a kill waits for a worker at work: an analysis of theirs takes some 50 ms."""


_REFUSALS = {
    "full": ("CONFIG SET maxmemory 1mb", "CONFIG SET maxmemory 0"),
    "read-only": ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
    "too few replicas": (
        "CONFIG SET min-replicas-to-write 2", "CONFIG SET min-replicas-to-write 0"
    ),
    "a right is missing": ("ACL SETUSER default -xadd -xack", "ACL SETUSER default +@all"),
}  # fmt: skip
"""How a server comes to refuse, and to serve again."""


@dataclass(frozen=True)
class Plan:
    """How large, how long, how rough."""

    seed: int
    seconds: float
    folder: Path
    workers: int = 6
    """So many that seldom all are in long analyses at once."""
    producers: int = 2
    lease: float = 15.0
    fault_pause: float = 4.0
    """Mean seconds between faults."""
    producer_pause: float = 1.0
    mutation: str = ""
    tell: Callable[[str], None] = print


@dataclass
class _Member:
    """One process of the fleet, and how to start it again under another name."""

    start: Callable[[str], subprocess.Popen[bytes]]
    prefix: str
    births: int = 0
    process: subprocess.Popen[bytes] | None = None
    serves_since: float | None = None

    @property
    def name(self) -> str:
        return f"{self.prefix}-{self.births}"

    def born(self) -> None:
        self.births += 1
        self.serves_since = None
        self.process = self.start(self.name)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclass
class Chaos:
    """One run."""

    plan: Plan
    faults: list[Fault] = field(default_factory=list)
    poison: set[str] = field(default_factory=set)
    lives: list[Life] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._server = Server(self.plan.folder / "server")
        self._replica = Server(self.plan.folder / "replica")
        self._proxy = Proxy(self._server.port)
        self._workers = [_Member(self._worker, f"w{n}") for n in range(self.plan.workers)]
        self._producers = [_Member(self._producer, f"p{n}") for n in range(self.plan.producers)]
        self._embedded = Embedded(self.plan.folder / "embedded")
        self._beside = [_Member(self._embedded_trainer, "e0"), _Member(self._embedded_worker, "e1")]
        self._over = asyncio.Event()

    async def run(self) -> Facts:
        """The whole run; the facts at its end."""
        await asyncio.to_thread(self._server.start)
        await asyncio.to_thread(self._replica.start)
        self._follow()
        await self._proxy.start()
        self._settings().write_text(yaml.safe_dump({"elesh": self._sections()}))
        self._listener = Listener(self._url, _PARTITION, 3 * self.plan.producer_pause)
        nursing = asyncio.create_task(self._nurse())
        healed = asyncio.Event()
        patience = 8 * self.plan.lease + 60
        listening = asyncio.create_task(self._listener.run(healed, patience))
        try:
            await self._until(self._all_serve, 60, "the workers to serve")
            await self._break(time.monotonic() + self.plan.seconds)
            await self._heal()
            self.plan.tell("healed, waiting for what is left to be done")
            healed.set()
            await listening
            await self._until(self._quiet, patience, "quiet")
            await self._until(self._embedded_done, patience, "the embedded server's trainer")
            return await self._facts()
        finally:
            self._over.set()
            listening.cancel()
            await nursing
            self._end()
            await self._proxy.close()
            self._server.kill()
            self._replica.kill()

    # The fleet

    def _sections(self) -> dict[str, dict[str, object]]:
        # A message that meets many faults is not poison: it may be delivered more often.
        bus = {"partition": _PARTITION, "lease_seconds": self.plan.lease, "max_deliveries": 12}
        return {"bus": bus, "breaker": {"failures": 10_000}}

    def _settings(self) -> Path:
        return self.plan.folder / "settings.yaml"

    @property
    def _url(self) -> str:
        return f"redis://127.0.0.1:{self._proxy.port}/0"

    def _worker(self, name: str) -> subprocess.Popen[bytes]:
        more = ["--mutate", self.plan.mutation] if self.plan.mutation else []
        arguments = ["--settings", str(self._settings()), *more]
        return self._process("tests.chaos.worker", name, *arguments)

    def _producer(self, name: str) -> subprocess.Popen[bytes]:
        plan = self.plan
        return self._process(
            "tests.chaos.producer", name, "--partition", _PARTITION, "--seed", str(plan.seed),
            "--acknowledged", str(plan.folder / f"{name}.events"),
            "--pause", str(plan.producer_pause), "--slow", str(1.3 * plan.lease),
        )  # fmt: skip

    def _embedded_trainer(self, name: str) -> subprocess.Popen[bytes]:
        command = self._embedded.trainer(3 * self.plan.producer_pause)
        return self._started(command, name, self._embedded.environment())

    def _embedded_worker(self, name: str) -> subprocess.Popen[bytes]:
        settings = self.plan.folder / "embedded.yaml"
        bus = {"partition": EMBEDDED, "lease_seconds": self.plan.lease, "max_deliveries": 12}
        settings.write_text(yaml.safe_dump({"elesh": {**self._sections(), "bus": bus}}))
        command = self._embedded.worker(name, settings)
        return self._started(command, name, self._embedded.environment())

    def _process(self, module: str, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", module, "--url", self._url, "--name", name, *arguments]
        return self._started(command, name, os.environ)

    def _started(
        self, command: list[str], name: str, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        inherited = os.environ.get("PYTHONPATH", "")
        support = _ROOT / "tests" / "support"
        paths = [inherited, str(_ROOT), str(support), str(support / "nets")]
        with (self.plan.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=_ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**environment, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    async def _nurse(self) -> None:
        """Start again what has ended, as whatever runs a fleet does."""
        while not self._over.is_set():
            for member in (*self._workers, *self._producers, *self._beside):
                if not member.alive and not self._over.is_set():
                    self._note_life(member)
                    member.born()
            for worker in self._workers:
                if worker.serves_since is None and self._serves(worker):
                    worker.serves_since = time.time()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), _RESTART_SECONDS)

    def _end(self) -> None:
        for member in (*self._workers, *self._producers, *self._beside):
            if member.alive and member.process is not None:
                member.process.send_signal(signal.SIGCONT)
                member.process.kill()
                member.process.wait()

    async def _until(
        self, condition: Callable[[], Awaitable[bool]], seconds: float, what: str
    ) -> bool:
        """Whether the condition came true in time; what did not is left to the audit."""
        deadline = time.monotonic() + seconds
        while not await condition():
            if time.monotonic() > deadline:
                self.plan.tell(f"waited {seconds:.0f} s in vain for {what}")
                return False
            await asyncio.sleep(0.25)
        return True

    async def _all_serve(self) -> bool:
        return all(map(self._serves, self._workers))

    def _serves(self, worker: _Member) -> bool:
        log = self.plan.folder / f"{worker.name}.log"
        return log.exists() and b" serving" in log.read_bytes()

    def _note_life(self, member: _Member) -> None:
        if member.serves_since is not None:
            self.lives.append(Life(member.name, member.serves_since, time.time()))

    # Faults

    async def _break(self, deadline: float) -> None:
        """Faults by the schedule, one after the other; the last one is seen to its end."""
        for pause, kind, chance in schedule(self.plan.seed, self.plan.fault_pause):
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                return
            begun = time.time()
            target = await self._FAULTS[kind](self, chance)
            self.faults.append(Fault(kind, target, begun, time.time()))
            self.plan.tell(f"{kind} {target}".rstrip())

    def _pick(self, members: list[_Member], chance: random.Random) -> _Member:
        alive = [member for member in members if member.alive]
        return chance.choice(alive or members)

    async def _kill_worker(self, chance: random.Random) -> str:
        """One that has something in flight, if one has within a while: the others lose nothing."""
        holders = await asyncio.to_thread(self._caught)
        holding = [member for member in self._workers if member.name in holders]
        member = self._pick(holding or self._workers, chance)
        assert member.process is not None
        member.process.kill()
        return member.name

    def _caught(self) -> set[str]:
        """Workers at work, waited for a while."""
        deadline = time.monotonic() + _CATCH_SECONDS
        with self._server.client() as redis:
            while not (holders := _holders(redis)) and time.monotonic() < deadline:
                time.sleep(0.005)
        return holders

    async def _kill_child(self, chance: random.Random) -> str:
        member = self._pick(self._workers, chance)
        assert member.process is not None
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            psutil.Process(member.process.pid).children()[0].kill()
        return member.name

    async def _kill_producer(self, chance: random.Random) -> str:
        member = self._pick(self._producers, chance)
        assert member.process is not None
        member.process.kill()
        return member.name

    async def _drain_worker(self, chance: random.Random) -> str:
        member = self._pick(self._workers, chance)
        assert member.process is not None
        member.process.terminate()
        return member.name

    async def _freeze_worker(self, chance: random.Random) -> str:
        member = self._pick(self._workers, chance)
        assert member.process is not None
        member.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self.plan.lease * chance.uniform(0.2, 1.6))
        member.process.send_signal(signal.SIGCONT)
        return member.name

    async def _restart_server(self, chance: random.Random) -> str:
        self._server.kill()
        await asyncio.sleep(chance.uniform(0, 0.2 * self.plan.lease))
        await asyncio.to_thread(self._server.start)
        return ""

    async def _freeze_server(self, chance: random.Random) -> str:
        self._server.freeze()
        await asyncio.sleep(self.plan.lease * chance.uniform(0.2, 0.7))
        self._server.thaw()
        return ""

    async def _cut(self, chance: random.Random) -> str:
        return f"({self._proxy.cut()})"

    async def _stall(self, chance: random.Random) -> str:
        await self._proxy.stall(self.plan.lease * chance.uniform(0.2, 0.7))
        return ""

    async def _poison(self, chance: random.Random) -> str:
        fields = {"envelope": chance.randbytes(chance.randrange(200))}
        with self._server.client() as redis:
            entry = redis.xadd(CHECKPOINTS.key(_PARTITION), fields)
        self.poison.add(entry.decode())
        return entry.decode()

    async def _refuse(self, chance: random.Random) -> str:
        """The server answers, and serves nobody for a while."""
        what = chance.choice(list(_REFUSALS))
        begin, end = _REFUSALS[what]
        with self._server.client() as redis:
            redis.execute_command(*begin.split())
            await asyncio.sleep(self.plan.lease * chance.uniform(0.2, 1.2))
            redis.execute_command(*end.split())
        return what

    def _follow(self) -> None:
        """Have the replica follow the server."""
        with self._replica.client() as redis:
            redis.replicaof("127.0.0.1", str(self._server.port))

    async def _failover(self, chance: random.Random) -> str:
        """The replica takes over with all that was acknowledged, under the same address."""
        if not await self._until(self._in_step, 10, "the replica"):
            return "(no replica in step)"
        with self._server.client() as redis:
            redis.execute_command("FAILOVER")
        if not await self._until(self._taken_over, 20, "the failover"):
            return "(none)"
        self._server, self._replica = self._replica, self._server
        self._proxy.to(self._server.port)
        return str(self._server.port)

    async def _in_step(self) -> bool:
        """Whether the replica has everything, on its disk too: it may be killed soon."""
        with contextlib.suppress(RedisError), self._server.client() as redis:
            if redis.info("replication").get("slave0", {}).get("state") != "online":
                return False
            with self._replica.client() as replica:
                disk = replica.info("persistence")
            return not (disk["aof_rewrite_in_progress"] or disk["aof_rewrite_scheduled"])
        return False

    async def _taken_over(self) -> bool:
        with contextlib.suppress(RedisError), self._replica.client() as redis:
            return bool(redis.info("replication")["role"] == "master")
        return False

    async def _restart_owner(self, chance: random.Random) -> str:
        """Whoever owns the embedded server ends, and the server with it."""
        processes = [m.process for m in self._beside if m.alive and m.process is not None]
        return self._embedded.restart_owner(processes, chance)

    async def _unblock(self, chance: random.Random) -> str:
        """End every waiting read, as a server does that is not the master any more."""
        with self._server.client() as redis:
            waiting = [one for one in redis.client_list() if one["cmd"] in ("xread", "xreadgroup")]
            ended = sum(redis.client_unblock(int(one["id"]), error=True) for one in waiting)
        return f"({ended})"

    _FAULTS: ClassVar[dict[Kind, Callable[[Chaos, random.Random], Awaitable[str]]]] = {
        Kind.KILL_WORKER: _kill_worker, Kind.KILL_CHILD: _kill_child,
        Kind.KILL_PRODUCER: _kill_producer, Kind.DRAIN_WORKER: _drain_worker,
        Kind.FREEZE_WORKER: _freeze_worker, Kind.RESTART_SERVER: _restart_server,
        Kind.FREEZE_SERVER: _freeze_server, Kind.CUT: _cut, Kind.STALL: _stall,
        Kind.POISON: _poison, Kind.REFUSE: _refuse, Kind.UNBLOCK: _unblock,
        Kind.FAILOVER: _failover, Kind.RESTART_OWNER: _restart_owner,
    }  # fmt: skip

    # The end

    async def _heal(self) -> None:
        """No more messages, everything goes on."""
        producers, self._producers = self._producers, []
        for member in (*producers, *self._workers):
            if member.process is not None and member.alive:
                member.process.send_signal(signal.SIGCONT)
        for member in producers:
            if member.process is not None:
                member.process.kill()
                member.process.wait()
        self._embedded.finish()
        self._proxy._flowing.set()
        if self._server.process is None or self._server.process.poll() is not None:
            await asyncio.to_thread(self._server.start)
        self._server.thaw()
        with self._server.client() as redis:
            for _, end in _REFUSALS.values():
                redis.execute_command(*end.split())

    async def _embedded_done(self) -> bool:
        """Whether the embedded server's trainer heard of all that it asked for."""
        return self._embedded.answered() >= self._embedded.asked()

    async def _quiet(self) -> bool:
        """Whether nothing is pending, waiting or delayed."""
        try:
            with self._server.client() as redis:
                return _left(redis) == 0
        except RedisError:
            return False

    async def _facts(self) -> Facts:
        for worker in self._workers:
            self._note_life(worker)
        bus = await Bus.connect(
            self._server.url, BusSettings(partition=_PARTITION, max_blob_bytes=1 << 30)
        )
        checkpoints = dict(filter(None, [_asked(d.fields) for d in await bus.read(CHECKPOINTS)]))
        decisions = [unwrap(read_envelope(d.envelope)) for d in await bus.read(DECISIONS)]
        telemetry = [unwrap(read_envelope(d.envelope)) for d in await bus.read(TELEMETRY)]
        keys = [d.idempotency_key for d in decisions if isinstance(d, StructuralPruningDecision)]
        dead_letters = [read_dead_letter(d) for d in await bus.read(DEAD)]
        with self._server.client() as redis:
            prefix = f"elesh:{{{_PARTITION}}}:record:"
            found = redis.scan_iter(match=f"elesh:{{{_PARTITION}}}:record:*", count=1000)
            records = frozenset(name.decode().removeprefix(prefix) for name in found)
            left = _left(redis)
        await bus.close()
        beside = await self._beside_facts()
        acknowledged = [f.read_text().split() for f in self.plan.folder.glob("*.events")]
        return Facts(
            acknowledged=frozenset(event for events in acknowledged for event in events),
            checkpoints=checkpoints | beside.checkpoints,
            decisions=[*keys, *beside.decisions],
            records=records | beside.records,
            dead_letters=dead_letters,
            telemetry=[event for event in telemetry if isinstance(event, TelemetryEvent)],
            poison=frozenset(self.poison),
            pending=left + beside.pending,
            faults=self.faults,
            lease=self.plan.lease,
            lives=self.lives,
            asked=frozenset(self._listener.asked) | self._embedded.asked(),
            answered=frozenset(self._listener.answered) | self._embedded.answered(),
        )

    async def _beside_facts(self) -> _Beside:
        """What the embedded server says."""
        bus = self._embedded.bus()
        try:
            asked = [_asked(each.fields) for each in await bus.read(CHECKPOINTS)]
            told = [unwrap(read_envelope(each.envelope)) for each in await bus.read(DECISIONS)]
            decided = [each for each in told if isinstance(each, StructuralPruningDecision)]
            recorded = [each.key for each in decided if await bus.record(each.key)]
            groups = [stream for stream in STREAMS if stream.group]
            pending = [await bus.pending(each.group, each) for each in groups]
        finally:
            await bus.close()
        return _Beside(
            dict(filter(None, asked)),
            [each.idempotency_key for each in decided],
            frozenset(map(str, recorded)),
            sum(each.pending for each in pending),
        )


@dataclass(frozen=True)
class _Beside:
    """As :class:`Facts`, of the embedded server."""

    checkpoints: dict[str, str]
    decisions: list[str]
    records: frozenset[str]
    pending: int


def _holders(redis: Redis) -> set[str]:
    """The workers that have claimed something and not ended it."""
    keys = [stream.key(_PARTITION) for stream in STREAMS if stream.group == WORKERS]
    return {
        consumer["name"].decode()
        for key in keys
        if redis.exists(key) and redis.xinfo_groups(key)
        for consumer in redis.xinfo_consumers(key, WORKERS)
        if consumer["pending"]
    }


def _left(redis: Redis) -> int:
    """Entries that a group has still to do, and entries that are delayed."""
    left = redis.zcard(f"elesh:{{{_PARTITION}}}:delayed")
    for stream in STREAMS:
        if not stream.group or not redis.exists(stream.key(_PARTITION)):
            continue
        for group in redis.xinfo_groups(stream.key(_PARTITION)):
            lag = group.get("lag")
            left += group["pending"] + (redis.xlen(stream.key(_PARTITION)) if lag is None else lag)
    return int(left)


def _asked(fields: dict[bytes, bytes]) -> tuple[str, str] | None:
    """Event id and key of a checkpoint's entry; None for poison."""
    try:
        envelope = read_envelope(fields.get(b"envelope", b""))
        work = admit(read(fields[b"envelope"]), window=300, now=envelope.created_at)
    except ContractError:
        return None
    return (envelope.event_id, str(work.key)) if isinstance(work, Work) else None

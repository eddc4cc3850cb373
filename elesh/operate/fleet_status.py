"""Fleet status: workers, backlog, open breakers, the last decisions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elesh.bus import Backlog, BreakerView, Bus, DeadLetterEntry, Guard, WorkerState
from elesh.bus.admission import hear
from elesh.bus.streams.records import Delivery
from elesh.observe.logs import printable
from elesh.observe.terminal import escape
from leyline import ContractError, StructuralPruningDecision
from leyline.streams import DEAD, DECISIONS, STREAMS

from .explain import reasons, removed
from .tables import compact

_LAST = 5
_COLOURS = {"idle": "green", "busy": "cyan", "draining": "yellow", "starting": "yellow"}
_CHILD = {"wedged": "red", "dead": "red"}


@dataclass(frozen=True)
class FleetStatus:
    """What the bus knew at one moment."""

    at: datetime
    workers: Sequence[WorkerState]
    backlog: Mapping[str, Backlog]
    breakers: Sequence[BreakerView]
    decisions: Sequence[StructuralPruningDecision]
    """The last ones, newest first."""
    dead_letters: Sequence[DeadLetterEntry]
    """The last ones, newest first."""
    dead_total: int = 0
    """Dead letters that were not redriven."""

    @property
    def version(self) -> int:
        """Differs where a page would: not with every heartbeat."""
        workers = [worker.model_dump(exclude={"heard_at"}) for worker in self.workers]
        waits = [
            (name, each.length, each.waiting, each.pending, self.since(each.oldest_seconds))
            for name, each in self.backlog.items()
        ]
        dead = [(each.entry_id, each.redriven_as) for each in self.dead_letters]
        return hash(repr((workers, waits, self.breakers, dead, self.dead_total)))

    def since(self, seconds: float | None) -> datetime | None:
        """When something began that has lasted so long, to the second."""
        if seconds is None:
            return None
        return datetime.fromtimestamp(round(self.at.timestamp() - seconds), UTC)

    def facts(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "workers": [worker.model_dump(mode="json") for worker in self.workers],
            "streams": {name: asdict(backlog) for name, backlog in self.backlog.items()},
            "breakers": [asdict(view) for view in self.breakers],
            "dead_letters": [
                entry.message.model_dump(mode="json", exclude={"original"})
                for entry in self.dead_letters
                if entry.message
            ],
            "decisions": [
                {
                    "key": decision.idempotency_key,
                    "run": decision.run_id,
                    "approved": decision.approved_for_application,
                    "units": {name: list(units) for name, units in decision.units.items()},
                    "layers": [target.layer_name for target in decision.layers],
                    "reason": decision.rejection_reason,
                }
                for decision in self.decisions
            ],
        }


async def fleet_status_of(bus: Bus) -> FleetStatus:
    """Ask the bus, in a handful of commands."""
    return FleetStatus(
        at=await bus.clock.now(),
        workers=await bus.registry.workers(),
        backlog=await bus.registry.backlog(),
        breakers=await bus.breakers.show(),
        decisions=[*_decisions(bus.guard, await bus.newest(DECISIONS, count=_LAST))],
        dead_letters=await bus.dead_letters.newest(_LAST),
        dead_total=await bus.dead_letters.open(),
    )


def _decisions(guard: Guard, deliveries: Sequence[Delivery]) -> Iterator[StructuralPruningDecision]:
    for delivery in deliveries:
        try:
            message = hear(delivery, guard).message
        except ContractError:
            continue  # not signed: it cannot be shown as a decision
        if isinstance(message, StructuralPruningDecision):
            yield message


def fleet_status(seen: FleetStatus) -> RenderableType:
    """The status for a terminal: what needs attention first, then what happened, then the rest."""
    parts: list[RenderableType] = [] if seen.workers else [_workers(seen), ""]
    if seen.dead_letters:
        parts += [*_dead(seen), ""]
    if seen.breakers:
        parts += [_breakers(seen), ""]
    parts += [_streams(seen), ""]
    if seen.decisions:
        parts += [*_last(seen), ""]
    return Group(*parts, *([_workers(seen)] if seen.workers else []))


def _workers(seen: FleetStatus) -> RenderableType:
    if not seen.workers:
        return Text("no worker is alive; start one with: elesh worker", style="yellow")
    now, ready = seen.at.timestamp(), sum(worker.ready for worker in seen.workers)
    figures = ("for", "done", "failed", "p95", "memory", "heard")
    table = compact(
        *("worker", "does", "child", *figures, "with"),
        figures=figures,
        whole=("worker", "does", "child"),
        title=f"Workers: {ready} of {len(seen.workers)} ready",
    )
    for each in seen.workers:
        table.add_row(
            escape(each.worker_id),
            Text(each.doing, style=_COLOURS.get(each.doing, "")),
            Text(each.child, style=_CHILD.get(each.child, "")),
            _age(now - each.since) if each.since else "",
            str(each.completed),
            Text(str(each.failed), style="red" if each.failed else ""),
            f"{each.duration_p95:.2f} s" if each.completed else "",
            f"{each.peak_memory_bytes / 2**20:.0f} MB" if each.peak_memory_bytes else "",
            _age(now - each.heard_at),
            Text(printable(each.why), style="red") if each.why else Text(printable(each.key)),
        )
    return table


def _streams(seen: FleetStatus) -> RenderableType:
    """The streams that hold anything."""
    figures = ("entries", "waiting", "pending", "oldest", "lease")
    table = compact("stream", *figures, figures=figures, title="Streams")
    for stream in STREAMS:
        backlog = seen.backlog[stream.name]
        if not backlog.length and not backlog.pending:
            continue
        grouped = bool(stream.group)
        table.add_row(
            stream.name,
            f"{backlog.length:,}",
            ("?" if backlog.waiting is None else f"{backlog.waiting:,}") if grouped else "",
            f"{backlog.pending:,}" if grouped else "",
            _age(backlog.oldest_seconds) if backlog.oldest_seconds is not None else "",
            _age(backlog.lease_seconds) if backlog.lease_seconds is not None else "",
        )
    return table if table.row_count else Text("no stream holds anything")


def _breakers(seen: FleetStatus) -> Table:
    names = ("run", "level", "state", "failures", "reason")
    table = compact(*names, figures=("failures",), title="Breakers")
    for view in seen.breakers:
        colour = {"open": "red", "half_open": "yellow"}.get(view.state, "")
        state = Text(view.state.replace("_", " "), style=colour)
        table.add_row(
            escape(view.run_id), view.level.value, state, str(view.failures), escape(view.reason)
        )
    return table


def _dead(seen: FleetStatus) -> Iterator[Text]:
    total = seen.backlog[DEAD.name].length
    yield Text(f"Dead letters: the last of {total:,}", style="bold")
    for entry in seen.dead_letters:
        if entry.message is None:
            yield Text.assemble((f"{entry.entry_id} cannot be read", "red"))
            yield _brief(entry.error)
            continue
        dead_letter = entry.message
        age = _age((seen.at - dead_letter.at).total_seconds())
        code, place = printable(dead_letter.error_code), printable(dead_letter.stream)
        yield Text.assemble((code, "red"), f"  from {place}, {age} ago")
        yield _brief(dead_letter.reason)


def _last(seen: FleetStatus) -> Iterator[Text]:
    yield Text("Last decisions", style="bold")
    for decision in seen.decisions:
        verdict, reason = ("rejected", "yellow"), reasons(decision)
        if decision.approved_for_application:
            verdict = (f"approved, {removed(decision)}", "green")
        yield Text.assemble(f"{printable(decision.idempotency_key)}  ", verdict)
        yield _brief(f"of {decision.run_id}" + (f": {reason}" if reason else ""))


def _brief(text: str) -> Text:
    """One line, as far as it fits: ``elesh explain`` and ``elesh dead show`` have all of it."""
    return Text(f"  {printable(text)}", no_wrap=True, overflow="ellipsis")


def _age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"

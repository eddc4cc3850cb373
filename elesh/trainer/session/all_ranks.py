"""Several processes that train one network (DistributedDataParallel): rank 0 decides, all make the
same cut.

Rank 0 has the session and does what a single process would do. Before each evaluation, and at the
end, it sends the others what they lack: its masks, and after a cut or a rollback its whole state.
They take that in, evaluate their share of the data, and answer.

Promises: after every call all ranks have the same structure, weights and optimizer state, bit for
bit, or, if one failed midway, those of before it; each rank keeps its own random states. All ranks
call the same methods in the same order; between two of them nothing is exchanged.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as distributed

from elesh.observe import get_logger
from elesh.trainer.calibration.ranks import merge_ranks
from elesh.trainer.recovery.snapshot import Snapshot, Tracked, pack_tree, unpack_tree
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import CheckpointBundle, InvalidField, PrunedArchitecture, PruningOutcome

from .apply import Evaluation
from .session import Session

Evaluate = Callable[[], Evaluation]
_Message = dict[str, Any]
_log = get_logger(__name__)


class AllRanks:
    """The session of a data-parallel run; made by every rank, with the others.

    ::

        ranks = AllRanks(session if rank == 0 else None, surgeon)
        done = ranks.resume(scheduler=scheduler)
        for epoch in range(done + 1, 121):
            train_one_epoch()
            ranks.end_epoch(epoch, evaluate)
            bundle = ranks.merged(recorder.measure(batches, epoch=epoch, run_id="my-run"))
            if bundle is not None:  # on rank 0
                session.publish(bundle)

    Args:
        session: open, on rank 0; None on the others.
        surgeon: of this rank's network (``ddp.module``) and optimizer.

    Raises:
        InvalidField: if torch.distributed was not initialised, or a session is where none belongs.
    """

    def __init__(self, session: Session | None, surgeon: Surgeon) -> None:
        if not distributed.is_initialized():
            hint = "call torch.distributed.init_process_group first"
            raise InvalidField("ranks", "an initialised torch.distributed", "none", hint=hint)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        if (session is not None) != (self.rank == 0):
            found = f"{'a' if session is not None else 'no'} session on rank {self.rank}"
            raise InvalidField("session", "a session on rank 0 and on no other", found)
        self._session, self._tracked = session, Tracked(surgeon)
        # Objects are exchanged on the CPU, whatever the gradients use.
        self._group = distributed.new_group(backend="gloo")
        self._sent: str | None = None
        """Digest of the state that the others are known to have."""

    def resume(self, **parts: Any) -> int:
        """:meth:`Session.resume` on rank 0, whose state all ranks take; the epoch.

        Args:
            parts: what restore points hold beside network and optimizer; the same on every rank.
        """
        self._tracked = Tracked(self._tracked.surgeon, parts)

        def lead(session: Session) -> int:
            epoch = session.resume(self._tracked.surgeon, **parts)
            self._sent = "nothing: the others began with weights of their own"
            return epoch

        found: int = self._together(lead, None)
        return found

    def end_epoch(self, epoch: int, evaluate: Evaluate) -> list[PruningOutcome]:
        """Judge monitored cuts and apply the decisions that have come; what became of them.

        ``evaluate`` is called on every rank at the same time, and may be of a share of the data:
        accuracy and loss are the means over ranks.
        """

        def lead(session: Session) -> list[PruningOutcome]:
            decisions = session.decisions()
            if not decisions and not session.monitored:
                return []
            self._sent = _digest(self._tracked.surgeon)
            judge = functools.partial(self._judge, evaluate)
            found = session.watch(epoch, judge)
            for decision in decisions:
                found.append(session.apply(decision, self._tracked.surgeon, judge))
            return found

        found: list[PruningOutcome] = self._together(lead, evaluate)
        return found

    def merged(self, bundle: CheckpointBundle) -> CheckpointBundle | None:
        """One bundle of what all ranks have measured, on rank 0; None on the others.

        So is the input covariance that a :class:`MeasuredCheckpoint` holds for the cut.
        """
        found = self._gathered(bundle)
        return merge_ranks(found) if found else None

    def _together(self, lead: Callable[[Session], Any], evaluate: Evaluate | None) -> Any:
        if self._session is None:
            return self._serve(evaluate)
        result, error = None, None
        try:
            result = lead(self._session)
        except Exception as raised:
            error = raised
        end = {"do": "end", "result": result, "failed": "" if error is None else repr(error)}
        failed = [a for a in self._exchange(end, lambda: None) if isinstance(a, str)]
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"the networks of the ranks differ now, end this run: {failed}")
        return result

    # Rank 0

    def _judge(self, evaluate: Evaluate) -> Evaluation:
        """An evaluation by all ranks; it fails if one of them does."""
        answers = self._exchange({"do": "evaluate"}, lambda: _figures(evaluate))
        failed = [answer for answer in answers if isinstance(answer, str)]
        if failed:
            raise RuntimeError("; ".join(failed))
        accuracies, losses = zip(*answers, strict=True)
        return Evaluation(sum(accuracies) / self.size, sum(losses) / self.size)

    def _exchange(self, message: _Message, mine: Callable[[], Any]) -> list[Any]:
        """Have the others do something while this rank does ``mine``; all answers."""
        surgeon = self._tracked.surgeon
        message["masks"] = (surgeon.masked, surgeon.masked_layers)
        if self._sent is not None and (now := _digest(surgeon)) != self._sent:
            snapshot, self._sent = Snapshot.take(self._tracked), now
            packed = pack_tree(snapshot.state)
            message["state"] = (snapshot.architecture.model_dump_json(), *packed)
        distributed.broadcast_object_list([message], group=self._group)
        return self._gathered(self._answer(mine))

    # The others

    def _serve(self, evaluate: Evaluate | None) -> Any:
        while True:
            received: list[Any] = [None]
            distributed.broadcast_object_list(received, group=self._group)
            message: _Message = received[0]
            if message["do"] == "evaluate":
                self._gathered(self._answer(functools.partial(self._evaluated, message, evaluate)))
                continue
            self._gathered(self._answer(functools.partial(self._take, message)))
            if message["failed"]:
                raise RuntimeError(f"rank 0 failed: {message['failed']}")
            return message["result"]

    def _evaluated(self, message: _Message, evaluate: Evaluate | None) -> tuple[float, float]:
        assert evaluate is not None
        self._take(message)
        try:
            return _figures(evaluate)
        finally:
            self._tracked.surgeon.unmask()

    def _take(self, message: _Message) -> None:
        """Become what rank 0 is, but for random states."""
        surgeon = self._tracked.surgeon
        if "state" in message:
            architecture, *packed = message["state"]
            state = unpack_tree(*packed)
            own = Snapshot.take(self._tracked).state
            state["random"] = own["random"]
            for name, part in self._tracked.parts.items():
                if isinstance(part, torch.Generator):
                    state["parts"][name] = own["parts"][name]
            now = PrunedArchitecture.model_validate_json(architecture, strict=True)
            Snapshot(now, state).put_back(self._tracked)
        units, layers = message["masks"]
        surgeon.unmask()
        if units:
            surgeon.mask(units)
        if layers:
            surgeon.mask_layers(layers)

    # Both

    def _answer(self, do: Callable[[], Any]) -> Any:
        """What it returns; an error as its text, since the others wait."""
        try:
            return do()
        except Exception as error:
            _log.exception("failed on this rank", rank=self.rank, reason=str(error))
            return f"rank {self.rank}: {type(error).__name__}: {error}"

    def _gathered(self, mine: Any) -> list[Any]:
        """What every rank has given, on rank 0; nothing on the others."""
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        distributed.gather_object(mine, found, dst=0, group=self._group)
        return found or []


def _figures(evaluate: Evaluate) -> tuple[float, float]:
    now = evaluate()
    return now.accuracy, now.loss


def _digest(surgeon: Surgeon) -> str:
    """Digest of structure and weights, which tells whether the ranks agree."""
    found = hashlib.sha256(surgeon.architecture.model_hash.encode())
    tensors = [*surgeon.model.parameters(), *surgeon.model.buffers()]
    for tensor in tensors:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        found.update(raw.cpu().numpy().tobytes())
    return found.hexdigest()

"""The sums of one measurement over all groups of a network, and the statistics made from them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from elesh.observe import get_logger
from elesh.trainer.network.calling import Batches
from elesh.trainer.network.gates import Axis
from elesh.trainer.network.kinds.matrices import layer_at
from elesh.trainer.surgery.reconstruction.after_cut import (
    CovarianceSums,
    InputCovariance,
    normalisations,
    takes_constant,
)
from leyline import (
    ChannelImportanceData,
    GateStatistics,
    HeadImportanceData,
    InvalidField,
    Level,
    PrunedArchitecture,
)

from .accumulators import CORRELATED_SAMPLES, AxisTally, GroupTally, Sums, magnitudes
from .attention_patterns import PATTERN_SAMPLES, AttentionWeights, PatternTally
from .head_ablation import masked_loss_increases, most_doubtful
from .shared_inputs import SharedInputs

_log = get_logger(__name__)
_UNREACHED = (
    "measure on more samples, or on some that they read; an expert that its router has stopped "
    "choosing is reached again by a loss that balances experts"
)


class Measurement:
    """The tallies of one measurement.

    Args:
        inputs: second moments of what enters consumers, too.
        reconstruct: whose covariance is wanted.
        samples: that there will be in all, where that is known.
    """

    def __init__(
        self,
        architecture: PrunedArchitecture,
        inputs: bool = False,
        reconstruct: bool = False,
        samples: int | None = None,
    ) -> None:
        self.look = self._enter if inputs else None
        self.samples, self.batch, self.derived = 0, 1, True
        self._groups = [GroupTally(group) for group in architecture.groups if group.prunable]
        self._axes: dict[Axis, AxisTally] = {
            site.axis: AxisTally() for tally in self._groups for site in tally.group.sites
        }
        self._entered = CovarianceSums(samples) if inputs else None
        self._reconstruct, self._expected = reconstruct, samples
        self._shared = SharedInputs()
        self._at: dict[Axis, list[GroupTally]] = {}
        for tally in self._groups:
            for axis in dict.fromkeys(site.axis for site in tally.group.sites):
                self._at.setdefault(axis, []).append(tally)
        self._first: dict[Axis, list[GroupTally]] = {}
        self._patterns: dict[Axis, PatternTally] = {}
        self._weights = AttentionWeights()
        for tally in self._groups:
            if tally.group.level is Level.HEAD:
                self._patterns[tally.first_axis] = PatternTally(tally.group)
            else:
                self._first.setdefault(tally.first_axis, []).append(tally)

    @property
    def axes(self) -> Collection[Axis]:
        """Where to measure."""
        return self._axes.keys()

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """To be entered while the network runs."""
        return self._weights if self._sees_patterns else contextlib.nullcontext()

    @property
    def _sees_patterns(self) -> bool:
        return bool(self._patterns) and self.derived and self.samples < PATTERN_SAMPLES

    def expect(self, batch: int, derived: bool = True) -> None:
        """Say how many samples the next forward pass has, and whether the loss's derivatives will
        be taken of them: only then are the importance vectors' other parts looked at."""
        self.batch, self.derived = batch, derived
        self._shared.clear()

    def watch(self, axis: Axis, x: Tensor) -> None:
        """Look at the activations that pass an axis."""
        self._shared.see(axis, x)
        if self._entered is not None:
            self._entered.see(axis, x)
        if not self.derived:
            return
        self._axes[axis].see(x, axis[1])
        rows = len(x) * min(self.batch, CORRELATED_SAMPLES - self.samples) // self.batch
        if rows > 0:
            for tally in self._first.get(axis, ()):
                if self._entered is not None and rows == len(x):
                    tally.shared = self._entered.rows[axis], self._entered.second[axis]
                else:
                    tally.correlate(x[:rows])
        if axis in self._patterns and self._sees_patterns:
            left = min(max(PATTERN_SAMPLES - self.samples, 0), self.batch) / self.batch
            self._patterns[axis].see(self._weights.take(), x.numel() // x.shape[-1], left)

    def _enter(self, axis: Axis, x: Tensor, gradient: Tensor) -> None:
        for first, summed in self._shared.together(axis, x, gradient):
            for tally in self._at.get(first, ()):
                tally.enter(first, x, summed, self.batch, self._expected)

    def _all_entered(self) -> None:
        """After a batch: what waits for a reader that had no gradient waits no longer."""
        for axis, x, gradient in self._shared.left():
            for tally in self._at.get(axis, ()):
                tally.enter(axis, x, gradient, self.batch, self._expected)

    def project(self, projections: Sums) -> None:
        """Take in the projections of a batch, of which nothing else is known."""
        self._all_entered()
        for tally in self._groups:
            tally.project(projections, self.batch)
        self.samples += self.batch

    def add(self, projections: Sums, true: Sums, sizes: Sums, sampled: Sums) -> None:
        """Take in the sums of a batch."""
        self._all_entered()
        for tally in self._groups:
            tally.add(projections, true, sizes, sampled, self.batch)
        self.samples += self.batch

    def add_logit_gaps(
        self, projections: Sums, moves: Sums, sizes: Sums, rivals: Sums, margins: Tensor
    ) -> None:
        """Take in the sums of a batch whose samples have margins."""
        self._all_entered()
        known = margins.double().cpu().numpy()
        for tally in self._groups:
            tally.add_logit_gaps(projections, moves, sizes, rivals, known)
        self.samples += self.batch

    def covariance(self, model_hash: str) -> InputCovariance | None:
        """Of what entered every consumer; None where it was not asked for."""
        if self._entered is None or not self._reconstruct:
            return None
        return self._entered.mean(model_hash)

    def ablate(self, model: nn.Module, architecture: PrunedArchitecture, batches: Batches) -> None:
        """Mask heads one at a time and measure what that does, where samples have margins."""
        heads = [t for t in self._groups if t.group.level is Level.HEAD]
        if not heads or not heads[0].rated or heads[0].rated != heads[0].derived:
            return
        known = heads[0].logit_gaps_of_all
        rows = most_doubtful(known, sum(t.group.size for t in heads))
        loss_increases = masked_loss_increases(
            model, architecture, [t.group for t in heads], batches, rows, known[rows]
        )
        for tally in heads:
            tally.measured(rows, loss_increases[tally.group.name])

    def statistics(
        self, model: nn.Module
    ) -> tuple[
        dict[str, ChannelImportanceData], dict[str, GateStatistics], dict[str, HeadImportanceData]
    ]:
        """The statistics by group: of channels, of all gates, of heads. Groups with a consumer that
        no sample reaches have none, and so are left alone by what is decided from them."""
        if not self.samples:
            raise InvalidField("batches", "at least one sample", 0)
        reached = self._reached()
        channel_tallies = [t for t in reached if t.group.level is not Level.HEAD]
        norms = magnitudes(model, (tally.group for tally in channel_tallies))
        channels = {
            t.group.name: t.channels(self._axes, norms[t.group.name]) for t in channel_tallies
        }
        constants = {a for a in self._axes if takes_constant(layer_at(model, a[0]))}
        gates = {
            t.group.name: t.gates(
                self.samples,
                self._entered,
                constants,
                normalisations(model, [t.group], t.group.size),
            )
            for t in reached
        }
        heads = {
            t.group.name: t.heads(self._patterns[t.first_axis].fields())
            for t in reached
            if t.group.level is Level.HEAD
        }
        return channels, gates, heads

    def _reached(self) -> list[GroupTally]:
        """The groups all of whose consumers were called with something."""
        unreached = {tally.group.name: tally.unreached(self._axes) for tally in self._groups}
        left = {name: consumer for name, consumer in unreached.items() if consumer}
        if left:
            _log.warning(
                "no sample reaches some consumers: what they read is left alone this time",
                consumers=sorted(set(left.values()))[:20],
                groups=len(left),
                hint=_UNREACHED,
            )
        if len(left) == len(self._groups) > 0:
            first = next(iter(left.values()))
            raise InvalidField("batches", "samples that reach a consumer", first, hint=_UNREACHED)
        return [tally for tally in self._groups if not unreached[tally.group.name]]

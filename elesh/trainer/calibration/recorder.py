"""Measures a network at a checkpoint: what can be removed, and how important each part is.

Promises: between measurements nothing is installed in the network, and a measurement leaves it
as it was (training flags, buffers, gradients, random generators). The same batches and seed
give the same bundle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from elesh.observe import get_logger
from elesh.trainer.graph.groups import find_architecture
from elesh.trainer.graph.hazards import require_modules
from elesh.trainer.network.calling import (
    Batches,
    Inputs,
    batch_size,
    call,
    device_of,
    main_output,
    map_tensors,
    packed_in,
    remember_example,
    tensors_in,
)
from elesh.trainer.network.gates import GateMeter
from elesh.trainer.network.layers import named_tensors, require_fit
from elesh.trainer.network.state import preserve_state, uncollected, unwrapped
from elesh.trainer.network.traversal import listed_once
from elesh.trainer.surgery.averages import teachers_in, with_teachers
from elesh.trainer.surgery.lineage import continued, lineage_of
from elesh.trainer.surgery.optimizers import require_whole
from elesh.trainer.surgery.reconstruction.after_cut import (
    CovarianceMeter,
    InputCovariance,
    batch_norms,
    consumer_axes,
)
from leyline import (
    AnalysisParameters,
    CheckpointBundle,
    CheckpointMetadata,
    InvalidField,
    Level,
    NotFinite,
    PrunedArchitecture,
    PruningGroup,
    Reconstruction,
    ShapeMismatch,
    checkpoint_id,
)

from .accumulators import GroupTally
from .branch_meter import BranchMeter
from .losses import (
    Loss,
    Sampler,
    class_axis,
    class_labels,
    cross_entropy,
    directions,
    has_logit_gaps,
    margins,
    rival_direction,
    sampled_labels,
    total,
)
from .measurement import Measurement
from .midpoint import LOOK_AHEAD, first_to_go, indices_of

_log = get_logger(__name__)
_ENOUGH = 128
"""Samples that put the units of small groups into an order."""
_ROWS = 8
"""For every unit, where a sample is one row; as many as layers are solved by."""
UNNAMED = "run"
"""The run of a measurement that names none."""
_PIECE = 16
"""A batch is divided into pieces of no fewer samples; random directions are then those that the
whole batch would have."""


@dataclass(frozen=True)
class MeasuredCheckpoint(CheckpointBundle):
    """A checkpoint with what stays in the trainer's process."""

    covariance: InputCovariance | None = None
    """Of the inputs of all consumers: what a cut decided from this checkpoint is refitted with."""


class Recorder:
    """Finds the coupled channel groups and attention heads of a network and measures them.

    One forward and three backward passes a batch, none of them for weights: along a random
    direction of the outputs (projections), of the loss with the true labels (first order and
    Taylor), and of the loss with labels drawn from the model's own predictions (second order).
    With the default loss and one label a sample, the last two are of the label's logit gap and of a
    direction among the other classes: the same statistics follow from them, and also the loss
    increase of single removals beyond second order.
    A last forward and backward pass takes the projections of channels at the midpoint of a cut
    (``look_ahead``): derivatives there predict its effect better than derivatives of the whole
    network. Heads are few, and derivatives predict them worst, so each is masked in
    turn, on the samples where that matters most.
    Statistics are taken in evaluation mode (normalisations frozen), so samples do not see each
    other. The first dimension of activations must count samples (or rows that each belong to
    one sample, in the order of the samples).

    Args:
        model: the network, which may be compiled; must be copyable, as the wiring is traced and
            proved on a copy.
        example_inputs: a small batch: a tensor, a sequence (positional) or a mapping (keywords).
        ignored_layers: names of layers, or of modules that hold some, whose outputs must stay.
        loss: a function of the model's output and the labels that returns one loss a sample (or
            their mean); default: cross-entropy of logits, summed over a sample's positions.
        sample_labels: a function of the model's output that draws labels from its predictive
            distribution. Default: from the softmax for the default loss; with a loss of your own
            and no sampler, the true labels (metadata.labels says ``true``).
        outputs: ``logits`` centres the random directions over the classes; ``values`` does not.
        compared: a function of the model's output that returns what must be equal under a mask and
            after a cut (tensors in any nesting), if other outputs jump by rounding. Default: all
            floating-point tensors.
        seed: seed of directions and sampled labels. Data-parallel ranks need different ones.
        architecture: the network's architecture, if known (then nothing is traced). Default: it is
            traced; a network that was cut before keeps its history.

    Raises:
        InvalidField: if the model cannot be copied or is sharded over processes, an ignored layer
            does not exist, or ``values`` come without a loss.
        ShapeMismatch: if a given architecture does not describe the model.
    """

    _not_followed = True

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        *,
        ignored_layers: Collection[str] = (),
        loss: Loss | None = None,
        sample_labels: Sampler | None = None,
        outputs: Literal["logits", "values"] = "logits",
        compared: Callable[[Any], Any] | None = None,
        seed: int = 0,
        architecture: PrunedArchitecture | None = None,
    ) -> None:
        if outputs == "values" and loss is None:
            raise InvalidField("loss", "a loss function where outputs are values", None)
        model = unwrapped(model)
        self._model = model
        self._loss, self._sampler = loss or cross_entropy, sample_labels
        self._samples_labels = loss is None or sample_labels is not None
        self._centred, self._seed = outputs == "logits", seed
        with listed_once(model):
            require_whole(model)
            require_modules(model)
            remember_example(model, example_inputs)
            if architecture is None:
                found = find_architecture(model, example_inputs, ignored_layers, compared)
                self._architecture = with_teachers(found, teachers_in(model))
                if (cut := _cut_before(model)) is not None:
                    self.architecture = continued(cut, self._architecture)
            else:
                self.architecture = architecture

    @property
    def architecture(self) -> PrunedArchitecture:
        """What the network looks like; set it to the Surgeon's after a cut or its undoing.

        Raises:
            ShapeMismatch: if it does not describe the model.
        """
        return self._architecture

    @architecture.setter
    def architecture(self, architecture: PrunedArchitecture) -> None:
        require_fit(self._model, architecture)
        self._architecture = architecture

    def measure(
        self,
        batches: Iterable[tuple[Inputs, Any]],
        *,
        epoch: int,
        run_id: str = UNNAMED,
        step: int = 0,
        accuracy: float | None = None,
        loss: float | None = None,
        note: str = "",
        max_samples: int | None = None,
        look_ahead: float | None = None,
        reconstruct: bool = True,
        skip: Collection[str] = (),
        batch_statistics: bool = False,
        redistribute: bool = False,
        loss_samples: int | None = None,
        layers: bool = True,
        ahead: float | None = None,
    ) -> MeasuredCheckpoint:
        """A checkpoint: architecture, statistics of every prunable group, and metadata.

        Args:
            batches: (inputs, labels) pairs; tensors are moved to the model's device.
            epoch, run_id, step, accuracy, loss, note: for the metadata (held-out figures); a
                session that publishes it without a run id adds its own.
            max_samples: stop after this many samples.
            look_ahead: the share of all channels whose cut the projections speak of: they are
                taken with the gates of that many channels, the first to go, at one half. 0: at the
                network as it is, which saves a forward and a backward pass, and all that is
                needed with ``reconstruct``. Default: a fifth, or 0 with ``reconstruct``.
            reconstruct: cuts decided from this checkpoint are followed by refitting what reads the
                kept units: units are ranked and verified for that, and the input covariance is
                kept with the checkpoint (three C x C matrices for every consumer of C channels).
            skip: paths of consumers that keep their weights.
            batch_statistics: those of batch normalisations move along with refitting:
                ``session.apply(..., batches=batches)`` does that.
            redistribute: only rank for a trainer that refits, as in the version before.
            loss_samples: only the first so many samples have the loss's derivatives taken, two of
                the three backward passes, and those that come in one batch with them where that
                is not much larger or cannot be divided; what is made from these (first and second
                order, margins, the masking of heads) is of them alone. The order for
                ``reconstruct`` reads none of it. Default: all.
            layers: whether to measure whole layers, too.
            ahead: the name of ``look_ahead`` in the version before.

        Raises:
            ShapeMismatch: if the network is not what the architecture says.
            NotFinite: if outputs or statistics hold NaN or infinity, naming group and field.
            InvalidField: if there is no sample, or none reaches a consumer. A group of which some
                consumer is not reached (an expert that is never chosen) has no statistics: it is
                left alone.
        """
        require_fit(self._model, self._architecture)
        redistribute = redistribute or reconstruct
        if look_ahead is None:
            look_ahead = ahead
        if look_ahead is None:
            look_ahead = 0.0 if reconstruct else LOOK_AHEAD
        kept: Batches = ()
        architecture = self._architecture
        with preserve_state(self._model, self._seed, batches):
            kept = list(self._limited(batches, max_samples, apart=loss_samples))
            expected = sum(batch_size(inputs) for inputs, _ in kept)
            measurement = Measurement(
                architecture, inputs=redistribute, reconstruct=reconstruct, samples=expected
            )
            branches = self._run(measurement, kept, loss_samples, layers)
            with uncollected():
                measurement.ablate(self._model, architecture, kept)
        metadata = CheckpointMetadata(
            run_id=run_id,
            checkpoint_id=checkpoint_id(run_id, epoch, architecture.model_hash),
            epoch=epoch,
            model_hash=architecture.model_hash,
            step=step,
            accuracy=accuracy,
            loss=loss,
            samples=measurement.samples,
            distinct=_distinct(kept, measurement.samples),
            labels="sampled" if self._samples_labels else "true",
            seed=self._seed,
            note=note,
        )
        with uncollected():
            channels, gates, heads = measurement.statistics(self._model)
        by_layer = branches.statistics(measurement.samples)
        asked = Reconstruction(
            skip=tuple(skip),
            batch_statistics=batch_statistics and bool(batch_norms(self._model)),
        )
        parameters = AnalysisParameters(
            redistribute=redistribute,
            reconstruction=asked if reconstruct else None,
            failing_gate="shorten",
        )
        bundle = MeasuredCheckpoint(
            metadata,
            architecture,
            channels,
            gates,
            parameters=parameters,
            layers=by_layer,
            heads=heads,
            covariance=measurement.covariance(architecture.model_hash),
        )
        return self._midpoint(bundle, kept, look_ahead) if look_ahead else bundle

    def _midpoint(
        self, bundle: MeasuredCheckpoint, batches: Batches, share: float
    ) -> MeasuredCheckpoint:
        """The bundle with projections of channels at the midpoint of a cut of this
        share of them."""
        groups = [self._architecture.group[name] for name in bundle.channels]
        groups = [g for g in groups if g.level is Level.CHANNEL]
        units = first_to_go(bundle, groups, share)
        if not units:
            return bundle
        tallies, halved = [GroupTally(group) for group in groups], indices_of(groups, units)
        generator = torch.Generator().manual_seed(self._seed)
        axes = {site.axis: None for group in groups for site in group.sites}
        with (
            preserve_state(self._model, self._seed),
            GateMeter(self._model, axes, lambda axis, x: None, halved) as meter,
        ):
            for inputs, labels in batches:
                meter.expect(batch_size(inputs))
                values = main_output(call(self._model, inputs)).float()
                drawn = directions(values.detach(), generator, self._class_axis(values, labels))
                sums, _ = meter.backward((drawn * values).sum(), keep=False)
                for tally in tallies:
                    tally.project(sums, batch_size(inputs))
        gates = dict(bundle.gates)
        for tally in tallies:
            rows = {"projections": np.concatenate(tally.projections)}
            gates[tally.group.name] = gates[tally.group.name].model_copy(update=rows)
        return replace(bundle, gates=gates)

    def moments(
        self,
        batches: Iterable[tuple[Inputs, Any]],
        groups: Collection[str],
        *,
        max_samples: int | None = None,
    ) -> InputCovariance:
        """Input covariance of the consumers of ``groups``, for ``Surgeon.cut``, by itself.

        One forward pass a batch, nothing masked. A consumer of C channels takes C x C doubles, so
        name only the groups that are cut.

        Raises:
            InvalidField: if a group is not there, or no sample reaches one of its consumers.
            ShapeMismatch: if the network is not what the architecture says.
        """
        require_fit(self._model, self._architecture)
        for name in groups:
            if name not in self._architecture.group:
                raise InvalidField("groups", f"some of {sorted(self._architecture.group)}", name)
        meter = CovarianceMeter(self._model, consumer_axes(self._architecture, groups))
        with preserve_state(self._model, self._seed, batches), torch.no_grad(), meter:
            for inputs, _ in self._limited(batches, max_samples):
                call(self._model, inputs)
        return meter.covariance(self._architecture.model_hash)

    def project(
        self, batches: Iterable[tuple[Inputs, Any]], *, max_samples: int | None = None
    ) -> npt.NDArray[np.float64]:
        """[N]: the outputs along the random directions that :meth:`measure` takes them.

        The difference between now and before earlier cuts, from the same batches and seed, is
        what those cuts have moved: r in ``cost = mean(G_i^2) - 2 mean(r G_i)``.
        """
        generator, rows = torch.Generator().manual_seed(self._seed), []
        with preserve_state(self._model, self._seed, batches), torch.no_grad():
            for inputs, labels in self._limited(batches, max_samples):
                values = main_output(call(self._model, inputs)).float()
                drawn = directions(values, generator, self._class_axis(values, labels))
                rows.append((drawn * values).flatten(1).sum(1).double().cpu())
        return torch.cat(rows).numpy() if rows else np.zeros(0)

    def _limited(
        self,
        batches: Iterable[tuple[Inputs, Any]],
        limit: int | None,
        apart: int | None = None,
    ) -> Iterator[tuple[Inputs, Any]]:
        """Batches on the model's device, up to so many samples. A batch that goes on beyond the
        first samples that are ``apart`` is divided there."""
        device, seen = device_of(self._model), 0
        for inputs, labels in batches:
            size = batch_size(inputs)
            left = size if limit is None else min(size, limit - seen)
            if left <= 0:
                return
            ends = [left]
            if packed_in(inputs) is not None:
                ends = [size]  # It cannot be shortened.
            elif apart is not None and _PIECE <= apart - seen <= left - _PIECE:
                ends = [apart - seen, left]

            def taken(tensor: Tensor, begin: int, end: int, size: int = size) -> Tensor:
                whole = tensor.ndim == 0 or tensor.shape[0] != size
                part = (tensor if whole else tensor[begin:end]).detach().to(device)
                return part.clone() if part.is_inference() else part

            for begin, end in pairwise([0, *ends]):
                own = partial(taken, begin=begin, end=end)
                yield map_tensors(own, inputs), map_tensors(own, labels)
            seen += ends[-1]

    def _run(
        self,
        measurement: Measurement,
        batches: Iterable[tuple[Inputs, Any]],
        loss_samples: int | None,
        layers: bool,
    ) -> BranchMeter:
        # Two streams, so that the directions are those of ``project`` whatever labels are drawn.
        generators = tuple(torch.Generator().manual_seed(self._seed + i * 2**32) for i in (0, 1))
        meter = GateMeter(self._model, measurement.axes, measurement.watch)
        blocks = self._architecture.blocks if layers else ()
        branches = BranchMeter(self._model, blocks, meter.anchor)
        with branches, meter:
            for inputs, labels in batches:
                samples = batch_size(inputs)
                meter.expect(samples)
                branches.expect(samples)
                derived = loss_samples is None or measurement.samples < loss_samples
                measurement.expect(samples, derived)
                with uncollected():
                    with measurement.watching():
                        output = call(self._model, inputs)
                    self._passes(meter, branches, measurement, output, labels, generators)
        return branches

    def _class_axis(self, values: Tensor, labels: Any) -> int | None:
        return class_axis(values, labels) if self._centred else None

    def _passes(
        self,
        meter: GateMeter,
        branches: BranchMeter,
        measurement: Measurement,
        output: Any,
        labels: Any,
        generators: tuple[torch.Generator, ...],
    ) -> None:
        """The backward passes of a batch: three, or one."""
        values, (for_directions, for_labels) = main_output(output).float(), generators
        if not torch.isfinite(values).all():
            raise NotFinite(
                "outputs of the network",
                "finite numbers",
                "NaN or infinity",
                hint=_where_not_finite(self._model),
            )
        if self._loss is cross_entropy and self._sampler is None:
            labels = class_labels(values, labels)
        axis, samples = self._class_axis(values, labels), measurement.batch
        projected = (directions(values.detach(), for_directions, axis) * values).sum()
        branches.read("projections")
        derived = measurement.derived
        projections, _ = meter.backward(projected, keep=derived, look=measurement.look)
        if not derived:
            return measurement.project(projections)
        if self._loss is cross_entropy and self._sampler is None and has_logit_gaps(values, labels):
            odds = margins(values, labels)
            known = odds.detach()
            branches.read("true", known)
            moves, sizes = meter.backward(odds.sum(), absolute=known.sigmoid())
            toward = rival_direction(values, labels)
            branches.read("sampled", known)
            rivals, _ = meter.backward((toward * values).sum(), keep=False)
            measurement.add_logit_gaps(projections, moves, sizes, rivals, known)
            return
        loss = total(self._loss(output, labels), samples)
        branches.read("true")
        true, sizes = meter.backward(loss, absolute=torch.ones(samples))
        if not self._samples_labels:
            drawn = labels
        elif self._sampler is not None:
            drawn = self._sampler(output)
        else:
            drawn = sampled_labels(output, labels, for_labels)
        branches.read("sampled")
        sampled, _ = meter.backward(total(self._loss(output, drawn), samples), keep=False)
        measurement.add(projections, true, sizes, sampled)


def enough_samples(architecture: PrunedArchitecture, at_least: int = 256) -> int:
    """So many samples put units into the order for reconstruction as well as more do: as many as
    the widest group has units, whose slopes are taken together, but no fewer than 128; twice as
    many, where that is no more than ``at_least`` (of heads, their elements count).

    A sample of a table is one row, where one of an image has as many as positions: what a few
    hundred rows say of inputs and slopes is chance, and they cost little. Eight are taken for
    every unit.
    """
    groups = [group for group in architecture.groups if group.prunable]
    widest = max((group.size for group in groups), default=0)
    across = max((_inputs(group) for group in groups), default=0)
    several = _ROWS * across if of_a_table(architecture) else min(2 * across, at_least)
    return max(_ENOUGH, widest, several)


def of_a_table(architecture: PrunedArchitecture) -> bool:
    """Whether every layer sees one position of a sample."""
    return max((layer.positions for layer in architecture.layers), default=0) == 1


def _inputs(group: PruningGroup) -> int:
    """Coefficients that the slopes of a group are of."""
    of_unit = group.sites[0].width if group.level is Level.HEAD and group.sites else 1
    return group.size * of_unit


def _cut_before(model: nn.Module) -> PrunedArchitecture | None:
    """What a network that was cut before is, by its lineage; None if it was changed since."""
    known = lineage_of(model)
    if known is None or not known.now.history:
        return None
    try:
        require_fit(model, known.now)
    except ShapeMismatch as error:
        _log.warning("changed since it was cut: a new history begins", reason=str(error))
        return None
    return known.now


def _distinct(batches: Batches, samples: int) -> int | None:
    """How many samples differ from all before them; None where all do."""
    seen: set[bytes] = set()
    for inputs, _ in batches:
        size = batch_size(inputs)
        given = [x.cpu() for x in tensors_in(inputs) if x.ndim and len(x) == size]
        rows = [x.reshape(size, -1).contiguous().view(torch.uint8).numpy() for x in given]
        for number in range(size):
            digest = hashlib.blake2b(digest_size=16)
            for row in rows:
                digest.update(row[number])
            seen.add(digest.digest())
    return None if len(seen) == samples else len(seen)


def _where_not_finite(model: nn.Module) -> str:
    for path, tensor in named_tensors(model).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"{path} is not finite"
    return "all weights are finite: look at the inputs"

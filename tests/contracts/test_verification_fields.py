"""The network that a checkpoint can carry, and what was measured with it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from contracts.examples import ARCHITECTURE, MESSAGES, METADATA
from elesh.bus.admission import Work, admit, read
from leyline import (
    CheckpointBundle,
    CheckpointReady,
    Interval,
    InvalidField,
    NetworkExport,
    StructuralPruningDecision,
    Verification,
    decode,
    encode,
    wrap,
)

NOW = datetime(2025, 1, 14, tzinfo=UTC)


def figures(**over: object) -> Verification:
    values = {
        "samples": 200,
        "measurements": 3,
        "proposed": 4,
        "kept": 2,
        "loss_before": 0.1,
        "loss_rise": 0.01,
        "loss_rise_interval": Interval(low=0.0, high=0.02),
        "accuracy_before": 0.97,
        "accuracy_drop": 0.005,
        "accuracy_drop_interval": Interval(low=-0.005, high=0.015),
        "class_accuracy_drop": 0.05,
        "worst_class": 3,
        "gradient_flow_change": 0.01,
    }
    return Verification.model_validate(values | over)


def test_a_bundle_keeps_its_network_in_a_folder_and_forgets_it_with_it(tmp_path) -> None:
    network = NetworkExport(program=b"p", weights=b"w", held_out=b"h")
    bundle = CheckpointBundle(METADATA, ARCHITECTURE, {}, network=network)
    assert CheckpointBundle.load(bundle.save(tmp_path)).network == network
    assert CheckpointBundle.load(replace(bundle, network=None).save(tmp_path)).network is None


def test_measured_figures_survive_the_wire_and_older_decisions_keep_their_bytes() -> None:
    decision = MESSAGES["StructuralPruningDecision"]
    assert isinstance(decision, StructuralPruningDecision)
    assert b"verification" not in encode(decision)
    safety = decision.safety.model_copy(update={"measured": True, "verification": figures()})
    measured = decision.model_copy(update={"safety": safety})
    assert decode(StructuralPruningDecision, encode(measured)) == measured


def test_an_interval_the_wrong_way_round_is_refused_by_name() -> None:
    with pytest.raises(InvalidField, match="high"):
        Interval(low=0.2, high=0.1)


def test_a_checkpoint_with_a_part_of_its_network_is_refused_by_name() -> None:
    message = MESSAGES["CheckpointReady"]
    assert isinstance(message, CheckpointReady)
    ref = message.statistics
    whole = message.model_copy(update={"program": ref, "weights": ref, "held_out": ref})
    work = admit(read(encode(wrap(whole, source="t", now=NOW))), window=300, now=NOW)
    assert isinstance(work, Work)
    assert {"program.msgpack", "weights.safetensors", "held_out.safetensors"} <= work.blobs.keys()
    part = whole.model_copy(update={"weights": None})
    with pytest.raises(InvalidField, match="no weights"):
        admit(read(encode(wrap(part, source="t", now=NOW))), window=300, now=NOW)

"""Public networks, their smallest members: what can go, and that cutting it is sound."""

from __future__ import annotations

import pytest

from benchmarks.zoo.networks import build
from benchmarks.zoo.ours import examine

pytestmark = pytest.mark.slow

NETWORKS = ["bert_cls", "gpt_neox", "falcon", "gemma", "qwen3", "t5"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_public_network_loses_what_it_can_and_stays_sound(name: str) -> None:
    figures = examine(*build(f"transformers/{name}"))
    assert figures["rows"] >= 0.9 * figures["all_rows"], figures["left_alone"]
    assert figures["heads"][0] == figures["heads"][1] > 0, figures["left_alone"]
    assert figures["difference"] < 1e-5
    assert figures["exact"]
    assert figures["undo"]
    assert set(figures["trains"].values()) == {"yes"}
    assert figures["removed"] > 0.2

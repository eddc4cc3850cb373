"""Keys and identities: one canonical text each, the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import leyline as ll

HASH = "0123456789abcdef"
GOOD = f"31:{HASH}:ck-31:channel"
epochs = st.integers(0, 10**10 - 1)
hashes = st.from_regex(r"[0-9a-f]{16}", fullmatch=True)
identifiers = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}", fullmatch=True)


@given(epochs, hashes, identifiers, st.sampled_from(list(ll.Level)))
def test_a_key_prints_and_parses_back_to_itself(
    epoch: int, model: str, name: str, level: ll.Level
) -> None:
    key = ll.IdempotencyKey(epoch, model, name, level)
    assert str(key) == f"{epoch}:{model}:{name}:{level}"
    assert ll.IdempotencyKey.parse(str(key)) == key
    request = ll.RequestKey(epoch, model, name)
    assert ll.RequestKey.parse(str(request)) == request
    assert request.at(level) == key


BAD = {
    "empty": "",
    "no level": f"31:{HASH}:ck-31",
    "a part more": f"{GOOD}:more",
    "unknown level": f"31:{HASH}:ck-31:neuron",
    "upper-case level": f"31:{HASH}:ck-31:CHANNEL",
    "leading zero": f"031:{HASH}:ck-31:channel",
    "two zeros": f"00:{HASH}:ck-31:channel",
    "sign": f"+31:{HASH}:ck-31:channel",
    "negative": f"-1:{HASH}:ck-31:channel",
    "unicode digits": f"٣١:{HASH}:ck-31:channel",
    "full-width digit in the hash": f"31:\uff10{HASH[1:]}:ck-31:channel",
    "unicode letter": f"31:{HASH}:ck-é:channel",
    "too many epochs": f"{10**10}:{HASH}:ck-31:channel",
    "upper-case hash": f"31:{HASH.upper()}:ck-31:channel",
    "short hash": f"31:{HASH[1:]}:ck-31:channel",
    "long hash": f"31:{HASH}0:ck-31:channel",
    "no identifier": f"31:{HASH}::channel",
    "identifier begins with a dot": f"31:{HASH}:.ck:channel",
    "long identifier": f"31:{HASH}:{'a' * 65}:channel",
    "colon in the identifier": f"31:{HASH}:a:b:channel",
    "newline at the end": f"{GOOD}\n",
    "newline inside": f"31:{HASH}:ck\n31:channel",
    "space before": f" {GOOD}",
    "null byte": f"{GOOD}\0",
    "bytes": GOOD.encode(),
    "none": None,
}


@pytest.mark.parametrize("name", BAD)
def test_anything_but_a_key_is_refused(name: str) -> None:
    text: Any = BAD[name]
    with pytest.raises(ll.InvalidField) as caught:
        ll.IdempotencyKey.parse(text)
    assert caught.value.field == "idempotency_key"
    if name != "no level":
        with pytest.raises(ll.InvalidField):
            ll.RequestKey.parse(text.replace(":channel", "") if isinstance(text, str) else text)


@given(st.text(alphabet="0123456789abcdefABCDEF:-_.\n chanelrjoit٣", max_size=60))
def test_what_parses_prints_as_it_was(text: str) -> None:
    try:
        key = ll.IdempotencyKey.parse(text)
    except ll.InvalidField:
        return
    assert str(key) == text


@pytest.mark.parametrize("epoch", [True, 31.0, "31", -1, 10**10])
def test_a_key_is_not_built_from_what_it_would_not_parse_back_to(epoch: Any) -> None:
    with pytest.raises(ll.InvalidField):
        ll.IdempotencyKey(epoch, HASH, "ck-31", ll.Level.CHANNEL)
    with pytest.raises(ll.InvalidField):
        ll.RequestKey(epoch, HASH, "ck-31")


def test_a_level_given_as_text_becomes_the_level() -> None:
    key = ll.IdempotencyKey(31, HASH, "ck-31", "head")  # type: ignore[arg-type]
    assert key.level is ll.Level.HEAD
    assert str(key.at(ll.Level.JOINT)) == f"31:{HASH}:ck-31:joint"


def test_a_parameters_identity_never_changes() -> None:
    weight = ll.ParameterIdentifier(path="conv1.weight", shape=(64, 3, 7, 7), dtype="float32")
    scalar = ll.ParameterIdentifier(path="scale", shape=(), dtype="float16")
    # sha256("conv1.weight:64x3x7x7:float32") and sha256("scale::float16"), 16 digits each
    assert weight.identifier == "baf249426d9f5486"
    assert scalar.identifier == "c30aa6090c924eff"
    assert ll.checkpoint_id("run", 3, HASH) == "ck-b0cdacef2ef6ec81"


@pytest.mark.slow
def test_identities_are_the_same_in_every_process() -> None:
    program = (
        "import leyline as ll\n"
        "p = ll.ParameterIdentifier(path='conv1.weight', shape=(64, 3, 7, 7), dtype='float32')\n"
        f"print(p.identifier, ll.checkpoint_id('run', 3, {HASH!r}, ['x']), ll.stable_hash('a', 1))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = ll.ParameterIdentifier(path="conv1.weight", shape=(64, 3, 7, 7), dtype="float32")
    assert found == {
        f"{here.identifier} {ll.checkpoint_id('run', 3, HASH, ['x'])} {ll.stable_hash('a', 1)}\n"
    }


@pytest.mark.parametrize(
    "other",
    [
        {"path": "conv2.weight"},
        {"shape": (64, 3, 49)},
        {"shape": (643, 7, 7)},
        {"dtype": "float16"},
    ],
)
def test_another_path_shape_or_dtype_is_another_identity(other: dict[str, Any]) -> None:
    one: dict[str, Any] = {"path": "conv1.weight", "shape": (64, 3, 7, 7), "dtype": "float32"}
    changed = ll.ParameterIdentifier(**one | other)
    assert changed.identifier != ll.ParameterIdentifier(**one).identifier

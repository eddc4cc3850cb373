"""Whoever removes, changes or moves an entry of the audit log is found, with the place."""

from __future__ import annotations

import io
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elesh.observe import AuditFile, Link, line_of, read_line, verify
from leyline import GENESIS, AuditEntry, AuditEvent

AT = datetime(2025, 1, 14, 12, tzinfo=UTC)


def chain(length: int) -> list[AuditEntry]:
    entries, digest = [], GENESIS
    for number in range(1, length + 1):
        event = AuditEvent(
            kind="operator", action="drop", actor="jo", at=AT, subject=f"dead/{number}-0"
        )
        entries.append(AuditEntry(number=number, previous=digest, event=event))
        digest = entries[-1].digest
    return entries


def links(entries: list[AuditEntry]) -> list[Link]:
    return [Link(f"audit/{entry.number}-0", entry) for entry in entries]


def problems(entries: list[AuditEntry], whole: list[AuditEntry]) -> list[str]:
    return [str(x) for x in verify(links(entries), number=len(whole), digest=whole[-1].digest)]


def test_a_whole_chain_holds():
    whole = chain(5)
    assert problems(whole, whole) == []
    assert verify([]) == []


@pytest.mark.parametrize("index", range(5))
def test_a_removed_entry_is_named(index):
    whole = chain(5)
    found = problems(whole[:index] + whole[index + 1 :], whole)
    if index == 4:
        assert found == ["after audit/4-0: entry 5 is missing: the chain ends at entry 5"]
    else:
        place = f"audit/{index + 2}-0"
        assert found == [f"{place}: entry {index + 2} where entry {index + 1} should be"]


def test_an_emptied_log_is_named():
    whole = chain(3)
    assert problems([], whole) == [
        "after the beginning: entries 1 to 3 are missing: the chain ends at entry 3"
    ]


@pytest.mark.parametrize("index", range(5))
def test_a_changed_entry_is_named_even_if_it_is_the_last(index):
    whole = chain(5)
    event = whole[index].event.model_copy(update={"actor": "nobody"})
    changed = [*whole]
    changed[index] = whole[index].model_copy(update={"event": event})
    found = problems(changed, whole)
    assert len(found) == 1
    assert found[0].startswith(f"audit/{index + 1}-0: ")
    assert "was changed" in found[0]


def test_two_swapped_entries_are_named():
    whole = chain(5)
    swapped = [whole[0], whole[2], whole[1], whole[3], whole[4]]
    assert problems(swapped, whole) == [
        "audit/3-0: entry 3 where entry 2 should be",
        "audit/2-0: entry 2 where entry 4 should be",
    ]


def test_a_chain_rewritten_from_some_entry_on_does_not_end_where_it_should():
    whole, other = chain(5), chain(5)
    event = whole[4].event.model_copy(update={"reason": "another story"})
    other[4] = AuditEntry(number=5, previous=other[3].digest, event=event)
    assert problems(other, whole) == [
        "audit/5-0: entry 5 was changed: it has not the digest of the chain's end"
    ]


@given(st.integers(0, 2**32))
@example(184200)  # a carriage return
def test_any_flipped_bit_of_a_file_is_found_in_its_line(seed):
    rng = random.Random(seed)
    lines = [line_of(entry) for entry in chain(3)]
    row = rng.randrange(3)
    data = bytearray(lines[row])
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    # A new line end within a line makes two of it; both are then wrong.
    parts = io.BytesIO(b"".join([*lines[:row], bytes(data), *lines[row + 1 :]])).readlines()
    found = verify(read_line(line, f"line {n}") for n, line in enumerate(parts, 1))
    assert found
    assert found[0].place == f"line {row + 1}"


def test_a_file_is_one_chain_whoever_appends_and_its_torn_end_is_mended(tmp_path: Path):
    whole, path = chain(6), tmp_path / "audit.jsonl"
    file = AuditFile(path)
    assert [entry.number for entry in file.extend(whole[:2])] == [1, 2]
    assert [entry.number for entry in file.extend(whole[:4])] == [3, 4]
    with path.open("ab") as torn:
        torn.write(line_of(whole[4])[:-7])
    assert [entry.number for entry in file.extend(whole)] == [5, 6]
    assert path.read_bytes() == b"".join(map(line_of, whole))
    assert verify(file.links(), number=6, digest=whole[-1].digest) == []


def test_a_file_refuses_entries_of_another_chain(tmp_path: Path):
    file = AuditFile(tmp_path / "audit.jsonl")
    file.extend(chain(3))
    before = file.path.read_bytes()
    event = chain(1)[0].event
    with pytest.raises(ValueError, match=r"audit.jsonl: ends with entry 3, and entry 4 was not"):
        file.extend([AuditEntry(number=4, previous="1" * 64, event=event)])
    assert file.path.read_bytes() == before

"""Modules of the version before can be imported by their names until the next one."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(
    ("former", "now", "name"),
    [
        ("elesh.verification", "elesh.program", "verifier"),
        ("elesh.worker.shards", "elesh.worker.fan_out", "groups_of"),
        ("leyline.work", "leyline.streams", "ItemResult"),
    ],
)
def test_a_former_name_of_a_module_leads_to_the_present_one(
    former: str, now: str, name: str
) -> None:
    there, here = importlib.import_module(former), importlib.import_module(now)
    assert getattr(there, name) is getattr(here, name)

"""The pages of settings and commands are what the code says, and every key is on them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from docs.generate import commands, settings
from elesh.cli import app
from elesh.safety import strictest_limits
from elesh.settings import Settings
from elesh.settings._base import why_retired
from elesh.settings.advice import CONSTANTS
from leyline import Level, Phase

DOCS = Path(__file__).parents[1] / "docs"


def keys(default: BaseModel, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for name in type(default).model_fields:
        value, field = getattr(default, name), type(default).model_fields[name]
        nested = isinstance(value, BaseModel) and not why_retired(field)
        found |= keys(value, (*path, name)) if nested else {(*path, name): (field, value)}
    return found


@pytest.mark.slow
def test_the_pages_are_current() -> None:
    for name, text in (("settings.md", settings()), ("cli.md", commands())):
        assert (DOCS / name).read_text() == text, f"docs/{name}: run python -m docs.generate"


def test_every_key_is_on_the_page_and_says_what_it_does() -> None:
    page = settings()
    for path, (field, _) in keys(Settings()).items():
        assert field.description, f"{'.'.join(path)}: has no docstring"
        if why_retired(field):
            assert f"| `{'.'.join(path)}` |" in page
        else:
            assert f"`{path[-1]}`<br>`ELESH_{'__'.join(path).upper()}`" in page


def test_every_key_is_read_by_some_code() -> None:
    """A key that nothing looks at does nothing (a look in vain is for other tests to find)."""
    code = "\n".join(path.read_text() for path in (DOCS.parent / "elesh").rglob("*.py"))
    for path, (field, _) in keys(Settings()).items():
        # Limits are read by level: ``getattr(self, level)``.
        assert isinstance(field.get_default(), BaseModel) or re.search(
            rf"\.{path[-1]}\b(?!\()", code
        ), f"{'.'.join(path)} is read nowhere"


def test_every_key_can_be_set_alone_by_its_environment_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.upper().startswith("ELESH_")]:
        monkeypatch.delenv(name)
    for path, (_, value) in keys(Settings()).items():
        if value is None or isinstance(value, BaseModel) or path[-1] == "token":
            continue
        text = json.dumps(value) if isinstance(value, tuple) else str(value)
        with monkeypatch.context() as one:
            one.setenv(f"ELESH_{'__'.join(path).upper()}", text)
            loaded = Settings.load()
        assert loaded == Settings(), ".".join(path)


def test_one_limit_of_a_phase_can_be_changed_alone() -> None:
    limits = {"head": {"moderate": {"accuracy_drop": 0.01}}}
    changed = Settings.load(verification=limits).verification
    assert changed.head.moderate.accuracy_drop == 0.01
    assert changed.head.moderate.loss_rise == Settings().verification.head.moderate.loss_rise
    assert changed.head.aggressive == Settings().verification.head.aggressive
    assert changed.channel == Settings().verification.channel


@pytest.mark.slow
def test_every_command_is_on_the_page() -> None:
    page = commands()
    for group in app.registered_groups:
        prefix = f"{group.name} " if group.name else ""
        assert group.typer_instance is not None
        for command in group.typer_instance.registered_commands:
            assert command.callback is not None
            name = command.name or command.callback.__name__
            assert f"## `elesh {prefix}{name}`" in page


def test_a_retired_key_still_loads_with_one_warning_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "elesh.yaml"
    file.write_text("elesh:\n  verification:\n    kept_share: 0.25\n")
    with pytest.warns(FutureWarning, match="verification.kept_share is retired, the next"):
        assert Settings.load(file).verification.kept_share == 0.25


@pytest.mark.parametrize("key", sorted(CONSTANTS))
def test_a_key_that_became_a_constant_loads_and_is_said_to_change_nothing(
    tmp_path: Path, key: str
) -> None:
    section, _, name = key.partition(".")
    file = tmp_path / "elesh.yaml"
    file.write_text(f"elesh:\n  {section}:\n    {name}: 8\n")
    with pytest.warns(FutureWarning, match=f"{key} is retired and changes nothing"):
        assert Settings.load(file) == Settings()


@pytest.mark.parametrize("key", sorted(CONSTANTS))
def test_a_key_that_became_a_constant_may_stay_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("ELESH_" + key.upper().replace(".", "__"), "false")
    with pytest.warns(FutureWarning, match=f"{key} is retired and changes nothing"):
        loaded = Settings.load()
    with pytest.warns(FutureWarning, match=f"{key} is retired and changes nothing"):
        Settings()
    monkeypatch.delenv("ELESH_" + key.upper().replace(".", "__"))
    assert loaded == Settings()


def test_one_factor_moves_all_limits() -> None:
    limits = [
        strictest_limits(
            Settings.load(verification=given).verification, {Level.HEAD}, Phase.MODERATE
        )
        for given in ({}, {"limit_factor": 0.5})
    ]
    assert [limit.accuracy_drop for limit in limits] == [0.05, 0.025]
    assert [limit.loss_rise for limit in limits] == [0.12, 0.06]

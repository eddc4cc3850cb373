"""What README, docs and examples name exists: links, anchors, imports, settings, commands, files,
codes of errors, gates, steps and metrics."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from pydantic import BaseModel

from docs.pictures import require
from elesh.cli import app
from elesh.settings import Settings
from leyline import TelemetryEvent, errors

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [page for page in PAGES if page.name not in {"contracts.md", "cli.md", "settings.md"}]
"""Those that people write."""
GUIDES = [
    page for page in WRITTEN if page.parent.name != "decisions" and page.name != "CHANGELOG.md"
]
"""Those that describe what is, not what was."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`([^`]+)`")

by_page = pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def quoted(page: Path) -> list[str]:
    """What stands in back quotes, on one line each."""
    return [" ".join(text.split()) for text in _INLINE.findall(prose(page))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_and_anchor_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}: there is no such file"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}: there is no such heading"


def test_every_decision_has_a_number_of_its_own_and_is_in_the_index() -> None:
    folder = ROOT / "docs/decisions"
    index = (folder / "README.md").read_text()
    found: dict[str, str] = {}
    for page in sorted(folder.glob("*.md")):
        for number in re.findall(r"^## (\d{4}) ", page.read_text(), re.MULTILINE):
            assert number not in found, f"{page.name} and {found[number]} both have {number}"
            found[number] = page.name
            assert f"[{number}]({page.name}#{number}-" in index, number
    assert len(found) > 50


@by_page
def test_code_of_a_page_parses_and_imports_what_exists(page: Path) -> None:
    for language, code in _FENCE.findall(page.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}: {node.module}.{name.name}"


def known(section: type[BaseModel]) -> dict[str, Any]:
    """The keys of settings as nested dictionaries."""
    defaults = {name: field.annotation for name, field in section.model_fields.items()}
    return {
        name: known(kind) if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        for name, kind in defaults.items()
    }


SETTINGS = known(Settings)
SECTIONS = SETTINGS | SETTINGS["structured_pruning"]


@by_page
def test_settings_that_a_page_names_exist(page: Path) -> None:
    for text in quoted(page):
        name = text.partition(":")[0]
        first, *rest = name.split(".")
        if not rest or first not in SECTIONS or not re.fullmatch(r"[a-z_.]+", name):
            continue
        inside: Any = SECTIONS[first]
        if not isinstance(inside, dict) or rest[-1] in {"py", "md", "json"}:
            continue
        for part in rest:
            assert isinstance(inside, dict), f"{page.name}: {name}: there is no such setting"
            assert part in inside, f"{page.name}: {name}: there is no such setting"
            inside = inside[part]
    for variable in re.findall(r"ELESH_[A-Z_]*__[A-Z_]+", page.read_text()):
        inside = SETTINGS
        for part in variable.removeprefix("ELESH_").lower().split("__"):
            assert part in inside, f"{page.name}: {variable}: there is no such setting"
            inside = inside[part]


COMMANDS = typer.main.get_command(app)


def calls(page: Path) -> Iterator[str]:
    """Calls of ``elesh`` in prose and in blocks."""
    yield from (text for text in quoted(page) if re.match(r"elesh [a-z]", text))
    for _, code in _FENCE.findall(page.read_text()):
        yield from (line for line in code.splitlines() if line.startswith("elesh "))


@by_page
def test_commands_and_options_that_a_page_names_exist(page: Path) -> None:
    for call in calls(page):
        words = shlex.split(call.replace("[", "").replace("]", ""), comments=True)[1:]
        here: Any = COMMANDS
        while words and hasattr(here, "commands") and not words[0].startswith("-"):
            name = words.pop(0).rstrip(",")
            assert name in here.commands, f"{page.name}: {call}: there is no command {name}"
            here = here.commands[name]
        options = {option for one in here.params for option in one.opts} | {"--help"}
        for word in words:
            name = word.partition("=")[0].rstrip(",")
            if name.startswith("--"):
                assert name in options, f"{page.name}: {call}: there is no option {name}"


@by_page
def test_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    folders = ("elesh/", "contracts/", "tests/", "docs/", "deploy/", "benchmarks/", "examples/")
    for text in quoted(page):
        for name in text.split(", "):
            if not name.startswith(folders) or " " in name:
                continue
            if ".py:" in name:
                require(name)
                continue
            for one in expanded(name):
                found = list(ROOT.glob(one.rstrip("/")))
                assert found, f"{page.name}: {name}: there is no such file"


def expanded(name: str) -> list[str]:
    """``a/{b,c}.py`` as two names."""
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    if match is None:
        return [name]
    return [f"{match[1]}{inner}{match[3]}" for inner in match[2].split(",")]


def first_cells(page: str, heading: str) -> set[str]:
    """What stands in back quotes in the first column of the table below a heading."""
    _, _, rest = (ROOT / "docs" / page).read_text().partition(heading)
    table = re.search(r"((?:^\|.*\n)+)", rest, re.MULTILINE)
    assert table, heading
    cells = [row.split("|")[1] for row in table[1].splitlines()[2:]]
    return {name for cell in cells for name in _INLINE.findall(cell)}


def source(*folders: str) -> str:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text() for path in files)


def test_every_code_of_a_dead_letter_is_explained() -> None:
    codes = {
        kind.code
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, errors.ContractError)
        and "code" in vars(kind)
    } - {errors.ContractError.code}
    assert first_cells("troubleshooting.md", "## Dead letters by code") == codes


def test_every_gate_is_explained() -> None:
    told = first_cells("concepts.md", "**Gates**, of a decision.")
    code = source("elesh/safety", "elesh/analysis", "elesh/program", "elesh/worker")
    literal = re.compile(r'GateResult\(\s*(?:name=)?f?"([a-z_]+)"')
    for name in set(literal.findall(code)) - {"minimum_"}:
        assert name in told, f"docs/concepts.md: the gate {name} is not in the table"
    for name in told:
        stem = re.sub(r"_(channels|heads|layers)$", "_", name) if "minimum" in name else name
        assert f'"{stem}' in code, f"docs/concepts.md: there is no gate {name}"


def test_every_metric_is_explained() -> None:
    code = source("elesh/observe", "elesh/worker")
    names = set(re.findall(r'"((?:elesh|messaging\.process)\.[a-z_.]+)"', code))
    told = (ROOT / "docs/observing.md").read_text()
    listed = re.findall(r"^\| `([a-z_0-9]+)`", told.partition("## Metrics")[2], re.MULTILINE)
    stems = {re.sub(r"_(total|seconds|bytes_total)$", "", name) for name in listed}
    for stem in stems:
        dotted = {name.replace(".", "_") for name in names}
        assert (
            stem in dotted
            or f'"{stem}"' in code
            or any(stem == re.sub(r"_seconds$", "", name) for name in dotted)
        ), f"docs/observing.md: there is no metric {stem}"
    made = set(re.findall(r'create_\w+\(\s*"([a-z_.]+)"', code))
    for name in made:
        assert name.replace(".", "_") in stems, f"docs/observing.md: {name} is not in the table"


def test_every_fallback_is_explained() -> None:
    told = "\n".join(page.read_text() for page in GUIDES)
    code = source("elesh/worker", "elesh/program", "elesh/analysis", "elesh/safety")
    rungs = set(re.findall(r'rung="([a-z_]+)"', code))
    named = re.findall(r'^(\w+) = "([a-z]+_[a-z_]+)"', code, re.MULTILINE)
    rungs |= {rung for name, rung in named if re.search(rf"rung={name}\b", code)}
    assert len(rungs) > 4
    for rung in rungs:
        assert f"`{rung}`" in told, f"docs: the fallback {rung} is told nowhere"


def test_steps_of_telemetry_that_pages_name_are_steps() -> None:
    steps = set(get_args(TelemetryEvent.model_fields["step"].annotation))
    for page in GUIDES:
        for text in re.findall(r"telemetry `([a-z_]+)`", prose(page)):
            assert text in steps, f"{page.name}: telemetry {text}"

"""Settings: the document's block as it stands, and complaints that say where and what."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from elesh.analysis.selection.schedule import phase_ends
from elesh.settings import Settings, SettingsError
from leyline import Phase

DESIGN = Path(__file__).parent / "data" / "design.yaml"
"""The YAML block of the design document, verbatim."""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine sets must not matter here."""
    for name in list(os.environ):
        if name.upper().startswith("ELESH_"):
            monkeypatch.delenv(name)


def load(folder: Path, text: str, **over: Any) -> Settings:
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return Settings.load(file, **over)


def complaint(folder: Path, text: str, **over: Any) -> str:
    """The complaint about a file of this text, without the folder."""
    with pytest.raises(SettingsError) as caught:
        load(folder, text, **over)
    return str(caught.value).replace(f"{folder}/", "")


def test_the_documents_block_loads_and_is_the_defaults() -> None:
    assert Settings.load(DESIGN) == Settings()


def flat(section: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(section, dict):
        return {path: section}
    return {k: v for key, value in section.items() for k, v in flat(value, (*path, key)).items()}


def test_every_figure_of_the_document_is_a_setting_with_its_value() -> None:
    block = flat(yaml.safe_load(DESIGN.read_text())["elesh"])
    assert len(block) == 40
    values = flat(Settings().model_dump())
    for path, figure in block.items():
        if path == ("analysis_cache_size",):
            figure = 1_000_000_000
        expected = float(figure) if path == ("marking_threshold",) else figure
        assert values[path] == expected, ".".join(path)


def test_a_figure_of_the_document_can_be_changed_in_the_file(tmp_path: Path) -> None:
    for path in flat(yaml.safe_load(DESIGN.read_text())["elesh"]):
        if path[-1].endswith("_weight"):
            continue  # three that must sum to one
        if path[-1] == "metric" and path[-2] != "channel_importance_ranking":
            continue  # only one is known
        block = yaml.safe_load(DESIGN.read_text())
        section = block["elesh"]
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = "spearman" if path[-1] == "metric" else 1
        changed = load(tmp_path, yaml.safe_dump(block))
        assert flat(changed.model_dump())[path] in ("spearman", 1), ".".join(path)


def test_sizes_and_small_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    settings = load(tmp_path, "elesh: {analysis_cache_size: 512MiB, marking_threshold: 2e-9}")
    assert settings.analysis_cache_size == 512 << 20
    assert settings.marking_threshold == 2e-9


@pytest.mark.parametrize("text", ["", "# nothing\n", "elesh:\n", "elesh: {}\n"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == Settings()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "elesh:\n  sketch_widht: 3\n",
            "settings.yaml:2: sketch_widht: unknown key (did you mean sketch_width?), found 3",
        ),
        (
            "elesh:\n  bus:\n    url: x\n    partitions: 3\n",
            "settings.yaml:4: bus.partitions: unknown key (did you mean partition?), found 3",
        ),
        (
            "elesh:\n  structured_pruning:\n    channel_analysis:\n      zzz: 3\n",
            "settings.yaml:4: structured_pruning.channel_analysis.zzz: unknown key, found 3",
        ),
        (
            "elesh:\n\n  sketch_width: wide\n",
            "settings.yaml:3: sketch_width: Input should be a valid integer, unable to parse "
            "string as an integer, found 'wide'",
        ),
        (
            "elesh:\n  sketch_depth: 0\n",
            "settings.yaml:2: sketch_depth: Input should be greater than or equal to 1, found 0",
        ),
        (
            "elesh:\n  analysis_cache_size: huge\n",
            "settings.yaml:2: analysis_cache_size: could not parse value and unit from byte "
            "string, found 'huge'",
        ),
        (
            "elesh:\n  structured_pruning:\n    channel_analysis:\n      taylor_weight: 0.9\n",
            "settings.yaml:3: structured_pruning.channel_analysis: taylor_weight + "
            "magnitude_weight + frequency_weight must be 1, not 1.4, found {'taylor_weight': 0.9}",
        ),
        (
            "elesh:\n  structured_pruning:\n    attention_analysis: {entropy_weight: 1}\n",
            "settings.yaml:3: structured_pruning.attention_analysis: entropy_weight + "
            "diversity_weight + gradient_weight must be 1, not 1.7, found {'entropy_weight': 1}",
        ),
        (
            "elesh:\n  structured_pruning:\n    safety_schedule: {conservative_limit: 0.5}\n",
            "settings.yaml:3: structured_pruning.safety_schedule: conservative_limit <= "
            "moderate_limit <= aggressive_limit must hold, found {'conservative_limit': 0.5}",
        ),
        (
            "elesh:\n  breaker: 3\n",
            "settings.yaml:2: breaker: Input should be a valid dictionary or instance of "
            "BreakerSettings, found 3",
        ),
        ("other: 3\n", "settings.yaml:1: expected one top-level key 'elesh', found ['other']"),
        ("- 3\n", "settings.yaml:1: expected one top-level key 'elesh', found list"),
        ("elesh: [3]\n", "settings.yaml:1: elesh: expected a mapping, found list"),
        (
            "elesh:\n  bus:\n    url: x\n    url: y\n",
            "settings.yaml:4: bus.url: is given twice in one section",
        ),
        (
            "elesh:\n  sketch_depth: 3\nelesh:\n  sketch_depth: 4\n",
            "settings.yaml:3: elesh: is given twice in one section",
        ),
        ("elesh:\n  7: 3\n", "settings.yaml:2: 7: a key must be text, found int"),
    ],
)
def test_a_wrong_file_is_told_with_line_and_key(tmp_path: Path, text: str, expected: str) -> None:
    assert complaint(tmp_path, text) == expected


@pytest.mark.parametrize("value", ["true", "false", ".nan", ".inf", "[3]", "{a: 3}", "null", "3.5"])
def test_what_is_no_number_is_no_number_of_epochs(tmp_path: Path, value: str) -> None:
    text = f"elesh:\n  importance_history_epochs: {value}\n"
    assert complaint(tmp_path, text).startswith("settings.yaml:2: importance_history_epochs: ")


@pytest.mark.parametrize("value", ["true", ".nan", ".inf", "-.inf", "soon", "0", "-1"])
def test_what_is_no_time_is_no_timeout(tmp_path: Path, value: str) -> None:
    text = f"elesh:\n  analysis_timeout: {value}\n"
    assert complaint(tmp_path, text).startswith("settings.yaml:2: analysis_timeout: ")


def test_all_complaints_come_at_once(tmp_path: Path) -> None:
    told = complaint(tmp_path, "elesh:\n  sketch_depth: 0\n  sketch_widht: 1\n  bus: {url: 3}\n")
    assert [line.partition(": ")[0] for line in told.splitlines()] == [
        "settings.yaml:2",
        "settings.yaml:4",
        "settings.yaml:3",
    ]


@pytest.mark.parametrize(
    "text",
    ["a: [\n", "\t", "elesh: !!python/object:os.system {}", "elesh: " + "[" * 5000, "\x00"],
    ids=["open list", "tab", "object", "deep", "null"],
)
@pytest.mark.slow
def test_what_is_no_plain_yaml_is_told_with_its_file(tmp_path: Path, text: str) -> None:
    assert complaint(tmp_path, text).startswith("settings.yaml: is ")


def test_an_alias_that_holds_itself_is_refused(tmp_path: Path) -> None:
    assert "settings.yaml:2: bus" in complaint(tmp_path, "elesh: &a\n  bus: *a\n")


@pytest.mark.parametrize(
    "text", ["elesh: {a: {b: hunter2", "elesh: {b: *hunter2}", "elesh: !hunter2 x"]
)
def test_what_is_no_yaml_is_told_without_its_text(tmp_path: Path, text: str) -> None:
    told = complaint(tmp_path, text)
    assert "line 1, column" in told
    assert "hunter2" not in told


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"missing\.yaml: cannot be read: No such file"):
        Settings.load(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"elesh: \xff")
    with pytest.raises(SettingsError, match=r"latin\.yaml: is not YAML"):
        Settings.load(tmp_path / "latin.yaml")


def test_arguments_go_before_environment_before_file_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELESH_BUS__LEASE_SECONDS", "2")
    monkeypatch.setenv("ELESH_BUS__MAX_DELIVERIES", "2")
    monkeypatch.setenv("ELESH_SKETCH_DEPTH", "2")
    text = "elesh:\n  bus: {lease_seconds: 1, max_deliveries: 1, partition: file}\n"
    settings = load(tmp_path, text, bus={"lease_seconds": 3})
    assert settings.bus.lease_seconds == 3
    assert settings.bus.max_deliveries == 2
    assert settings.bus.partition == "file"
    assert settings.bus.blob_ttl_seconds == Settings().bus.blob_ttl_seconds
    assert settings.sketch_depth == 2
    assert Settings.load().sketch_depth == Settings().sketch_depth == 2


def test_a_wrong_value_is_blamed_on_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "elesh:\n  sketch_depth: 5\n"
    monkeypatch.setenv("ELESH_SKETCH_DEPTH", "deep")
    assert complaint(tmp_path, text).startswith("environment: sketch_depth: ")
    assert complaint(tmp_path, text, sketch_depth=0).startswith("argument: sketch_depth: ")
    monkeypatch.delenv("ELESH_SKETCH_DEPTH")
    monkeypatch.setenv("ELESH_BUS", "{broken")
    assert complaint(tmp_path, text).startswith('environment: error parsing value for field "bus"')
    monkeypatch.setenv("ELESH_BUS", '{"urll": "x"}')
    assert "environment: bus.urll: unknown key (did you mean url?)" in complaint(tmp_path, text)
    assert complaint(tmp_path, text, bus={}, depth=3).startswith("environment: ")


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().sketch_depth = 3


def test_phases_end_where_the_document_says() -> None:
    schedule = Settings().structured_pruning.safety_schedule
    assert phase_ends(schedule) == (
        (Phase.PREPARATION, 30, 0.0),
        (Phase.CONSERVATIVE, 60, 0.05),
        (Phase.MODERATE, 90, 0.1),
        (Phase.AGGRESSIVE, 120, 0.2),
    )
    assert schedule.total_epochs == 120


@pytest.mark.parametrize(
    "change",
    [
        {"sketch_depth": 11},
        {"marking_threshold": 1e-7},
        {"structured_pruning": {"channel_analysis": {"min_channels_per_layer": 8}}},
    ],
)
def test_the_hash_changes_with_what_can_change_a_decision(change: dict[str, Any]) -> None:
    assert Settings.load(**change).analysis_hash != Settings().analysis_hash


@pytest.mark.parametrize(
    "change",
    [
        {"parallel_analysis_threads": 1},
        {"layers_per_worker": 1},
        {"analysis_cache_size": 1},
        {"bus": {"url": "redis://elsewhere"}},
        {"worker": {"threads": 4}},
        {"breaker": {"failures": 1}},
    ],
)
def test_the_hash_does_not_change_with_how_and_where_it_is_computed(change: dict[str, Any]) -> None:
    assert Settings.load(**change).analysis_hash == Settings().analysis_hash


@pytest.mark.parametrize(
    "content",
    [
        "bus: {url: [redis://w:s3cr3t@h:1/0]}",
        "bus: {urll: 'redis://w:s3/c:r3t@h:1/0?ssl_password=s3cr3t'}",
        "bus: redis://w:s3cr3t@h:1/0",
        "console: {token: [s3cr3t]}",
        "console: {tokn: s3cr3t}",
    ],
)
def test_a_complaint_does_not_show_the_secret_that_it_complains_about(
    content: str, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"elesh: {{{content}}}")
    with pytest.raises(SettingsError) as refused:
        Settings.load(file)
    assert not re.search("s3|r3t", str(refused.value))

"""What is generated from the contracts is current, and true."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import msgpack
import numpy as np
import pytest
import yaml
from referencing import Registry, Resource

import leyline as ll
from contracts import examples, generate
from leyline.arrays import pack_arrays
from leyline.network.bundle import statistics_arrays, unpack_statistics

CONTRACTS = Path(generate.__file__).parent
VECTORS = CONTRACTS / "vectors"
INDEX = {entry["type"]: entry for entry in json.loads((VECTORS / "index.json").read_bytes())}
MESSAGES = {**examples.MESSAGES, "EventEnvelope": examples.ENVELOPE}
SCHEMAS = {
    file.stem: json.loads(file.read_bytes()) for file in (CONTRACTS / "schemas").glob("*.json")
}


def test_generated_files_are_current() -> None:
    assert generate.main(["--check"]) == 0


@pytest.mark.slow
def test_a_stale_or_missing_or_left_over_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "_ROOT", tmp_path)
    monkeypatch.setattr(generate, "generated", cache(generate.generated))
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    (tmp_path / "contracts/schemas/BlobRef.json").touch()
    (tmp_path / "contracts/asyncapi.yaml").write_text("")
    (tmp_path / "docs/contracts.md").unlink()
    capsys.readouterr()
    assert generate.main(["--check"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [
        "contracts/asyncapi.yaml: is not current",
        "docs/contracts.md: is missing",
        "contracts/schemas/BlobRef.json: is no longer generated",
    ]
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_the_index_lists_every_vector_with_size_and_digest() -> None:
    files = {file.name for file in VECTORS.iterdir()} - {"index.json"}
    assert {entry["file"] for entry in INDEX.values()} == files
    assert INDEX.keys() == MESSAGES.keys() | {type(item).__name__ for item in examples.STATISTICS}
    for entry in INDEX.values():
        data = (VECTORS / entry["file"]).read_bytes()
        assert entry["size"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_golden_bytes_decode_to_the_example_and_it_encodes_to_them(name: str) -> None:
    data = (VECTORS / f"{name}.bin").read_bytes()
    decoded = ll.decode(type(MESSAGES[name]), data)
    assert decoded == MESSAGES[name]
    assert ll.encode(decoded) == data
    plain = msgpack.unpackb(data)
    fields = type(MESSAGES[name]).model_fields.items()
    written = [name for name, field in fields if field.exclude_if is None or name in plain]
    assert list(plain) == written


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_the_index_renders_the_same_message_as_json(name: str) -> None:
    text = json.dumps(INDEX[name]["json"])
    assert type(MESSAGES[name]).model_validate_json(text, strict=True) == MESSAGES[name]


@pytest.mark.parametrize("item", examples.STATISTICS, ids=lambda item: type(item).__name__)
def test_golden_blobs_decode_to_the_example_and_it_encodes_to_them(item: Any) -> None:
    kind = type(item)
    data = (VECTORS / f"{kind.__name__}.safetensors").read_bytes()
    read = unpack_statistics(kind, data, "statistics")
    assert list(read) == [item.layer_name]
    assert pack_arrays(statistics_arrays(read.values())) == data
    for name, told in INDEX[kind.__name__]["json"].items():
        if name != "layer_name":
            array = getattr(read[item.layer_name], name)
            assert np.array_equal(array, getattr(item, name))
            assert (str(array.dtype), list(array.shape)) == (told["dtype"], told["shape"])
            assert array.tolist() == told["values"]


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_schemas_are_sound_and_about_the_fields_of_the_type(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    kind = getattr(ll, name)
    assert list(SCHEMAS[name]["properties"]) == list(kind.model_fields)
    assert SCHEMAS[name]["additionalProperties"] is False


def test_every_message_has_a_schema() -> None:
    others = {"EventEnvelope", "CheckpointDocument"}
    others |= {"ChannelImportanceData", "GateStatistics", "HeadImportanceData"}
    others |= {"LayerStatistics", "LevelAnalysis"}
    assert SCHEMAS.keys() == ll.MESSAGES.keys() | others


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_examples_are_valid_under_their_schemas_and_damaged_ones_are_not(name: str) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMAS[name])
    rendered = MESSAGES[name].model_dump(mode="json")
    validator.validate(rendered)
    assert not validator.is_valid(rendered | {"surprise": 1})
    for field in SCHEMAS[name].get("required", []):
        assert not validator.is_valid({k: v for k, v in rendered.items() if k != field}), field


def test_field_docstrings_are_in_the_schemas() -> None:
    group = SCHEMAS["CheckpointReady"]["$defs"]["PruningGroup"]["properties"]
    assert group["reason"]["description"].startswith("Why the group is left alone")


ASYNCAPI = yaml.safe_load((CONTRACTS / "asyncapi.yaml").read_text())


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


def test_every_reference_of_the_asyncapi_document_resolves() -> None:
    registry: Registry[Any] = Registry().with_resource(
        "file:asyncapi.yaml", Resource.opaque(ASYNCAPI)
    )
    found = set(references(ASYNCAPI))
    for reference in found:
        if reference.startswith("#"):
            registry.resolver("file:asyncapi.yaml").lookup(reference)
        else:
            assert json.loads((CONTRACTS / reference).read_bytes())["title"] in reference
    assert {f"./schemas/{name}.json" for name in (*ll.MESSAGES, "EventEnvelope")} <= found


def test_the_asyncapi_document_has_every_stream_and_message() -> None:
    assert ASYNCAPI["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= ASYNCAPI["info"].keys()
    assert all({"host", "protocol"} <= server.keys() for server in ASYNCAPI["servers"].values())
    assert ASYNCAPI["channels"].keys() == {stream.name for stream in ll.STREAMS}
    assert ASYNCAPI["components"]["messages"].keys() == ll.MESSAGES.keys()
    for stream in ll.STREAMS:
        channel = ASYNCAPI["channels"][stream.name]
        default = ASYNCAPI["components"]["parameters"]["partition"]["default"]
        assert channel["address"].replace("{partition}", default) == stream.key("main")
        assert channel["messages"].keys() == {kind.__name__ for kind in stream.messages}
        assert channel["x-redis-stream"].get("consumerGroup", "") == stream.group


def test_every_message_is_sent_by_one_role_and_received_by_another() -> None:
    sent: dict[str, set[str]] = {"send": set(), "receive": set()}
    for name, operation in ASYNCAPI["operations"].items():
        channel = operation["channel"]["$ref"].removeprefix("#/channels/")
        role = operation["tags"][0]["name"]
        assert name == f"{role.lower()}-{operation['action']}-{channel}"
        for message in operation["messages"]:
            kind = message["$ref"].removeprefix(f"#/channels/{channel}/messages/")
            assert kind in ASYNCAPI["channels"][channel]["messages"]
            end = 0 if operation["action"] == "send" else 1
            assert ll.MESSAGES[kind].contract_of.split(" to ")[end] == role
            sent[operation["action"]].add(kind)
    assert sent["send"] == sent["receive"] == ll.MESSAGES.keys()


def test_the_reference_tells_of_every_stream_message_and_field() -> None:
    text = (CONTRACTS.parent / "docs/contracts.md").read_text()
    for stream in ll.STREAMS:
        assert f"### `{stream.name}`" in text
    for name in SCHEMAS:
        _, _, section = text.partition(f"\n### {name}\n")
        section = section.partition("\n#")[0]
        for field in SCHEMAS[name]["properties"]:
            assert f"| `{field}` |" in section, f"{name}.{field}"
    links = {part.partition(")")[0] for part in text.split("](#")[1:]}
    headings = {line[4:].lower() for line in text.splitlines() if line.startswith("### ")}
    assert links <= headings

"""Generates schemas, vectors and pages from the contracts: ``python -m contracts.generate
[--check]``.

``contracts/schemas/*.json`` (JSON Schema), ``contracts/vectors/*`` (golden bytes),
``contracts/asyncapi.yaml`` and ``docs/contracts.md``. The output depends on the contracts and on
``contracts/examples.py`` alone. With ``--check`` nothing is written: it ends with 1 and names every
file that is not what it would write.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

import leyline as ll
from contracts import examples
from contracts.asyncapi import asyncapi
from contracts.reference import reference
from leyline.arrays import pack_arrays
from leyline.network.bundle import statistics_arrays

_ROOT = Path(__file__).resolve().parent.parent
_WHOLE_FOLDERS = ("contracts/schemas", "contracts/vectors")


class _Schema(GenerateJsonSchema):
    """JSON Schema 2020-12 with durations in seconds, as they are on the wire."""

    def encode_default(self, dft: Any) -> Any:
        return dft.total_seconds() if isinstance(dft, timedelta) else super().encode_default(dft)


def schema(kind: type[ll.Message]) -> dict[str, Any]:
    """The JSON Schema of a message in its JSON rendering (bytes are base64url text there)."""
    return {"$schema": _Schema.schema_dialect, **kind.model_json_schema(schema_generator=_Schema)}


def generated() -> dict[str, bytes]:
    """Every generated file's content by its path from the root of the repository."""
    kinds: list[type[ll.Message]] = [*ll.MESSAGES.values(), ll.EventEnvelope]
    kinds += [ll.ChannelImportanceData, ll.GateStatistics, ll.LayerStatistics]
    kinds += [ll.HeadImportanceData]
    kinds += [ll.CheckpointDocument, ll.LevelAnalysis]
    schemas = {kind.__name__: schema(kind) for kind in kinds}
    files = {f"contracts/schemas/{name}.json": _json(value) for name, value in schemas.items()}
    files |= {f"contracts/vectors/{name}": data for name, data in _vectors().items()}
    files["contracts/asyncapi.yaml"] = asyncapi().encode()
    files["docs/contracts.md"] = reference(schemas).encode()
    return files


def _vectors() -> dict[str, bytes]:
    """Golden bytes, and ``index.json`` that says what each file is."""
    files, index = {}, []
    for name, message in {**examples.MESSAGES, "EventEnvelope": examples.ENVELOPE}.items():
        files[f"{name}.bin"] = ll.encode(message)
        index.append(_entry(f"{name}.bin", name, "msgpack", files, message.model_dump(mode="json")))
    for item in examples.STATISTICS:
        name = type(item).__name__
        files[f"{name}.safetensors"] = pack_arrays(statistics_arrays([item]))
        rendering = {"layer_name": item.layer_name, **_tensors(item)}
        index.append(_entry(f"{name}.safetensors", name, "safetensors", files, rendering))
    files["index.json"] = _json(sorted(index, key=lambda entry: str(entry["file"])))
    return files


def _entry(
    file: str, kind: str, encoding: str, files: dict[str, bytes], rendering: dict[str, Any]
) -> dict[str, Any]:
    data = files[file]
    return {
        "file": file,
        "type": kind,
        "encoding": encoding,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "json": rendering,
    }


def _tensors(item: ll.Message) -> dict[str, Any]:
    fields = [name for name in type(item).model_fields if name != "layer_name"]
    return {
        name: {"dtype": str(array.dtype), "shape": list(array.shape), "values": array.tolist()}
        for name in fields
        if (array := getattr(item, name)) is not None
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _stale(files: dict[str, bytes]) -> list[str]:
    """What is wrong with the files on disk, one line each."""
    problems = []
    for path, data in files.items():
        file = _ROOT / path
        if not file.exists():
            problems.append(f"{path}: is missing")
        elif file.read_bytes() != data:
            problems.append(f"{path}: is not current")
    return problems + [f"{path}: is no longer generated" for path in _left_over(files)]


def _left_over(files: dict[str, bytes]) -> list[str]:
    found = (file for folder in _WHOLE_FOLDERS for file in (_ROOT / folder).glob("*"))
    return sorted({file.relative_to(_ROOT).as_posix() for file in found} - files.keys())


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or check them; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m contracts.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file is stale")
    check = parser.parse_args(arguments).check
    files = generated()
    if check:
        problems = _stale(files)
        print(*problems, sep="\n", end="\n" if problems else "")
        if problems:
            print("run: python -m contracts.generate")
        return 1 if problems else 0
    for path in _left_over(files):
        (_ROOT / path).unlink()
    for path, data in files.items():
        (_ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (_ROOT / path).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())

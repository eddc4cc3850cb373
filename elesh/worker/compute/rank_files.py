"""Where the files of a parameter analysis lie in the spool folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["MASKS", "REQUEST", "RankFiles", "rank_files"]

REQUEST = "request.msgpack"
MASKS = "masks.bin"


@dataclass(frozen=True)
class RankFiles:
    """Where one rank's importance lies in the spool folder."""

    importance: Path
    sketches: Path
    samples: Path


def rank_files(folder: Path, number: int) -> RankFiles:
    """The files of rank ``number``."""
    return RankFiles(
        folder / f"importance-{number}.msgpack",
        folder / f"sketches-{number}.safetensors",
        folder / f"samples-{number}.safetensors",
    )

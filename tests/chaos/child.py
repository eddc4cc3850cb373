"""The compute child of the chaos driver: the real one, that first does what its checkpoint says.

A checkpoint's note may be ``sleep SECONDS`` (an analysis longer than the lease), ``die`` (one that
takes its process with it) or ``raise`` (a fault of ours).
"""

from __future__ import annotations

import os
import time
from typing import Any

from elesh.worker.compute import child
from leyline import CheckpointBundle

_read = child._input


def _obedient(job: Any) -> Any:
    bundle, settings = _read(job)
    _obey(bundle)
    return bundle, settings


def _obey(bundle: CheckpointBundle) -> None:
    match bundle.metadata.note.split():
        case ["sleep", seconds]:
            time.sleep(float(seconds))
        case ["die"]:
            os._exit(86)
        case ["raise"]:
            raise RuntimeError("as the checkpoint's note says")


if __name__ == "__main__":
    child._input = _obedient
    child.main()

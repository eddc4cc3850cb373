"""Loads OpenTelemetry's libraries, whatever its environment variables say.

They raise while they are imported, or at every span, if a variable names what is not installed or
is no number. Here that is one line in the log, the variable is left out, and the default holds.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import entry_points

_LIBRARIES = ("opentelemetry.propagate", "opentelemetry.sdk.trace", "opentelemetry.sdk.metrics")
_GROUPS = {
    "OTEL_PYTHON_TRACER_PROVIDER": "opentelemetry_tracer_provider",
    "OTEL_PYTHON_METER_PROVIDER": "opentelemetry_meter_provider",
    "OTEL_PYTHON_CONTEXT": "opentelemetry_context",
}


def leave_out(name: str, reason: str, found: str = "") -> None:
    """Go on without a variable, which may be gone already."""
    found = os.environ.pop(name, found)
    from .logs import get_logger  # loads the libraries, which read the variables

    log = get_logger(__name__)
    log.warning("OTEL setting cannot be met, left out", name=name, found=found, reason=reason)


def _require(library: str) -> None:
    """Import a library, without the variables that it cannot read."""
    while True:
        try:
            importlib.import_module(library)
            return
        except ValueError as error:
            given = [name for name in os.environ if name.startswith("OTEL_")]
            named = [name for name in given if name in str(error)]
            named = named or [name for name in given if name == "OTEL_PROPAGATORS"]
            if not named:
                raise
            for name in named:
                leave_out(name, str(error))


_UNKNOWN = {
    name: os.environ.pop(name)
    for name, group in _GROUPS.items()
    if os.environ.get(name) and not entry_points(group=group, name=os.environ[name])
}
for _name, _value in _UNKNOWN.items():
    leave_out(_name, "no such thing is installed", _value)
for _library in _LIBRARIES:
    _require(_library)

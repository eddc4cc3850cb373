"""Commands for whoever wants to see what happens: traces, and the fleet at a glance."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import console, fail

app = typer.Typer()


@app.command()
def trace(
    what: Annotated[
        str, typer.Argument(help="Key of a decision, a run, or a trace id; empty: the newest.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a span.")] = False,
) -> None:
    """Print the waterfall of a checkpoint's trace, from what this machine recorded of it."""
    import json
    from dataclasses import asdict

    from elesh.observe.spanfile import find_trace
    from elesh.observe.waterfall import print_trace

    spans = find_trace(what)
    if not spans:
        fail(f"{what or 'trace'}: nothing is recorded here (a collector may have it: see README)")
    if as_json:
        for span in spans:
            typer.echo(json.dumps(asdict(span)))
    else:
        print_trace(console, spans)

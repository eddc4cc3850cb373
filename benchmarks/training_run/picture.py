"""The picture and the tables of benchmarks.training_run, from its lines of JSON.

    python -m benchmarks.training_run.picture results.jsonl docs/gain.svg    # needs matplotlib
    python -m benchmarks.training_run.picture results.jsonl                  # tables as Markdown

The picture has no background; its ink follows the page, light or dark.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .methods import METHODS

__all__ = ["main", "picture", "tables"]

Line = dict[str, Any]
_COLOURS = dict(
    zip(
        [name for name in METHODS if name != "unpruned"],
        ["#3b82f6", "#06b6d4", "#f97316", "#a855f7", "#14b8a6", "#ca8a04", "#94a3b8", "#ef4444"],
        strict=True,
    )
)
_INK = "#010203"
"""A colour that nothing else has: it becomes that of the page's text."""
_STYLE = (
    "<style>svg { color: #0f172a; } "
    "@media (prefers-color-scheme: dark) { svg { color: #e2e8f0; } }</style>"
)
_TITLES = {
    "tabular": "digits as a table",
    "clusters": "a generated table",
    "resnet": "ResNet-20, MNIST",
    "vit": "ViT, MNIST",
    "gpt": "GPT, characters",
}


def read(path: Path) -> list[Line]:
    """All finished runs."""
    return [json.loads(text) for text in path.read_text().splitlines()]


def grouped(lines: Sequence[Line], task: str) -> dict[tuple[str, float], list[Line]]:
    """By method and share: the runs that have figures."""
    found: dict[tuple[str, float], list[Line]] = defaultdict(list)
    for line in lines:
        if line["task"] == task and "accuracy" in line:
            found[line["method"], line["share"]].append(line)
    return found


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for one value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def picture(lines: Sequence[Line], path: Path) -> None:
    """A row a task: accuracy against the MACs left, and against how much faster 64 samples are."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "elesh",
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
        }
    )
    from matplotlib import pyplot

    tasks = [task for task in _TITLES if any(line["task"] == task for line in lines)]
    figure, rows = pyplot.subplots(
        len(tasks), 2, figsize=(9, 3.1 * len(tasks)), squeeze=False, layout="constrained"
    )
    for task, (left, right) in zip(tasks, rows, strict=True):
        found = grouped(lines, task)
        whole = [line["accuracy"] for line in found["unpruned", 1.0]]
        sides: tuple[tuple[Any, Callable[[Line], float], str], ...] = (
            (left, lambda line: 100 * line["macs"], "MACs left, %"),
            (right, lambda line: line["faster"]["64"], "times faster, 64 samples"),
        )
        for axes, across, label in sides:
            if whole:
                axes.axhline(100 * mean(whole)[0], color=_INK, linewidth=0.8, linestyle=":")
            for method, colour in _COLOURS.items():
                points = [runs for (name, _), runs in sorted(found.items()) if name == method]
                if points:
                    accuracy = [mean([100 * run["accuracy"] for run in runs]) for runs in points]
                    axes.errorbar(
                        [mean([across(run) for run in runs])[0] for runs in points],
                        [value for value, _ in accuracy],
                        [error for _, error in accuracy],
                        color=colour,
                        marker="o",
                        markersize=3,
                        linewidth=2.2 if method.startswith("ours") else 1.2,
                        zorder=3 if method.startswith("ours") else 2,
                        label=method,
                    )
            axes.set_xlabel(label)
        left.invert_xaxis()
        left.set_ylabel("test accuracy, %")
        left.set_title(_TITLES[task], loc="left", fontsize=10)
    figure.legend(
        *rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path, transparent=True, metadata={"Date": None})
    text = path.read_text().replace(_INK, "currentColor")
    path.write_text(re.sub(r"(<svg[^>]*>)", rf"\1{_STYLE}", text, count=1))


def tables(lines: Sequence[Line]) -> str:
    """A table a task: what is left of the accuracy, how much faster, and at what price."""
    parts = []
    for task in _TITLES:
        found = grouped(lines, task)
        if not found:
            continue
        whole = found["unpruned", 1.0]
        shares = sorted({share for _, share in found if share < 1}, reverse=True)
        parts.append(f"**{_TITLES[task]}**, {setting(whole[0])}, unpruned {figures(whole)}\n")
        head = "".join(f" {share:.0%} of the MACs | faster (1, 64) |" for share in shares)
        parts += [f"| method |{head} time |", "|---|" + "---|---|" * len(shares) + "---|"]
        for method in _COLOURS:
            cells = [found.get((method, share), []) for share in shares]
            if any(cells):
                parts.append(row(method, cells, whole))
        parts += [failures(lines, task), ""]
    return "\n".join(parts)


def row(method: str, cells: Sequence[Sequence[Line]], whole: Sequence[Line]) -> str:
    """Of one method: by share accuracy and how much faster; training time, cuts included, in that
    of the script as it is, mean over shares."""
    told = [f"| {'**ours**' if method == 'ours' else method} |"]
    for runs in cells:
        if not runs:
            told.append(" | |")
            continue
        left, fast = mean([run["macs"] for run in runs])[0], speeds(runs)
        missed = "" if left < runs[0]["share"] + 0.01 else f" ({left:.0%} left)"
        told.append(f" {figures(runs)}{missed} | {fast} |")
    plain = mean([run["cpu_seconds"] for run in whole])[0]
    times = [run["cpu_seconds"] / plain for runs in cells for run in runs]
    return "".join(told) + f" {mean(times)[0]:.2f} |"


def figures(runs: Sequence[Line]) -> str:
    """Accuracy, or loss where accuracy says little (``gpt``)."""
    name, digits = ("loss", 3) if runs[0]["task"] == "gpt" else ("accuracy", 4)
    value, error = mean([run[name] for run in runs])
    return f"{value:.{digits}f} ±{error:.{digits}f}" if len(runs) > 1 else f"{value:.{digits}f}"


def speeds(runs: Sequence[Line]) -> str:
    """For example 1.21, 1.40: of calls with 1 and with 64 samples."""
    return ", ".join(
        f"{mean([run['faster'][size] for run in runs])[0]:.2f}" for size in ("1", "64")
    )


def setting(line: Mapping[str, Any]) -> str:
    """What the runs of a table have in common."""
    size = f"{line['original_parameters']:,} parameters, {line['original_macs'] / 1e6:.2f} M MACs"
    return f"{size}, {line['samples']} samples at most, {line['epochs']} epochs"


def failures(lines: Sequence[Line], task: str) -> str:
    """What could not be used, or failed."""
    said = {
        f"{line['method']}: {line.get('error') or line['not_applicable']}"
        for line in lines
        if line["task"] == task and "accuracy" not in line
    }
    return "\n" + "\n".join(f"- {text}" for text in sorted(said)) if said else ""


def main() -> None:
    """Draw, or print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("svg", type=Path, nargs="?")
    asked = parser.parse_args()
    lines = read(asked.results)
    if asked.svg:
        picture(lines, asked.svg)
    else:
        print(tables(lines))


if __name__ == "__main__":
    main()

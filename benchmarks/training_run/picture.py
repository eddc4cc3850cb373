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
from functools import partial
from pathlib import Path
from typing import Any

from .methods import lines_of

__all__ = ["main", "picture", "tables"]

Line = dict[str, Any]
_COLOURS = {
    "ours": "#3b82f6",
    "ours, at once": "#1d4ed8",
    "ours, attached": "#06b6d4",
    "torch-pruning magnitude": "#f97316",
    "torch-pruning Taylor": "#a855f7",
    "torch-pruning Hessian": "#14b8a6",
    "network slimming": "#ca8a04",
    "uniform magnitude": "#94a3b8",
    "torch-pruning magnitude, at once": "#c2410c",
    "network slimming, at once": "#854d0e",
    "small from the start": "#ef4444",
}
_INK = "#010203"
"""A colour that nothing else has: it becomes that of the page's text."""
_STYLE = (
    "<style>svg { color: #0f172a; } "
    "@media (prefers-color-scheme: dark) { svg { color: #e2e8f0; } }</style>"
)
_TITLES = {
    "tabular": "digits as a table",
    "clusters": "a generated table",
    "mnist-table": "MNIST as a table",
    "resnet": "ResNet-20, MNIST",
    "vit": "ViT, MNIST",
    "vit-stem": "ViT with a stem of convolutions, MNIST",
    "gpt": "GPT, characters",
    "gpt-parameters": "GPT, characters, by parameters",
}
_BY_LOSS = ("gpt", "gpt-parameters")
"""Tasks of which accuracy says little."""
_BY_PARAMETERS = ("gpt-parameters",)
_OURS = ("ours", "ours, at once")


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


def resource_of(task: str) -> tuple[str, str]:
    """What a task's budgets are of: the figure's name, and for people."""
    return ("parameters", "parameters") if task in _BY_PARAMETERS else ("macs", "MACs")


def percent_left(line: Line, resource: str) -> float:
    """Of a resource."""
    return 100 * float(line[resource])


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for one value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def lost(runs: Sequence[Line], whole: Sequence[Line]) -> tuple[float, float]:
    """Accuracy lost (``gpt``: loss increase) against the script as it is, and its standard error,
    paired by seed."""
    name, sign = ("loss", 1) if runs[0]["task"] in _BY_LOSS else ("accuracy", -1)
    plain = {run["seed"]: run[name] for run in whole}
    pairs = [sign * (run[name] - plain[run["seed"]]) for run in runs if run["seed"] in plain]
    return mean(pairs) if pairs else (float("nan"), 0.0)


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
        whole = found["unpruned", 1.0]
        name = "loss" if task in _BY_LOSS else "accuracy"
        scale = 1 if task in _BY_LOSS else 100
        resource, named = resource_of(task)
        sides: tuple[tuple[Any, Callable[[Line], float], str], ...] = (
            (left, partial(percent_left, resource=resource), f"{named} left, %"),
            (right, lambda line: line["faster"]["64"], "times faster, 64 samples"),
        )
        for axes, across, label in sides:
            if whole:
                level = scale * mean([run[name] for run in whole])[0]
                axes.axhline(level, color=_INK, linewidth=0.8, linestyle=":")
            for method, colour in _COLOURS.items():
                points = [runs for (name, _), runs in sorted(found.items()) if name == method]
                if points:
                    axes.errorbar(
                        [mean([across(run) for run in runs])[0] for runs in points],
                        [scale * mean([run[name] for run in runs])[0] for runs in points],
                        [scale * lost(runs, whole)[1] for runs in points],
                        color=colour,
                        marker="o",
                        markersize=3,
                        linewidth=2.2 if method.startswith("ours") else 1.2,
                        zorder=3 if method.startswith("ours") else 2,
                        label=method,
                    )
            axes.set_xlabel(label)
        left.invert_xaxis()
        if task in _BY_LOSS:  # up is better everywhere
            left.invert_yaxis()
            right.invert_yaxis()
        left.set_ylabel("test loss" if task in _BY_LOSS else "test accuracy, %")
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
        named = resource_of(task)[1]
        parts.append(
            f"**{_TITLES[task]}**: {setting(whole[0])}; the script as it is ends at "
            f"{figures(whole, whole)}.\n"
        )
        head = "".join(f" {share:.0%} of the {named} | faster (1, 64) |" for share in shares)
        parts += [
            f"| method |{head} time | lines |",
            "|---|" + "---|---|" * len(shares) + "---|---|",
        ]
        for method in _COLOURS:
            cells = [found.get((method, share), []) for share in shares]
            if any(cells):
                parts.append(row(method, cells, whole))
        parts += ["", *against_ours(found), *failures(lines, task), ""]
    return "\n".join(parts)


def row(method: str, cells: Sequence[Sequence[Line]], whole: Sequence[Line]) -> str:
    """One method: accuracy and speed-up for each share, training time and lines of code.

    The time includes the cuts. It is a multiple of the time of the script as it is
    (``script_seconds`` if that was measured under another load), averaged over shares."""
    told = [f"| {f'**{method}**' if method in _OURS else method} |"]
    for runs in cells:
        if not runs:
            told.append(" | |")
            continue
        resource = resource_of(runs[0]["task"])[0]
        left, fast = mean([run[resource] for run in runs])[0], speeds(runs)
        missed = "" if left < runs[0]["share"] + 0.01 else f" ({left:.0%} left)"
        told.append(f" {figures(runs, whole)}{missed} | {fast} |")
    plain = mean([run["cpu_seconds"] for run in whole])[0]
    times = [
        run["cpu_seconds"] / run.get("script_seconds", plain) for runs in cells for run in runs
    ]
    return "".join(told) + f" {mean(times)[0]:.2f} | {lines_of(method)} |"


def against_ours(found: Mapping[tuple[str, float], list[Line]]) -> list[str]:
    """For each share: what the better of our two ways loses (of more seeds, where that differs),
    and the best other method, on the seeds that both have. Then the methods that are better or
    worse than ours by more than two standard errors, paired by seed."""
    whole, lines = found["unpruned", 1.0], []
    said: dict[str, list[str]] = {"better": [], "worse": []}
    sign, name = (-1, "loss") if whole[0]["task"] in _BY_LOSS else (1, "accuracy")
    for share in sorted({share for method, share in found if method in _OURS}, reverse=True):
        ways = [runs for way in _OURS if (runs := found.get((way, share)))]
        better = min(ways, key=lambda runs: (-len(runs), lost(runs, whole)[0]))
        ours = {run["seed"]: run for run in better}
        others = {
            method: alike
            for (method, at), runs in found.items()
            if at == share and method not in (*_OURS, "unpruned")
            if (alike := [run for run in runs if run["seed"] in ours])
        }
        if others:
            best = min(others, key=lambda method: lost(others[method], whole)[0])
            own = lost([ours[run["seed"]] for run in others[best]], whole)
            theirs = lost(others[best], whole)
            part = f"; ratio {own[0] / theirs[0]:.2f}" if min(own[0], theirs[0]) > 0 else ""
            lines.append(
                f'- {share:.0%} left: "{next(iter(ours.values()))["method"]}" loses '
                f"{told_loss(own)}, the best other method ({best}) {told_loss(theirs)}{part}."
            )
        for method, runs in others.items():
            if len(runs) > 1:
                pairs = [sign * (run[name] - ours[run["seed"]][name]) for run in runs]
                more, error = mean(pairs)
                if abs(more) > 2 * error:
                    side = "better" if more > 0 else "worse"
                    said[side].append(f"{method} at {share:.0%} ({abs(more):.4f} ±{error:.4f})")
    if not lines or max(len(runs) for (way, _), runs in found.items() if way in _OURS) < 2:
        return lines
    return lines + [
        f"- {side.capitalize()} than ours by more than two standard errors, paired by seed: "
        f"{', '.join(names) or 'none'}."
        for side, names in said.items()
    ]


def told_loss(found: tuple[float, float]) -> str:
    """Without an error where there is one seed."""
    return f"{found[0]:z.4f} ±{found[1]:.4f}" if found[1] else f"{found[0]:z.4f}"


def figures(runs: Sequence[Line], whole: Sequence[Line]) -> str:
    """Accuracy, or loss where accuracy says little (``gpt``); the error is that of the difference
    to the script as it is."""
    name, digits = ("loss", 3) if runs[0]["task"] in _BY_LOSS else ("accuracy", 4)
    value, error = mean([run[name] for run in runs])[0], lost(runs, whole)[1]
    own = runs[0]["method"] == "unpruned" or len(runs) < 2
    return f"{value:.{digits}f}" if own else f"{value:.{digits}f} ±{error:.{digits}f}"


def speeds(runs: Sequence[Line]) -> str:
    """For example 1.21, 1.40: of calls with 1 and with 64 samples."""
    return ", ".join(
        f"{mean([run['faster'][size] for run in runs])[0]:.2f}" for size in ("1", "64")
    )


def setting(line: Mapping[str, Any]) -> str:
    """What the runs of a table have in common."""
    size = f"{line['original_parameters']:,} parameters, {line['original_macs'] / 1e6:.2f} M MACs"
    return f"{size}, at most {line['samples']} training samples, {line['epochs']} epochs"


def failures(lines: Sequence[Line], task: str) -> list[str]:
    """What could not be used, or failed."""
    said = {
        f"{line['method']}: {line.get('error') or line['not_applicable']}"
        for line in lines
        if line["task"] == task and "accuracy" not in line
    }
    return [f"- {text}" for text in sorted(said)]


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

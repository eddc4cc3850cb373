"""What deploy/ holds, as several tests look at it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import promql_parser
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
BOARD = json.loads((DEPLOY / "grafana/dashboards/elesh.json").read_text())
QUERIES = [rule["expr"] for rule in RULES] + [
    target["expr"] for panel in BOARD["panels"] for target in panel["targets"]
]


def named_metrics() -> set[str]:
    """Every series that rules and dashboard read, but for those that the rules record."""
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    found = {
        name
        for query in QUERIES
        for name in re.findall(r"name: Some\(\s*\"([^\"]+)\"", repr(promql_parser.parse(query)))
    }
    return found - recorded


def selectors(query: str) -> list[str]:
    """The series that a query reads, each as a query of its own: a name with its labels."""
    return re.findall(r"\b(?:elesh[\w:]*|[a-z]+(?:_[a-z0-9]+)+)(?:\{[^}]*\})?(?=[\[\s)]|$)", query)

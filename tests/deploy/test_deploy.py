"""deploy/: rules and dashboards parse and name what is there; manifests follow their schemas."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml
from deployment import BOARD, DEPLOY, QUERIES, ROOT, RULES

from leyline.streams import STREAMS, WORKERS

KUBERNETES = "1.31"


def manifests() -> list[dict[str, Any]]:
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [each for file in files for each in yaml.safe_load_all(file.read_text())]


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_parses(query: str) -> None:
    assert promql_parser.parse(query) is not None


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    alerts = [rule for rule in RULES if "alert" in rule]
    assert len(alerts) == len({rule["alert"] for rule in alerts}) >= 10
    for rule in alerts:
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert {"summary", "action"} <= rule["annotations"].keys()


def test_the_objectives_of_the_document_are_recorded_and_alerted_on() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    for name, bound in {
        "elesh:structured_analysis_completion_rate:ratio_1h": "< 0.95",
        "elesh:analysis_duration_seconds:p95_1h": "> 300",
        "elesh:peak_memory_usage:max": "> 4 * 1024 * 1024 * 1024",
        "elesh:multi_level_accuracy:ratio_1d": "< 0.9",
    }.items():
        assert name in recorded
        assert any("alert" in rule and rule["expr"] == f"{name} {bound}" for rule in RULES)


def test_grafana_finds_its_data_sources_and_its_dashboard() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    sources = yaml.safe_load((provisioning / "datasources/elesh.yml").read_text())["datasources"]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert {source["type"] for source in sources} == {"prometheus", "jaeger"}
    for source in sources:
        assert source["url"].removeprefix("http://").partition(":")[0] in services
    assert {panel["datasource"]["uid"] for panel in BOARD["panels"]} <= {s["uid"] for s in sources}
    boards = yaml.safe_load((provisioning / "dashboards/elesh.yml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert boards[0]["options"]["path"] in mounted


def test_manifests_follow_the_schemas_of_kubernetes() -> None:
    checked = [each for each in manifests() if "." not in each["apiVersion"].partition("/")[0]]
    assert {each["kind"] for each in checked} >= {"Namespace", "Service", "Deployment"}
    for manifest in checked:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_keda_scales_the_workers_by_the_lag_of_every_stream_that_they_serve() -> None:
    by_kind = {each["kind"]: each for each in manifests()}
    scaled = by_kind["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == by_kind["Deployment"]["metadata"]["name"]
    secret = by_kind["TriggerAuthentication"]["metadata"]["name"]
    for trigger in scaled["triggers"]:
        assert trigger["type"] == "redis-streams"
        assert {"address", "stream", "consumerGroup", "lagCount"} <= trigger["metadata"].keys()
        assert trigger["authenticationRef"]["name"] == secret
        assert trigger["metadata"]["consumerGroup"] == WORKERS
    served = {stream.key("main") for stream in STREAMS if stream.group == WORKERS}
    assert {trigger["metadata"]["stream"] for trigger in scaled["triggers"]} == served


def test_workers_are_killed_later_than_they_drain_and_are_not_root() -> None:
    pod = next(each for each in manifests() if each["kind"] == "Deployment")["spec"]["template"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > 30
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    (container,) = pod["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"


PROMTOOL = shutil.which("promtool")


def promtool(*arguments: str, given: bytes = b"") -> str:
    assert PROMTOOL
    done = subprocess.run([PROMTOOL, *arguments], input=given, capture_output=True, check=False)
    told = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, told
    return told


@pytest.mark.slow
@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on this machine")
def test_prometheus_accepts_rules_and_configuration_and_alerts_fire_when_they_should() -> None:
    folder = DEPLOY / "prometheus"
    promtool("check", "config", str(folder / "prometheus.yml"))
    promtool("test", "rules", str(folder / "rules_test.yml"))


def test_every_alert_is_tested_firing_and_not_firing() -> None:
    cases = [
        case
        for test in yaml.safe_load((DEPLOY / "prometheus/rules_test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    alerts = {rule["alert"] for rule in RULES if "alert" in rule}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts


def test_no_label_is_a_run() -> None:
    assert not [query for query in QUERIES if re.search(r"\brun\b", query)]

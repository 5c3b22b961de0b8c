"""Alerts, dashboard and monitor: accepted, explained, and as their sources say."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from k8s.dashboards import DASHBOARDS, ROWS, files
from k8s.documents import Document, load_documents
from k8s.lint import lint_text
from k8s.queries import all_wanted, dashboard_expressions, rule_expressions
from k8s.render import FOLDER, kustomize_command
from k8s.schemas import Schemas
from tests.k8s.manifests import documents, of_kind, ray, worker

MONITORING = FOLDER / "monitoring"
RULES = MONITORING / "prometheusrule.yaml"
RUNBOOK = FOLDER.parent / "docs" / "runbook.md"
ONCE = pytest.mark.skipif(kustomize_command() is None, reason="no kubectl and no kustomize")


def rule() -> Document:
    (only,) = load_documents(RULES.read_text())
    return only


def alerts() -> list[Document]:
    return [each for group in rule()["spec"]["groups"] for each in group["rules"]]


def rendered() -> list[Document]:
    command = kustomize_command()
    assert command is not None
    words = [*command, str(MONITORING)]
    return load_documents(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def test_dashboards_are_those_that_the_script_writes() -> None:
    assert {file: file.read_text() for file in DASHBOARDS.iterdir()} == files()


def test_every_row_that_is_promised_is_there() -> None:
    (text,) = files().values()
    panels = json.loads(text)["panels"]
    titles = [panel["title"] for panel in panels if panel["type"] == "row"]
    expected = ["Traffic", "Latency", "Engine", "Experts", "Dispatch", "Faults", "Cost"]
    assert titles == [row.title for row in ROWS] == expected


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    (text,) = files().values()
    panels = json.loads(text)["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_dashboard_and_alerts_parse() -> None:
    for file in DASHBOARDS.iterdir():
        assert all_wanted(dashboard_expressions(json.loads(file.read_text())))
    assert all_wanted(rule_expressions(rule()))


def test_no_metric_of_ours_is_left_unwatched() -> None:
    """What docs/observability.md lists, which is what there is, is on the dashboard."""
    page = (FOLDER.parent / "docs" / "observability.md").read_text()
    documented = set(re.findall(r"^\| `(conclave_\w+)` \|", page, re.MULTILINE))
    shown = set()
    for file in DASHBOARDS.iterdir():
        names = all_wanted(dashboard_expressions(json.loads(file.read_text())))
        shown |= {re.sub(r"_(bucket|sum|count)$", "", name.removeprefix("ray_")) for name in names}
    assert documented
    assert documented <= shown, documented - shown


def test_every_alert_has_a_section_and_every_section_an_alert() -> None:
    headings = re.findall(r"^## (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert headings == [alert["alert"] for alert in alerts()]
    for alert in alerts():
        # As anchors are made of headings.
        assert alert["annotations"]["runbook"] == f"docs/runbook.md#{alert['alert'].lower()}"


def test_panels_that_the_runbook_names_are_there() -> None:
    titles = {panel.title for row in ROWS for panel in row.panels}
    text = " ".join(RUNBOOK.read_text().split())
    named = re.findall(r"[Pp]anel ((?:[A-Z]\w*)(?: [a-z]+)*)", text)
    assert named
    for words in named:
        assert any(words.startswith(title) for title in titles) or words in {"Faults"}, words


def test_the_linter_accepts_the_alerts(without_crds: Schemas) -> None:
    assert lint_text(RULES.read_text(), without_crds) == []


@ONCE
def test_the_linter_accepts_what_is_applied_once(without_crds: Schemas) -> None:
    text = yaml.safe_dump_all(rendered())
    assert lint_text(text, without_crds) == []


@ONCE
def test_each_dashboard_is_a_config_map_that_grafana_finds() -> None:
    maps = [each for each in rendered() if each["kind"] == "ConfigMap"]
    assert len(maps) == len(files())
    held = {name: text for each in maps for name, text in each["data"].items()}
    assert held == {file.name: text for file, text in files().items()}
    for each in maps:
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert len(json.dumps(each).encode()) < 1_000_000


def test_the_network_policy_lets_the_monitor_in() -> None:
    found = documents("dbrx-monitored")
    endpoints = of_kind(found, "PodMonitor")["spec"]["podMetricsEndpoints"]
    ports = {port["name"]: port["containerPort"] for port in ray(worker(found))["ports"]}
    assert endpoints[0]["port"] in ports
    allowed = {
        port["port"]
        for each in of_kind(found, "NetworkPolicy")["spec"]["ingress"]
        for port in each.get("ports", ())
    }
    assert {8080, 44217, 44227} <= allowed
    assert {each["port"] for each in endpoints} == {"metrics", "as-metrics", "dash-metrics"}


def misspelt(found: Document) -> None:
    found["spec"]["groups"][0]["rules"][0]["expression"] = "up"


def no_such_duration(found: Document) -> None:
    found["spec"]["groups"][0]["rules"][0]["for"] = "soon"


def number_as_label(found: Document) -> None:
    found["spec"]["groups"][0]["rules"][0]["labels"]["severity"] = 1


def no_expression(found: Document) -> None:
    del found["spec"]["groups"][0]["rules"][0]["expr"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (misspelt, "'expression' was unexpected"),
        (no_such_duration, "'soon' does not match"),
        (number_as_label, "1 is not of type 'string'"),
        (no_expression, "'expr' is a required property"),
    ],
)
def test_mistakes_in_alerts_are_named(
    change: Callable[[Document], Any], words: str, without_crds: Schemas
) -> None:
    found = rule()
    change(found)
    problems = lint_text(yaml.safe_dump(found), without_crds)
    assert any(words in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("podMetricsEndpoints:", "podMetricEndpoints:", "'podMetricEndpoints' was unexpected"),
        ("targetLabel: ray_io", "target: ray_io", "'target' was unexpected"),
        ("interval: 15s", "interval: 15", "15 is not of type 'string'"),
        ("action: labeldrop", "action: labelsdrop", "'labelsdrop' is not one of"),
        ("__meta_kubernetes_pod_label_ray_io", "ray.io", "does not match"),
    ],
)
def test_mistakes_in_monitors_are_named(
    old: str, new: str, words: str, without_crds: Schemas
) -> None:
    text = yaml.safe_dump(of_kind(documents("dbrx-monitored"), "PodMonitor"))
    assert old in text
    problems = lint_text(text.replace(old, new), without_crds)
    assert any(words in problem for problem in problems), problems

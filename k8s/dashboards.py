"""`python -m k8s.dashboards`: what Grafana shows, from the rows of panels beside this file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from k8s.dashboard_machinery import COST, DISPATCH, EXPERTS, FAULTS
from k8s.dashboard_panels import SCHEMA_VERSION, panels_json, source_variable_json, variable_json
from k8s.dashboard_queries import NODES
from k8s.dashboard_serving import ENGINE, LATENCY, TRAFFIC
from k8s.documents import Document
from k8s.render import FOLDER

DASHBOARDS = FOLDER / "monitoring" / "dashboards"
ROWS = (TRAFFIC, LATENCY, ENGINE, EXPERTS, DISPATCH, FAULTS, COST)


def dashboard() -> Document:
    """The only one: a row for each question."""
    state = "ray_conclave_instance_state"
    within = f'{state}{{namespace=~"$namespace"}}'
    variables = [
        source_variable_json(),
        variable_json("namespace", "Namespace", f"label_values({state}, namespace)"),
        variable_json("instance", "Instance", f"label_values({within}, conclave_instance)"),
        variable_json("replica", "Replica", f"label_values({state}{{{NODES}}}, replica_id)"),
    ]
    return {
        "uid": "conclave",
        "title": "Conclave",
        "tags": ["conclave", "ray"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels_json(ROWS),
    }


def files() -> dict[Path, str]:
    """What is committed: file → text."""
    return {DASHBOARDS / "conclave.json": json.dumps(dashboard(), indent=1) + "\n"}


def main() -> int:
    """Write all of them."""
    for file, text in files().items():
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(FOLDER.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Grafana's JSON of rows of panels, laid out from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k8s.documents import Document

SCHEMA_VERSION = 39
"""Of Grafana 10.4; newer ones migrate it when they read it."""
_GRID_WIDTH = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression, and the name of each of its series."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One graph; `unit` is one of Grafana's ids."""

    title: str
    about: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 8
    stacked: bool = False
    number: bool = False
    """The last values as large numbers instead of a graph."""


class Row:
    """Panels under one heading that can be folded."""

    def __init__(self, title: str, *panels: Panel) -> None:
        self.title = title
        self.panels = panels


def panels_json(rows: Sequence[Row], height: int = 8) -> list[Document]:
    """The panels of a dashboard, in reading order, with ids from 1."""
    found: list[Document] = []
    y = 0
    for row in rows:
        found.append(_row_json(row, len(found) + 1, y))
        y, x = y + 1, 0
        for panel in row.panels:
            if x + panel.width > _GRID_WIDTH:
                x, y = 0, y + height
            position = {"h": height, "w": panel.width, "x": x, "y": y}
            found.append(_panel_json(panel, len(found) + 1, position))
            x += panel.width
        y += height
    return found


def variable_json(name: str, label: str, values: str) -> Document:
    """A choice among the values of a label; `values` is `label_values(SELECTOR, LABEL)`."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": _SOURCE,
        "definition": values,
        "query": {"query": values, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def source_variable_json() -> Document:
    """Which Prometheus is asked."""
    return {
        "type": "datasource",
        "name": "datasource",
        "label": "Prometheus",
        "query": "prometheus",
        "current": {},
    }


def _row_json(row: Row, number: int, y: int) -> Document:
    position = {"h": 1, "w": _GRID_WIDTH, "x": 0, "y": y}
    shape = {"type": "row", "collapsed": False, "panels": []}
    return {"id": number, "title": row.title, "gridPos": position, **shape}


def _panel_json(panel: Panel, number: int, position: dict[str, int]) -> Document:
    targets = [
        {"refId": chr(ord("A") + index), "expr": query.expr, "legendFormat": query.legend}
        for index, query in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": "stat" if panel.number else "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "gridPos": position,
        "targets": [{"datasource": _SOURCE, **target} for target in targets],
        "fieldConfig": {"defaults": _field_defaults(panel), "overrides": []},
        "options": _options(panel),
    }


def _field_defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.unit == "percentunit":
        defaults |= {"min": 0, "max": 1}
    if not panel.number:
        stacking = {"mode": "normal" if panel.stacked else "none"}
        fill = 30 if panel.stacked else 5
        defaults["custom"] = {"fillOpacity": fill, "showPoints": "never", "stacking": stacking}
    return defaults


def _options(panel: Panel) -> dict[str, Any]:
    if panel.number:
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}
    return {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }

"""CRDs' schemas, made strict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.documents import Document
from k8s.quantities import quantity
from k8s.schemas import Schemas

WIDGET = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["size", "mode"],
            "properties": {
                "size": {"type": "integer", "minimum": 1},
                "mode": {"type": "string", "enum": ["a", "b"], "default": "a"},
                "port": {"x-kubernetes-int-or-string": True},
                "note": {"type": "string", "nullable": True},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                "parts": {
                    "type": "array",
                    "items": {"type": "object", "properties": {"name": {"type": "string"}}},
                },
            },
        }
    },
}


@pytest.fixture
def widgets(tmp_path: Path) -> Schemas:
    crd = {
        "kind": "CustomResourceDefinition",
        "spec": {
            "group": "example.com",
            "names": {"kind": "Widget"},
            "versions": [{"name": "v1", "schema": {"openAPIV3Schema": WIDGET}}],
        },
    }
    (tmp_path / "widgets.yaml").write_text(yaml.safe_dump(crd))
    return Schemas(tmp_path)


def widget(**spec: Any) -> Document:
    metadata = {"name": "w"}
    return {"apiVersion": "example.com/v1", "kind": "Widget", "metadata": metadata, "spec": spec}


@pytest.mark.parametrize(
    "spec",
    [
        {"size": 1},
        {"size": 2, "mode": "b", "port": "http", "note": None},
        {"size": 2, "port": 80, "labels": {"any": "text"}, "free": {"any": [1]}},
        {"size": 2, "parts": [{"name": "x"}, {}]},
    ],
)
def test_what_the_server_takes_is_taken(spec: dict[str, Any], widgets: Schemas) -> None:
    assert list(widgets.problems(widget(**spec))) == []


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ({"mode": "a"}, "spec: 'size' is a required"),
        ({"size": 0}, "spec.size: "),
        ({"size": "1"}, "spec.size: "),
        ({"size": 1, "seize": 2}, "spec: "),
        ({"size": 1, "mode": "c"}, "spec.mode: "),
        ({"size": 1, "port": [80]}, "spec.port: "),
        ({"size": 1, "labels": {"number": 1}}, "spec.labels.number: "),
        ({"size": 1, "parts": [{"name": "x"}, {"nam": "y"}]}, "spec.parts.1: "),
    ],
)
def test_what_the_server_refuses_or_drops_is_named(
    spec: dict[str, Any], place: str, widgets: Schemas
) -> None:
    (problem,) = widgets.problems(widget(**spec))
    assert problem.startswith(place)


def test_metadata_is_checked_although_crds_leave_it_open(widgets: Schemas) -> None:
    bad = widget(size=1)
    bad["metadata"] = {"name": "w", "label": {}}
    assert [p for p in widgets.problems(bad) if p.startswith("metadata: ")]


def test_a_kind_that_nobody_knows_is_named(widgets: Schemas) -> None:
    unknown = {"apiVersion": "apps/v7", "kind": "Deployment", "metadata": {"name": "x"}}
    (problem,) = widgets.problems(unknown)
    assert "no schema of apps/v7/Deployment" in problem


def test_quantities_are_numbers() -> None:
    texts = ["8", 8, "500m", "2k", "16Gi", "1.5Mi"]
    assert list(map(quantity, texts)) == [8, 8, 0.5, 2000, 16 * 2**30, 1.5 * 2**20]
    with pytest.raises(ValueError, match="no quantity"):
        quantity("8Gib")

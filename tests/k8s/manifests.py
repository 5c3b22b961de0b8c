"""Rendered overlays as objects to plant mistakes in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import yaml

from k8s.documents import Document, load_documents
from k8s.lint import lint_text
from k8s.render import RENDERED
from k8s.schemas import Schemas

Change = Callable[[list[Document]], Any]


@cache
def _documents(overlay: str) -> list[Document]:
    return load_documents((RENDERED / f"{overlay}.yaml").read_text(encoding="utf-8"))


def documents(overlay: str) -> list[Document]:
    """A copy of its own."""
    return copy.deepcopy(_documents(overlay))


def of_kind(found: list[Document], kind: str) -> Document:
    """The only one."""
    (document,) = [each for each in found if each["kind"] == kind]
    return document


def service(found: list[Document]) -> Document:
    """The spec of the RayService."""
    spec: Document = of_kind(found, "RayService")["spec"]
    return spec


def cluster(found: list[Document]) -> Document:
    """Its RayCluster."""
    config: Document = service(found)["rayClusterConfig"]
    return config


def head(found: list[Document]) -> Document:
    """Pod spec of the head."""
    spec: Document = cluster(found)["headGroupSpec"]["template"]["spec"]
    return spec


def group(found: list[Document]) -> Document:
    """The worker group."""
    only: Document = cluster(found)["workerGroupSpecs"][0]
    return only


def worker(found: list[Document]) -> Document:
    """Pod spec of the workers."""
    spec: Document = group(found)["template"]["spec"]
    return spec


def ray(pod: Document) -> Document:
    """Ray's container."""
    container: Document = pod["containers"][0]
    return container


def problems_after(change: Change, overlay: str, schemas: Schemas) -> list[str]:
    """What the linter says of an overlay that has been changed."""
    found = documents(overlay)
    change(found)
    return lint_text(yaml.safe_dump_all(found), schemas)

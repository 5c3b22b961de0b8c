"""Manifests as plain dicts, read as strictly as the API server would wish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has already: YAML parsers otherwise keep the last one."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode, deep: bool = False) -> Document:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key {key!r}", key_node.start_mark
            )
        seen.add(key)
    mapping: Document = yaml.SafeLoader.construct_mapping(loader, node, deep)  # type: ignore[assignment]
    return mapping


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_text(text: str) -> Any:
    """One YAML document. Raises yaml.YAMLError."""
    return yaml.load(text, _StrictLoader)


def load_documents(text: str) -> list[Document]:
    """All objects of a manifest; empty documents are left out. Raises yaml.YAMLError."""
    return [document for document in yaml.load_all(text, _StrictLoader) if document]


def manifest_files(path: Path) -> list[Path]:
    """A file itself, or the YAML files below a folder that hold objects of a cluster."""
    if path.is_file():
        return [path]
    return [file for file in sorted(path.rglob("*.yaml")) if file.name != "kustomization.yaml"]

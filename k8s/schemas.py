"""What an API server would refuse, and what it would drop without a word.

Custom resources are judged by the CRDs' own OpenAPI schemas, made strict; everything else, and the
pods inside, by the published schemas of Kubernetes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from k8s.documents import Document
from k8s.operator_schemas import OPERATOR_KINDS
from k8s.ray_pods import ray_pods

KUBERNETES_VERSION = "1.35.0"
"""The oldest with everything that the overlays use switched on."""

_KEPT = frozenset(
    (
        *("type", "enum", "required", "pattern", "uniqueItems", "anyOf", "oneOf", "allOf", "not"),
        *("minimum", "maximum", "minLength", "maxLength"),
        *("minItems", "maxItems", "minProperties", "maxProperties"),
    )
)
Kind = tuple[str, str]


class Schemas:
    """The CRDs of a folder. Without one, custom resources are judged by their pods alone."""

    def __init__(self, folder: Path | None) -> None:
        """Raises OSError, yaml.YAMLError."""
        self._schemas = OPERATOR_KINDS | ({} if folder is None else _read_crds(folder))
        self._validators: dict[Kind, Any] = {}

    def problems(self, document: Document) -> Iterator[str]:
        """What is wrong with one object, each as `place: sentence`."""
        kind: Kind = (str(document.get("apiVersion")), str(document.get("kind")))
        if kind in self._schemas:
            yield from _found_by(self._validator(kind), document)
        elif not kind[0].startswith("ray.io/"):
            yield from _kubernetes_problems(document)
        for pod in ray_pods(document):
            wrapped = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}}
            for problem in _kubernetes_problems({**wrapped, "spec": pod.spec}):
                yield f"{pod.group}: {problem}"

    def _validator(self, kind: Kind) -> Any:
        if kind not in self._validators:
            schema = strict_object(self._schemas[kind])
            self._validators[kind] = jsonschema.Draft202012Validator(schema)
        return self._validators[kind]


def strict(schema: Document) -> Document:
    """A CRD's structural schema as a JSON schema that refuses what the server would prune."""
    out = {key: value for key, value in schema.items() if key in _KEPT}
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    properties = schema.get("properties", {})
    if properties:
        out["properties"] = {name: strict(value) for name, value in properties.items()}
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
        if not open_ended and "additionalProperties" not in schema:
            out["additionalProperties"] = False
    if "required" in out:  # the server fills in defaults before it validates
        out["required"] = [
            name for name in out["required"] if "default" not in properties.get(name, {})
        ]
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        out["items"] = strict(schema["items"])
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    return out


def strict_object(schema: Document) -> Document:
    """`strict` for a whole object, whose metadata every CRD leaves open."""
    out = strict(schema)
    text = {"type": "string"}
    metadata = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {
            "name": text,
            "namespace": text,
            "labels": {"type": "object", "additionalProperties": text},
            "annotations": {"type": "object", "additionalProperties": text},
        },
    }
    out["properties"] |= {"apiVersion": text, "kind": text, "metadata": metadata}
    out["required"] = sorted({*out.get("required", ()), "apiVersion", "kind", "metadata"})
    return out


def _found_by(validator: Any, document: Document) -> Iterator[str]:
    errors = validator.iter_errors(document)
    for error in sorted(errors, key=lambda each: [str(part) for part in each.absolute_path]):
        yield f"{'.'.join(map(str, error.absolute_path)) or 'object'}: {error.message[:200]}"


def _kubernetes_problems(document: Document) -> Iterator[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path)) or 'object'}: {error.message[:200]}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"apiVersion: there is no schema of {document['apiVersion']}/{document['kind']}"


def _read_crds(folder: Path) -> dict[Kind, Document]:
    found: dict[Kind, Document] = {}
    for file in sorted(folder.glob("*.y*ml")):
        for crd in yaml.load_all(file.read_text(encoding="utf-8"), yaml.CSafeLoader):
            if not crd or crd.get("kind") != "CustomResourceDefinition":
                continue
            spec = crd["spec"]
            for version in spec["versions"]:
                kind = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                found[kind] = version["schema"]["openAPIV3Schema"]
    return found

"""`python -m k8s.lint [--crds FOLDER] PATH...`: what is wrong with manifests.

Exit codes: 0 nothing, 1 something, 2 nothing to check.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from k8s.documents import Document, load_documents, manifest_files
from k8s.pod_rules import POD_RULES
from k8s.ray_pods import ray_pods
from k8s.schemas import Schemas
from k8s.service_rules import SERVICE_RULES
from k8s.set_rules import SET_RULES

CRDS_VARIABLE = "CONCLAVE_KUBERAY_CRDS"


def lint_text(text: str, schemas: Schemas) -> list[str]:
    """Problems of the objects of one manifest, which are applied together."""
    try:
        documents = load_documents(text)
    except yaml.YAMLError as error:
        return [f"YAML: {' '.join(str(error).split())}"]
    problems: list[str] = []
    for document in documents:
        if not isinstance(document, dict) or not {"apiVersion", "kind"} <= document.keys():
            problems.append("object: allowed are mappings with apiVersion and kind")
            continue
        name = (document.get("metadata") or {}).get("name")
        # Rules read what has the right shape: schemas speak first.
        found = list(schemas.problems(document)) or list(_rule_problems(document))
        problems += [f"{document['kind']}/{name}: {problem}" for problem in found]
    if not problems:
        problems += [problem for rule in SET_RULES for problem in rule(documents)]
    return problems


def _rule_problems(document: Document) -> Iterator[str]:
    if document["kind"] == "RayService":
        for service_rule in SERVICE_RULES:
            yield from service_rule(document)
    for pod in ray_pods(document):
        for pod_rule in POD_RULES:
            for problem in pod_rule(pod):
                yield f"{pod.group}: {problem}"


def main() -> int:
    """Print every problem."""
    parser = argparse.ArgumentParser(prog="python -m k8s.lint")
    parser.add_argument("--crds", type=Path, help=f"folder of CRDs; default ${CRDS_VARIABLE}")
    parser.add_argument("paths", type=Path, nargs="+")
    given = parser.parse_args()
    folder = given.crds or os.environ.get(CRDS_VARIABLE)
    if folder is None:
        print("no folder of CRDs: custom resources are judged by their pods alone")
    schemas = Schemas(None if folder is None else Path(folder))
    files = [file for path in given.paths for file in manifest_files(path)]
    bad = 0
    for file in files:
        problems = lint_text(file.read_text(encoding="utf-8"), schemas)
        bad += bool(problems)
        print(f"{'FAIL' if problems else 'pass'} {file}", *problems, sep="\n     ")
    print(f"{len(files)} files, {bad} with problems")
    return 1 if bad else 0 if files else 2


if __name__ == "__main__":
    sys.exit(main())

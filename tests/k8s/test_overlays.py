"""The overlays: rendered as committed, accepted as rendered, and saying what the product takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import ray
from ray.serve.schema import ServeDeploySchema

from deploy import local_ray
from deploy.app import build
from deploy.config import ConfigError, parse_args
from deploy.proxy_request_id import SaneRequestId
from deploy.version import VERSION
from k8s.documents import Document, load_documents, load_text
from k8s.lint import lint_text, manifest_files
from k8s.pod_rules import PROXY_CALLBACK, PROXY_MIDDLEWARES
from k8s.render import (
    FOLDER,
    RENDERED,
    header,
    kustomize_command,
    overlays,
    render,
    rendered_file,
)
from k8s.schemas import Schemas
from tests.k8s.manifests import cluster, documents, service, worker
from tests.k8s.manifests import ray as ray_container

NAMES = [overlay.name for overlay in overlays()]
ON_GPUS = [name for name in NAMES if name != "nano"]
ROOT = FOLDER.parent


def serve_config(overlay: str) -> Document:
    config: Document = load_text(service(documents(overlay))["serveConfigV2"])
    return config


def serve_args(overlay: str) -> Document:
    args: Document = serve_config(overlay)["applications"][0]["args"]
    return args


def test_every_overlay_is_rendered_and_nothing_else() -> None:
    assert NAMES
    assert sorted(RENDERED.iterdir()) == sorted(map(rendered_file, overlays()))


@pytest.mark.parametrize("overlay", overlays(), ids=NAMES)
def test_renderings_are_of_the_sources_as_they_are(overlay: Path) -> None:
    assert rendered_file(overlay).read_text().startswith(header(overlay)), (
        "stale: run python -m k8s.render"
    )


@pytest.mark.skipif(kustomize_command() is None, reason="neither kubectl nor kustomize is here")
@pytest.mark.parametrize("overlay", overlays(), ids=NAMES)
def test_kustomize_renders_what_is_committed(overlay: Path) -> None:
    command = kustomize_command()
    assert command is not None
    committed = rendered_file(overlay).read_text()
    assert load_documents(render(overlay, command)) == load_documents(committed)


@pytest.mark.parametrize("name", NAMES)
def test_the_linter_accepts_every_overlay(name: str, schemas: Schemas) -> None:
    assert lint_text((RENDERED / f"{name}.yaml").read_text(), schemas) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_linter_accepts_them_without_crds(name: str, without_crds: Schemas) -> None:
    assert lint_text((RENDERED / f"{name}.yaml").read_text(), without_crds) == []


@pytest.mark.parametrize("folder", ["cluster", "weights/claim", "weights/object-store"])
def test_the_linter_accepts_what_is_applied_once(folder: str, without_crds: Schemas) -> None:
    text = "\n---\n".join(file.read_text() for file in manifest_files(FOLDER / folder))
    assert lint_text(text, without_crds) == []


@pytest.mark.parametrize("name", NAMES)
def test_ray_serve_takes_the_configuration(name: str) -> None:
    schema = ServeDeploySchema.model_validate(serve_config(name))
    (application,) = schema.applications
    assert application.import_path == "deploy.app:build"
    assert [each.name for each in application.deployments] == ["Ingress"]


@pytest.mark.parametrize("name", ON_GPUS)
def test_gpu_overlays_are_refused_for_cuda_and_for_nothing_else(name: str) -> None:
    args = serve_args(name)
    with pytest.raises(ConfigError, match="device=cuda"):
        parse_args(args)
    assert parse_args({**args, "device": "cpu"}).stages == args["stages"]


def test_request_ids_are_checked_as_by_conclave_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    local_ray._set_environment("folder")
    assert os.environ[PROXY_CALLBACK] == PROXY_MIDDLEWARES
    module, _, function = PROXY_MIDDLEWARES.partition(":")
    assert [each.cls for each in getattr(import_module(module), function)()] == [SaneRequestId]


def test_the_cpu_overlay_builds_the_application_that_it_configures() -> None:
    config = serve_config("nano")["applications"][0]
    application = build(config["args"])
    assert application._bound_deployment.name == config["deployments"][0]["name"]


@pytest.mark.parametrize("name", NAMES)
def test_versions_are_those_of_the_product(name: str) -> None:
    found = documents(name)
    assert cluster(found)["rayVersion"] == ray.__version__
    if name == "nano":
        assert ray_container(worker(found))["image"] == f"conclave:{VERSION}"


@pytest.mark.parametrize("name", ON_GPUS)
def test_gpu_overlays_say_that_cuda_is_not_served(name: str) -> None:
    text = (RENDERED / f"{name}.yaml").read_text()
    assert re.search(r"# Refused at start-up by this version.*\n\s+device: cuda\n", text)


@pytest.mark.parametrize("name", ON_GPUS)
def test_the_model_is_where_the_weights_are_mounted(name: str) -> None:
    mounts = {
        mount["mountPath"] for mount in ray_container(worker(documents(name)))["volumeMounts"]
    }
    assert serve_args(name)["model"] in mounts


def test_the_linter_is_a_command(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndatas: {}\n")
    command = [sys.executable, "-m", "k8s.lint", str(RENDERED / "nano.yaml"), str(bad)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}
    )
    assert done.returncode == 1, done.stderr
    assert f"FAIL {bad}" in done.stdout
    assert f"pass {RENDERED / 'nano.yaml'}" in done.stdout

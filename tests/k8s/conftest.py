"""Where the CRDs of KubeRay are, which the project has no copy of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from k8s.lint import CRDS_VARIABLE
from k8s.schemas import Schemas

BESIDE_THE_PROJECT = Path(__file__).resolve().parents[3] / "shared" / "kuberay" / "crds"


@pytest.fixture(scope="session")
def schemas() -> Schemas:
    """With the CRDs of KubeRay v1.7.0."""
    folder = Path(os.environ.get(CRDS_VARIABLE) or BESIDE_THE_PROJECT)
    if not folder.is_dir():
        pytest.skip(f"no CRDs of KubeRay: {CRDS_VARIABLE} names no folder that holds them")
    return Schemas(folder)


@pytest.fixture(scope="session")
def without_crds() -> Schemas:
    """Kubernetes' own schemas alone: custom resources are judged by their pods and the rules."""
    return Schemas(None)

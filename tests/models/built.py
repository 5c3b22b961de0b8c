"""The variants of the native kernels that can be tested on this machine."""

from __future__ import annotations

import os
import shutil

import pytest

from models.kernels.variants import KernelsUnavailable, build, load, supported_variants


def _built() -> list[str]:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        return []
    names = []
    for variant in supported_variants():
        build(variant)  # a compiler that is there and fails is a failure
        try:
            load(variant)
        except KernelsUnavailable:  # the operating system keeps the tiles to itself
            continue
        names.append(variant.name)
    return names


VARIANTS = _built()
"""Names, best first; none without a compiler."""

needs_kernels = pytest.mark.skipif(
    not VARIANTS, reason="no C compiler, or no processor that the native kernels are for"
)

"""Runs pytest with the C files under sanitizers; not a test by itself.

`python tests/models/sanitized.py ARGUMENT_OF_PYTEST...`, with the address sanitizer preloaded, or
`... --sources FOLDER`, which only loads what is made of other C files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from models.kernels import variants

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")

if __name__ == "__main__":
    variants._FLAGS = (*variants._FLAGS, *FLAGS)
    # Building takes its time: the best and the plainest are two ways through all sources.
    supported = variants.supported_variants()
    variants.VARIANTS = tuple(dict.fromkeys([supported[0], supported[-1]]))
    if sys.argv[1] == "--sources":
        variants._SOURCES = Path(sys.argv[2])
        variants.load(supported[-1])
    else:
        sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))

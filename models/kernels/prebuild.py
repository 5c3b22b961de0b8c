"""`python -m models.kernels.prebuild FOLDER`: compile the kernels for every kind of processor.

For images and machines without a compiler: where CONCLAVE_PREBUILT_KERNELS names the folder,
libraries that fit the sources are loaded from it.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

from models.kernels.variants import VARIANTS, KernelsUnavailable, build_into


def main() -> int:
    """Exit codes: 0 done (also on machines for which there are no kernels), 1 cannot compile."""
    parser = argparse.ArgumentParser(prog="python -m models.kernels.prebuild")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if platform.machine() not in ("x86_64", "AMD64"):
        print(f"there are no kernels for {platform.machine()}: PyTorch computes there")
        return 0
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    for variant in VARIANTS:
        try:
            print(build_into(variant, folder))
        except KernelsUnavailable as error:
            print(f"{variant.name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

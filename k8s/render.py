"""`python -m k8s.render`: every overlay as one file under k8s/rendered, for review.

`kubectl kustomize` (or `kustomize build`) does it. A file's first line holds a digest of what it
was made of, so that a stale one is seen where neither is installed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from k8s.documents import load_text

FOLDER = Path(__file__).resolve().parent
RENDERED = FOLDER / "rendered"


def overlays() -> list[Path]:
    """Folders that `kubectl apply -k` takes, one model instance each."""
    return sorted(file.parent for file in (FOLDER / "overlays").glob("*/kustomization.yaml"))


def rendered_file(overlay: Path) -> Path:
    """Where an overlay's rendering is kept."""
    return RENDERED / f"{overlay.name}.yaml"


def kustomize_command() -> list[str] | None:
    """What renders a folder on this machine; None where nothing does."""
    if kubectl := shutil.which("kubectl"):
        return [kubectl, "kustomize"]
    kustomize = shutil.which("kustomize")
    return None if kustomize is None else [kustomize, "build"]


def render(overlay: Path, command: list[str]) -> str:
    """The objects of an overlay as YAML. Raises subprocess.CalledProcessError."""
    done = subprocess.run([*command, str(overlay)], capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\n") + "\n"


def header(overlay: Path) -> str:
    """First line of a rendering: what it was made of."""
    return f"# Written by `python -m k8s.render` from sources {sources_digest(overlay)}\n"


def sources_digest(overlay: Path) -> str:
    """Of every file in the folders that an overlay draws on."""
    digest = hashlib.sha256()
    for folder in source_folders(overlay):
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            name = file.relative_to(FOLDER).as_posix().encode()
            digest.update(name + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def source_folders(folder: Path) -> list[Path]:
    """A kustomization's folder and those that it names, each once, in a fixed order."""
    kustomization = load_text((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    found = {folder}
    for key in ("resources", "components"):
        for entry in kustomization.get(key, ()):
            path = (folder / entry).resolve()
            if path.is_dir():
                found.update(source_folders(path))
    return sorted(found)


def main() -> int:
    """Write all of them."""
    command = kustomize_command()
    if command is None:
        print("neither kubectl nor kustomize is on PATH", file=sys.stderr)
        return 1
    RENDERED.mkdir(exist_ok=True)
    for overlay in overlays():
        text = header(overlay) + render(overlay, command)
        rendered_file(overlay).write_text(text, encoding="utf-8")
        print(rendered_file(overlay).relative_to(FOLDER.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Install the PyTorch of requirements.lock, but never gigabytes of CUDA that nobody asked for.

    python tools/install_torch.py INDEX

Looks before it installs: an installed PyTorch of that version is kept, whoever made it. Otherwise
what pip would take, from INDEX or the usual index, must be a build that asks for no CUDA.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

CUDA = ("nvidia", "cuda", "triton")
LOCK = Path(__file__).parents[1] / "requirements.lock"


def pip(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def is_installed(requirement: str) -> bool:
    try:
        installed = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return Requirement(requirement).specifier.contains(installed)


def brings_cuda(requires: list[str]) -> bool:
    """Whether, on this system, a package with these requirements asks for CUDA."""
    for text in requires:
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name.lower().startswith(CUDA):
            return True
    return False


def main(index: str) -> str | None:
    """Install it if need be; one line that says what is wrong and what to do, or None."""
    requirement = re.search(r"^torch==\S+", LOCK.read_text(encoding="utf-8"), re.MULTILINE)[0]
    if is_installed(requirement):
        return None
    options = ["--extra-index-url", index, requirement]
    look = pip("--dry-run", "--ignore-installed", "--report", "-", *options)
    if look.returncode:
        return f"pip finds no {requirement}: {look.stderr.strip().splitlines()[-1]}"
    (found,) = json.loads(look.stdout)["install"]
    if brings_cuda(found["metadata"].get("requires_dist", [])):
        return (
            f"{index} offers no {requirement} (can it be reached?), and what pip takes instead "
            "brings gigabytes of CUDA. Name an index that has the CPU build (make "
            f"TORCH_INDEX=...), or install either build yourself (.venv/bin/pip install FILE, or "
            f"{requirement}) and call make again."
        )
    done = pip(*options)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

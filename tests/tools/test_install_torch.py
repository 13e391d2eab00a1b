"""PyTorch without CUDA, from folders of wheels that stand for PyTorch's index and the usual one."""

import os
import re
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKED = re.search(r"^torch==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]


def write_wheel(folder: Path, version: str, *requires: str) -> None:
    """An empty package called torch."""
    folder.mkdir(exist_ok=True)
    lines = ["Metadata-Version: 2.1", "Name: torch", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """The Python of a bare environment, as the Makefile makes it."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


@pytest.fixture
def python(environment: Path) -> Path:
    command = [environment, "-m", "pip", "uninstall", "--quiet", "--yes", "torch"]
    subprocess.run(command, check=True, capture_output=True)
    return environment


def install(python: Path, offered: Path) -> subprocess.CompletedProcess:
    """Run the script where pip finds nothing but these wheels."""
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(offered)}
    environment.pop("PYTHONPATH", None)
    script = ROOT / "tools" / "install_torch.py"
    command = [str(python), str(script), "https://cpu.example/whl"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def installed(python: Path) -> str:
    code = (
        "import importlib.metadata as m; print(*(d.version for d in m.distributions(name='torch')))"
    )
    command = [str(python), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_torch_without_cuda(python: Path, tmp_path: Path) -> None:
    usual, both = tmp_path / "usual", tmp_path / "both"
    write_wheel(usual, LOCKED, "filelock", "nvidia-cublas==1; python_version >= '3'")
    write_wheel(both, LOCKED, "filelock", "triton==3")
    write_wheel(both, f"{LOCKED}+cpu", "filelock", "nvidia-cublas; sys_platform == 'amiga'")

    refused = install(python, usual)  # PyTorch's index can't be reached
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "gigabytes of CUDA" in refused.stderr
    assert "TORCH_INDEX" in refused.stderr
    assert installed(python) == ""

    taken = install(python, both)
    assert taken.returncode == 0, taken.stderr
    assert installed(python) == f"{LOCKED}+cpu"

    again = install(python, usual)  # what is there is kept
    assert again.returncode == 0, again.stderr
    assert installed(python) == f"{LOCKED}+cpu"


def test_an_own_build_is_kept_and_another_version_is_not(python: Path, tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    write_wheel(own, f"{LOCKED}+mine", "nvidia-cublas")
    write_wheel(other, "0.1")
    (wheel,) = own.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    assert install(python, other).returncode == 0
    (wheel,) = other.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    missing = install(python, other)
    assert missing.returncode == 1
    assert f"torch=={LOCKED}" in missing.stderr
    assert len(missing.stderr.strip().splitlines()) == 1

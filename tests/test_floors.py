"""The rooms of the package: imports only go down, and the core is light (see CONTRIBUTING.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bitnet_edu

PACKAGE = Path(bitnet_edu.__file__).parent
FLOORS = (
    ("errors", "container", "quantize", "packing", "weights"),
    ("kernels",),
    ("layers", "sampling"),
    ("reference", "model"),
    ("files", "tokenizer", "tokenizer_json", "chat_template"),
    ("guess", "generate", "chat", "load"),
    ("proof", "training", "benchmark", "system", "doctor"),
    ("book", "ui"),
    ("info", "terminal", "cli"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# rooms of one floor that must not know each other
STRANGERS = {("reference", "model"), ("model", "reference")}
TORCH_ROOMS = {"proof", "training"}
HEAVY = {"torch", "transformers", "accelerate", "pandas", "matplotlib", "ipywidgets", "IPython"}


def imports_of(path: Path) -> set[str]:
    """Everything a file imports, anywhere in it: "numpy", "bitnet_edu.files.hf", ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which floor it goes to"
            # `from bitnet_edu import X` means the room X
            joined = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= joined if node.module == "bitnet_edu" else {node.module}
    return names


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "bitnet_edu" and len(parts) > 1 else None


SOURCES = {
    path: path.relative_to(PACKAGE).with_suffix("").parts[0]
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem != "__init__"
}


def test_every_file_has_its_room():
    assert set(SOURCES.values()) == set(FLOOR_OF)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_only_go_down(path):
    room = SOURCES[path]
    for name in imports_of(path):
        target = room_of(name)
        if target in FLOOR_OF:
            assert FLOOR_OF[target] <= FLOOR_OF[room], f"{path.name} imports {name} from above"
            assert (room, target) not in STRANGERS, f"{room} must not know {target}"
        if name.split(".")[0] in ("torch", "transformers"):
            assert room in TORCH_ROOMS, f"{path.name} imports {name}: only proof and training may"


@pytest.mark.parametrize("below", ["files", "tokenizer", "tokenizer_json", "chat_template"])
def test_files_know_no_engine(below):
    for path in (p for p, room in SOURCES.items() if room == below):
        assert not {"bitnet_edu.model", "bitnet_edu.reference"} & imports_of(path), path


def modules_after(*names: str) -> set[str]:
    """All modules that a fresh Python has loaded after importing these."""
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_import_loads_next_to_nothing():
    """What makes an import slow is what it loads; a time would depend on the machine."""
    assert not modules_after("bitnet_edu") & (HEAVY | {"numpy", "numba"})


def test_the_tokenizer_needs_no_compiler():
    assert "numba" not in modules_after("bitnet_edu.tokenizer")


def test_the_core_needs_neither_torch_nor_transformers():
    floors = [room for rooms in FLOORS[:6] for room in rooms]
    core = [
        "bitnet_edu." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for path, room in SOURCES.items()
        if room in (*floors, "cli", "system") and path.stem != "__init__"
    ]
    assert not modules_after(*core) & HEAVY


@pytest.mark.parametrize("name", ["proof.report", "benchmark", "doctor", "cli"])
def test_the_upper_floors_import_torch_only_when_they_work(name):
    assert not modules_after(f"bitnet_edu.{name}") & HEAVY


def test_the_public_surface():
    for name in ("reference", "quantize", "packing", "ChatSession", "load", "BitNetError"):
        assert getattr(bitnet_edu, name) is not None
    for error in ("CheckpointError", "ContextLengthError", "DownloadError", "InputError"):
        assert issubclass(getattr(bitnet_edu, error), bitnet_edu.BitNetError)
    with pytest.raises(AttributeError, match="nonsense"):
        bitnet_edu.nonsense  # noqa: B018
    assert bitnet_edu.load("tiny").config == bitnet_edu.load("tiny").config

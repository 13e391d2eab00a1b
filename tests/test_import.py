"""`import bitnet_edu` is light, and the core stays below its floor."""

import subprocess
import sys

import pytest

import bitnet_edu

HEAVY = ("torch", "transformers", "accelerate", "pandas", "matplotlib", "ipywidgets", "IPython")
CORE = ["errors", "quantize", "packing", "layers", "weights", "reference", "model"]
CORE += ["checkpoint", "gguf_io", "tokenizer", "generate", "chat", "sources"]


def modules_after(code: str) -> set[str]:
    report = "import sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}; {report}"], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_import_loads_next_to_nothing():
    loaded = modules_after("import bitnet_edu")
    assert not loaded & {*HEAVY, "numpy", "numba"}


def test_the_core_needs_neither_torch_nor_transformers():
    loaded = modules_after("import bitnet_edu; " + "; ".join(f"bitnet_edu.{m}" for m in CORE))
    assert {f"bitnet_edu.{m}" for m in CORE} <= loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("module", ["verify", "system", "cli"])
def test_the_upper_floors_import_torch_only_when_they_work(module):
    assert not modules_after(f"import bitnet_edu.{module}") & set(HEAVY)


def test_the_public_surface():
    for name in (*CORE, "verify", "ChatSession", "load", "BitNetError", "CheckpointError"):
        assert getattr(bitnet_edu, name) is not None
    for error in ("CheckpointError", "ContextLengthError", "DownloadError", "InputError"):
        assert issubclass(getattr(bitnet_edu, error), bitnet_edu.BitNetError)
    with pytest.raises(AttributeError, match="nonsense"):
        bitnet_edu.nonsense  # noqa: B018

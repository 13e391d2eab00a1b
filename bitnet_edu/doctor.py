"""Is this machine ready for the book or a workshop? One finding for each thing to look at."""

import os
import platform
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, NamedTuple

import ml_dtypes
import numpy as np

from bitnet_edu.errors import BitNetError

if TYPE_CHECKING:
    from rich.console import Group

GOOD, NOTE, BAD = "good", "note", "bad"
NETWORK_SECONDS = 4
EXTRAS = {
    "verify": ("torch", "transformers", "accelerate"),
    "book": ("jupyterlab", "jupyter-book", "ipywidgets", "matplotlib"),
}


class Finding(NamedTuple):
    """What was looked at. "note" is worth knowing, "bad" keeps the book from working."""

    name: str
    status: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything; what fails unexpectedly is a finding too, never an exception."""
    findings = []
    checks = (python, processor, memory, disk, packages, kernels, tuning, model, microsoft, network)
    for check in checks:
        try:
            findings += check()
        except BitNetError as error:
            findings.append(Finding(check.__name__, BAD, str(error)))
        except Exception as error:
            found = " ".join(f"{type(error).__name__}: {error}".split())
            findings.append(Finding(check.__name__, BAD, found, "this should work: report it"))
    return findings


def python() -> list[Finding]:
    version = sys.version.split()[0]
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Finding("python", GOOD, version)]
    return [Finding("python", BAD, version, "install Python 3.11, 3.12 or 3.13")]


def processor() -> list[Finding]:
    from bitnet_edu.system import machine

    m = machine()
    threads = f"{m.cores} cores, {m.logical_cores} logical; the engine uses {m.threads} threads"
    features = f"{m.kernel} ({', '.join(m.features) or 'no SIMD that matters here'})"
    arm = platform.machine() in ("aarch64", "arm64")
    faster = "with the dot product of newer Arm processors" if arm else "with AVX2 or AVX-512"
    advice = "" if m.kernel != "portable" else f"right, but slower than {faster}"
    return [
        Finding("processor", GOOD, m.cpu),
        Finding("threads", GOOD, threads),
        Finding("kernel", GOOD if not advice else NOTE, features, advice),
    ]


def memory() -> list[Finding]:
    from bitnet_edu.system import memory as now

    m = now()
    found = f"{m.available / 1e9:.1f} GB free of {m.total / 1e9:.1f} GB"
    if m.available < 1e9:
        return [Finding("memory", BAD, found, "close other programs: the book wants 1 GB")]
    if m.available < 2.5e9:
        advice = "enough for the book; Microsoft's 2B4T wants 2.5 GB"
        return [Finding("memory", NOTE, found, advice)]
    return [Finding("memory", GOOD, found)]


def disk() -> list[Finding]:
    from bitnet_edu.system import free_disk

    free = free_disk()
    found = f"{free / 1e9:.1f} GB free"
    if free < 2e8:
        return [Finding("disk", BAD, found, "make room: the book wants 0.2 GB")]
    if free < 3e9:
        return [Finding("disk", NOTE, found, "Microsoft's 2B4T wants 1.2 GB more")]
    return [Finding("disk", GOOD, found)]


def packages() -> list[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return None

    core = ("bitnet-edu", "numpy", "numba", "safetensors", "tokenizers", "huggingface_hub")
    findings = [Finding("packages", GOOD, ", ".join(filter(None, map(installed, core))))]
    for extra, names in EXTRAS.items():
        found = {name: installed(name) for name in names}
        missing = [name for name, text in found.items() if text is None]
        text = ", ".join(text or f"no {name}" for name, text in found.items())
        advice = f"pip install 'bitnet-edu[{extra}]'" if missing else ""
        findings.append(Finding(f"for {extra}", NOTE if missing else GOOD, text, advice))
    return findings


def kernels() -> list[Finding]:
    """Multiply with every kernel that this CPU runs, odd sizes and extreme values included."""
    from bitnet_edu.kernels.matmul import ternary_matmul
    from bitnet_edu.kernels.simd import supported_kernels
    from bitnet_edu.packing import pack_base3_rows, pack_hf

    rng = np.random.default_rng(0)
    wrong = set()
    for kernel in supported_kernels():
        for columns in (4, 68, 260):
            codes = rng.integers(-1, 2, (12, columns), dtype=np.int8)
            q = rng.integers(-128, 128, (5, columns), dtype=np.int8)
            codes[0], q[0] = 1, -128
            exact = q.astype(np.int64) @ codes.astype(np.int64).T
            for packed, rows in ((pack_hf(codes), None), (pack_base3_rows(codes), 12)):
                found = ternary_matmul(packed, q, base3_rows=rows, kernel=kernel)
                if not np.array_equal(found, exact):
                    wrong.add(kernel)
    if wrong:
        found = f"{', '.join(sorted(wrong))}: not what NumPy computes"
        advice = "set BITNET_EDU_KERNEL=portable, and report it"
        return [Finding("kernel test", BAD, found, advice)]
    return [Finding("kernel test", GOOD, f"{', '.join(supported_kernels())}: exact")]


def tuning() -> list[Finding]:
    """How a large model would be worked with here, measured now unless that was done before."""
    from bitnet_edu.kernels.simd import kernel_name
    from bitnet_edu.kernels.threads import default_threads
    from bitnet_edu.kernels.tuning import SAMPLE, tuning_for
    from bitnet_edu.system import memory as now
    from bitnet_edu.weights import TernaryMatrix

    if os.environ.get("BITNET_EDU_TUNING") or now().available > 6 * SAMPLE:
        zeros = TernaryMatrix(np.full((SAMPLE // 2560, 2560), 0b01010101, np.uint8), np.float32(1))
        head = np.ones((SAMPLE // 5120, 2560), ml_dtypes.bfloat16)
        chosen = tuning_for([zeros], head, kernel_name(), default_threads())
        return [Finding("tuning", GOOD, str(chosen), "BITNET_EDU_TUNING overrides it")]
    return [Finding("tuning", NOTE, "not measured", "it takes 1 GB of free memory")]


def model() -> list[Finding]:
    """Load the embedded model, answer, and ask the NumPy reference whether it agrees."""
    import bitnet_edu
    from bitnet_edu.reference import BitNetReference

    start = time.perf_counter()
    tiny = bitnet_edu.load("tiny")
    prompt = tiny.tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}])
    first = tiny.generate(prompt, max_new_tokens=1)
    seconds = time.perf_counter() - start
    reference = BitNetReference(tiny.config, tiny.weights).logits(np.array(prompt))[-1].argmax()
    if first != [reference]:
        found = f"the engine says token {first[0]}, the reference {reference}"
        return [Finding("embedded model", BAD, found, "set BITNET_EDU_KERNEL=portable, report it")]
    found = f"loads and answers in {seconds:.1f} s"
    return [Finding("embedded model", GOOD, found)]


def microsoft() -> list[Finding]:
    from bitnet_edu.files.hub import MODEL, is_cached

    if is_cached():
        return [Finding("Microsoft's model", GOOD, f"{MODEL} is on this disk")]
    advice = "`bitnet-edu download` fetches 1.2 GB; the book goes on without"
    return [Finding("Microsoft's model", NOTE, "not downloaded", advice)]


def network() -> list[Finding]:
    """Ask the hub for its front page, briefly. No network is a note: the book works without."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return [Finding("network", NOTE, "switched off by HF_HUB_OFFLINE")]
    reached: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=NETWORK_SECONDS).close()
            reached.append(True)
        except urllib.error.HTTPError:  # an answer, if not a friendly one
            reached.append(True)
        except (OSError, ValueError):
            pass

    # looking up a name has no time limit of its own
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS)
    if reached:
        return [Finding("network", GOOD, f"{constants.ENDPOINT} answers")]
    advice = "only downloads need it; HF_ENDPOINT names a mirror"
    return [Finding("network", NOTE, f"{constants.ENDPOINT} does not answer", advice)]


def render(findings: list[Finding]) -> "Group":
    """The findings as a table for a terminal (rich)."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colors = {GOOD: "green", NOTE: "yellow", BAD: "bold red"}
    table = Table(box=None, show_header=False)
    for name, status, found, advice in findings:
        text = f"{found}: {advice}" if advice else found
        table.add_row(Text(status, style=colors[status]), name, Text(text))
    bad = sum(finding.status == BAD for finding in findings)
    verdict = "ready" if not bad else f"{bad} thing(s) to repair before the book works"
    return Group(table, Text(verdict, style=colors[BAD if bad else GOOD]))

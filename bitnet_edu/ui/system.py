"""The machine, live: processor, kernel in use and why, memory, versions."""

import html
import threading

import ipywidgets

from bitnet_edu import system
from bitnet_edu.kernels.simd import KERNELS

SECONDS = 2  # between two readings
WHAT = {  # each kernel of `KERNELS`
    "vnni": "64 products of bytes, added in fours, in one instruction (AVX-512 VNNI)",
    "avxvnni": "32 products of bytes, added in fours, in one instruction (AVX-VNNI)",
    "avx2": "32 products of bytes, added in pairs, in one instruction (AVX2)",
    "i8mm": "32 products of bytes, two rows by two tokens, in one instruction (Arm's i8mm)",
    "sdot": "16 products of bytes, added in fours, in one instruction (Arm's dot product)",
    "portable": "what the compiler makes of plain code for this CPU",
}


class SystemPanel(ipywidgets.VBox):
    """What this machine is, and how its memory and temperature are now: `SystemPanel()` in a cell.

    live=False takes one reading only, for a page without a kernel.
    """

    def __init__(self, live: bool = True):
        self._now = ipywidgets.HTML()
        super().__init__([ipywidgets.HTML(_table(machine_rows())), self._now])
        self.add_class("bn-system")
        self._stop = threading.Event()
        self._read()
        if live:
            threading.Thread(target=self._follow, daemon=True).start()

    def close(self) -> None:
        """Stop reading, and remove the panel."""
        self._stop.set()
        super().close()

    def _follow(self) -> None:
        while not self._stop.wait(SECONDS):
            self._read()

    def _read(self) -> None:
        self._now.value = _table(live_rows())


def machine_rows() -> list[tuple[str, str]]:
    """What does not change: names and values."""
    m = system.machine()
    missing = [f"{name} is not installed" for name, version in m.packages.items() if not version]
    versions = [f"{name} {version}" for name, version in m.packages.items() if version]
    return [
        ("Processor", m.cpu),
        ("SIMD features", ", ".join(m.features) or "none of those that matter here"),
        ("Kernel", f"{m.kernel}: {why(m.kernel, m.kernels)}"),
        ("Other kernels", others(m.kernel, m.kernels)),
        ("Cores", f"{m.cores} physical, {m.logical_cores} logical"),
        ("Threads", f"{m.threads} (set BITNET_EDU_THREADS to change it)"),
        ("System", f"{m.system}, Python {m.python}"),
        ("Libraries", ", ".join(versions + missing)),
    ]


def why(kernel: str, supported: tuple[str, ...]) -> str:
    """What a kernel is, and the reason for it, in a few words."""
    if kernel == supported[0]:
        return f"{WHAT[kernel]}; the fastest that this CPU runs"
    return f"{WHAT[kernel]}; chosen by BITNET_EDU_KERNEL, {supported[0]} would be faster"


def others(kernel: str, supported: tuple[str, ...]) -> str:
    """The kernels that are not in use, and whether they would run."""
    return "; ".join(
        f"{name}: {WHAT[name]} ({'runs here too' if name in supported else 'not on this CPU'})"
        for name in KERNELS
        if name != kernel
    )


def live_rows() -> list[tuple[str, str]]:
    """What changes: names and values, now."""
    memory, heat = system.memory(), system.temperature()
    return [
        ("Memory", f"{_gb(memory.total)} in all, {_gb(memory.available)} free"),
        ("This process", f"{_gb(memory.process)} now, {_gb(memory.peak)} at most so far"),
        ("Temperature", f"{heat:.0f} °C" if heat is not None else "no sensor can be read"),
    ]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(
        f'<tr><th scope="row" style="text-align:left;padding:2px 16px 2px 0;min-width:8em;'
        f'vertical-align:top">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<table style="line-height:1.5;margin:0">{cells}</table>'

"""The machine: what limits the speed here, and what a report of a measurement must name."""

import importlib.metadata
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding as llvm
import psutil

from bitnet_edu.container import memory_available, memory_limit
from bitnet_edu.kernels.bits import cpu_features
from bitnet_edu.kernels.simd import kernel_name, supported_kernels
from bitnet_edu.kernels.threads import default_threads

# of all that a CPU can do, what decides which kernel runs
FEATURES = (
    "avx512vnni",
    "avx512bw",
    "avx512vbmi",
    "avxvnni",
    "avx2",
    "fma",
    "f16c",
    "neon",
    "dotprod",
    "i8mm",
    "sve",
)
PACKAGES = (
    "bitnet-edu",
    "numpy",
    "numba",
    "llvmlite",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "torch",
    "transformers",
    "ipywidgets",
)


class Memory(NamedTuple):
    """In bytes."""

    total: int
    available: int
    process: int  # resident, of this process
    peak: int  # the most that this process ever had resident


class Machine(NamedTuple):
    """What does not change while a program runs."""

    system: str
    python: str
    cpu: str
    features: tuple[str, ...]
    cores: int  # physical
    logical_cores: int
    threads: int  # that the engine uses
    kernel: str  # that the engine uses
    kernels: tuple[str, ...]  # that would run, fastest first
    packages: dict[str, str | None]  # version, None where not installed


def machine() -> Machine:
    """Describe this machine and the software on it."""
    return Machine(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=platform.python_version(),
        cpu=cpu_name(),
        features=tuple(name for name in FEATURES if name in cpu_features()),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        logical_cores=psutil.cpu_count() or 1,
        threads=default_threads(),
        kernel=kernel_name(),
        kernels=supported_kernels(),
        packages={name: _version(name) for name in PACKAGES},
    )


def cpu_name() -> str:
    """The processor's own name where the system tells it, else LLVM's name of its kind."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({llvm.get_host_cpu_name()})"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} ({llvm.get_host_cpu_name()})"


def memory() -> Memory:
    """Memory of the machine, or of the container, and of this process, now."""
    process = psutil.Process().memory_info()
    return Memory(memory_limit(), memory_available(), process.rss, peak_memory())


def peak_memory() -> int:
    """The most bytes that this process ever had resident."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    with suppress(OSError, StopIteration):  # Linux; ru_maxrss begins with the peak of the parent
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def free_disk(folder: Path | str = ".") -> int:
    """Bytes that can still be written to the disk that holds `folder`."""
    return shutil.disk_usage(folder).free


def temperature() -> float | None:
    """The hottest sensor of the processor in degrees Celsius; None where no sensor can be read."""
    sensors = getattr(psutil, "sensors_temperatures", dict)()
    readings = [
        r.current for name in ("coretemp", "k10temp", "cpu_thermal") for r in sensors.get(name, [])
    ]
    return max(readings, default=None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

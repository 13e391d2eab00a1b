"""What this process may use of the machine: a container's share of the processors and the memory.

A container sees the whole machine; its limits stand in the files of Linux's control groups, in one
tree (version 2) or in one for each resource (version 1). A group's limit holds for all groups in
it, so the smallest one between this process's group and the root of the tree counts.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_limit() -> float:
    """Processors that the control groups leave to this process; infinity without a limit."""
    limits = [float("inf")]
    for folder in _folders("cpu"):
        # "quota period" in one file, or each in a file of its own
        files = [folder / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
        quota, period, *_ = [*_words(folder / "cpu.max"), *map(_word, files), "", ""]
        if quota.isdigit() and period.isdigit() and int(period):
            limits.append(int(quota) / int(period))
    return min(limits)


def memory_limit() -> int:
    """Bytes of memory that this process can ever have: the machine's, or the container's."""
    return min([psutil.virtual_memory().total, *(limit for _, limit in _memory_limits())])


def memory_available() -> int:
    """Bytes that this process can still take without pushing anything out of memory."""
    rooms = [psutil.virtual_memory().available]
    for folder, limit in _memory_limits():
        used = _word(folder / "memory.current") or _word(folder / "memory.usage_in_bytes")
        statistics = iter(_words(folder / "memory.stat"))
        # file pages that nobody has used for a while are given back when memory is asked for
        cached = dict(zip(statistics, statistics, strict=False))
        idle = cached.get("total_inactive_file") or cached.get("inactive_file") or "0"
        if used.isdigit():
            rooms.append(max(0, limit - int(used) + int(idle)))
    return min(rooms)


def _memory_limits() -> Iterator[tuple[Path, int]]:
    for folder in _folders("memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _word(folder / name)
            if limit.isdigit():  # "max" is none, as is version 1's number near 2**63
                yield folder, int(limit)


def _folders(controller: str) -> Iterator[Path]:
    """The group of this process and those around it, in the tree that knows `controller`."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, names, path, *_ = [*line.split(":", 2), "", ""]
        if names and controller not in names.split(","):
            continue
        for root in (GROUPS / controller,) if names else (GROUPS, GROUPS / "unified"):
            folder = root.joinpath(*(part for part in Path(path).parts if part not in ("/", "..")))
            yield folder
            # inside a container the path may be the host's, and only the root be there
            yield from (parent for parent in folder.parents if parent.is_relative_to(root))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []


def _word(file: Path) -> str:
    return (_words(file) or [""])[0]

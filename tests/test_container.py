"""Limits of control groups, read from trees of files like those of the kernel."""

import psutil
import pytest

from bitnet_edu import container
from bitnet_edu.kernels import threads


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A function that lays files under a false /sys/fs/cgroup and tells the process its group."""
    monkeypatch.setattr(container, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(container, "MEMBERSHIP", tmp_path / "self")

    def lay(membership: str, **files: str) -> None:
        (tmp_path / "self").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return lay


V2, V1 = "0::/a/b\n", "12:cpu,cpuacct:/docker/x\n7:memory:/docker/x\n0::/docker/x\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (V2, {"cpu.max": "max 100000"}, float("inf")),
        (V2, {"a/b/cpu.max": "150000 100000"}, 1.5),
        (V2, {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 0.5),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/../../b\n", {"b/cpu.max": "200000 100000"}, 2),
        (V1, {"cpu/docker/x/cpu.cfs_quota_us": "50", "cpu/docker/x/cpu.cfs_period_us": "100"}, 0.5),
        (V1, {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        (V2, {"a/cpu.max": "", "cpu.max": "nonsense"}, float("inf")),
        (V2, {"a/cpu.max": "100000 0"}, float("inf")),
        ("garbage\n", {"cpu.max": "max"}, float("inf")),
    ],
)  # fmt: skip
def test_the_smallest_share_of_the_processors_counts(tree, membership, files, expected):
    tree(membership, **files)
    assert container.cpu_limit() == expected


def test_threads_follow_the_share(tree, monkeypatch):
    monkeypatch.delenv("BITNET_EDU_THREADS", raising=False)
    tree(V1, **{"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"})
    assert threads.default_threads() == 1
    tree(V2, **{"a/cpu.max": "90000 100000"})
    assert threads.default_threads() == 1


@pytest.mark.parametrize(
    ("membership", "limit", "used", "stat", "expected"),
    [
        (V2, "a/memory.max", "a/memory.current", "inactive_file 1000", 4000),
        (V2, "a/b/memory.high", "a/b/memory.current", "anon 5\ninactive_file 0", 3000),
        (V1, "memory/docker/x/memory.limit_in_bytes", "memory/docker/x/memory.usage_in_bytes",
         "inactive_file 1\ntotal_inactive_file 500", 3500),
    ],
)  # fmt: skip
def test_memory_is_what_the_container_leaves(tree, membership, limit, used, stat, expected):
    folder = limit.rpartition("/")[0]
    tree(membership, **{limit: "5000", used: "2000", f"{folder}/memory.stat": stat})
    assert container.memory_limit() == 5000
    assert container.memory_available() == expected


def test_without_limits_the_machine_counts(tree):
    tree(V2, **{"memory.max": "max"})
    assert container.memory_limit() == psutil.virtual_memory().total
    tree(V1, **{"memory/memory.limit_in_bytes": "9223372036854771712"})
    assert container.memory_limit() == psutil.virtual_memory().total
    container.MEMBERSHIP.unlink()
    assert 0 < container.memory_available() <= container.memory_limit()

"""The description of the machine holds together and agrees with the system's own words."""

import os

import numpy as np

from bitnet_edu import system


def test_machine_names_a_kernel_that_runs():
    m = system.machine()
    assert m.kernel in m.kernels
    assert m.kernels[-1] == "portable"
    assert 1 <= m.cores <= m.logical_cores <= os.cpu_count()
    assert m.packages["numpy"] == np.__version__
    assert m.cpu


def test_a_package_that_is_not_there_has_no_version(monkeypatch):
    monkeypatch.setattr(system, "PACKAGES", ("no-such-package",))
    assert system.machine().packages == {"no-such-package": None}


def test_memory_sees_what_is_allocated():
    before = system.memory()
    block = np.ones(50_000_000, np.uint8)
    after = system.memory()
    assert after.process - before.process > block.nbytes // 2
    assert after.peak >= after.process // 2
    assert 0 < after.available < after.total
    assert system.free_disk() > 0
    assert system.temperature() is None or 0 < system.temperature() < 150

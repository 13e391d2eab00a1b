"""The system panel tells of this machine, and follows it."""

import time

import pytest

from bitnet_edu import system
from bitnet_edu.kernels.simd import KERNELS, supported_kernels
from bitnet_edu.ui.system import WHAT, SystemPanel, machine_rows, others, why


def test_panel_names_kernel_cores_and_memory():
    panel = SystemPanel(live=False)
    fixed, now = (child.value for child in panel.children)
    assert f"{system.machine().kernel}:" in fixed
    assert f"{system.machine().cores} physical" in fixed
    assert "GB free" in now


def test_panel_follows_until_it_is_closed(monkeypatch):
    monkeypatch.setattr("bitnet_edu.ui.system.SECONDS", 0.01)
    readings = []
    monkeypatch.setattr("bitnet_edu.ui.system.live_rows", lambda: readings.append(1) or [])
    panel = SystemPanel()
    deadline = time.monotonic() + 10
    while len(readings) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(readings) >= 3
    panel.close()
    time.sleep(0.1)
    seen = len(readings)
    time.sleep(0.1)
    assert len(readings) == seen


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("vnni", "AVX-512 VNNI"),
        ("avxvnni", "AVX-VNNI"),
        ("avx2", "AVX2"),
        ("i8mm", "Arm's i8mm"),
        ("sdot", "Arm's dot product"),
        ("portable", "plain code"),
    ],
)
def test_each_kernel_is_called_what_it_is(kernel, words):
    for said in (why(kernel, (kernel,)), why(kernel, ("faster", kernel))):
        assert [name for name, what in WHAT.items() if what in said] == [kernel]
        assert words in said
    assert words in others("another", ())
    assert words not in others(kernel, ())


def test_every_kernel_has_its_words():
    assert list(WHAT) == list(KERNELS)


@pytest.mark.parametrize("kernel", supported_kernels())
def test_panel_tells_the_kernel_in_use_from_the_others(monkeypatch, kernel):
    monkeypatch.setenv("BITNET_EDU_KERNEL", kernel)
    rows = dict(machine_rows())
    best = supported_kernels()[0]
    reason = "fastest" if kernel == best else f"chosen by BITNET_EDU_KERNEL, {best} would"
    assert rows["Kernel"].startswith(f"{kernel}: {WHAT[kernel]}; ")
    assert reason in rows["Kernel"]
    for name in KERNELS:
        runs = "runs here too" if name in supported_kernels() else "not on this CPU"
        assert (f"{WHAT[name]} ({runs})" in rows["Other kernels"]) == (name != kernel)

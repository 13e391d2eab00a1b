"""The system panel tells of this machine, and follows it."""

import time

import pytest

from bitnet_edu import system
from bitnet_edu.ui.system import SystemPanel, why


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
    ("kernel", "supported", "words"),
    [
        ("vnni", ("vnni", "avx2", "portable"), "AVX-512 VNNI"),
        ("avx2", ("vnni", "avx2", "portable"), "BITNET_EDU_KERNEL"),
        ("avx2", ("avx2", "portable"), "no AVX-512"),
        ("portable", ("portable",), "plain code"),
    ],
)
def test_reason_for_the_kernel(kernel, supported, words):
    assert words in why(kernel, supported)

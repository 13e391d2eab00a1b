"""What the compiler is told about this CPU."""

import platform
import sys

import pytest

from bitnet_edu.kernels import bits


class Linux:
    """A C library whose getauxval tells these capabilities."""

    def __init__(self, capabilities):
        self.getauxval = lambda kind: capabilities if kind == 16 else 0


class MacOS:
    """A C library whose sysctlbyname writes `value`, or fails."""

    def __init__(self, value):
        self.value = value

    def sysctlbyname(self, name, found, size, new, length):
        assert name == b"hw.optional.arm.FEAT_DotProd"
        if self.value is None:
            return -1
        found._obj.value = self.value
        return 0


@pytest.mark.parametrize(
    ("machine", "system", "library", "expected"),
    [
        ("x86_64", "linux", Linux(1 << 20), False),
        ("aarch64", "linux", Linux(1 << 20), True),
        ("aarch64", "linux", Linux(1 << 19 | 1 << 21), False),
        ("arm64", "darwin", MacOS(1), True),
        ("arm64", "darwin", MacOS(0), False),
        ("arm64", "darwin", MacOS(None), False),
        ("arm64", "win32", None, False),
    ],
)
def test_arms_dot_product_is_asked_of_the_system(monkeypatch, machine, system, library, expected):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(bits.ctypes, "CDLL", lambda name: library)
    assert bits._has_dot_product() is expected

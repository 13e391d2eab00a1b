"""What the compiler is told about this CPU."""

import platform
import sys

import pytest

from bitnet_edu.kernels import bits


class Linux:
    """A C library whose getauxval tells these capabilities, the older and the newer ones."""

    def __init__(self, old, new=0):
        self.getauxval = lambda kind: {16: old, 26: new}.get(kind, 0)


class MacOS:
    """A C library whose sysctlbyname knows these names, or fails."""

    def __init__(self, **known):
        self.known = {f"hw.optional.arm.{name}".encode(): value for name, value in known.items()}

    def sysctlbyname(self, name, found, size, new, length):
        if name not in self.known:
            return -1
        found._obj.value = self.known[name]
        return 0


BOTH = ["dotprod", "i8mm"]


@pytest.mark.parametrize(
    ("machine", "system", "library", "expected"),
    [
        ("x86_64", "linux", Linux(1 << 20, 1 << 13), []),
        ("aarch64", "linux", Linux(1 << 20), ["dotprod"]),
        ("aarch64", "linux", Linux(1 << 20, 1 << 13), BOTH),
        ("aarch64", "linux", Linux(1 << 19 | 1 << 21, 1 << 12 | 1 << 14), []),
        ("arm64", "darwin", MacOS(FEAT_DotProd=1, FEAT_I8MM=1), BOTH),
        ("arm64", "darwin", MacOS(FEAT_DotProd=1, FEAT_I8MM=0), ["dotprod"]),
        ("arm64", "darwin", MacOS(FEAT_DotProd=1), ["dotprod"]),
        ("arm64", "darwin", MacOS(FEAT_DotProd=0), []),
        ("arm64", "darwin", MacOS(), []),
        ("arm64", "win32", None, []),
    ],
)
def test_an_arms_instructions_are_asked_of_the_system(
    monkeypatch, machine, system, library, expected
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(bits.ctypes, "CDLL", lambda name: library)
    assert bits._arm_features() == expected

"""The oldest versions that pyproject.toml allows, as constraints for pip."""

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("lowest", ROOT / "tools" / "lowest.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_lower_bounds_become_pins():
    asked = ["numpy>=2.1", "a_b[c]>=1.0,<2", "d<3,>= 0.5; python_version < '4'"]
    assert tool.lowest(asked) == ["numpy==2.1", "a_b==1.0", "d==0.5"]
    with pytest.raises(ValueError, match="without a lower bound"):
        tool.lowest(["numpy"])


def test_every_dependency_of_the_core_has_its_oldest_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [Requirement(text) for text in project["dependencies"]]
    pins = [Requirement(text) for text in tool.lowest(project["dependencies"])]
    assert [pin.name for pin in pins] == [requirement.name for requirement in asked]
    for pin, requirement in zip(pins, asked, strict=True):
        (only,) = pin.specifier
        assert requirement.specifier.contains(only.version)

"""Print the oldest versions of the core's dependencies that pyproject.toml allows, for pip -c."""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest(dependencies: list[str]) -> list[str]:
    """["numpy>=2.1"] -> ["numpy==2.1"]; ValueError for one that states no lower bound."""
    pins = []
    for dependency in dependencies:
        name, bound = re.match(r"([\w.-]+)(?:\[.*\])?(?:[^;]*?>=\s*([\w.]+))?", dependency).groups()
        if bound is None:
            raise ValueError(
                f"{dependency}: without a lower bound nobody can test the oldest version"
            )
        pins.append(f"{name}=={bound}")
    return pins


if __name__ == "__main__":
    print(
        *lowest(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]),
        sep="\n",
    )

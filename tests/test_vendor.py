"""Every file of other projects that the book serves lies beside its licence."""

import importlib.util
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VENDOR = ROOT / "book" / "_static" / "vendor"
FONTS = "mathjax/output/chtml/fonts/woff-v2"
# what is served -> its licence, and words that must stand in it
LICENCES = {
    "anywidget/index.js": ("anywidget/LICENSE", ["MIT License", "Trevor Manz"]),
    "html-manager/embed-amd.js": (
        "html-manager/embed-amd.js.LICENSE.txt",
        ["jQuery UI Slider", "\nbackbone\n", "\nlodash\n", "\nsanitize-html\n", "\nd3-format\n"],
    ),
    "html-manager/*.woff2": ("html-manager/fontawesome.LICENSE.txt", ["Font Awesome", "SIL OFL"]),
    "mathjax/tex-chtml-full.js": ("mathjax/LICENSE", ["Apache License", "Version 2.0"]),
    f"{FONTS}/*.woff": (f"{FONTS}/LICENSE.txt", ["SIL OPEN FONT LICENSE", "Design Science"]),
    "require.js": ("require.js.LICENSE.txt", ["RequireJS", "Permission is hereby granted"]),
}
SERVED = sorted(
    path.relative_to(VENDOR).as_posix()
    for path in VENDOR.rglob("*")
    if path.is_file() and "LICENSE" not in path.name
)


def test_something_is_served():
    assert len(SERVED) > len(LICENCES)


@pytest.mark.parametrize("name", SERVED)
def test_a_served_file_has_its_licence(name):
    (pattern,) = [pattern for pattern in LICENCES if fnmatch(name, pattern)]
    licence, words = LICENCES[pattern]
    text = (VENDOR / licence).read_text(encoding="utf-8")
    assert [word for word in words if word not in text] == []


def test_jupyter_has_its_own_licence_beside_its_bundle():
    assert "Project Jupyter" in (VENDOR / "html-manager" / "LICENSE").read_text(encoding="utf-8")


def test_the_theme_serves_icons_of_the_version_whose_licence_we_add():
    theme = Path(importlib.util.find_spec("pydata_sphinx_theme").origin).parent
    static = theme / "theme" / "pydata_sphinx_theme" / "static"
    assert list(static.glob("vendor/fontawesome/webfonts/*.woff2"))  # served beside our licence
    banner = (static / "scripts" / "fontawesome.js.LICENSE.txt").read_text(encoding="utf-8")
    version = re.search(r"Font Awesome Free ([\d.]+)", banner)[1]
    assert f"@fortawesome/fontawesome-free {version}\n" in (ROOT / "tools/vendor.sh").read_text()
    licence = (VENDOR / "fontawesome" / "LICENSE.txt").read_text(encoding="utf-8")
    assert "Fonticons" in licence
    assert "SIL OPEN FONT LICENSE" in licence

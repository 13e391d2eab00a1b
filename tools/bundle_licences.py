"""The licences of all that is inside a bundle of the html-manager, from its source map.

Usage: bundle_licences.py SOURCE_MAP BANNERS; prints the banners that the bundle's maker collected
and the licence of every package that the map names. The texts are those that JupyterLab and
jupyterlab_widgets ship for the same packages; Jupyter's own have the project's LICENSE.
"""

import json
import re
import sys
from pathlib import Path

JUPYTER = ("@jupyter", "@lumino/")
IN_BANNERS = {"jquery-ui"}
SHIPPED = (
    "share/jupyter/lab/static/third-party-licenses.json",
    "share/jupyter/labextensions/@jupyter-widgets/jupyterlab-manager/static/third-party-licenses.json",
)


def packages(source_map: Path) -> list[str]:
    """Names of the npm packages in a bundle."""
    sources = json.loads(source_map.read_text(encoding="utf-8"))["sources"]
    found = (re.findall(r"node_modules/((?:@[^/]+/)?[^/]+)", source) for source in sources)
    return sorted({names[-1] for names in found if names})


def shipped_texts() -> dict[str, str]:
    """Package name -> licence text."""
    lists = (json.loads((Path(sys.prefix) / path).read_text(encoding="utf-8")) for path in SHIPPED)
    return {p["name"]: p["extractedText"] for each in lists for p in each["packages"]}


def main(source_map: str, banners: str) -> None:
    texts = shipped_texts()
    print(Path(banners).read_text(encoding="utf-8").strip())
    for name in packages(Path(source_map)):
        if name not in IN_BANNERS and not name.startswith(JUPYTER):
            print(f"\n{'-' * 79}\n{name}\n\n{texts[name].strip()}")


if __name__ == "__main__":
    main(*sys.argv[1:])

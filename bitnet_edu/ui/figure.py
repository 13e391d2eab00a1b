"""Figures that a reader can touch: one ES module each, shown with or without a kernel.

A module in ui/static exports `render({model, el})`. In an app it lives in an anywidget; in a page
without a kernel `static_figure` gives it a stand-in for the model that only answers `get`.
"""

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import anywidget
import traitlets
from IPython.display import HTML

STATIC = Path(__file__).parent / "static"

PAGE = """
<style>{css}</style>
<div id="{name}"></div>
<script type="module">
const source = {source};
const state = {state};
const url = URL.createObjectURL(new Blob([source], {{type: "text/javascript"}}));
const figure = (await import(url)).default;
figure.render({{model: {{get: (key) => state[key]}}, el: document.getElementById("{name}")}});
</script>
"""


def static_figure(module: str, state: dict[str, Any]) -> HTML:
    """The figure ui/static/<module>.js with its state inside: works in any page, kernel or not."""
    return HTML(
        PAGE.format(
            css=(STATIC / f"{module}.css").read_text(encoding="utf-8"),
            name=f"bn-{uuid4().hex[:12]}",  # two copies on one page must not collide
            source=_script_json((STATIC / f"{module}.js").read_text(encoding="utf-8")),
            state=_script_json(state),
        )
    )


def live_figure(module: str, state: dict[str, Any]) -> anywidget.AnyWidget:
    """The same figure as a widget, to stand among others."""
    traits = {key: traitlets.Any(value).tag(sync=True) for key, value in state.items()}
    files = {"_esm": STATIC / f"{module}.js", "_css": STATIC / f"{module}.css"}
    return type("Figure", (anywidget.AnyWidget,), files | traits)()


def _script_json(value: Any) -> str:
    # "</script>" inside a string would end the script
    return json.dumps(value).replace("</", "<\\/")

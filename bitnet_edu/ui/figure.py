"""Figures that a reader can touch: one ES module each, shown with or without a kernel.

A module in ui/static exports `render({model, el})`. In an app it lives in an anywidget; in a page
without a kernel `static_figure` gives it a stand-in for the model that only answers `get`. What
the modules share, dom.js, is put into each: neither host could find a second file.
"""

import json
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import anywidget
import traitlets
from IPython.display import HTML

STATIC = Path(__file__).parent / "static"
IMPORT = re.compile(r'^import \{.*\} from "\./dom\.js";$', re.MULTILINE)

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


def module_source(module: str) -> str:
    """The ES module ui/static/<module>.js with dom.js inside."""
    shared = _read("dom.js").replace("export function", "function")
    return IMPORT.sub(lambda _: shared, _read(f"{module}.js"))


def style(module: str) -> str:
    """Its style sheet."""
    return _read(f"{module}.css")


def static_figure(module: str, state: dict[str, Any]) -> HTML:
    """The figure ui/static/<module>.js with its state inside: works in any page, kernel or not."""
    return HTML(
        PAGE.format(
            css=style(module),
            name=f"bn-{uuid4().hex[:12]}",  # two copies on one page must not collide
            source=_script_json(module_source(module)),
            state=_script_json(state),
        )
    )


def live_figure(module: str, state: dict[str, Any]) -> anywidget.AnyWidget:
    """The same figure as a widget, to stand among others."""
    traits = {key: traitlets.Any(value).tag(sync=True) for key, value in state.items()}
    files = {"_esm": module_source(module), "_css": style(module)}
    # anywidget keeps one style sheet for each name of a class
    return type(f"{module.title()}Figure", (anywidget.AnyWidget,), files | traits)()


def _read(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _script_json(value: Any) -> str:
    # "</script>" inside a string would end the script
    return json.dumps(value).replace("</", "<\\/")

"""Figures are whole modules, and no two of them share a class or a piece of code."""

import json
import re
from collections import Counter

import pytest

from bitnet_edu.ui.chat import ChatPanel
from bitnet_edu.ui.figure import STATIC, live_figure, module_source, static_figure

MODULES = sorted(path.stem for path in STATIC.glob("*.js") if path.stem != "dom")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_needs_no_second_file(module):
    source = module_source(module)
    assert "function element(" in source
    assert not re.search(r"\bimport\b.*\bfrom\b|\bimport\(", source)
    assert re.findall(r"^export .*", source, re.MULTILINE) == ["export default { render };"]
    page = static_figure(module, {}).data
    assert json.loads(re.search(r"^const source = (.*);$", page, re.MULTILINE)[1]) == source
    assert "</script>" not in page.removesuffix("</script>\n")


def test_figures_of_one_page_have_their_own_classes():
    figures = [live_figure(module, {}) for module in MODULES]
    names = {figure._anywidget_id for figure in figures}
    assert len(names) == len(MODULES)
    assert ChatPanel("tiny")._anywidget_id not in names
    assert live_figure(MODULES[0], {})._anywidget_id in names


def test_no_function_of_the_page_side_is_written_twice():
    everywhere = Counter()
    for path in STATIC.glob("*.js"):
        everywhere.update(
            re.findall(r"^(?:export )?function (\w+)", path.read_text(), re.MULTILINE)
        )
    # `render` is each module's entrance; the two drawings are of different things
    assert {name for name, count in everywhere.items() if count > 1} == {"render"}

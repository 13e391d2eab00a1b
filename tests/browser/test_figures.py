"""Figures in a page of their own: without a kernel, over http and from a file."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

import bitnet_edu
from bitnet_edu.ui.architecture import architecture_figure
from bitnet_edu.ui.paper import paper_tables


@pytest.mark.parametrize("by", ["http", "file"])
def test_figures_and_copies_of_them_live_on_one_page(
    browser: Browser, folder_url: str, tmp_path: Path, by: str
):
    architecture = architecture_figure(bitnet_edu.load("tiny"))
    figures = [architecture, paper_tables(), architecture_figure(bitnet_edu.load("tiny"))]
    path = tmp_path / "page.html"
    body = "".join(figure.data for figure in figures)
    path.write_text(f'<!doctype html><meta charset="utf-8"><body>{body}', encoding="utf-8")
    page, errors = browser.new_page(viewport={"width": 390, "height": 800}), []
    page.set_default_timeout(300_000)  # to end a hang, not to judge a busy machine
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri() if by == "file" else f"{folder_url}/{path.name}")
    expect(page.locator(".bn-arch")).to_have_count(2)
    expect(page.locator(".bn-paper")).to_have_count(1)
    page.get_by_role("button", name="BitLinear down: explain").last.click()
    expect(page.locator(".bn-details pre")).to_have_count(1)  # in the copy that was clicked
    assert width_of_border(page, ".bn-arch") == width_of_border(page, ".bn-paper") == "1px"
    assert page.evaluate("document.body.scrollWidth <= 390")
    assert errors == []
    page.close()


def width_of_border(page, figure: str) -> str:
    """Of a picker, which each figure's own style sheet draws with one pixel."""
    style = "node => getComputedStyle(node).borderTopWidth + getComputedStyle(node).borderTopColor"
    return page.locator(f"{figure} select").first.evaluate(style).split("rgb")[0]

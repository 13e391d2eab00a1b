"""Every page of the built book, opened in Chromium: it loads, reads and needs no other host."""

import re
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

PATIENCE = 300_000  # milliseconds: to end a hang, not to judge a busy machine
BOOK = Path(__file__).parents[2] / "_build" / "html"
PAGES = sorted(
    str(page.relative_to(BOOK))
    for page in BOOK.rglob("*.html")
    if "_static" not in page.parts and page != BOOK / "index.html"  # that one only redirects
)
DESKTOP, PHONE = 1280, 390

# The theme's own: it adds one inline script twice. Nothing depends on it.
HARMLESS = ("Identifier 'THEBE_JS_URL' has already been declared",)

# axe looks at the text, not at the theme's shell. The bibliography's roles are docutils' own;
# ipywidgets gives the handle of a slider and the buttons of Play no name, whatever one sets.
READ = {
    "include": [["article"]],
    "exclude": [[".citation-list"], [".noUi-handle"], [".widget-play"]],
}
RULES = {"runOnly": ["wcag2a", "wcag2aa"], "resultTypes": ["violations"], "preload": False}

# What a reader must never see, and where a page says so.
FAULTS = {
    "stderr of a cell": ".cell_output .stderr, .output.stderr",
    "traceback": ".cell_output .traceback, .output.traceback",
    "Sphinx system message": ".system-message, .problematic",
    "math that MathJax could not read": "mjx-merror, [data-mjx-error], mjx-mtext[style*='red']",
    "math that was not typeset": ".math:not(:has(mjx-container))",
    "widget that was not drawn": ".jupyter-widgets-error-widget",
}
BROKEN_IMAGES = """() => [...document.images]
    .filter(image => image.complete && image.naturalWidth === 0).map(image => image.src)"""
# A figure without a text of its own gets its file's name as alt text.
NO_ALT = r"""() => [...document.querySelectorAll('article img')]
    .filter(image => !image.alt.trim() || /\.(png|svg|jpe?g|gif|webp)$/.test(image.alt))
    .map(image => image.src.slice(0, 120))"""
# Elements that stick out of the screen and cannot be scrolled inside their own box.
STICKING_OUT = """() => [...document.querySelectorAll('article *')].filter(element => {
    if (element.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let box = element; box && box.tagName !== 'ARTICLE'; box = box.parentElement)
        if (getComputedStyle(box).overflowX !== 'visible') return false;
    return !element.closest('mjx-assistive-mml, .visually-hidden, .sr-only');
}).map(element => element.outerHTML.slice(0, 160))"""
WIDGETS_READY = """() => {
    const wanted = document.querySelectorAll(
        'article script[type="application/vnd.jupyter.widget-view+json"]').length;
    return document.querySelectorAll('article .widget-subarea').length >= wanted;
}"""


def open_page(browser: Browser, url: str, width: int) -> tuple[Page, list[str]]:
    """Open a page with a fresh profile wait until it is drawn, and note its complaints."""
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    page.set_default_timeout(PATIENCE)
    complaints: list[str] = []
    host = re.match(r"https?://[^/]+", url)[0]

    def local_only(route):
        if route.request.url.startswith((host, "data:", "blob:")):
            route.continue_()
        else:
            complaints.append(f"asks another host: {route.request.url}")
            route.abort()

    page.route("**/*", local_only)
    page.on(
        "pageerror",
        lambda error: (
            complaints.append(f"page error: {error}") if not str(error).endswith(HARMLESS) else None
        ),
    )
    page.on(
        "console",
        lambda message: (
            complaints.append(f"console: {message.text}") if message.type == "error" else None
        ),
    )
    page.on(
        "response",
        lambda answer: (
            complaints.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None
        ),
    )
    page.goto(url, wait_until="load")
    page.evaluate("() => window.MathJax?.startup?.promise")
    page.wait_for_function(WIDGETS_READY, timeout=PATIENCE)
    return page, complaints


def test_the_book_is_built() -> None:
    assert PAGES, "There is no built book in _build/html: run `make book` first."


@pytest.mark.browser
def test_the_front_door_leads_to_the_introduction(browser: Browser, book_url: str) -> None:
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(book_url)
    page.wait_for_url("**/book/intro.html")
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_page(name: str, browser: Browser, book_url: str) -> None:
    page, complaints = open_page(browser, f"{book_url}/{name}", DESKTOP)
    for what, selector in FAULTS.items():
        complaints += [f"{what}: {text[:200]}" for text in page.locator(selector).all_inner_texts()]
    complaints += [f"broken image: {source}" for source in page.evaluate(BROKEN_IMAGES)]
    complaints += [f"image without alt text: {source}" for source in page.evaluate(NO_ALT)]
    if page.locator("article").count():
        accessibility = Axe().run(page, context=READ, options=RULES)
        if accessibility.violations_count:
            complaints.append(accessibility.generate_report())
    page.context.close()
    assert not complaints, "\n".join(complaints)


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_phone(name: str, browser: Browser, book_url: str) -> None:
    page, complaints = open_page(browser, f"{book_url}/{name}", PHONE)
    width = page.evaluate("() => document.documentElement.scrollWidth")
    if width > PHONE:
        complaints.append(f"the page is {width} pixels wide on a screen of {PHONE}")
    complaints += [f"sticks out: {element}" for element in page.evaluate(STICKING_OUT)]
    page.context.close()
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("name", PAGES)
def test_internal_links_lead_somewhere(name: str) -> None:
    ids = {}
    dead = []
    html = (BOOK / name).read_text(encoding="utf-8")
    for href in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', html):
        if re.match(r"[a-z]+:", href):
            continue
        target, anchor = urldefrag(urljoin(name, href.replace("&amp;", "&")))
        file = BOOK / unquote(target or name)
        if not file.exists():
            dead.append(href)
        elif anchor and file.suffix == ".html":
            if file not in ids:
                ids[file] = set(re.findall(r'\bid="([^"]+)"', file.read_text(encoding="utf-8")))
            if unquote(anchor) not in ids[file]:
                dead.append(href)
    assert not dead, f"links that lead nowhere: {dead}"

"""The site: it builds without a warning, links to what is there, needs no network, and is read in a browser."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from test_doctests import public_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of the built site, `jaxbn` as in its address."""
    folder = tmp_path_factory.mktemp("site") / "jaxbn"
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Found(HTMLParser):
    """The links, loaded files and anchors of a page."""

    def __init__(self, page):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        elif tag in ("script", "img", "iframe", "source") and attrs.get("src"):
            self.loads.append(attrs["src"])
        elif tag == "link" and attrs.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(attrs["href"])


@pytest.fixture(scope="module")
def pages(site):
    """Return each page, by its address on the site."""
    return {f"/{page.relative_to(site.parent)}": Found(page) for page in site.glob("**/*.html")}


def test_no_dead_link(site, pages):
    dead = []
    for address, page in pages.items():
        for link in page.links + page.loads:
            target, anchor = urldefrag(urljoin(address, link))
            if target.startswith(("http:", "https:", "mailto:", "data:")):
                continue
            target += "index.html" if target.endswith("/") else ""
            missing = anchor and target in pages and unquote(anchor) not in pages[target].anchors
            if missing or not (site.parent / unquote(target).lstrip("/")).is_file():
                dead.append((address, link))
    assert dead == []


def test_nothing_is_loaded_from_elsewhere(pages):
    assert not [load for page in pages.values() for load in page.loads if "//" in load]


@pytest.mark.parametrize("module", ["", "linen", "nnx", "convert"])
def test_reference_has_every_public_name(pages, module):
    anchors = set().union(*(page.anchors for page in pages.values()))
    if not module:
        names = set(public_names())
    else:
        package = __import__(f"jaxbn.{module}", fromlist=[module])
        names = {f"jaxbn.{module}.{name}" for name in vars(package) if not name.startswith("_") and name[:5] != "jaxbn"}
    assert names
    assert sorted(names - anchors) == []


def test_every_example_has_a_page(pages):
    for script in (ROOT / "examples").glob("*.py"):
        shown = f"/jaxbn/examples/{script.stem}/index.html" in pages
        assert shown or "__main__" not in script.read_text()


@pytest.fixture(scope="module")
def browser():
    """Return headless Chromium; where there is none, skip, or fail if `REQUIRE_BROWSER` is set."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        say = pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip
        say(f"the site is read in a browser, and none of {', '.join(names)} is on the path")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=flags) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def address(site):
    """Return the address at which the site is served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(site.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# The least contrast of a text with its background, and the width by which the page is wider than the window.
CONTRAST = """() => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = c => { context.clearRect(0, 0, 1, 1); context.fillStyle = c; context.fillRect(0, 0, 1, 1);
                      return [...context.getImageData(0, 0, 1, 1).data].map(v => v / 255); };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const light = c => c.map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const background = e => { const c = rgba(getComputedStyle(e).backgroundColor);
                        return over(c, c[3] < 1 && e.parentElement ? background(e.parentElement) : [1, 1, 1]); };
  let least = [99, ''];
  for (const e of document.querySelectorAll('article :is(p, li, td, th, h1, h2, h3, p > code, p > a)')) {
    if (!e.textContent.trim() || !e.offsetParent) continue;
    const ground = background(e), [a, b] = [light(ground), light(over(rgba(getComputedStyle(e).color), ground))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least[0]) least = [ratio, e.outerHTML.slice(0, 120)];
  }
  return least;
}"""
OVERFLOW = "() => document.documentElement.scrollWidth - window.innerWidth"
GROUND = "() => getComputedStyle(document.body).backgroundColor"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_readable_in_a_browser(scheme, browser, address, pages):
    """It loads without an error, fits into 390 pixels, and its text stands out."""
    wrong, tab = [], browser.new_page(color_scheme=scheme)
    tab.on("pageerror", lambda error: wrong.append((tab.url, str(error))))
    tab.on("console", lambda line: line.type == "error" and wrong.append((tab.url, line.text)))
    # What is still loading when the page is left is aborted, the script of the search most often: that is no fault.
    aborted = "net::ERR_ABORTED"
    tab.on("requestfailed", lambda r: r.failure == aborted or wrong.append((tab.url, f"{r.failure}: {r.url}")))
    tab.on("response", lambda reply: reply.status >= 400 and wrong.append((tab.url, f"{reply.status} {reply.url}")))
    tab.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or wrong.append((tab.url, r.url)))
    for page in pages:
        tab.set_viewport_size({"width": 1280, "height": 800})
        tab.goto(address + page, wait_until="load")
        assert tab.title()
        assert tab.evaluate(GROUND) == {"light": "rgb(255, 255, 255)", "dark": "rgb(30, 33, 41)"}[scheme]
        for width in (1280, 390):
            tab.set_viewport_size({"width": width, "height": 800})
            if (excess := tab.evaluate(OVERFLOW)) > 0:
                wrong.append((page, f"{excess} px wider than {width} px"))
        least, where = tab.evaluate(CONTRAST)
        if least < 4.5:
            wrong.append((page, f"contrast {least:.1f}: {where}"))
    tab.close()
    assert wrong == []


@pytest.mark.slow
def test_search_finds_a_word(browser, address):
    tab = browser.new_page()
    tab.goto(f"{address}/jaxbn/", wait_until="load")
    tab.keyboard.press("/")
    tab.keyboard.type("FrozenBatchNorm", delay=20)
    result = tab.locator(".md-search-result__link", has_text="FrozenBatchNorm").first
    result.wait_for(state="attached", timeout=30_000)
    assert "/jaxbn/" in result.get_attribute("href")

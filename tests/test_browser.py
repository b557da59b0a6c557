"""The pages in a real browser: every figure is there, nothing is fetched, and a phone's width is enough."""

import json
import re
import shutil
import subprocess

import pytest
from synthetic_results import write_folder

from hookdepth.report import write_report
from hookdepth.report_compare import write_comparison

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")

LOOK = """<script>
addEventListener("load", () => {
  const box = (element) => element.getBoundingClientRect();
  document.querySelectorAll("details").forEach((element) => { element.open = true; });
  const found = {
    widths: [...document.images].map((image) => image.naturalWidth),
    shown: [...document.images].map((image) => box(image).width),
    outside: [...document.querySelectorAll(".over")].filter((over) => {
      const picture = box(over.parentElement.querySelector("img")), own = box(over);
      return own.left < picture.left - 1 || own.right > picture.right + 1 || own.width < 20
        || own.top < picture.top - 1 || own.bottom > picture.bottom + 1;
    }).length,
    titles: document.querySelectorAll(".over path title").length,
    tables: document.querySelectorAll("figure details table").length,
    fetched: performance.getEntriesByType("resource").map((entry) => entry.name).filter((n) => !n.startsWith("data:")),
    window: innerWidth,
    page: document.documentElement.scrollWidth,
  };
  const place = document.createElement("pre");
  place.id = "found";
  place.textContent = JSON.stringify(found);
  document.body.append(place);
});
</script>"""


def browse(page, folder, width=1400):
    """What a browser finds on a page, and the addresses that it asks for, read from its own log of the network.

    The page's policy, which forbids scripts and addresses, is taken out: the page must fetch nothing without it.
    """
    html = page.read_text(encoding="utf-8")
    html, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    assert removed == 1
    copy = folder / f"{page.stem}-copy.html"
    copy.write_text(html.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    log = folder / "net.json"
    quiet = ("background-networking", "component-update", "default-apps", "sync", "extensions", "gpu")
    command = [BROWSER, "--headless", "--no-sandbox", *(f"--disable-{what}" for what in quiet), "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", f"--log-net-log={log}"]
    command += ["--dump-dom", "--virtual-time-budget=10000", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    asked = set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]*)"', log.read_text(encoding="utf-8", errors="replace")))
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")), asked


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("run") / "small", n_layers=6, n_tokens=9, strange=True)


def whole(found, asked, n_figures):
    assert len(found["widths"]) == n_figures
    assert min(found["widths"]) > 400
    assert min(found["shown"]) > 100
    assert found["outside"] == 0, "what is said on hover lies over the picture"
    assert found["titles"] > 20 * n_figures / 4
    assert found["tables"] >= n_figures
    assert found["fetched"] == []
    assert {address for address in asked if "example.org" in address} == set()
    assert found["page"] <= found["window"], "the page itself does not scroll sideways"


@pytest.mark.parametrize("width", [390, 1400])
def test_report(run, tmp_path, width):
    page = write_report(run)
    found, asked = browse(page, tmp_path, width)
    whole(found, asked, len(list(run.glob("*.png"))))
    assert found["window"] == width
    assert asked == set()


def test_comparison(run, tmp_path):
    other = write_folder(tmp_path / "large", n_layers=9, n_tokens=9)
    page = write_comparison([run, other], tmp_path / "both")
    found, asked = browse(page, tmp_path, 390)
    whole(found, asked, len(list((tmp_path / "both").glob("*.png"))))
    assert asked == set()


def test_a_page_that_fetches_is_noticed(tmp_path):
    """The test of the test: an address on a page shows up in what the browser is seen to ask for."""
    page = tmp_path / "page.html"
    policy = '<meta http-equiv="Content-Security-Policy" content="">'
    page.write_text(f'<!DOCTYPE html><head>{policy}</head><body><img src="http://127.0.0.1:9/a.png"></body>')
    found, asked = browse(page, tmp_path)
    assert found["widths"] == [0]
    assert "http://127.0.0.1:9/a.png" in asked

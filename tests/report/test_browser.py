"""The pages in a real browser: every figure is there, nothing is fetched, and a phone's width is enough."""

import base64
import json
import re
import shutil
import subprocess

import pytest
import torch
from synthetic_results import write_folder

from hookdepth.results import Result
from hookdepth.runs.reporting import comparison, report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")

LOOK = """<script>
addEventListener("load", () => {
  const box = (element) => element.getBoundingClientRect();
  document.querySelectorAll("details").forEach((element) => { element.open = true; });
  const fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  parent.postMessage({
    widths: [...document.images].map((image) => image.naturalWidth),
    shown: [...document.images].map((image) => box(image).width),
    outside: [...document.querySelectorAll(".over")].filter((over) => {
      const picture = box(over.parentElement.querySelector("img")), own = box(over);
      return own.left < picture.left - 1 || own.right > picture.right + 1 || own.width < 20
        || own.top < picture.top - 1 || own.bottom > picture.bottom + 1;
    }).length,
    titles: document.querySelectorAll(".over path title").length,
    tables: document.querySelectorAll("figure details table").length,
    fetched: fetched.filter((name) => !name.startsWith("data:")),
    window: document.documentElement.clientWidth,
    page: document.documentElement.scrollWidth,
  }, "*");
});
</script>"""
WIDTHS = (390, 1400)  # of a phone; of a laptop or projector
FRAME = """<!DOCTYPE html><body><pre id="found"></pre><script>
const all = {};
addEventListener("message", (event) => {
  const frame = [...document.querySelectorAll("iframe")].find((one) => one.contentWindow === event.source);
  all[frame.width] = event.data;
  document.getElementById("found").textContent = btoa(JSON.stringify(all));
});
</script>"""


def browse(page, folder, look=LOOK):
    """What a browser finds on a page at each width, and the addresses that the page asks for.

    The addresses are read from the browser's own log of the network, less those that the browser itself asks for.
    The page's policy, which forbids scripts and addresses, is taken out: it must fetch nothing without it.
    """
    html = page.read_text(encoding="utf-8")
    html, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    assert removed == 1
    copy, frame, log = folder / "copy.html", folder / "frame.html", folder / "net.json"
    copy.write_text(html.replace("</body>", f"{look}</body>"), encoding="utf-8")
    frames = (f'<iframe width="{width}" height="900" src="copy.html"></iframe>' for width in WIDTHS)
    frame.write_text(FRAME + "".join(frames), encoding="utf-8")
    quiet = ("background-networking", "component-update", "default-apps", "sync", "extensions", "gpu")
    command = [BROWSER, "--headless", "--no-sandbox", *(f"--disable-{what}" for what in quiet), "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    command += ["--dump-dom", "--virtual-time-budget=10000", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    requests = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if '"initiator":' in line
    ]
    own = [line for line in requests if '"initiator":"not an origin"' not in line]
    asked = {address for line in own for address in re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]*)"', line)}
    return {int(width): look for width, look in json.loads(base64.b64decode(found[1])).items()}, asked


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Results of a kind each: the pages take seconds to draw, and those left out are drawn by the same functions."""
    folder = write_folder(tmp_path_factory.mktemp("run") / "small", n_layers=6, n_tokens=9, strange=True)
    for name in ("skip-future", "local-current", "local-future"):
        (folder / f"{name}.safetensors").unlink()
    return folder


def whole(looks, asked, n_figures):
    assert set(looks) == set(WIDTHS)
    assert asked == set()
    for width, found in looks.items():
        assert width - 20 < found["window"] <= width
        assert len(found["widths"]) == n_figures
        assert min(found["widths"]) > 400
        assert min(found["shown"]) > 0.75 * min(width, 400)
        assert found["outside"] == 0, "what is said on hover lies over the picture"
        assert found["titles"] > 6 * n_figures
        assert found["tables"] >= n_figures
        assert found["fetched"] == []
        assert found["page"] <= found["window"], "the page itself does not scroll sideways"


def test_report(run, tmp_path):
    page = report(run)
    looks, asked = browse(page, tmp_path)
    whole(looks, asked, len(list(run.glob("*.png"))))


def test_comparison(run, tmp_path):
    other = write_folder(tmp_path / "large", n_layers=9, n_tokens=9)
    page = comparison([run, other], tmp_path / "both")
    looks, asked = browse(page, tmp_path)
    whole(looks, asked, len(list((tmp_path / "both").glob("*.png"))))


def test_a_page_that_fetches_is_noticed(tmp_path):
    """The test of the test: an address on a page shows up in what the page is seen to ask for."""
    page = tmp_path / "page.html"
    policy = '<meta http-equiv="Content-Security-Policy" content="">'
    page.write_text(f'<!DOCTYPE html><head>{policy}</head><body><img src="http://127.0.0.1:9/a.png"></body>')
    looks, asked = browse(page, tmp_path)
    assert looks[390]["widths"] == [0]
    assert "http://127.0.0.1:9/a.png" in asked


POINT = """<script>
addEventListener("load", () => {
  const over = (r, c) => cells[r][c].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  const found = { maps: data.maps.length, words: data.maps.findIndex((one) => one.words.length) };
  over(2, 1);
  found.said = by("cell").textContent;
  found.table = by("map").innerText;
  cells[1][0].click();
  over(2, 1);  // held by the click
  found.held = by("cell").querySelector("h2").textContent;
  const press = (key) => by("scroll").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  press("ArrowRight");
  found.moved = by("cell").querySelector("h2").textContent;
  found.drawn = data.maps.map((one, n) => {
    draw(n);
    return by("map").querySelectorAll("td").length === one.rows.length * one.columns.length;
  });
  draw(found.words);
  const fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  const root = document.documentElement;
  parent.postMessage({ ...found, fetched, window: root.clientWidth, page: root.scrollWidth }, "*");
});
</script>"""


def test_maps_that_one_points_at(run, tmp_path):
    """Under its own policy the page draws; and what is pointed at is said, by pointer and by keys."""
    words = {"1": "<b>Paris</b>", "2": " Rome"}
    lens = Result.load(run / "logit-lens.safetensors")
    top = torch.tensor([1.0, 2.0]).expand(7, 3, 2)
    lens.tensors |= {"page.final.0": torch.rand(7, 3), "page.top.0": top, "page.probability.0": top / 4}
    lens.metadata["shown"] = [{"prompt": "a b c", "tokens": ["a", " b", " <i>c</i>"], "words": words}]
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("residual-erasure", "skip-current"):
        (folder / f"{name}.safetensors").write_bytes((run / f"{name}.safetensors").read_bytes())
    lens.save(folder / "logit-lens.safetensors")
    page = report(folder).with_name("explore.html")
    command = [BROWSER, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'own'}", "--dump-dom"]
    drawn = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert drawn.count("<td") == 7 * 3, "its policy lets its own script run"
    looks, asked = browse(page, tmp_path, POINT)
    assert asked == set()
    for found in looks.values():
        assert found["maps"] == 4
        assert all(found["drawn"])
        assert "layer 2, _b" in found["said"]
        assert "<b>Paris</b>" in found["said"]
        assert "_Rome 0.5" in found["said"]
        assert "<b>Paris</b>" in found["table"]
        assert (found["held"], found["moved"]) == ("layer 1, a", "layer 1, _b")
        assert found["fetched"] == []
        assert found["page"] <= found["window"]

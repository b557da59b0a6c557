"""The pages are whole, self-contained, escaped, and the same every time."""

import json
from html.parser import HTMLParser

import pytest
import torch
from synthetic_results import EVERY_KIND, synthetic_results, write_folder

from hookdepth.analyses.registry import declared
from hookdepth.errors import HookdepthError
from hookdepth.report import folder as pages
from hookdepth.report import patterns
from hookdepth.report.compare import labels_of
from hookdepth.report.drawing import style
from hookdepth.report.explore import write_explorer
from hookdepth.results import Result
from hookdepth.runs.contract import load_folder
from hookdepth.runs.reporting import comparison, report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """`Page(html).tags`: elements with their attributes; refuses a page whose elements are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


def assert_self_contained(page, html):
    assert page.all("script") == page.all("link") == page.all("iframe") == page.all("object") == []
    assert page.all("img")
    for image in page.all("img"):
        assert image["src"].startswith("data:image/png;base64,")
        assert image["alt"]
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert not any(name in attrs for _, attrs in page.tags for name in ("srcset", "onload", "onerror", "action"))
    anchors = {attrs["id"] for attrs in page.all("section")}
    assert {attrs["href"] for attrs in page.all("a")} == {f"#{anchor}" for anchor in anchors}
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert page.all("svg"), "values on hover"
    for details in page.all("details"):
        assert details == {}, "closed until it is asked for"


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """What is drawn here is not looked at."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(style._STYLE, "savefig.dpi", 30)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = {"n_layers": 5, "n_tokens": 13, "strange": True, "parts": ("layer", "attn"), "n_probes": 1}
    folder = write_folder(tmp_path_factory.mktemp("run"), **options)
    report(folder)
    return folder


def test_report_is_one_self_contained_page(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert_self_contained(page, html)
    images = {attrs["alt"].split(":")[0] for attrs in page.all("img")}
    assert images == {path.stem for path in folder.glob("*.png")} == {path.stem for path in folder.glob("*.svg")}
    assert len(images) == 3 + 2 + 2 * 4 + 2 + 1 + 2
    for path in folder.glob("*.svg"):
        assert b"<svg" in path.read_bytes()


def test_report_has_the_facts_and_the_numbers(folder):
    text = " ".join(page_of(folder / "report.html").text)
    assert "tests/synthetic-135M" in text
    for fact in ("float32", "sdpa", "cpu", "134.5 M", "torch 2.13.0", "keep_front = 1", "ig_tolerance = 0.01", "321"):
        assert fact in text
    assert "Noise floor 0: every difference shown is an effect." in text
    assert "arXiv 2505.13898, Fig. 3a" in text
    kl = Result.load(folder / "logit-lens.safetensors").tensors["kl"]
    assert all(f"{value:.4g}" in text for value in kl.tolist())
    assert "per_prompt" not in text


def test_summary_is_written(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["effective_depth"]["kl"]["status"] == "found"
    assert set(summary["depth_scores"]["skip-current"]) == {"layer", "attn"}


def test_the_interactive_page_is_beside_it(folder, tmp_path):
    again = write_explorer(tmp_path / "explore.html", load_folder(folder), declared)
    assert again.read_bytes() == (folder / "explore.html").read_bytes()


def test_report_is_the_same_every_time(tmp_path):
    folder = write_folder(tmp_path / "run", ["logit-lens", "skip-current", "residual-erasure"], n_layers=3, n_tokens=6)
    report(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert report(str(folder)) == folder / "report.html"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("null", "says"),
    [(2e-6, "Noise floor 2e-06: a branch that changes nothing differs by up to that much (prompt 0, layer 2, 14 rows)"),
     (0.5, "% of the largest effect"), (None, "Noise floor: not measured.")],
)  # fmt: skip
def test_noise_floor_is_told(tmp_path, null, says):
    result = synthetic_results(n_layers=3, null=null)["skip-future"]
    result.save(tmp_path / "skip-future.safetensors")
    page = page_of(report(tmp_path))
    assert any(says in text for text in page.text)
    warned = any("warn" in (attrs.get("class") or "") for attrs in page.all("p"))
    assert warned == (null != 2e-6)


def test_results_with_little_metadata_and_of_one_layer(tmp_path):
    write_folder(tmp_path, EVERY_KIND, n_layers=1, n_tokens=2)
    Result("logit-lens", {"kl": torch.zeros(2), "topk_overlap": torch.ones(2)}).save(
        tmp_path / "logit-lens.safetensors"
    )
    Result("of-another-version", {"x": torch.ones(2, 2)}).save(tmp_path / "of-another-version.safetensors")
    text = " ".join(page_of(report(tmp_path)).text)
    assert "of-another-version" in text
    assert "none" in text
    assert "These results differ in: model, versions." in text


def test_parallel_sublayers_are_told(tmp_path):
    known = {"model": {"id": "mine", "n_layers": 1, "parallel": True}}
    lens = Result("logit-lens", {"kl": torch.zeros(2), "topk_overlap": torch.ones(2)}, known)
    lens.save(tmp_path / "logit-lens.safetensors")
    assert "parallel: the MLP does not see the attention" in " ".join(page_of(report(tmp_path)).text)


def test_a_large_set_of_probes_is_cut_on_the_page_only(tmp_path, monkeypatch):
    for module in (pages, patterns):
        assert module.MOST_PROBES == 20
        monkeypatch.setattr(module, "MOST_PROBES", 3)
    probes = [{"prompt": str(n), "answer": "x", "tokens": ["a", "b"], "answer_positions": [1]} for n in range(5)]
    tensors = {f"effect.{n}": torch.ones(2, 2) for n in range(5)} | {"baseline": torch.ones(2, 3)}
    Result("residual-erasure", tensors, {"probes": probes}).save(tmp_path / "residual-erasure.safetensors")
    page = page_of(report(tmp_path))
    assert len(page.all("img")) == 3
    assert any("first 3 of 5 probes" in text for text in page.text)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(HookdepthError, match="no result files"):
        report(tmp_path)
    with pytest.raises(HookdepthError, match="no folder"):
        comparison([tmp_path / "nowhere"], tmp_path)
    with pytest.raises(HookdepthError, match="no folder to compare"):
        comparison([], tmp_path)


def test_comparison_page(tmp_path):
    names = ("logit-lens", "skip-current", "residual-erasure")
    small = write_folder(tmp_path / "small", names, n_layers=3, n_tokens=6)
    large = write_folder(tmp_path / "large", names, n_layers=6, n_tokens=6, model="other/model")
    path = comparison([small, large], tmp_path / "both")
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert_self_contained(page, html)
    assert {"small", "large", "model.n_layers", "other/model"} <= set(page.text)
    assert "model.d_model" not in page.text  # the same in both
    pictures = {item.name for item in path.parent.glob("*.png")}
    assert {"compare-logit-lens-kl.png", "compare-skip-current-layer-effect.png"} <= pictures
    first = html
    assert comparison([small, large], tmp_path / "both").read_text(encoding="utf-8") == first
    assert not list(small.glob("*.png"))


def test_maxima_over_other_numbers_of_prompts_are_warned_of(tmp_path):
    for count in (3, 5):
        result = synthetic_results(n_layers=3)["skip-current"]
        result.metadata["data"] |= {"n_prompts": count, "texts": [f"prompt <{n}>" for n in range(count)]}
        result.metadata["settings"] = {**(result.metadata.get("settings") or {}), "over_prompts": "max"}
        result.save(tmp_path / str(count) / "skip-current.safetensors")
    both = [tmp_path / "3", tmp_path / "5"]
    said = "largest values over 3 and 5 prompts: more prompts, larger values"
    assert said in comparison(both, tmp_path / "both").read_text(encoding="utf-8")
    assert said not in comparison([both[0], both[0]], tmp_path / "same").read_text(encoding="utf-8")
    page = report(both[0]).read_text(encoding="utf-8")
    assert "<summary>The prompts (3)</summary>" in page
    assert "<li>prompt &lt;2&gt;</li>" in page


def test_comparison_of_runs_with_nothing_in_common(tmp_path):
    for name in ("logit-lens", "skip-current"):
        synthetic_results(n_layers=3)[name].save(tmp_path / name / f"{name}.safetensors")
    page = page_of(comparison([tmp_path / "logit-lens", tmp_path / "skip-current"], tmp_path / "out"))
    assert "analyses" in page.text
    assert not any("keep_front" in text for text in page.text)  # a setting of what only one of them ran
    assert any("no analysis in common" in text for text in page.text)


def test_labels_are_names_made_unique(tmp_path):
    assert labels_of(["runs/a", "runs/b"]) == ["a", "b"]
    assert labels_of(["x/out", "y/out"]) == ["x/out", "y/out"]
    assert labels_of(["x/out", "y/out", "z"]) == ["x/out", "y/out", "z"]
    assert labels_of(["x/out", "x/out"]) == ["out", "out (2)"]
    assert labels_of([tmp_path]) == [tmp_path.name]
    assert len(set(labels_of(["a", "x/a", "a", "b/c/a"]))) == 4

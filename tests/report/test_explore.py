"""The interactive page: what it holds are the tensors, everything is escaped, and its own script alone may run."""

import base64
import hashlib
import json
from html.parser import HTMLParser

import pytest
import torch
from synthetic_results import synthetic_results, write_folder
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth as hd
from hookdepth.analyses.registry import declared
from hookdepth.errors import HookdepthError
from hookdepth.report.explore import write_explorer
from hookdepth.report.notebook import export
from hookdepth.results import Result
from hookdepth.runs import reporting
from hookdepth.runs.extending import merge
from hookdepth.runs.reporting import report

EVIL = '</script><script>alert("x")</script><img src=https://example.org/a.png onerror=alert(1)>'


class Scripts(HTMLParser):
    """`Scripts(html).found`: attributes and text of every script; `.tags` counts all elements."""

    def __init__(self, html):
        super().__init__()
        self.found, self.tags, self.policy = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        if attrs.get("http-equiv") == "Content-Security-Policy":
            self.policy = attrs["content"]
        if tag == "script":
            self.found.append([attrs, ""])

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_data(self, data):
        if self.tags[-1:] == ["script"]:
            self.found[-1][1] += data


def page_of(folder):
    """The maps of the page that a report leaves, without the report: test_page holds that it is the same."""
    write_explorer(folder / "explore.html", reporting._drawn(folder), declared)
    page = Scripts((folder / "explore.html").read_text(encoding="utf-8"))
    (about, data), (plain, script) = page.found
    assert about == {"type": "application/json", "id": "data"}
    assert plain == {}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'; style-src")
    assert not {"img", "link", "iframe", "object", "a"} & set(page.tags)
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "http:",
        "https:",
        "fetch(",
    ):
        assert word not in script
    return json.loads(data)["maps"]


def test_every_map_is_there_with_its_numbers(tmp_path):
    folder = write_folder(tmp_path / "run", n_layers=4, n_tokens=9)
    maps = page_of(folder)
    known = [(one["section"], one["caption"]) for one in maps]
    assert len(set(known)) == len(known) == 4 + 2 + 2  # effects of four analyses, probes of two
    effect = next(one for one in maps if one["section"].startswith("Residual erasure"))
    tensor = Result.load(folder / "residual-erasure.safetensors")["effect.0"]
    assert effect["columns"] == synthetic_results(4, 9)["residual-erasure"].metadata["probes"][0]["tokens"][:8]
    torch.testing.assert_close(torch.tensor(effect["values"]), tensor[:, :8], rtol=1e-3, atol=1e-6)
    assert effect["upward"]
    assert (effect["low"], effect["log"]) == (0, False)
    before = (folder / "explore.html").read_bytes()
    assert page_of(folder) == maps
    assert (folder / "explore.html").read_bytes() == before


def test_what_comes_from_data_stays_text(tmp_path):
    for result in synthetic_results(n_layers=2, n_tokens=4, model=EVIL).values():
        for probe in result.metadata.get("probes", []):
            probe |= {"prompt": EVIL, "answer": EVIL, "tokens": [EVIL] * 4}
        result.save(tmp_path / f"{result.analysis}.safetensors")
    maps = page_of(tmp_path)
    assert any(one["columns"][0] == EVIL for one in maps)
    assert "<img" not in (tmp_path / "explore.html").read_text(encoding="utf-8")


def test_what_is_not_finite_and_what_cannot_be(tmp_path):
    result = synthetic_results(n_layers=3)["skip-current"]
    result.tensors["layer.effect"][0, 1] = torch.nan
    result.save(tmp_path / "skip-current.safetensors")
    (one,) = page_of(tmp_path)
    assert one["values"][0][1] is None
    assert one["first"] == [0, 1, 2]


def test_without_maps_there_is_no_page(tmp_path):
    synthetic_results(n_layers=3)["residual-stats"].save(tmp_path / "residual-stats.safetensors")
    report(tmp_path)
    assert (tmp_path / "report.html").is_file()
    assert not (tmp_path / "explore.html").exists()


TEXTS = ["the king and the queen went to the town", f"the town {EVIL}", "a third one in the house"]


@pytest.fixture(scope="module")
def model():
    return hd.wrap(tiny_model("llama", num_hidden_layers=3), tiny_tokenizer(), name="tiny")


@torch.no_grad()
def naive_words(model, text):
    """Straight from Hugging Face's own hidden states: [point, token] lists of the five likeliest, and a probability."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    out = model.hf(ids, output_hidden_states=True)
    inner = model.hf.model
    logits = [model.hf.lm_head(inner.norm(hidden[0])) for hidden in out.hidden_states[:-1]] + [out.logits[0]]
    probabilities = torch.stack(logits).float().softmax(-1)
    final = probabilities[-1].argmax(-1)
    return probabilities.topk(5), probabilities[:, torch.arange(ids.shape[1]), final]


def test_words_of_the_logit_lens(model, tmp_path):
    hd.analyse(model, "logit-lens", TEXTS, out=str(tmp_path))
    maps = [one for one in page_of(tmp_path) if one["words"]]
    assert len(maps) == 2  # of the first prompts alone
    for one, text in zip(maps, TEXTS, strict=False):
        (shares, ids), final = naive_words(model, text)
        torch.testing.assert_close(torch.tensor(one["values"]), final, rtol=1e-3, atol=1e-4)
        words = [[[model.tokenizer.decode([token]) for token in cell] for cell in row] for row in ids.tolist()]
        assert [[[word for word, _ in cell] for cell in row] for row in one["words"]] == words
        found = torch.tensor([[[share for _, share in cell] for cell in row] for row in one["words"]])
        torch.testing.assert_close(found, shares, rtol=1e-3, atol=1e-4)
        assert len(one["columns"]) == len(final[0])


def test_words_are_the_same_in_pieces_and_merged(model, tmp_path):
    def run(texts, folder, limit):
        file = tmp_path / f"{len(texts)}.txt"
        file.write_text("\n".join(texts), encoding="utf-8")
        hd.analyse(model, "logit-lens", dataset=str(file), limit=limit, out=str(tmp_path / folder))
        return (tmp_path / folder / "logit-lens.safetensors").read_bytes()

    run(TEXTS, "grown", 1)
    assert run(TEXTS, "grown", 3) == run(TEXTS, "once", 3)
    run(TEXTS[:1], "first", 1)
    run(TEXTS[1:], "rest", 2)
    merge([str(tmp_path / "first"), str(tmp_path / "rest")], str(tmp_path / "both"), print)
    assert page_of(tmp_path / "both") == page_of(tmp_path / "once")


def test_tables_leave_out_what_only_the_page_shows(model, tmp_path):
    found = hd.analyse(model, "logit-lens", TEXTS)
    assert "page." not in repr(found)
    assert "page." not in export(found, None, tmp_path / "lens.csv").read_text()
    assert set(hd.plot(found)) == {"logit-lens-kl", "logit-lens-overlap"}
    found.plot("page.final.0")  # and can be drawn all the same


@pytest.mark.parametrize("shown", ["x", ["x"], [{"tokens": [1]}], [{"words": []}]])
def test_a_damaged_list_of_words_is_refused(model, tmp_path, shown):
    found = hd.analyse(model, "logit-lens", TEXTS[:1])
    found.metadata["shown"] = shown
    found.save(tmp_path / "logit-lens.safetensors")
    with pytest.raises(HookdepthError, match="no complete logit-lens result"):
        report(tmp_path)


def test_maps_of_a_sweep(model, tmp_path):
    clean, changed = ["the king and the town", "the town and the king"]
    found = hd.patch_sweep(model, clean, changed, "resid_pre", hd.LogitDifference(20, 30))
    found.save(tmp_path / "sweep.safetensors")
    (one,) = page_of(tmp_path)
    assert one["signed"]
    assert one["rows"] == ["0", "1", "2"]
    assert [name.partition(" ")[0] for name in one["columns"]] == list(map(str, range(len(found["score"][0]))))

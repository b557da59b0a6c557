"""The three lenses against Jacobians taken whole, and against logits from the lenses that a file holds."""

import naive
import pytest
import torch
from test_against_naive import close, results_of
from tiny_models import prompts, tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth.analyses import Inputs
from hookdepth.analyses.jacobian import jacobian_rows, mean_jacobian
from hookdepth.analyses.lenses import Lenses, spread
from hookdepth.analyses.ridge import split_prompts
from hookdepth.errors import HookdepthError
from hookdepth.report.scale import interval_of
from hookdepth.results import Result
from hookdepth.runs.contract import violation

SMALL = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}


def whole_jacobian(hf, ids, layer, front=0):
    """d × d: the Jacobian of all tokens by all tokens, summed over what is read and averaged over what is moved."""
    clean = naive.run_with(hf, ids).resid_pre[layer].detach()

    def final(value):
        return naive.run_with(hf, ids, [("resid_pre", layer, lambda _: value)]).resid_post[-1]

    full = torch.autograd.functional.jacobian(final, clean)[0, :, :, 0]  # [read, d, moved, d]
    for moved in range(len(ids)):
        assert not full[:moved, :, moved].any(), "no token reads a later one"
    return full.sum(0)[:, front:].mean(1)


@pytest.fixture(scope="module")
def hf():
    return tiny_model("llama-gqa", **SMALL)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_rows_of_the_jacobian(family, monkeypatch):
    hf, ids = tiny_model(family, **SMALL), prompts(1, 6)[0]
    model = hookdepth.wrap(hf)
    monkeypatch.setattr("hookdepth.analyses.jacobian._AT_ONCE", 30)  # several ways back over one graph
    ours = jacobian_rows(model, ids, list(range(16)), front=1)
    for layer in range(3):
        close(ours[layer].float(), whole_jacobian(hf, ids, layer, front=1))
    some = jacobian_rows(model, ids, [5, 14, 7], front=1)
    close(some.float(), ours[:, [5, 14, 7]].float(), 1e-5)


def test_the_mean_over_prompts_and_its_error(hf):
    ids, model = prompts(3, (6, 4, 5)), hookdepth.wrap(hf)
    each = torch.stack([torch.stack([whole_jacobian(hf, own, layer) for layer in range(3)]) for own in ids])
    mean, error = mean_jacobian(model, ids, 0, samples=5, longest=100)
    close(mean[:3], each.mean(0))
    assert torch.equal(mean[3], torch.eye(16))
    expected = (each.var(0) / 3).sum((1, 2)).sqrt() / each.mean(0).square().sum((1, 2)).sqrt()
    close(error, expected, 1e-3)


def test_rows_are_shared_among_prompts(hf):
    ids, model = prompts(4, 5), hookdepth.wrap(hf)
    each = torch.stack([torch.stack([whole_jacobian(hf, own[:4], layer) for layer in range(3)]) for own in ids])
    mean, _ = mean_jacobian(model, ids, 0, samples=2, longest=4)
    for row in range(16):
        own = each[[row % 4, (row + 1) % 4], :, row].mean(0)
        assert torch.allclose(mean[:3, row], own, atol=1e-4 * each.abs().max().item())


IDS = prompts(12, (22, 18))


@torch.no_grad()
def test_what_the_lenses_of_a_file_read(hf, tmp_path):
    model = hookdepth.wrap(hf)
    found = results_of(["lenses"], model, Inputs(tuple(map(tuple, IDS))))["lenses"]
    hookdepth.Result("lenses", found, {}).save(tmp_path / "lenses.safetensors")
    stored = hookdepth.Result.load(tmp_path / "lenses.safetensors")
    _, _, test = split_prompts(len(IDS))
    carry = {
        "logit": lambda h, point: h,
        "linear": lambda h, point: h @ stored["linear.weight"][point] + stored["linear.bias"][point],
        "jacobian": lambda h, point: h @ stored["jacobian.weight"][point].T,
    }
    for lens, carried in carry.items():
        kl, overlap = torch.zeros(2, len(test), 4)
        for place, number in enumerate(test):
            stream = [h[:, 1:].detach() for h in naive.run_with(hf, IDS[number]).stream()]
            final = naive.unembed(hf, stream[-1]).log_softmax(-1)
            for point, h in enumerate(stream):
                logs = naive.unembed(hf, carried(h, point)).log_softmax(-1)
                kl[place, point] = (logs.exp() * (logs - final)).sum(-1).mean()
                tops = (logs.topk(5).indices[0], final.topk(5).indices[0])
                overlap[place, point] = sum(
                    len(set(a.tolist()) & set(b.tolist())) / 5 for a, b in zip(*tops, strict=True)
                )
                overlap[place, point] /= h.shape[1]
        weights = torch.tensor([len(IDS[number]) - 1.0 for number in test])
        close(found[f"{lens}.kl"], (kl * weights[:, None]).sum(0) / weights.sum())
        close(found[f"{lens}.topk_overlap"], (overlap * weights[:, None]).sum(0) / weights.sum(), 1e-3)
        close(found[f"per_prompt.{lens}.kl"], kl)
        assert found[f"{lens}.kl"][-1] == 0
        assert found[f"{lens}.topk_overlap"][-1] == 1


def test_whiskers_are_of_the_mean_that_is_drawn():
    """The prompts that test are of unequal length: their mean is one over tokens, and its interval lies around it."""
    model = hookdepth.wrap(tiny_model("llama-gqa", **SMALL), tiny_tokenizer())
    words = ("the town", "the people of the town and the basket", "Anna has 12 apples and eats 3 of them, so she has 9")
    texts = [f"{words[n % 3]} {words[n % 2]} {n} full of the problem" for n in range(24)]
    result = hookdepth.analyse(model, "lenses", texts, jacobian_tokens=8)
    assert result.metadata["tested"] == split_prompts(24)[2]
    mean, low, high = interval_of(result, "linear.kl")
    close(mean.float(), result["linear.kl"])
    assert (low[:-1] < mean[:-1]).all()
    assert (mean[:-1] < high[:-1]).all()
    result.metadata["tested"] = [*result.metadata["tested"][:-1], 24]
    assert "tested" in violation(result)


def test_the_linear_lens_is_the_ridge_of_linear_maps(hf):
    """On tokens of the prompts that test, its squared error from each point is that of the map to the last point."""
    model, inputs = hookdepth.wrap(hf), Inputs(tuple(map(tuple, IDS)))
    found = results_of(["lenses", "linear-maps"], model, inputs)
    lens, maps = found["lenses"], found["linear-maps"]
    _, _, test = split_prompts(len(IDS))
    streams = [[h[0, 1:].detach() for h in naive.run_with(hf, IDS[number]).stream()] for number in test]
    stream = [torch.cat(own) for own in zip(*streams, strict=True)]
    for point in range(3):
        rest = stream[-1] - stream[point] @ lens["linear.weight"][point] - lens["linear.bias"][point]
        relative = (rest.norm(dim=-1) / stream[-1].norm(dim=-1)).mean().item()
        assert relative == pytest.approx(maps["relative_error"][point, 3].item(), abs=1e-4)


def test_too_few_tokens_are_refused(hf):
    says = r"--keep-front 5 leaves nothing of the 5 tokens .*--jacobian-tokens 6 or more"
    with pytest.raises(HookdepthError, match=says):
        results_of(["lenses"], hookdepth.wrap(hf), Inputs(tuple(map(tuple, IDS))), keep_front=5, jacobian_tokens=5)
    with pytest.raises(HookdepthError, match="too few for lenses"):
        results_of(["lenses"], hookdepth.wrap(hf), Inputs(tuple(map(tuple, IDS[:3]))))


def jlens_file(path, layers, width=16):
    """As the reference implementation saves: float16, a dict of layers, what comes out of each is what it reads."""
    matrices = {layer: torch.randn(width, width).half() for layer in layers}
    torch.save({"J": matrices, "n_prompts": 100, "source_layers": sorted(layers), "d_model": width}, path)
    return matrices


def test_a_lens_of_another_tool(hf, tmp_path):
    model, path = hookdepth.wrap(hf), tmp_path / "lens.pt"
    matrices = jlens_file(path, [1, 0])
    found = hookdepth.load_lens(path, model)
    weight = found["jacobian.weight"]
    assert weight.shape == (4, 16, 16)
    assert weight[0].isnan().all(), "what goes into layer 0 comes out of no layer"
    assert torch.equal(weight[1], matrices[0].float())
    assert torch.equal(weight[2], matrices[1].float())
    assert torch.equal(weight[3], torch.eye(16))
    assert (found.metadata["n_prompts"], found.metadata["layers"]) == (100, [0, 1])
    found.save(tmp_path / "lens.safetensors")
    assert torch.equal(hookdepth.Result.load(tmp_path / "lens.safetensors")["jacobian.weight"][2], weight[2])


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, "there is no lens"),
        (lambda path: path.write_text("no lens"), "is no lens"),
        (lambda path: path.write_bytes(b""), "is no lens"),
        (lambda path: torch.save({"weights": torch.ones(2)}, path), "is no lens"),
        (lambda path: torch.save({"J": {"0": torch.ones(16, 16)}}, path), "is no lens"),
        (lambda path: torch.save({"J": {0: jlens_file}}, path), "is no lens"),
        (lambda path: jlens_file(path, [0], 8), "width 8, and the model has 3 layers and width 16"),
        (lambda path: jlens_file(path, [3]), "layers 3 to 3"),
    ],
)
def test_what_is_no_lens_of_this_model(hf, tmp_path, write, says):
    write(tmp_path / "lens.pt")
    with pytest.raises(HookdepthError, match=says):
        hookdepth.load_lens(tmp_path / "lens.pt", hookdepth.wrap(hf))


def test_lenses_are_read_at_some_tokens(hf):
    """Evenly spread ones, at which they say what they say where all are read; too many are all."""
    model, inputs = hookdepth.wrap(hf), Inputs(tuple(map(tuple, IDS)))
    whole = results_of(["lenses"], model, inputs)["lenses"]
    more = results_of(["lenses"], model, inputs, lens_tokens=1000)["lenses"]
    assert all(torch.equal(own, more[name]) for name, own in whole.items())
    found = results_of(["lenses"], model, inputs, lens_tokens=3)["lenses"]
    assert torch.equal(found["linear.weight"], whole["linear.weight"])
    place, (_, _, test) = 0, split_prompts(len(IDS))
    chosen = spread(range(1, len(IDS[test[place]])), 3)
    assert len(set(chosen)) == 3
    stream = [h[0, chosen].detach() for h in naive.run_with(hf, IDS[test[place]]).stream()]
    final = naive.unembed(hf, stream[-1]).log_softmax(-1)
    logs = [naive.unembed(hf, h).log_softmax(-1) for h in stream]
    kl = torch.stack([(own.exp() * (own - final)).sum(-1).mean() for own in logs])
    close(found["per_prompt.logit.kl"][place], kl)
    # A smaller share of a longer prompt is read, and stands for all of it.
    weights = torch.tensor([len(IDS[number]) - 1.0 for number in test])
    close(found["logit.kl"], (found["per_prompt.logit.kl"] * weights[:, None]).sum(0) / weights.sum())


def test_the_report_says_at_how_many_tokens():
    assert not Lenses().notes(Result("lenses", {}, {"settings": {"lens_tokens": None}}))
    (said,) = Lenses().notes(Result("lenses", {}, {"settings": {"lens_tokens": 32}}))
    assert "at 32 tokens of each prompt" in said


def test_tokens_are_spread_evenly():
    assert spread(range(10), None) == spread(range(10), 99) == list(range(10))
    assert spread(range(10), 2) == [2, 7]
    assert spread([4, 6, 9], 1) == [6]
    assert spread([], 3) == []

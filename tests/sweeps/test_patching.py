"""Sweeps against one plain forward pass a cell."""

import pytest
import torch
from naive import run_with
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth import Custom, LayerEffect, LogitDifference, OutputEffect, ablate_sweep, patch_sweep, skip_sweep
from hookdepth.errors import HookdepthError

A, B = 17, 91
METRIC = LogitDifference(A, B)


def difference(run):
    return (run.logits[0, -1, A] - run.logits[0, -1, B]).item()


def patched(hf, base, source, site, layer, places):
    """The metric of a base run with a source run's activations: places[base token] is the source's token."""
    return put(hf, base, getattr(run_with(hf, source), site)[layer], site, layer, places)


def put(hf, base, values, site, layer, places):
    """The metric of a base run with these activations: places[base token] is their token."""

    def edit(x):
        x = x.clone()
        for own, other in places.items():
            x[:, own] = values[:, other]
        return x

    return difference(run_with(hf, base, [(site, layer, edit)]))


def pair(seed, length=7, differ=3):
    clean, other = prompts(2, length, seed=seed)
    return clean, [*clean[:differ], other[differ], *clean[differ + 1 :]]


@pytest.fixture
def model():
    return hookdepth.wrap(tiny_model("llama-gqa"))


@pytest.mark.parametrize(
    ("family", "denoise"), [("llama-gqa", True), ("llama-gqa", False), ("gemma2", True), ("mistral", False)]
)
def test_every_cell_is_the_share_of_a_plain_patched_run(family, denoise):
    model = hookdepth.wrap(tiny_model(family))
    both = [pair(1), pair(2, length=9, differ=5)]
    clean, corrupted = zip(*both, strict=True)
    for site in ("resid_pre", "attn_out", "resid_post"):
        found = patch_sweep(model, clean, corrupted, site, METRIC, layers=[0, 3], denoise=denoise)
        own = found["per_prompt.score"]
        assert own.shape == (2, 2, 9)
        assert own[0, :, :2].isnan().all()  # the shorter prompt ends where the longer one does
        for number, (one, other) in enumerate(both):
            base, source = (other, one) if denoise else (one, other)
            begun, ended = (run_with(model.hf, ids) for ids in (base, source))
            first, second = difference(begun), difference(ended)
            for row, layer in enumerate((0, 3)):
                values = getattr(ended, site)[layer]
                for token in range(len(one)):
                    plain = put(model.hf, base, values, site, layer, {token: token})
                    cell = own[number, row, 9 - len(one) + token]
                    assert cell.item() == pytest.approx((plain - first) / (second - first), abs=2e-4)
        assert torch.equal(found["score"], own.nanmean(0))
        assert own[0, :, 2:5].eq(0).all()  # left of the token that differs nothing is another


def test_what_surrounds_the_differing_token_carries_all(model):
    clean, corrupted = pair(3)
    found = patch_sweep(model, clean, corrupted, "resid_pre", METRIC)["score"]
    assert found[0, 3].item() == pytest.approx(1, abs=1e-5)
    every = patch_sweep(model, clean, corrupted, "resid_pre", METRIC, tokens="all")
    assert every["score"].tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    some = patch_sweep(model, clean, corrupted, "resid_pre", METRIC, tokens=[3, -1], layers=[4, 1])["score"]
    assert torch.allclose(some, found[[4, 1]][:, [3, -1]], atol=1e-5)
    assert found[4, -1] != 0


def test_prompts_of_other_lengths_are_aligned_at_their_ends(model):
    clean, corrupted = [5, 6, 7, 8, 9, 10], [5, 6, 99, 8, 98, 9, 10]
    with pytest.raises(HookdepthError, match="6 and 7 tokens"):
        patch_sweep(model, clean, corrupted, "resid_pre", METRIC)
    found = patch_sweep(model, clean, corrupted, "resid_post", METRIC, layers=[2], align="ends")["score"][0]
    places = {0: 0, 1: 1, 5: 4, 6: 5}
    assert found.isnan().tolist() == [token not in places for token in range(7)]
    first, second = (difference(run_with(model.hf, ids)) for ids in (corrupted, clean))
    for own, other in places.items():
        plain = patched(model.hf, corrupted, clean, "resid_post", 2, {own: other})
        assert found[own].item() == pytest.approx((plain - first) / (second - first), abs=1e-4)


def test_every_pair_may_have_a_metric_of_its_own(model):
    both = [pair(1), pair(4)]
    clean, corrupted = zip(*both, strict=True)
    metrics = [LogitDifference(A, B), LogitDifference(40, 41)]
    together = patch_sweep(model, clean, corrupted, "mlp_out", metrics)
    for number, metric in enumerate(metrics):
        alone = patch_sweep(model, *both[number], "mlp_out", metric)
        assert torch.allclose(together["per_prompt.score"][number], alone["score"], atol=1e-4)
        assert together["clean"][number] == pytest.approx(alone["clean"][0].item(), abs=1e-4)


def test_few_activations_are_held_at_once(model, monkeypatch):
    clean, corrupted = zip(pair(1), pair(2), pair(4), strict=True)
    whole = patch_sweep(model, clean, corrupted, "resid_pre", METRIC)
    monkeypatch.setattr("hookdepth.sweeps.patching._HELD", 1)
    apart = patch_sweep(model, clean, corrupted, "resid_pre", METRIC)
    assert torch.allclose(whole["per_prompt.score"], apart["per_prompt.score"], atol=1e-4)


def test_skips_and_ablations_are_changes_of_the_metric(model):
    ids = prompts(1, 8)[0]
    clean = difference(run_with(model.hf, ids))
    found = skip_sweep(model, ids, METRIC, "mlp")
    assert found["clean"].tolist() == pytest.approx([clean], abs=1e-4)
    zero = ablate_sweep(model, ids, "mlp_out", METRIC, tokens=None)["score"]
    assert zero.shape == (5, 8)
    for layer in range(5):
        all_tokens = difference(run_with(model.hf, ids, [("mlp_out", layer, torch.zeros_like)]))
        assert found["score"][layer].item() == pytest.approx(all_tokens - clean, abs=1e-3)

        def last(x):
            return torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], dim=1)

        plain = difference(run_with(model.hf, ids, [("mlp_out", layer, last)]))
        assert zero[layer, -1].item() == pytest.approx(plain - clean, abs=1e-3)


def test_heads_are_patched_and_ablated_one_by_one(model):
    clean, corrupted = pair(1)
    found = patch_sweep(model, clean, corrupted, "z", METRIC, tokens="all", heads="all")["score"]
    both = patch_sweep(model, clean, corrupted, "z", METRIC, tokens=[-1], heads=[2], layers=[3])["score"]
    assert (found.shape, both.shape) == ((5, 4), (1, 1, 1))
    first, second = (difference(run_with(model.hf, ids)) for ids in (corrupted, clean))
    zero = ablate_sweep(model, corrupted, "z", METRIC, heads="all")["score"]
    mean = ablate_sweep(model, corrupted, "z", METRIC, heads="all", value="mean")["score"]
    for layer, head in ((0, 1), (3, 2), (4, 0)):
        own, other = (read_z(model.hf, ids, layer)[:, :, 16 * head : 16 * head + 16] for ids in (corrupted, clean))
        plain = [with_head(model.hf, corrupted, layer, head, v) for v in (other, other * 0, own.mean(1, keepdim=True))]
        assert found[layer, head].item() == pytest.approx((plain[0] - first) / (second - first), abs=2e-4)
        assert zero[layer, head].item() == pytest.approx(plain[1] - first, abs=1e-3)
        assert mean[layer, head].item() == pytest.approx(plain[2] - first, abs=1e-3)
    last = read_z(model.hf, corrupted, 3)[:, :, 32:48].clone()
    last[:, -1] = read_z(model.hf, clean, 3)[:, -1, 32:48]
    plain = with_head(model.hf, corrupted, 3, 2, last)
    assert both.item() == pytest.approx((plain - first) / (second - first), abs=2e-4)


def read_z(hf, ids, layer):
    """What the output projection of attention reads, [1, T, heads · width]."""
    seen = []
    handle = hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        run_with(hf, ids)
    finally:
        handle.remove()
    return seen[0].detach()


def with_head(hf, ids, layer, head, value):
    """The metric of a run of which one head gives a value."""

    def put(_, args):
        z = args[0].clone()
        z[:, :, 16 * head : 16 * head + 16] = value
        return (z,)

    handle = hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(put)
    try:
        return difference(run_with(hf, ids))
    finally:
        handle.remove()


def test_what_cannot_be_swept_is_refused(model):
    one, other = pair(1)
    wrong = [
        ((one, one, "resid_pre", METRIC), {}, "the same"),
        ((one, [other, one], "resid_pre", METRIC), {}, "1 clean and 2 corrupted"),
        ((one, other, "resid", METRIC), {}, "resid"),
        ((one, other, "resid_pre", LogitDifference), {}, "LogitDifference"),
        ((one, other, "resid_pre", LayerEffect()), {}, "layers"),
        ((one, other, "resid_pre", OutputEffect()), {}, "both prompts"),
        ((one, other, "resid_pre", [METRIC, METRIC]), {}, "2 metrics"),
        ((one, other, "resid_pre", METRIC), {"layers": [5]}, "5"),
        ((one, other, "resid_pre", METRIC), {"layers": []}, "layers"),
        ((one, other, "resid_pre", METRIC), {"layers": range(0)}, "the layers are range"),
        ((one, other, "resid_pre", METRIC), {"layers": [1, 1]}, "a layer is named twice"),
        ((one, other, "resid_pre", METRIC), {"tokens": 1}, "tokens are 1"),
        ((one, other, "resid_pre", METRIC), {"tokens": [True]}, "one of the tokens is True"),
        ((one, other, "resid_pre", METRIC), {"tokens": [1.5]}, "one of the tokens is 1.5"),
        ((one, other, "z", METRIC), {"heads": []}, r"the heads are \[\]"),
        ((one, other, "z", METRIC), {"heads": 1}, "the heads are 1"),
        ((one, other, "z", METRIC), {"heads": [0, 0]}, "a head is named twice"),
        (([5, 6, 7], [8, 9], "resid_pre", METRIC), {"align": "ends"}, "a token that they share"),
        ((one, other, "resid_pre", LogitDifference(5, 6, reduce=None)), {}, "leaves a value a token"),
        (([], [], "resid_pre", METRIC), {}, "there are no prompts"),
        ((one, other, "resid_pre", METRIC), {"tokens": [9]}, "token 9"),
        ((one, other, "resid_pre", METRIC), {"tokens": "each"}, "each"),
        ((one, other, "resid_pre", METRIC), {"tokens": []}, "tokens"),
        ((one, other, "resid_pre", METRIC), {"heads": "all"}, "heads"),
        ((one, other, "resid_pre", METRIC), {"align": "left"}, "left"),
        ((one, other, "resid_pre", METRIC), {"denoise": "yes"}, "denoise"),
        (
            (one, other, "resid_pre", Custom("nothing", lambda view: view.logits[..., 0].float() * 0)),
            {},
            "0 on both",
        ),
    ]
    for arguments, options, named in wrong:
        with pytest.raises(HookdepthError, match=named):
            patch_sweep(model, *arguments, **options)
    with pytest.raises(HookdepthError, match="model"):
        patch_sweep(model.hf, one, other, "resid_pre", METRIC)

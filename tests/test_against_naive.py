"""Every analysis, part and family against one plain forward pass per intervention.

Passes without a prefix run the same kernels as the reference does, yet on another number of rows, where a
matrix product may sum in another order; passes with a prefix take a masked attention kernel. So the
tolerance is the issue's 1e-4 of the largest entry throughout, and `test_demo.py` checks what is exact there.
"""

import naive
import pytest
import torch
from tiny_models import FAMILIES, prompts, tiny_model

import hookdepth
from hookdepth.analyses import Inputs, Settings, Subject, chosen
from hookdepth.data import Probe
from hookdepth.errors import HookdepthError
from hookdepth.runs.sharing import groups_of

PARTS = ("layer", "attn", "mlp")
LENGTHS = (20, 14, 9)
CUTS = ((8, 12), (8,), ())


def close(ours, reference, scale=1e-4):
    reference = torch.as_tensor(reference)
    assert ours.shape == reference.shape
    assert torch.isfinite(ours).all()
    largest = reference.abs().max().item()
    assert largest > 0.01, "the reference shows no effect, so agreeing with it means nothing"
    assert (ours - reference).abs().max().item() <= scale * largest


def probe_of(ids, answer_positions):
    return Probe("", "", tuple(ids), tuple(map(str, ids)), tuple(answer_positions))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    hf = tiny_model(request.param)
    return hf, hookdepth.wrap(hf), prompts(3, LENGTHS)


def results_of(names, model, inputs, **settings):
    finished = {}
    for task in groups_of(chosen(names), Subject(model, inputs, Settings(**settings))):
        partials = [task.run(chunk, lambda: None) for chunk in range(task.n_chunks)]
        assert all(p.null_effect is None or p.null_effect < 1e-4 for p in partials)
        finished.update(task.finish(partials))
    return finished


def test_residual_stats(family):
    hf, model, ids = family
    ours = results_of(["residual-stats"], model, Inputs(tuple(map(tuple, ids))))["residual-stats"]
    reference = naive.residual_stats(hf, ids)
    assert {name for name in ours if not name.startswith("per_prompt.")} == set(reference)
    for name, values in reference.items():
        close(ours[name], values, 1e-5)
    for number, prompt in enumerate(ids):
        for name, values in naive.residual_stats(hf, [prompt]).items():
            close(ours[f"per_prompt.{name}"][number], values, 1e-5)


def test_logit_lens(family):
    hf, model, ids = family
    ours = results_of(["logit-lens"], model, Inputs(tuple(map(tuple, ids))))["logit-lens"]
    reference = naive.logit_lens(hf, ids)
    close(ours["kl"], reference["kl"])
    close(ours["topk_overlap"], reference["topk_overlap"], 1e-6)
    for number, prompt in enumerate(ids):
        close(ours["per_prompt.kl"][number], naive.logit_lens(hf, [prompt])["kl"])
    assert ours["kl"][-1] == 0
    assert ours["topk_overlap"][-1] == 1


@pytest.mark.parametrize("part", PARTS)
def test_skip(family, part):
    hf, model, ids = family
    inputs = Inputs(tuple(map(tuple, ids)), CUTS)
    ours = results_of(["skip-current", "skip-future"], model, inputs, parts=(part,))
    for number, prompt in enumerate(ids):
        effect, output = naive.skip(hf, prompt, part)
        close(ours["skip-current"][f"per_prompt.{part}.effect"][number], effect)
        close(ours["skip-current"][f"per_prompt.{part}.output"][number], output)
        at_cuts = [naive.skip(hf, prompt, part, cut=cut) for cut in CUTS[number]]
        effect = ours["skip-future"][f"per_prompt.{part}.effect"][number]
        output = ours["skip-future"][f"per_prompt.{part}.output"][number]
        if at_cuts:
            close(effect, torch.stack([e for e, _ in at_cuts]).amax(0))
            close(output, torch.stack([o for _, o in at_cuts]).amax(0))
        else:
            assert effect.isnan().all(), "nothing was measured on a prompt that cannot be cut"
    for name in ("skip-current", "skip-future"):
        per_prompt = ours[name][f"per_prompt.{part}.effect"]
        measured = per_prompt if name == "skip-current" else per_prompt[:2]
        assert torch.equal(ours[name][f"{part}.effect"], measured.amax(0))
        assert measured.tril(-1).abs().max() == 0, "a skipped layer changed an earlier one"
    assert ours["skip-future"][f"{part}.effect"].diagonal().abs().max() == 0


def test_parts_together_equal_parts_alone(family):
    _, model, ids = family
    inputs = Inputs(tuple(map(tuple, ids)), CUTS)
    names = ["skip-current", "skip-future"]
    together = results_of(names, model, inputs, parts=PARTS)
    for part in PARTS:
        alone = results_of(names, model, inputs, parts=(part,))
        for name in names:
            for kind in ("effect", "output"):
                close(together[name][f"{part}.{kind}"], alone[name][f"{part}.{kind}"])


@pytest.mark.parametrize("keep_front", [1, 4])
def test_the_first_tokens_do_not_count_where_they_are_left_out(keep_front):
    hf = tiny_model("llama")
    model, ids = hookdepth.wrap(hf), prompts(3, LENGTHS)
    inputs = Inputs(tuple(map(tuple, ids)))
    ours = results_of(["residual-stats", "logit-lens"], model, inputs, keep_front=keep_front)
    # What is left of a prompt's sums is what its first tokens did not bring: those see no later ones.
    heads, whole = Inputs(tuple(tuple(prompt[:keep_front]) for prompt in ids)), {}
    for part in (inputs, heads):
        whole[part] = results_of(["residual-stats", "logit-lens"], model, part)
    n_all, n_front = sum(LENGTHS), keep_front * len(LENGTHS)
    for name, own in ours.items():
        for key, values in own.items():
            if key.endswith(".last"):  # of the last token, which is never among the first
                torch.testing.assert_close(values, whole[inputs][name][key])
            elif "_max" not in key and not key.startswith("per_prompt."):
                total = whole[inputs][name][key] * n_all - whole[heads][name][key] * n_front
                torch.testing.assert_close(values, total / (n_all - n_front), rtol=1e-4, atol=1e-5)
    largest = whole[inputs]["residual-stats"]["relative_contribution_max.layer"]
    assert (ours["residual-stats"]["relative_contribution_max.layer"] <= largest).all()


@pytest.mark.parametrize("name", ["residual-stats", "logit-lens"])
def test_a_prompt_of_which_nothing_is_left_is_refused(name):
    model, inputs = hookdepth.wrap(tiny_model("llama")), Inputs(tuple(map(tuple, prompts(3, LENGTHS))))
    says = r"--keep-front 9 leaves nothing of prompt 2 .*\(it has 9 tokens\); give --keep-front 8 at most"
    with pytest.raises(HookdepthError, match=says):
        groups_of(chosen([name]), Subject(model, inputs, Settings(keep_front=9)))


@pytest.mark.parametrize("keep_front", [0, 1, 3])
def test_keep_front(keep_front):
    hf, ids = tiny_model("llama"), prompts(1, (20,))
    model = hookdepth.wrap(hf)
    inputs = Inputs(tuple(map(tuple, ids)), ((8, 12),))
    names = ["skip-current", "skip-future", "local-current", "local-future"]
    ours = results_of(names, model, inputs, keep_front=keep_front)
    for cut, name in ((None, "current"), (12, "future")):
        effect, _ = naive.skip(hf, ids[0], "layer", cut=cut, keep_front=keep_front)
        local = naive.local(hf, ids[0], cut=cut, keep_front=keep_front)
        if cut:
            effect = torch.maximum(effect, naive.skip(hf, ids[0], "layer", cut=8, keep_front=keep_front)[0])
            local = torch.maximum(local, naive.local(hf, ids[0], cut=8, keep_front=keep_front))
        close(ours[f"skip-{name}"]["layer.effect"], effect)
        close(ours[f"local-{name}"]["layer.effect"], local)


def test_local(family):
    hf, model, ids = family
    ours = results_of(["local-current", "local-future"], model, Inputs(tuple(map(tuple, ids)), CUTS))
    for number, prompt in enumerate(ids):
        close(ours["local-current"]["per_prompt.layer.effect"][number], naive.local(hf, prompt))
        if CUTS[number]:
            at_cuts = torch.stack([naive.local(hf, prompt, cut=cut) for cut in CUTS[number]])
            close(ours["local-future"]["per_prompt.layer.effect"][number], at_cuts.amax(0))


def test_residual_erasure(family):
    hf, model, ids = family
    probes = (probe_of(ids[1], [12, 13]), probe_of(ids[2], [5, 6]))
    inputs = Inputs((), (), tuple(map(tuple, ids)), probes)
    ours = results_of(["residual-erasure"], model, inputs)["residual-erasure"]
    baseline = naive.erasure_baseline(hf, ids)
    close(ours["baseline"], baseline, 1e-5)
    for number, probe in enumerate(probes):
        reference = naive.erasure(hf, list(probe.token_ids), list(probe.answer_positions), baseline)
        close(ours[f"effect.{number}"], reference)


def test_future_without_current_equals_future_with_it(family):
    _, model, ids = family
    inputs = Inputs(tuple(map(tuple, ids)), CUTS)
    alone = results_of(["skip-future", "local-future"], model, inputs)
    both = results_of(["skip-current", "skip-future", "local-current", "local-future"], model, inputs)
    close(alone["skip-future"]["layer.effect"], both["skip-future"]["layer.effect"])
    close(alone["local-future"]["layer.effect"], both["local-future"]["layer.effect"])

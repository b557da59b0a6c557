"""residual-erasure with every choice of what is put in, what is erased and where that is measured."""

import naive
import pytest
import torch
from test_against_naive import close, probe_of, results_of
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth.analyses import Inputs
from hookdepth.analyses.erasure import uninformative_residual
from hookdepth.cli import main
from hookdepth.engine.machines import PassCost

IDS = prompts(3, (9, 7, 11))
PROBES = (probe_of(IDS[0], [7, 8]), probe_of(IDS[1], [6]))


def one_pass_each(hf, probe, baseline, erase, measure):
    """[L+1, T], a plain pass for each point and token."""
    ids, length = list(probe.token_ids), len(probe.token_ids)
    clean, n_layers = naive.run_with(hf, ids), baseline.shape[0] - 1
    effect = torch.zeros(n_layers + 1, length)
    for point in range(n_layers + 1):
        site = ("resid_pre", point) if point < n_layers else ("resid_post", n_layers - 1)
        for token in range(length):
            erased = slice(token, token + 1) if erase == "token" else slice(0, token)
            first = token + 1 if erase == "token" else token
            measured = [p - 1 for p in probe.answer_positions] if measure == "answer" else list(range(first, length))
            if measured:
                run = naive.run_with(hf, ids, [(*site, naive.overwrite(erased, baseline[point]))])
                effect[point, token] = naive.output_change(clean.logits, run.logits, torch.tensor(measured))
    return effect


@pytest.mark.parametrize(
    ("kind", "erase", "measure"),
    [
        ("dataset", "token", "later"),
        ("prompt", "token", "answer"),
        ("zero", "before", "answer"),
        ("zero", "before", "later"),
        ("counterfactual", "token", "answer"),
    ],
)
def test_against_a_plain_pass_for_each(kind, erase, measure):
    hf = tiny_model("llama", num_hidden_layers=2)
    inputs = Inputs((), (), tuple(map(tuple, IDS)), PROBES)
    how = {"erasure_baseline": kind, "erase": erase, "measure": measure}
    if kind == "counterfactual":
        how |= {"erasure_baseline": "prompt", "counterfactual": IDS[2]}
    ours = results_of(["residual-erasure"], hookdepth.wrap(hf), inputs, **how)["residual-erasure"]
    for number, probe in enumerate(PROBES):
        baseline = {
            "dataset": lambda: naive.erasure_baseline(hf, IDS),
            "prompt": lambda probe=probe: naive.erasure_baseline(hf, [probe.token_ids]),
            "counterfactual": lambda: naive.erasure_baseline(hf, IDS[2:]),
            "zero": lambda: torch.zeros(3, 64),
        }[kind]()
        stored = ours[f"baseline.{number}"] if kind == "prompt" else ours["baseline"]
        assert torch.allclose(stored, baseline, atol=1e-4)
        close(ours[f"effect.{number}"], one_pass_each(hf, probe, baseline, erase, measure))


def test_prompts_of_the_baseline_share_passes_where_that_costs_less(monkeypatch):
    hf, ids = tiny_model("llama", num_hidden_layers=2), prompts(4, (9, 30, 8, 9))
    model, passes = hookdepth.wrap(hf), []
    monkeypatch.setattr("hookdepth.engine.passes.cost_of", lambda model: PassCost(4, full=40))
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids: passes.append(tuple(ids.shape)) or forward(ids))
    together = uninformative_residual(model, ids)
    assert passes == [(3, 9), (1, 30)], "one with a padded prompt, and one that would be too long for more"
    assert torch.allclose(together, naive.erasure_baseline(hf, ids), atol=1e-5)
    model.shares = False
    apart = uninformative_residual(model, ids)
    assert len(passes) == 2 + 4
    assert torch.allclose(together, apart, atol=1e-6)


@pytest.mark.parametrize(("option", "value"), [("--erase", "after"), ("--measure", "all"), ("--erasure-baseline", "0")])
def test_what_there_is_not_is_refused(option, value, tmp_path, capsys):
    assert main(["run", "--analyses", "residual-erasure", option, value, "--out", str(tmp_path)]) == 2
    assert value in capsys.readouterr().err
    assert main(["run", "--analyses", "logit-lens", "--erase", "before", "--out", str(tmp_path)]) == 2
    assert "none of the chosen analyses reads --erase" in capsys.readouterr().err


def test_the_page_says_what_is_erased_and_measured():
    notes = hookdepth.analyses.find("residual-erasure").notes
    found = {how: hookdepth.Result("", {}, {"settings": {how[0]: how[1]}}) for how in (("erase", "before"), ("x", "y"))}
    assert notes(found["erase", "before"]) == ["Here each cell replaces all tokens before it."]
    assert notes(found["x", "y"]) == []


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"counterfactual": IDS[2]}, "--erasure-baseline prompt, not dataset"),
        ({"counterfactual": [999], "erasure_baseline": "prompt"}, "the counterfactual prompt"),
        ({"counterfactual": "a text", "erasure_baseline": "prompt"}, "no tokenizer"),
        ({"counterfactual": "", "erasure_baseline": "prompt"}, "is no prompt"),
        ({"counterfactual": [0.5], "erasure_baseline": "prompt"}, "is no prompt"),
    ],
)
def test_a_counterfactual_prompt_that_is_none(how, says):
    inputs = Inputs((), (), tuple(map(tuple, IDS)), PROBES)
    with pytest.raises(hookdepth.HookdepthError, match=says):
        results_of(["residual-erasure"], hookdepth.wrap(tiny_model("llama", num_hidden_layers=2)), inputs, **how)

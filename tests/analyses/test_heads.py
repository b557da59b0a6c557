"""head-ablation against one plain pass a head."""

import pytest
import torch
from tiny_families import tiny
from tiny_models import prompts, tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth.analyses import Inputs, Settings, Subject, chosen
from hookdepth.errors import HookdepthError
from hookdepth.runs.sharing import groups_of


def found_on(model, inputs, **settings):
    (group,) = groups_of(chosen("head-ablation"), Subject(model, inputs, Settings(**settings)))
    partials = [group.run(chunk, lambda: None) for chunk in range(group.n_chunks)]
    assert all(one.null_effect < 1e-6 for one in partials)
    return group.finish(partials)["head-ablation"]


def plain(hf, ids, layer=None, head=None, value=None, front=0):
    """Probabilities and losses of one pass; z is what o_proj reads."""

    def replaced(_module, args):
        z = args[0].unflatten(-1, (4, 16)).clone()
        z[:, front:, head] = value
        return (z.flatten(-2),)

    handle = None if layer is None else hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(replaced)
    with torch.no_grad():
        logits = hf(torch.tensor([ids])).logits[0]
    if handle:
        handle.remove()
    loss = torch.nn.functional.cross_entropy(logits[front:-1], torch.tensor(ids[front + 1 :]), reduction="none")
    return logits[front:].softmax(-1), loss


@pytest.mark.parametrize("front", [0, 3])
def test_heads_against_plain_passes(front):
    hf = tiny_model("llama-gqa", num_hidden_layers=3)
    model, ids = hookdepth.wrap(hf), prompts(2, (11, 8))
    baseline = prompts(3, (9, 7), seed=5)
    found = found_on(model, Inputs(tuple(map(tuple, ids)), baseline=tuple(map(tuple, baseline))), keep_front=front)
    z = [[] for _ in range(3)]
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args, n=n: z[n].append(args[0][0]))
        for n, layer in enumerate(hf.model.layers)
    ]
    with torch.no_grad():
        for prompt in baseline:
            hf(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    means = [torch.cat(own).mean(0).unflatten(-1, (4, 16)) for own in z]
    for how in ("zero", "mean"):
        for layer in range(3):
            for head in range(4):
                value = 0.0 if how == "zero" else means[layer][head]
                outputs, rises = [], []
                for prompt in ids:
                    clean, before = plain(hf, prompt)
                    changed, after = plain(hf, prompt, layer, head, value, front)
                    outputs.append((changed - clean[front:]).norm(dim=-1).max())
                    rises.append(after - before[front:])
                assert found[f"{how}.output"][layer, head].item() == pytest.approx(max(outputs).item(), abs=1e-5)
                assert found[f"{how}.loss"][layer, head].item() == pytest.approx(
                    torch.cat(rises).mean().item(), abs=1e-5
                )
                assert max(outputs) > 1e-3


def test_layers_without_heads_are_nan_and_models_without_them_refused():
    ids = tuple(map(tuple, prompts(1, (9,))))
    found = found_on(hookdepth.wrap(tiny("lfm2")), Inputs(ids, baseline=ids))
    assert found["zero.output"][[0, 2]].isnan().all()
    assert (found["zero.output"][[1, 3]] > 0).all()
    with pytest.raises(HookdepthError, match="has no attention heads for head-ablation"):
        found_on(hookdepth.wrap(tiny("mamba")), Inputs(ids, baseline=ids))


def test_the_mean_is_over_the_data_sets_first_prompts(tmp_path):
    model = hookdepth.wrap(tiny_model("llama-gqa", num_hidden_layers=3), tiny_tokenizer())
    texts = [f"Anna has {number} apples and eats {number - 1} of them." for number in range(2, 14)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    found = hookdepth.analyse(model, "head-ablation", dataset=tmp_path / "texts.txt", limit=1)
    ids = [tuple(model.tokenizer(text)["input_ids"]) for text in texts]
    assert torch.equal(found["mean.loss"], found_on(model, Inputs(tuple(ids[:1]), (), tuple(ids[:10])))["mean.loss"])

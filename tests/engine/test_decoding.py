"""Texts of branches, against Hugging Face's `generate` under plain hooks, branch by branch."""

import pytest
import torch
from tiny_models import FAMILIES, prompts, tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth import AddVector, Branch, Erase, Identity, LayerPath, Patch, Scale, Skip, Subtract, generate
from hookdepth.errors import HookdepthError

NEW = 6
DIRECTION = torch.randn(64, generator=torch.Generator().manual_seed(1))


def hugging_face(model, ids, branch, where, new=NEW, **options):
    """What `model.hf.generate` writes while hooks do what the branch says, position by position."""
    handles, pre, state = [], {}, {"start": 0}

    def begin(_module, args, kwargs):
        given = kwargs.get("input_ids", args[0] if args else None)
        state["start"] = 0 if given.shape[1] == len(ids) and not state["start"] else state["stop"]
        state["stop"] = state["start"] + given.shape[1]

    def note(layer):
        return lambda hidden: pre.__setitem__(layer, hidden)

    def edit(one):
        def body(value):
            value = value.clone()
            for n in range(value.shape[1]):
                position = state["start"] + n
                is_new = position >= len(ids)
                if where not in ("both", "new" if is_new else "prompt") or not reaches(one.tokens, position, len(ids)):
                    continue
                if isinstance(one, Skip) and one.part == "layer":
                    value[:, n] = pre[one.layer][:, n]
                elif isinstance(one, Skip):
                    value[:, n] = 0
                elif isinstance(one, AddVector):
                    value[:, n] += one.value
                elif isinstance(one, Scale):
                    value[:, n] *= one.factor
                elif isinstance(one, Patch):
                    value[:, n] = one.value if one.value.ndim == 1 else one.value[position]
            return value

        return body

    handles.append(model.base.register_forward_pre_hook(begin, with_kwargs=True))
    handles += [model.on(one.site, one.layer, edit(one)) for one in branch]
    handles += [model.on("resid_pre", layer, note(layer)) for layer in {one.layer for one in branch}]
    options = {"do_sample": False, "pad_token_id": 0, **options}
    try:
        found = model.hf.generate(torch.tensor([ids]), max_new_tokens=new, **options)
    finally:
        for handle in handles:
            handle.remove()
    return found[0, len(ids) :].tolist()


def reaches(tokens, position, length):
    """Whether an intervention acts at a position of a text whose prompt has `length` tokens."""
    if isinstance(tokens, slice) and tokens.stop is None:
        start = tokens.start or 0
        return position >= (start if start >= 0 else length + start)
    return position in (range(length)[tokens] if isinstance(tokens, slice) else [t % length for t in tokens])


BRANCHES = {
    "layer": (Skip(2),),
    "attn": (Skip(1, "attn"),),
    "mlp": (Skip(4, "mlp"),),
    "steer": (AddVector("resid_post", 1, 9.0 * DIRECTION, tokens=slice(-1, None)),),
    "two": (Scale("mlp_out", 0, 0.3), Skip(3, tokens=slice(4, None))),
    "later": (AddVector("resid_pre", 3, DIRECTION, tokens=slice(5, None)),),
    "last": (Patch("resid_post", 4, DIRECTION),),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate_under_hooks(family):
    model = hookdepth.wrap(tiny_model(family))
    texts = prompts(3, lengths=(11, 7, 11))
    found = generate(model, texts, [Branch(own) for own in BRANCHES.values()], NEW)
    for ids, clean, own in zip(texts, found.clean, found, strict=True):
        assert clean.tokens == hugging_face(model, ids, (), "both")
        for branch, text in zip(BRANCHES.values(), own, strict=True):
            assert text.close_call is not None or text.tokens == hugging_face(model, ids, branch, "both")
    assert found.null_effect < 1e-4
    assert len({tuple(text.tokens) for own in found for text in own}) > 4  # and branches matter


@pytest.mark.parametrize("where", ["prompt", "new"])
def test_a_branch_may_act_on_the_prompt_or_on_new_tokens_alone(where):
    model = hookdepth.wrap(tiny_model("llama-gqa"))
    for ids in prompts(2, lengths=(9, 5)):
        found = generate(model, [ids], [Branch(own) for own in BRANCHES.values()], NEW, where=where)
        expected = [hugging_face(model, ids, own, where) for own in BRANCHES.values()]
        assert found.tokens[0] == expected
        both = [hugging_face(model, ids, own, "both") for own in BRANCHES.values()]
        assert expected != both  # so that the question where matters


def test_small_passes_give_the_same_texts():
    model = hookdepth.wrap(tiny_model("gemma3"))
    texts, branches = prompts(4, lengths=(9, 12, 5)), [Branch(own) for own in BRANCHES.values()]
    whole, small = (generate(model, texts, branches, NEW, max_rows=rows) for rows in (None, 4))
    assert (whole.tokens, whole.clean) == (small.tokens, small.clean)
    assert small.plan.n_passes > whole.plan.n_passes


def test_what_a_branch_shares_with_its_clean_run_is_read_once():
    model = hookdepth.wrap(tiny_model("llama"))
    ids = prompts(1, (200,))[0]
    late = [AddVector("resid_post", layer, DIRECTION, tokens=slice(-1, None)) for layer in range(5)]
    found = generate(model, [ids], late, 3)
    assert found.plan.work < 3 * 5 * 200  # the clean run and its control, and one token more
    assert found.tokens[0] == [hugging_face(model, ids, (one,), "both", 3) for one in late]
    assert generate(model, [ids], [Skip(1), Skip(2)], 3, where="new").plan.work < 3 * 5 * 200


def test_a_path_of_layers_writes_what_the_rearranged_model_writes():
    hf = tiny_model("llama-gqa")
    model, texts = hookdepth.wrap(hf), prompts(2, lengths=(9, 6))
    paths = [LayerPath("0,2-4"), LayerPath("0-2,1-4")]
    found = generate(model, texts, [Skip(3), paths[0], Branch((paths[1], Scale("mlp_out", 2, 0.5)))], 4)
    for number, path in enumerate([[0, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]], start=1):
        for ids, own in zip(texts, found, strict=True):
            written = list(ids)
            for _ in range(4):
                hidden = hf.model.embed_tokens(torch.tensor([written]))
                factors = hf.model.rotary_emb(hidden, torch.arange(len(written))[None])
                for layer in path:
                    halve = number == 2 and layer == 2
                    scaled = (
                        hf.model.layers[2].mlp.register_forward_hook(lambda *given: 0.5 * given[-1]) if halve else None
                    )
                    hidden = hf.model.layers[layer](hidden, position_embeddings=factors)
                    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                    if scaled:
                        scaled.remove()
                written.append(int(hf.lm_head(hf.model.norm(hidden))[0, -1].argmax()))
            assert own[number].tokens == written[len(ids) :]
    assert found.tokens[0][0] == hugging_face(model, texts[0], (Skip(3),), "both", 4)
    with pytest.raises(HookdepthError, match="path"):
        generate(model, texts, paths, 2, where="prompt")


def test_rows_end_at_stop_tokens_and_the_others_go_on():
    model = hookdepth.wrap(tiny_model("llama"), tiny_tokenizer())
    ids = prompts(1, (8,), vocab=280)[0]
    branches = [Identity("resid_pre", 0), *(Skip(layer) for layer in range(5))]
    free = generate(model, [ids], branches, 8)
    ends = free.clean[0].tokens[2]
    found = generate(model, [ids], branches, 8, stop=[ends])
    assert (found.clean[0].stopped, free.clean[0].stopped) == (True, False)
    for before, text in zip([*free[0], free.clean[0]], [*found[0], found.clean[0]], strict=True):
        at = before.tokens.index(ends) + 1 if ends in before.tokens else 8
        assert (text.tokens, text.stopped) == (before.tokens[:at], ends in before.tokens)
    word = tiny_tokenizer().decode(free.clean[0].tokens[1:3])
    stopped = generate(model, [ids], [], 8, stop=[word]).clean[0]
    assert stopped.stopped
    assert word not in stopped
    assert free.clean[0].startswith(stopped)
    own_end = model.hf.generation_config.eos_token_id
    model.hf.generation_config.eos_token_id = ends
    try:
        assert generate(model, [ids], [], 8).clean[0].tokens == found.clean[0].tokens
    finally:
        model.hf.generation_config.eos_token_id = own_end


def test_samples_depend_on_seed_and_prompt_and_on_nothing_beside_them():
    model = hookdepth.wrap(tiny_model("qwen3"))
    texts = prompts(3, lengths=(8, 6, 8))
    drawn = generate(model, texts, [Identity("resid_pre", 2), Skip(2)], 8, temperature=1.0, seed=5)
    assert [own[0].tokens for own in drawn] == [clean.tokens for clean in drawn.clean]  # the same numbers are drawn
    small = generate(model, texts, [Skip(2)], 8, temperature=1.0, seed=5, max_rows=3)
    assert [own[1].tokens for own in drawn] == [own[0].tokens for own in small]
    assert generate(model, texts, [], 8, temperature=1.0, seed=6).clean != drawn.clean
    greedy = generate(model, texts, [Skip(2)], 8)
    assert generate(model, texts, [Skip(2)], 8, temperature=1.0, top_k=1).tokens == greedy.tokens


def test_samples_follow_the_distribution():
    model = hookdepth.wrap(tiny_model("llama", vocab_size=20))
    ids = [3, 9, 4]
    with model.evaluating():
        expected = torch.softmax(model.unembed(model.forward(torch.tensor([ids])))[0, -1] / 3.0, -1)
    drawn = generate(model, [ids] * 600, [], 1, temperature=3.0).clean
    counts = torch.tensor([text.tokens[0] for text in drawn]).bincount(minlength=20) / 600
    assert (counts - expected).abs().max() < 0.06
    assert expected.max() < 0.9


def test_close_calls_are_told():
    hf = tiny_model("llama-untied")
    with torch.no_grad():
        hf.lm_head.weight[1::2] = hf.lm_head.weight[::2]  # every token has a twin
    model = hookdepth.wrap(hf)
    assert generate(model, prompts(1), [], 3).clean[0].close_call == 0
    assert "≈" in repr(generate(model, prompts(1), [], 3))


def test_what_cannot_be_generated_is_refused():
    model, ids = hookdepth.wrap(tiny_model("llama")), prompts(1, (6,))[0]
    wrong = [
        (([ids], [Branch((Skip(2),), cut=3)]), {}, "cut"),
        (([ids], [Skip]), {}, "Skip"),
        (([ids], 5), {}, "branches"),
        (([ids], [Skip(9)]), {}, "layer 9"),
        (([ids], [Skip(2)]), {"where": "later"}, "later"),
        (([ids], [Erase("resid_pre", 2, DIRECTION, tokens=[3])]), {"where": "new"}, "prompt alone"),
        (([ids], [Patch("resid_pre", 2, torch.zeros(6, 64))]), {}, 'where="prompt"'),
        (([ids], [Subtract(1, 3)]), {}, "clean run"),
        (([ids], [Skip(2)], 0), {}, "max_new_tokens"),
        (([ids], [Skip(2)], 600), {}, "context"),
        (([ids], [Skip(2)]), {"temperature": -1.0}, "temperature"),
        (([ids], [Skip(2)]), {"top_k": 3}, "top_k"),
        (([ids], [Skip(2)]), {"stop": ["word"]}, "tokenizer"),
        (([ids], [Skip(2)]), {"stop": [999]}, "999"),
        (([ids], [Skip(2)]), {"max_rows": 1}, "max_rows"),
    ]
    for arguments, options, named in wrong:
        with pytest.raises(HookdepthError, match=named):
            generate(model, *arguments, **options)
    subtract = generate(model, [ids], [Subtract(1, 3), Patch("resid_pre", 2, torch.zeros(6, 64))], 2, where="prompt")
    assert len(subtract[0]) == 2


def test_rotary_factors_that_change_with_the_length_are_refused_and_others_kept():
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    hf = tiny_model("llama", max_position_embeddings=16, rope_scaling=scaling)
    model = hookdepth.wrap(hf)
    texts = prompts(2, lengths=(9, 6))
    found = generate(model, texts, [Skip(2)], 5)
    assert [own[0].tokens for own in found] == [hugging_face(model, ids, (Skip(2),), "both", 5) for ids in texts]
    with pytest.raises(HookdepthError, match="rotary factors"):
        generate(model, texts, [Skip(2)], 12)

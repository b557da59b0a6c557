"""The naive reference: one ordinary forward pass of the Hugging Face model for each intervention.

    import naive
    effect, output = naive.skip(model, token_ids, part="layer")  # L passes, [L, L] and [L]

Written from the specification and the notebook that the project replaces, and importing nothing from hookdepth, so
that the two can be compared. Slow on purpose: no passes are shared, no rows are batched (but for integrated
gradients), and everything is kept. Models are float32 causal LMs in eval mode; prompts are lists of token ids.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6

# model_type -> the modules of a decoder layer whose outputs are added to the residual stream (attention, MLP).
PLAIN = ("self_attn", "mlp")
POST_NORMED = ("post_attention_layernorm", "post_feedforward_layernorm")
SUBLAYERS = {
    "llama": PLAIN,
    "mistral": PLAIN,
    "qwen2": PLAIN,
    "qwen3": PLAIN,
    "smollm3": PLAIN,
    "phi3": PLAIN,
    "granite": PLAIN,  # times config.residual_multiplier
    "olmo2": POST_NORMED,
    "gemma2": POST_NORMED,
    "gemma3_text": POST_NORMED,
}

Edit = tuple[str, int, Callable[[Tensor], Tensor]]
Tokens = Sequence[int]


class Run(NamedTuple):
    """What one forward pass gave: `run.resid_post[l] - run.resid_pre[l]` is layer l's contribution, [B, T, d]."""

    logits: Tensor  # [B, T, vocab]
    resid_pre: list[Tensor]  # all four as they were after the edits
    attn_out: list[Tensor]
    mlp_out: list[Tensor]
    resid_post: list[Tensor]

    def contributions(self) -> list[Tensor]:
        """`c = run.contributions()`: c[l] = resid_post[l] − resid_pre[l], [B, T, d] each."""
        return [after - before for before, after in zip(self.resid_pre, self.resid_post, strict=True)]

    def stream(self) -> list[Tensor]:
        """`h = run.stream()`: resid_pre[0..L-1], then the final residual (before the final norm); L+1 of [B, T, d]."""
        return [*self.resid_pre, self.resid_post[-1]]


def run_with(model: nn.Module, token_ids: Tokens | Tensor, edits: Sequence[Edit] = ()) -> Run:
    """`run_with(model, ids, [("attn_out", 3, torch.zeros_like)])`: one forward pass with activations replaced.

    An edit is (site, layer, function): function gets the activation [B, T, d] and returns what takes its place.
    Sites: resid_pre, attn_out, mlp_out (what the sublayer adds to the residual stream), resid_post. `token_ids` is a
    prompt, or a tensor [B, T] of prompts of equal length.
    """
    config, layers = model.config, model.model.layers
    attn_name, mlp_name = SUBLAYERS[config.model_type]
    scale = config.residual_multiplier if config.model_type == "granite" else 1.0
    ids = token_ids if isinstance(token_ids, Tensor) else torch.tensor([list(token_ids)])
    ids = ids.to(model.model.embed_tokens.weight.device)
    seen: dict[tuple[str, int], Tensor] = {}

    def apply(site: str, layer: int, value: Tensor) -> Tensor:
        for edit_site, edit_layer, function in edits:
            if (edit_site, edit_layer) == (site, layer):
                value = function(value)
        seen[site, layer] = value
        return value

    def before(layer: int):  # a hook on a decoder layer's input, which comes by position or by keyword
        def hook(_module, args, kwargs):
            if args:
                return (apply("resid_pre", layer, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": apply("resid_pre", layer, kwargs["hidden_states"])}

        return hook

    def after(
        site: str, layer: int, scale: float = 1.0
    ):  # a hook on an output, a tensor or a tuple that begins with it
        def hook(_module, _args, output):
            raw = output[0] if isinstance(output, tuple) else output
            if scale == 1.0:
                new = apply(site, layer, raw)
            else:  # edits see what is added, raw * scale; entries they leave alone stay the same to the last bit
                added = raw * scale
                edited = apply(site, layer, added)
                new = torch.where(edited == added, raw, edited / scale)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            for handle in (
                layer.register_forward_pre_hook(before(i), with_kwargs=True),
                layer.get_submodule(attn_name).register_forward_hook(after("attn_out", i, scale)),
                layer.get_submodule(mlp_name).register_forward_hook(after("mlp_out", i, scale)),
                layer.register_forward_hook(after("resid_post", i)),
            ):
                stack.callback(handle.remove)
        logits = model(input_ids=ids, use_cache=False).logits

    def gather(site: str) -> list[Tensor]:
        return [seen[site, i] for i in range(len(layers))]

    return Run(logits, *map(gather, ("resid_pre", "attn_out", "mlp_out", "resid_post")))


@torch.no_grad()
def visit(model: nn.Module, prompt: Tokens, stages: Sequence[Sequence[int]], mean: bool = False) -> list[Tensor]:
    """`visit(model, ids, [(0,), (1,), (1,), (2, 3)])[-1]`: the layers called by hand, in this order.

    Layers of one stage read the same input, and what they add is summed (or averaged). Gives what each visit added, in
    order, and at last the logits.
    """
    given: dict[int, dict] = {}
    with ExitStack() as stack:
        for i, layer in enumerate(model.model.layers):

            def note(_module, args, kwargs, i=i):
                hidden = args[0] if args else kwargs.pop("hidden_states")
                given[i] = {"hidden_states": hidden, "args": args[1:], "kwargs": kwargs}

            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        model(input_ids=torch.tensor([list(prompt)]), use_cache=False)
    hidden, added = given[0]["hidden_states"], []
    for stage in stages:
        outputs = []
        for i in stage:
            output = model.model.layers[i](hidden, *given[i]["args"], **given[i]["kwargs"])
            outputs.append(output[0] if isinstance(output, tuple) else output)
            added.append(outputs[-1] - hidden)
        total = sum(output - hidden for output in outputs) / (len(stage) if mean else 1)
        hidden = outputs[0] if len(stage) == 1 else hidden + total
    return [*added, unembed(model, hidden)]


def overwrite(tokens: slice | int, value: Tensor | float) -> Callable[[Tensor], Tensor]:
    """`("resid_pre", 3, overwrite(slice(1, 8), 0.0))`: an edit's function that sets x[:, tokens] to the value."""

    def function(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, tokens] = value
        return x

    return function


def unembed(model: nn.Module, residual: Tensor) -> Tensor:
    """`unembed(model, run.resid_pre[3])`: final norm, unembedding and whatever the family does to its logits."""
    logits = model.lm_head(model.model.norm(residual))
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    if model.config.model_type == "granite":
        logits = logits / model.config.logits_scaling
    return logits


@torch.no_grad()
def residual_stats(model: nn.Module, prompts: Sequence[Tokens]) -> dict[str, Tensor]:
    """`residual_stats(model, prompts)["cosine.mlp"]`: sizes and directions of contributions, [L] (norm.resid [L+1]).

    Every number is taken a token at a time; means and maxima run over all tokens of all prompts.
    """
    rows: dict[str, list[Tensor]] = {}  # name -> one [T, L] (or [T, L+1]) tensor a prompt
    for prompt in prompts:
        run = run_with(model, prompt)
        pairs = {  # what is added, and what it is added to
            "attn": (run.attn_out, run.resid_pre),
            "mlp": (run.mlp_out, [h + a for h, a in zip(run.resid_pre, run.attn_out, strict=True)]),
            "layer": (run.contributions(), run.resid_pre),
        }
        found = {"norm.resid": torch.stack([h[0].float().norm(dim=-1) for h in run.stream()], dim=-1)}
        for part, (added, onto) in pairs.items():
            x, y = torch.cat(added).float(), torch.cat(onto).float()  # [L, T, d]
            found[f"norm.{part}"] = x.norm(dim=-1).T
            found[f"relative_contribution.{part}"] = (x.norm(dim=-1) / y.norm(dim=-1).clamp(min=EPS)).T
            found[f"cosine.{part}"] = F.cosine_similarity(x, y, dim=-1).T
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
        h = torch.cat(run.stream()).double()  # [L+1, T, d]
        cosines = torch.stack([F.cosine_similarity(one[None], h, dim=-1) for one in h]).permute(2, 0, 1)
        angles = cosines.clamp(-1, 1).arccos() / torch.pi
        rows.setdefault("angular_distance.last", []).append(angles[-1:])
        rows.setdefault("angular_distance.mean", []).append(angles)
        rows.setdefault("block_influence", []).append(1 - cosines.diagonal(1, 1, 2))
    tokens = {name: torch.cat(values) for name, values in rows.items()}
    result = {name: value.double().mean(0).float() for name, value in tokens.items()}
    for part in ("attn", "mlp", "layer"):
        result[f"relative_contribution_max.{part}"] = tokens[f"relative_contribution.{part}"].amax(0)
    for name in [name for name in rows if name.startswith(("relative_contribution.", "norm."))]:
        result[f"first_token.{name}"] = torch.stack([own[0] for own in rows[name]]).mean(0)
    return result


@torch.no_grad()
def logit_lens(
    model: nn.Module, prompts: Sequence[Tokens], k: int = 5, layers: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """`logit_lens(model, prompts)["kl"]`: KL(lens‖final) ≥ 0 and top-k overlap in [0, 1], token means, [L+1] each.

    `layers` are the points of the stream to look at, each an entry of the results; all of 0..L without it.
    """
    kl, overlap = [], []
    for prompt in prompts:
        run = run_with(model, prompt)
        final = run.logits[0].float().log_softmax(-1)  # [T, vocab]
        final_top = final.topk(k, dim=-1).indices
        stream = run.stream()
        points = stream if layers is None else [stream[layer] for layer in layers]
        lenses = [unembed(model, h)[0].float().log_softmax(-1) for h in points]
        kl.append(torch.stack([(lens.exp() * (lens - final)).sum(-1) for lens in lenses], dim=-1))  # [T, L+1]
        tops = [lens.topk(k, dim=-1).indices for lens in lenses]
        shared = [(top[:, :, None] == final_top[:, None, :]).sum((1, 2)) / k for top in tops]
        overlap.append(torch.stack(shared, dim=-1))
    return {"kl": torch.cat(kl).double().mean(0).float(), "topk_overlap": torch.cat(overlap).double().mean(0).float()}


def relative_change(clean: Tensor, changed: Tensor, measured: slice) -> Tensor:
    """`relative_change(c, c_bar, slice(None))`: max over measured tokens of ‖c − c̄‖ / ‖c‖, a scalar ≥ 0."""
    clean, changed = clean[0, measured].float(), changed[0, measured].float()
    return ((clean - changed).norm(dim=-1) / clean.norm(dim=-1).clamp(min=EPS)).max()


def output_change(clean: Tensor, changed: Tensor, positions: slice | Tensor) -> Tensor:
    """`output_change(z, z_bar, slice(None))`: max over positions of ‖softmax(z) − softmax(z̄)‖₂, a scalar in [0, √2]."""
    clean, changed = clean[0, positions].float(), changed[0, positions].float()
    return (clean.softmax(-1) - changed.softmax(-1)).norm(dim=-1).max()


@torch.no_grad()
def skip(
    model: nn.Module,
    prompt: Tokens,
    part: str = "layer",
    cut: int | None = None,
    keep_front: int = 1,
    layers: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`effect, output = skip(model, ids, "mlp", cut=8)`: skip each layer's part in a pass of its own; [L, L] and [L].

    Without a cut (skip-current) tokens from keep_front on are skipped and all tokens measured; with one (skip-future)
    tokens keep_front..cut-1 are skipped and tokens from the cut on measured. Row s skipped, column i measured; of other
    layers than `layers` rows are 0.
    """
    clean = run_with(model, prompt)
    contributions = clean.contributions()
    skipped, measured = slice(keep_front, cut), slice(cut, None)
    n = len(contributions)
    effect, output = torch.zeros(n, n), torch.zeros(n)
    for s in range(n) if layers is None else layers:
        if part == "layer":  # nothing below s changes, so its input is the clean one
            edit = ("resid_post", s, overwrite(skipped, clean.resid_pre[s][:, skipped]))
        else:
            edit = ({"attn": "attn_out", "mlp": "mlp_out"}[part], s, overwrite(skipped, 0.0))
        run = run_with(model, prompt, [edit])
        output[s] = output_change(clean.logits, run.logits, measured)
        for i, changed in enumerate(run.contributions()):
            effect[s, i] = relative_change(contributions[i], changed, measured)
    return effect, output


@torch.no_grad()
def local(model: nn.Module, prompt: Tokens, cut: int | None = None, keep_front: int = 1) -> Tensor:
    """`effect = local(model, ids)`: what layer s's contribution does to layer i > s directly, [L, L], 0 for i ≤ s.

    One pass a pair: layer i's input is h_i − c_s on the tokens that `skip` would skip, clean elsewhere.
    """
    clean = run_with(model, prompt)
    contributions = clean.contributions()
    changed, measured = slice(keep_front, cut), slice(cut, None)
    effect = torch.zeros(len(contributions), len(contributions))
    for s, c in enumerate(contributions):
        for i in range(s + 1, len(contributions)):
            without = (clean.resid_pre[i] - c)[:, changed]
            run = run_with(model, prompt, [("resid_pre", i, overwrite(changed, without))])
            effect[s, i] = relative_change(contributions[i], run.contributions()[i], measured)
    return effect


@torch.no_grad()
def erasure_baseline(model: nn.Module, prompts: Sequence[Tokens]) -> Tensor:
    """`baseline = erasure_baseline(model, prompts)`: the mean residual over all tokens of all prompts, [L+1, d]."""
    sums = [torch.cat([h.float().sum(dim=1) for h in run_with(model, prompt).stream()]) for prompt in prompts]
    total = torch.zeros_like(sums[0])
    for one in sums:
        total += one
    return total / sum(len(prompt) for prompt in prompts)


@torch.no_grad()
def erasure(
    model: nn.Module,
    token_ids: Tokens,
    answer_positions: Sequence[int],
    baseline: Tensor,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """`effect = erasure(model, ids, [18, 19], baseline)`: replace h_l[t] by baseline[l], a pass for each; [L+1, T].

    The effect is the largest change of the output distributions that predict the answer tokens. `layers` are the l to
    do, each a row of the result; all of 0..L without it.
    """
    predicting = torch.tensor(answer_positions) - 1
    clean = run_with(model, token_ids)
    last = len(clean.resid_pre)
    rows = []
    for layer in range(last + 1) if layers is None else layers:
        site, at = ("resid_pre", layer) if layer < last else ("resid_post", last - 1)
        rows.append(torch.zeros(len(token_ids)))
        for t in range(len(token_ids)):
            run = run_with(model, token_ids, [(site, at, overwrite(t, baseline[layer]))])
            rows[-1][t] = output_change(clean.logits, run.logits, predicting)
    return torch.stack(rows)


def answer_probability(logits: Tensor, token_ids: Tokens, answer_positions: Sequence[int]) -> Tensor:
    """`answer_probability(run.logits, ids, [18, 19])`: Σ p(answer token) for each row of the batch, [B]."""
    positions = torch.tensor(answer_positions)
    probabilities = logits[:, positions - 1].float().softmax(-1)  # [B, answers, vocab]
    wanted = torch.tensor(token_ids)[positions]
    return sum(probabilities[:, j, token] for j, token in enumerate(wanted.tolist()))


def integrated_gradients(
    model: nn.Module,
    token_ids: Tokens,
    answer_positions: Sequence[int],
    layer: int,
    part: str = "layer",
    steps: int = 256,
    method: str = "riemann",
    block: int = 16,
) -> tuple[Tensor, float, float]:
    """`attribution, f_x, f_baseline = integrated_gradients(model, ids, [18, 19], layer=3)`: attribution [T] to Σ p.

    The path runs from the prompt's own token mean of that activation (resid_post for part layer, attn_out, mlp_out)
    to the activation itself, at k/steps (`riemann`, the paper's) or (k + ½)/steps (`midpoint`), k = 0..steps-1.
    """
    site = {"layer": "resid_post", "attn": "attn_out", "mlp": "mlp_out"}[part]
    offset = {"riemann": 0.0, "midpoint": 0.5}[method]
    with torch.no_grad():
        clean = run_with(model, token_ids)
        x = getattr(clean, site)[layer]  # [1, T, d]
        base = x.mean(dim=1, keepdim=True).expand_as(x)
        f_x = answer_probability(clean.logits, token_ids, answer_positions).item()
        at_base = run_with(model, token_ids, [(site, layer, lambda _: base)])
        f_base = answer_probability(at_base.logits, token_ids, answer_positions).item()
    total = torch.zeros_like(x[0], dtype=torch.float32)  # [T, d]
    nodes = (torch.arange(steps, dtype=torch.float32) + offset) / steps
    for some in nodes.to(x.device).split(block):
        r = some[:, None, None]
        target = (x * r + base * (1 - r)).requires_grad_()  # [block, T, d]
        ids = torch.tensor([list(token_ids)] * len(some), device=x.device)
        with torch.enable_grad():
            run = run_with(model, ids, [(site, layer, lambda _, target=target: target)])
            f = answer_probability(run.logits, token_ids, answer_positions).sum()
        (gradient,) = torch.autograd.grad(f, target)
        total += (gradient * (x - base)).float().sum(0)
    return total.sum(-1) / steps, f_x, f_base

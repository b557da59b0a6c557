"""verify: is what the engine measures on this model, on this machine, what plain single passes give?

    report = hookdepth.verify(model)
    print(report)            # a table: kind of branch, verdict, how far apart, how large the effects are
    report.ok                # False where anything is wrong

Random branches of every kind run through the engine, many in a pass, and one by one through the model's own forward
call under one plain hook each. The hooks here are written apart from the engine's and the adapter's, so that a mistake
there cannot be made twice; that the contributions add up is the self-check's to say, which runs first.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hookdepth import metrics
from hookdepth.engine.ablation import Ablate, Clamp
from hookdepth.engine.branches import Branch
from hookdepth.engine.gradients import Given, differentiate
from hookdepth.engine.intervention import Intervention
from hookdepth.engine.interventions import AddVector, Patch, Skip
from hookdepth.engine.measurements import Custom, LayerEffect, OutputEffect
from hookdepth.engine.passes import measure
from hookdepth.engine.tokens import positions
from hookdepth.errors import HookdepthError, shown, whole_number
from hookdepth.model.ambient import plainly
from hookdepth.model.checking import check
from hookdepth.model.contributions import INNER_SITE
from hookdepth.model.decoder import Decoder
from hookdepth.model.sites import part_of

LENGTHS = (14, 9, 6)
KINDS = ("sites", "skips", "tokens", "heads", "neurons", "cuts", "several", "lengths", "gradients")
_ROUNDING = 1e-4  # of the largest value, in float32: as SPEC has it for runs that share work
_PROMPTS = 5  # are tried for one beside which nothing jumps
_DIFFERENCES = 0.05  # of a derivative: what finite differences in float32 resolve
_STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
_HALF = (torch.bfloat16, torch.float16)


@dataclass
class Verdict:
    """What one kind of branches gave.

    Attributes:
        kind: of `KINDS`.
        verdict: right (equal bits), rounding, wrong, or none (the model has no such site).
        branches: how many.
        difference: the largest between the engine and a plain pass.
        effect: the largest of these branches on the output; where it is 0, agreeing means nothing.
        case: the smallest wrong one.
    """

    kind: str
    verdict: str = "none"
    branches: int = 0
    difference: float = 0.0
    effect: float = 0.0
    case: str = ""


@dataclass
class Verification:
    """All verdicts on a model: print it, or `json()` it."""

    model: str
    family: str
    dtype: str
    device: str
    prefixes: bool
    null_effect: float
    seconds: float
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(one.verdict != "wrong" for one in self.verdicts)

    def json(self) -> str:
        """The same as JSON."""
        return json.dumps({**asdict(self), "ok": self.ok}, indent=2)

    def __str__(self) -> str:
        head = f"{self.model} ({self.family}), {self.dtype} on {self.device}, noise floor {self.null_effect:.2g}"
        start = (
            ""
            if self.prefixes
            else "\nIts layers keep no keys and values that can be handed on: passes start at token 0."
        )
        lines = [f"{'branches':<12}{'verdict':<10}{'number':>7}{'difference':>12}{'effect':>9}"]
        for one in self.verdicts:
            still = "  nothing moved" if one.branches and not one.effect else ""
            numbers = f"{one.branches:>7}{one.difference:>12.2g}{one.effect:>9.2g}"
            lines.append(f"{one.kind:<12}{one.verdict:<10}{numbers}{still}{'  ' + one.case if one.case else ''}")
        return "\n".join([head + start, *lines])


@plainly
def verify(model: Decoder, n: int = 6, seed: int = 0) -> Verification:
    """Compare the engine with plain single passes, on random branches of every kind.

        hookdepth.verify(model).ok      # True

    Args:
        model: from `load` or `wrap`.
        n: branches of each kind.
        seed: of what is drawn.

    Per kind *right*: equal bits; *rounding*: as far apart as the dtype explains, which in 16 bits means that a float32
    copy of the model is right to 1e-4 of the largest value; or *wrong*, with the smallest case. Gradients are compared
    with finite differences.

    Raises:
        HookdepthError: no model, or one that the self-check refuses.
    """
    if not isinstance(model, Decoder):
        raise HookdepthError(f"the model is {shown(model)}", "give what load or wrap gave")
    n, began = whole_number("the number of branches", n, 1), time.perf_counter()
    check(model)
    found, floor = _verdicts(model, n, seed)
    if model.dtype in _HALF and any(one.verdict == "wrong" for one in found):
        beside = {one.kind: one for one in _verdicts(_in_float32(model), n, seed)[0]}
        for one in found:
            if one.verdict == "wrong" and beside[one.kind].verdict != "wrong":
                one.verdict, one.case = "rounding", ""
    spent = time.perf_counter() - began
    dtype = str(model.dtype).removeprefix("torch.")
    about = (model.name, model.family.name, dtype, str(model.device), model.prefixes, floor, spent)
    return Verification(*about, found)


def _in_float32(model: Decoder) -> Decoder:
    copied = Decoder(copy.deepcopy(model.hf).float(), model.tokenizer, name=model.name, family=model.family)
    check(copied)
    return copied


def _verdicts(model: Decoder, n: int, seed: int) -> tuple[list[Verdict], float]:
    source = random.Random(seed)
    vocab = int(model.hf.get_input_embeddings().weight.shape[0])
    prompts = [[source.randrange(vocab) for _ in range(length)] for length in LENGTHS]
    found, floor = [], 0.0
    with model.evaluating():
        clean = [_plain(model, prompt) for prompt in prompts]
    for kind in KINDS:
        branches = list(_branches(model, kind, n, source)) if kind != "gradients" else []
        if kind == "gradients":
            found.append(_gradients(model, vocab, source))
        elif branches:
            verdict, own = _compared(model, kind, prompts, branches, clean, source.randrange(vocab))
            found.append(verdict)
            floor = max(floor, own)
        else:
            found.append(Verdict(kind))
    return found, floor


# What is drawn.


def _branches(model: Decoder, kind: str, n: int, source: random.Random) -> Iterator[Branch]:
    where = [(site, layer) for layer in range(model.n_layers) for site in model.sites.of(layer)]
    having = {"heads": "z", "neurons": "neurons"}.get(kind)
    where = [place for place in where if having in (None, place[0])]
    if kind == "cuts":  # a later layer must be there to see it
        where = [place for place in where if 2 * place[1] < model.n_layers]
    if kind in ("sites", "tokens"):  # every site at least once
        source.shuffle(where)
        first = list({site: (site, layer) for site, layer in where}.values())
        where = [*first, *where[: max(0, n - len(first))]]
    elif where:
        where = [source.choice(where) for _ in range(n)]
    for number, (site, layer) in enumerate(where):
        prompt = number % len(LENGTHS) if kind == "lengths" else 0
        length = LENGTHS[prompt]
        drawn = [_drawn(model, kind, site, layer, source, length)]
        if kind == "several":
            drawn += [_drawn(model, kind, *source.choice(where), source, length) for _ in range(2)]
        cut = source.randrange(2, length - 1) if kind == "cuts" else None
        measured = sorted(source.sample(range(cut or 0, length), 3 if (cut or 0) + 3 < length else 1))
        yield Branch(tuple(drawn), prompt, cut, measured=measured if number % 2 else None)


def _drawn(model: Decoder, kind: str, site: str, layer: int, source: random.Random, length: int) -> Intervention:
    shape, tokens = model.shape_of(site, layer), slice(source.randrange(2), None)
    head = source.randrange(shape[0]) if site == "z" else None
    part = part_of(site) if site.endswith("_out") else "layer" if site == "resid_post" else None
    if kind in ("skips", "cuts", "lengths", "several") and part and source.random() < 0.7:
        return Skip(layer, part, tokens)
    if kind == "neurons":
        return Clamp(site, layer, source.randrange(shape[0]), 3.0, tokens)
    if kind == "heads" or (kind == "lengths" and site != "resid_mid" and source.random() < 0.5):
        return Ablate(site, layer, head, "mean" if source.random() < 0.5 else 0.0, tokens)
    generator = torch.Generator().manual_seed(source.randrange(1 << 30))
    value = torch.randn(shape if head is None else shape[1:], generator=generator)
    if kind == "tokens":
        return Patch(site, layer, value, [source.randrange(length)], head)
    return (
        AddVector(site, layer, value, tokens, head)
        if source.random() < 0.5
        else Patch(site, layer, value, tokens, head)
    )


# Through the engine, and through plain passes.


def _compared(
    model: Decoder,
    kind: str,
    prompts: Sequence[Sequence[int]],
    branches: Sequence[Branch],
    clean: Sequence[dict[Any, Tensor]],
    token: int,
) -> tuple[Verdict, float]:
    logit = Custom("logit", lambda view: view.logits[..., token].float(), "mean")
    # Measurements of changes alone let passes leave out what is left of them; the others need it.
    changes = measure(model, prompts, branches, [OutputEffect()])
    values = measure(model, prompts, branches, [LayerEffect(), logit])
    ours = [changes.output["output"], values.output["logit"], *values.layer["effect"].T]
    with model.evaluating():
        pairs = [(branch, _plain(model, prompts[branch.prompt], branch, clean[branch.prompt])) for branch in branches]
        rows = [_measured(branch, clean[branch.prompt], own, token) for branch, own in pairs]
    theirs = list(torch.tensor(rows).T)
    verdict = Verdict(kind, "right", len(branches), effect=theirs[0].max().item())
    wrong: set[int] = set()
    for mine, plain in zip(ours, theirs, strict=True):
        apart = (mine - plain).abs()
        verdict.difference = max(verdict.difference, apart.max().item())
        wrong |= set((~(apart <= _ROUNDING * max(1.0, plain.abs().max().item()))).nonzero().flatten().tolist())
    if wrong:
        smallest = min(wrong, key=lambda number: (len(branches[number].interventions), number))
        verdict.verdict, verdict.case = "wrong", _shown(branches[smallest])
    elif verdict.difference:
        verdict.verdict = "rounding"
    return verdict, max(changes.null_effect, values.null_effect)


def _shown(branch: Branch) -> str:
    own = [
        f"{type(one).__name__} at {one.site} of layer {one.layer}, tokens {one.tokens}" for one in branch.interventions
    ]
    more = [f"{name} {value}" for name in ("cut", "measured") if (value := getattr(branch, name)) is not None]
    return "; ".join([*own, f"prompt {branch.prompt}", *more])


def _measured(branch: Branch, clean: dict[Any, Tensor], own: dict[Any, Tensor], token: int) -> list[float]:
    at, layers = branch.measured_positions(len(clean["logits"])), range(sum(isinstance(key, int) for key in clean) // 2)
    moved = torch.softmax(own["logits"][at], -1) - torch.softmax(clean["logits"][at], -1)
    added = [[one[layer] - one[~layer] for one in (clean, own)] for layer in layers]
    effects = [metrics.relative_change(a[at], b[at], a[at].norm(dim=-1)).max().item() for a, b in added]
    return [moved.norm(dim=-1).max().item(), own["logits"][at][:, token].mean().item(), *effects]


def _plain(
    model: Decoder, prompt: Sequence[int], branch: Branch | None = None, clean: dict[Any, Tensor] | None = None
) -> dict[Any, Tensor]:
    """One prompt through the model's own forward call. Keys: l and ~l, a layer's output and input; sites; logits."""
    seen: dict[Any, Tensor] = {}
    with ExitStack() as stack:
        for site, layer in ((site, n) for n in range(model.n_layers) for site in model.sites.of(n)):
            edit = _edit(branch, clean, seen, (site, layer), len(prompt))
            if site == "attn_out" and "resid_mid" in model.sites.of(layer):
                edit = _with_middle(edit, _edit(branch, clean, seen, ("resid_mid", layer), len(prompt)), seen, layer)
            _hook(model, stack, site, layer, edit)
        output = model.hf(input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=False)
        seen["logits"] = output[0][0].float().cpu()
    for layer in range(model.n_layers):
        seen[layer], seen[~layer] = seen["resid_post", layer].float().cpu(), seen["resid_pre", layer].float().cpu()
    return seen


def _edit(
    branch: Branch | None, clean: Any, seen: dict[Any, Tensor], key: tuple[str, int], length: int
) -> Callable[[Tensor], Tensor]:
    own = [one for one in branch.interventions if (one.site, one.layer) == key] if branch else []

    def edit(value: Tensor) -> Tensor:  # [token, …]
        value = value.clone() if own else value
        for one in own:
            at = [t for t in positions(one.tokens, length) if branch is None or branch.cut is None or t < branch.cut]
            part = value if one.head is None else value[:, one.head]
            part[at] = _new(one, part[at], at, clean[key] if one.head is None else clean[key][:, one.head], seen)
        seen[key] = value
        return value

    return edit


def _with_middle(
    attn: Callable[[Tensor], Tensor], middle: Callable[[Tensor], Tensor], seen: dict[Any, Tensor], layer: int
) -> Callable[[Tensor], Tensor]:
    """resid_mid is no module's output: attention adds what makes the sum what it is to be."""

    def edit(value: Tensor) -> Tensor:
        value = attn(value)
        before = seen["resid_pre", layer] + seen.get(("mixer_out", layer), 0.0)
        mid = before + value
        changed = middle(mid)
        return torch.where(changed == mid, value, changed - before)

    return edit


def _new(one: Intervention, old: Tensor, at: list[int], clean: Tensor, seen: dict[Any, Tensor]) -> Tensor:
    if isinstance(one, Skip):
        return seen["resid_pre", one.layer][at] if one.part == "layer" else torch.zeros_like(old)
    if isinstance(one, Clamp):
        index = torch.tensor(one.index, device=old.device)
        return old.index_fill(-1, index, one.value)
    if isinstance(one, Ablate):
        mean = clean.float().mean(0).to(old.dtype)
        return mean.expand_as(old) if one.value == "mean" else torch.zeros_like(old)
    assert isinstance(one, Patch | AddVector)
    value = one.value.to(old.device)
    return (old.float() + value).to(old.dtype) if isinstance(one, AddVector) else value.to(old.dtype).expand_as(old)


def _hook(model: Decoder, stack: ExitStack, site: str, layer: int, edit: Callable[[Tensor], Tensor]) -> None:
    module, own = model.layers[layer], model.sites.found.contributions[layer].get(part_of(site) or "")

    def read(args: Any, kwargs: Any) -> Any:
        value = args[0] if args else kwargs["hidden_states"]
        wide = value.reshape(-1, value.shape[-1])  # the one prompt's tokens
        heads = own.heads if own is not None and site == "z" else 0
        new = edit(wide.unflatten(-1, (heads, -1)) if heads else wide).reshape(value.shape)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def gave(output: Any, scale: float) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        wide = value.reshape(-1, value.shape[-1])
        added = wide if scale == 1.0 else wide * scale
        new = edit(added.clone())
        new = torch.where(new == added, wide, new / scale).reshape(value.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if site == "resid_mid":
        return  # edited with what attention adds
    if site == "resid_pre" or site in INNER_SITE.values():
        where = module if own is None else own.inner
        assert where is not None
        handle = where.register_forward_pre_hook(lambda _m, args, kwargs: read(args, kwargs), with_kwargs=True)
    elif own is None:
        handle = module.register_forward_hook(lambda _m, _a, output: gave(output, 1.0))
    else:
        handle = own.output.register_forward_hook(lambda _m, _a, output: gave(output, own.scale))
    stack.callback(handle.remove)


def _gradients(model: Decoder, vocab: int, source: random.Random) -> Verdict:
    """Along a random direction, against differences of plain passes, on a prompt beside which no router switches."""
    verdict = Verdict("gradients")
    if model.dtype in _HALF:
        return verdict  # finite differences resolve nothing there
    for _ in range(_PROMPTS):
        verdict, smooth = _gradients_on(model, [source.randrange(vocab) for _ in range(LENGTHS[0])], source)
        if smooth:
            return verdict
    return Verdict("gradients", case=f"a router switched beside each of {_PROMPTS} prompts")


def _gradients_on(model: Decoder, prompt: Sequence[int], source: random.Random) -> tuple[Verdict, bool]:
    """The verdict, and whether the differences settle as their steps become smaller: a jump makes them grow."""
    where = [("resid_pre", model.n_layers // 2), ("resid_post", 0)]
    branches = [Branch((Given(site, layer),)) for site, layer in where]
    logit = Custom("logit", lambda view: view.logits[..., 0].float(), "mean")
    with model.evaluating():
        clean = _plain(model, prompt)
        points = torch.stack([clean[place].float().cpu() for place in where])
        generator = torch.Generator().manual_seed(source.randrange(1 << 30))
        along = torch.randn(points.shape, generator=generator) * points.abs().mean()

        def difference(number: int, step: float) -> float:
            moved = [points[number] + sign * step * along[number] for sign in (1, -1)]
            up, down = (_plain(model, prompt, Branch((Patch(*where[number], one),)), clean) for one in moved)
            return float((up["logits"][:, 0].mean() - down["logits"][:, 0].mean()) / (2 * step))

        plain = [torch.tensor([difference(number, step) for step in _STEPS]) for number in range(len(where))]
    verdict = Verdict("gradients", "rounding", len(where))
    found = differentiate(model, prompt, branches, logit, lambda rows: points[list(rows)].to(model.device), _given)
    for part in found:
        for row, gradient in zip(part.branches, part.reduced, strict=True):
            own, expected = float((gradient * along[row]).sum()), plain[row]
            apart = float((expected - own).abs().min())
            verdict.difference = max(verdict.difference, apart)
            verdict.effect = max(verdict.effect, float(expected.abs().max()))
            if apart > _DIFFERENCES * float(expected.abs().min()) + 1e-4:
                verdict.verdict, verdict.case = "wrong", f"{where[row]}: {own:.4g}, differences {expected.tolist()}"
    settled = [(one.diff().abs() <= _DIFFERENCES * one[1:].abs() + 1e-4).any() for one in plain]
    return verdict, all(settled)


def _given(_rows: Sequence[int], gradient: Tensor) -> Tensor:
    return gradient

"""The analyses at the notebook's settings, each with its least work and with what the peers do for it.

    for make in WORKLOADS: workload = make(subject, Peers(subject.model))
    workload.ours().tensors                     # the chunks (layers, or layer points) first
    workload.contestants[0].run((3, 4))         # the same tensors, of two chunks

A contestant may run some of the chunks only; `passes` says how much of the whole that is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.entries import Outcome, Tensors, Workload, contestants_of, prompts_of, run_analyses
from benchmarks.limits import Need
from benchmarks.models import Subject
from benchmarks.peers import Peer, Peers
from hookdepth import Branch, Decoder, LogitDifference, OutputEffect, Patch, patch_sweep
from hookdepth.analyses import Settings, chosen, erasure, integrals
from hookdepth.analyses import Subject as On
from hookdepth.engine.passes import measure, plan_for
from hookdepth.runs.sharing import groups_of

CHECKED = 8  # one in so many steps of integrated gradients is what peers are checked on and timed with


def residual_stats(subject: Subject, peers: Peers) -> Workload:
    """Norms and cosines of both prompts."""
    model, prompts = subject.model, subject.inputs.prompts
    names = [f"{kind}.{part}" for kind in ("relative_contribution", "cosine") for part in ("attn", "mlp", "layer")]
    tokens = sum(map(len, prompts))

    def ours() -> Outcome:
        found = run_analyses(subject, ["residual-stats"])["residual-stats"][0]
        return Outcome({name: found[name] for name in names})

    def run(peer: Peer, _chunks: Sequence[int]) -> Tensors:
        table = sum(peer.object.stats(ids).double().cpu() for ids in prompts_of(subject)) / tokens
        return dict(zip(names, table, strict=True))

    need = Need(model.n_layers * tokens, 0)
    return Workload("residual-stats", ours, lambda _: need, contestants_of(peers, "stats", run))


def logit_lens(subject: Subject, peers: Peers) -> Workload:
    """KL and overlap of both prompts; the peers keep all layers' logits, as the notebook does."""
    model, prompts = subject.model, subject.inputs.prompts
    tokens = sum(map(len, prompts))

    def ours() -> Outcome:
        found = run_analyses(subject, ["logit-lens"])["logit-lens"][0]
        return Outcome({"kl": found["kl"][:-1], "topk_overlap": found["topk_overlap"][:-1]})

    def run(peer: Peer, _chunks: Sequence[int]) -> Tensors:
        kl, overlap = sum(peer.object.lens(ids).double().cpu() for ids in prompts_of(subject)) / tokens
        return {"kl": kl, "topk_overlap": overlap}

    need = Need(model.n_layers * tokens, (model.n_layers + 1) * tokens)
    contestants = contestants_of(peers, "lens", run, note="all layers' logits kept")
    targets = {"hook loop": 2.2} if subject.name == "demo" else {}
    return Workload("logit-lens", ours, lambda _: need, contestants, targets=targets)


def skip_current(subject: Subject, peers: Peers) -> Workload:
    """All layer skips, on all tokens of both prompts."""
    targets = {"demo": {"hook loop": 1.7}, "llama-3.1-8b": {"floor": 0.7, "nnsight, a trace each": 25.0}}
    return _effects(subject, peers, "skip", ("current",), targets)


def skip_both(subject: Subject, peers: Peers) -> Workload:
    """All layer skips, on all tokens and left of four cuts."""
    return _effects(subject, peers, "skip", ("current", "future"), {"demo": {"hook loop": 3.0}})


def local_both(subject: Subject, peers: Peers) -> Workload:
    """Direct effects, on all tokens and left of four cuts."""
    return _effects(subject, peers, "local", ("current", "future"), {})


def _effects(
    subject: Subject, peers: Peers, kind: str, which: tuple[str, ...], targets: dict[str, dict[str, float]]
) -> Workload:
    model, inputs = subject.model, subject.inputs
    names = [f"{kind}-{one}" for one in which]
    outputs = kind == "skip"
    settings = Settings()

    def ours() -> Outcome:
        tensors: Tensors = {}
        null_effect = 0.0
        for name, (found, null) in run_analyses(subject, names, settings).items():
            null_effect = max(null_effect, null or 0.0)
            tensors[f"{name}.effect"] = found["per_prompt.layer.effect"].transpose(0, 1)  # [skipped, prompt, measured]
            if outputs:
                tensors[f"{name}.output"] = found["per_prompt.layer.output"].transpose(0, 1)
        return Outcome(tensors, null_effect)

    def run(peer: Peer, chunks: Sequence[int]) -> Tensors:
        tensors: Tensors = {}
        for name, one in zip(names, which, strict=True):
            per_prompt = []
            for ids, own in zip(prompts_of(subject), inputs.cuts, strict=True):
                found = getattr(peer.object, kind)(ids, [None] if one == "current" else list(own), list(chunks))
                per_prompt.append(found if outputs else (found,))
            kinds = ("effect", "output")[: 1 + outputs]
            for key, values in zip(kinds, zip(*per_prompt, strict=True), strict=True):
                tensors[f"{name}.{key}"] = torch.stack([value.cpu() for value in values], 1)
        return tensors

    (task,) = groups_of(chosen(names), On(model, inputs, settings))
    assert task.branches is not None
    planned = [task.branches(chunk) for chunk in range(task.n_chunks)]
    layers = sum(plan_for(model, *one).least for one in planned)
    count = sum(len(branches) for branches, _ in planned)
    cuts = [cut for own in inputs.cuts for cut in own] if "future" in which else []
    positions = 0
    if outputs:
        tokens = [len(prompt) for prompt in inputs.prompts]
        behind = [length - cut for length, own in zip(tokens, inputs.cuts, strict=True) for cut in own] if cuts else []
        positions = (model.n_layers + 1) * sum(tokens) + model.n_layers * sum(behind)
    per_unit = len(inputs.prompts) + len(cuts)
    clean = len(inputs.prompts) * len(which)
    contestants = contestants_of(
        peers, kind, run, units=tuple(range(model.n_layers)), passes=lambda n: clean + n * per_unit
    )
    need = Need(layers, positions)
    own = targets.get(subject.name, {})
    return Workload("+".join(names), ours, lambda _: need, contestants, targets=own, interventions=lambda _: count)


def residual_erasure(subject: Subject, peers: Peers) -> Workload:
    """Every layer point and token of the probe; the baseline, which costs all the same, is given."""
    model, inputs = subject.model, subject.inputs
    (probe,) = inputs.probes
    baseline = erasure.uninformative_residual(model, inputs.baseline).to(model.device)
    branches = erasure.erasure_branches(probe, baseline)
    ids = torch.tensor([probe.token_ids], device=model.device)
    points = model.n_layers + 1

    def ours() -> Outcome:
        result = measure(model, [probe.token_ids], branches, [OutputEffect()])
        return Outcome({"effect": result.output["output"].view(points, -1)}, result.null_effect)

    def run(peer: Peer, chunks: Sequence[int]) -> Tensors:
        return {"effect": peer.object.erasure(ids, list(probe.answer_positions), baseline, list(chunks)).cpu()}

    tokens = max(probe.answer_positions)
    least = plan_for(model, branches, [len(probe.token_ids)]).least
    need = Need(least, (len(branches) + 1) * len(probe.answer_positions))
    contestants = contestants_of(
        peers, "erasure", run, units=tuple(range(points)), passes=lambda n: 1 + n * tokens, unit="layer points"
    )
    targets = {"demo": {"hook loop": 10.0}, "llama-3.1-8b": {"floor": 0.5, "nnsight, a trace each": 40.0}}
    own = targets.get(subject.name, {})
    return Workload(
        "residual-erasure", ours, lambda _: need, contestants, targets=own, interventions=lambda _: len(branches)
    )


def patching(subject: Subject, peers: Peers) -> Workload:
    """Activation patching, the field's daily bread: every layer and token of a pair that differs in one token."""
    model = subject.model
    source = list(subject.inputs.probes[0].token_ids[:-1])
    base = list(source)
    base[len(base) // 2] = (base[len(base) // 2] + 7) % int(model.config.vocab_size)
    ids, other = (torch.tensor([one], device=model.device) for one in (base, source))
    with torch.no_grad():
        words = [int(model.hf(one, use_cache=False).logits[0, -1].argmax()) for one in (other, ids)]
    if words[0] == words[1]:
        words[1] = (words[0] + 1) % int(model.config.vocab_size)

    def ours() -> Outcome:
        found = patch_sweep(model, source, base, "resid_pre", LogitDifference(words[0], words[1]))
        return Outcome({"score": found["score"]}, found.noise)

    def run(peer: Peer, chunks: Sequence[int]) -> Tensors:
        return {"score": peer.object.patching(ids, other, words, list(chunks)).cpu()}

    nothing = torch.zeros(model.d_model)
    cells = [  # left of the token that differs both runs are the same, and nothing need be computed
        Branch((Patch("resid_pre", layer, nothing, [token]),), measured=[len(base) - 1])
        for layer in range(model.n_layers)
        for token in range(len(base) // 2, len(base))
    ]
    need = Need(plan_for(model, cells, [len(base)]).least, len(cells) + 2)
    contestants = contestants_of(
        peers, "patching", run, units=tuple(range(model.n_layers)), passes=lambda n: 2 + n * len(base)
    )
    targets = {"demo": {"hook loop": 15.0, "loop batched by layer": 3.5}}
    return Workload(
        "activation patching, every layer and token",
        ours,
        lambda _: need,
        contestants,
        targets=targets.get(subject.name, {}),
        interventions=lambda _: model.n_layers * len(base),
    )


def gradients_riemann(subject: Subject, peers: Peers) -> Workload:
    """The notebook's sum of 256 steps; peers run one in eight of them, and are checked against the same sum."""
    model = subject.model
    (probe,) = subject.inputs.probes
    steps = notebook_steps(subject)
    ids = torch.tensor([probe.token_ids], device=model.device)

    def ours(count: int = steps) -> Outcome:
        path = integrals.Path(model, probe, "layer")
        settings = Settings(ig_method="riemann", ig_steps=count)
        found = integrals.attribute(path, settings, subject.layers)
        return Outcome({"attribution": found["attribution"]}, path.null_effect)

    def run(peer: Peer, _chunks: Sequence[int]) -> Tensors:
        found = peer.object.gradients(ids, list(probe.answer_positions), list(subject.layers), steps // CHECKED)
        return {"attribution": found.cpu()}

    note = f"{steps // CHECKED} of {steps} steps timed, scaled"
    contestants = contestants_of(peers, "gradients", run, scale=float(CHECKED), note=note)
    targets = {"demo": {"hook loop": 1.6}, "llama-3.1-8b": {"floor": 0.6}}
    return Workload(
        f"integrated-gradients, {steps} steps{_some_layers(subject)}",
        ours,
        lambda _: _gradient_need(subject, [steps] * len(subject.layers)),
        contestants,
        check=lambda: ours(steps // CHECKED),
        interventions=lambda _: steps * len(subject.layers),
        targets=targets.get(subject.name, {}),
    )


def gradients_adaptive(subject: Subject, peers: Peers) -> Workload:
    """The adaptive integral at its default tolerance. No peer does it; its floor is that of the nodes it took."""
    model = subject.model
    (probe,) = subject.inputs.probes

    def ours() -> Outcome:
        path = integrals.Path(model, probe, "layer")
        settings = Settings(ig_tolerance=integrals.default_tolerance(model))
        found = integrals.attribute(path, settings, subject.layers)
        return Outcome({"attribution": found["attribution"], "evaluations": found["evaluations"]}, path.null_effect)

    return Workload(
        f"integrated-gradients, adaptive{_some_layers(subject)}",
        ours,
        lambda outcome: _gradient_need(subject, outcome.tensors["evaluations"].int().tolist()),
        (),
        interventions=lambda outcome: int(outcome.tensors["evaluations"].sum()),
    )


def six_experiments(subject: Subject, peers: Peers) -> Workload:
    """All that the notebook does, in one go, baseline and all. The peers' times are the sums of their rows."""
    names = ["residual-stats", "logit-lens", "skip-current", "skip-future", "residual-erasure", "integrated-gradients"]
    steps = notebook_steps(subject)
    settings = Settings(ig_method="riemann", ig_steps=steps)

    def ours() -> Outcome:
        found = run_analyses(subject, names, settings)
        return Outcome({}, max(null or 0.0 for _, null in found.values()))

    def need(outcome: Outcome) -> Need:
        parts = (residual_stats, logit_lens, skip_both, residual_erasure)
        total = _gradient_need(subject, [steps] * subject.model.n_layers)
        for part in parts:
            total = total + part(subject, peers).need(outcome)
        return total + Need(subject.model.n_layers * sum(map(len, subject.inputs.baseline)), 0)

    targets = {"seconds": 8.0} if subject.name == "llama-3.1-8b" else {}
    return Workload("the notebook's six experiments", ours, need, (), targets=targets)


WORKLOADS = (
    residual_stats,
    logit_lens,
    skip_current,
    skip_both,
    local_both,
    residual_erasure,
    patching,
    gradients_riemann,
    gradients_adaptive,
)


def notebook_steps(subject: Subject) -> int:
    """256; fewer for the tiny model, which is there to test the code."""
    return 32 if subject.name == "tiny" else 256


def _gradient_need(subject: Subject, evaluations: Sequence[int]) -> Need:
    model: Decoder = subject.model
    (probe,) = subject.inputs.probes
    tokens = max(probe.answer_positions)
    layers = subject.layers if len(evaluations) == len(subject.layers) else tuple(range(model.n_layers))
    above = sum(count * (model.n_layers - 1 - layer) for count, layer in zip(evaluations, layers, strict=True))
    return Need(above * tokens, sum(evaluations) * len(probe.answer_positions), passes=2)


def _some_layers(subject: Subject) -> str:
    some = len(subject.layers) < subject.model.n_layers
    return f", layers {', '.join(map(str, subject.layers))}" if some else ""

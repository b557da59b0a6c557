"""The engine: run any branches of any prompts in shared passes, in bounded memory.

    from hookdepth import Branch, LayerEffect, OutputEffect, Skip, run_branches

    branches = [Branch((Skip(s),)) for s in range(model.n_layers)]
    result = run_branches(model, [token_ids], branches, [LayerEffect(), OutputEffect()])
    result.layer["effect"]     # [branch, L]: row s skipped, column i measured
    result.null_effect         # the noise floor of this run

A branch differs from its clean run, the clean run, only from the layer at which it is born on, and only right of
the first token that it changes. It joins the batch there, by a hook, and nothing before is computed twice.
What is compared lies in the same pass_. A pass that does not fit into memory is run again, whole, after
everything that is left has been planned anew at half the size of the largest pass_. (Not by accelerate's
`find_executable_batch_size`: from some version on it takes a tenth off instead of halving, and it cannot
know that a budget is far above what the plan used.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.forward import PassResult, run_pass
from hookdepth.engine.measurements import Measurement, zero_where_clean
from hookdepth.engine.memory import default_row_tokens, fits
from hookdepth.engine.plan import ForwardPass, Plan
from hookdepth.engine.planner import make_plan
from hookdepth.engine.rows import RowTable
from hookdepth.errors import HookdepthError, NotFiniteError
from hookdepth.model.decoder import Decoder


@dataclass
class BranchResults:
    """What `run_branches` measured, in float32 on the CPU.

        result = run_branches(model, [ids], [Branch((Skip(4),)), Branch((Skip(5),))], [LayerEffect(), OutputEffect()])
        result.layer["effect"][1]                          # [L], of layer 5 skipped
        result.output["output"]                            # [branch]
        result.trunk_output["output"]                      # [prompt], 0: changes are measured against the clean run
        result.null_effect, result.null_where              # 0.0 and None where the kernels add no noise
        result.passes, result.plan.n_passes            # equal, unless a pass did not fit

    Attributes:
        layer: layer measurement → [branch, L]. Before a branch is born: its clean run's value.
        output: output measurement → [branch].
        trunk_layer, trunk_output: the same for the clean runs, [prompt, L] and [prompt], wherever a branch of
            the prompt's last pass is measured; 0 for a prompt without branches.
        null_effect: largest difference between a null branch and its clean run in any measurement.
        null_where: where that was, None while it is 0.
        passes: forward calls made.
        plan: what was planned at first.
    """

    layer: dict[str, Float[Tensor, "branch layer"]]
    output: dict[str, Float[Tensor, " branch"]]
    trunk_layer: dict[str, Float[Tensor, "prompt layer"]]
    trunk_output: dict[str, Float[Tensor, " prompt"]]
    null_effect: float
    null_where: str | None
    passes: int
    plan: Plan


def run_branches(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    branches: Sequence[Branch],
    measurements: Sequence[Measurement],
    *,
    max_rows: int | None = None,
    max_row_tokens: int | None = None,
    on_pass: Callable[[], object] | None = None,
) -> BranchResults:
    """Run branches and measure them against their clean runs.

        run_branches(model, [ids], [Branch((Skip(4, "attn"),))], [OutputEffect()]).output["output"]   # [1]

    Args:
        model: from `load_model` or `wrap`.
        prompts: token ids, one list a prompt; unpadded.
        branches: counterfactual runs; each names its prompt.
        measurements: what to read off them.
        max_rows, max_row_tokens: most rows, and rows × tokens, of a pass_. Default: a share of the memory.
        on_pass: called after each pass, e.g. to move a progress bar.

    Raises:
        HookdepthError: a branch that does not fit model or prompt, values that are not finite, or a device
            on which not even one branch fits.
    """
    lengths = [len(prompt) for prompt in prompts]
    _check(model, prompts, branches)
    gathered = _Gathered(model, branches, len(prompts))
    pending = set(range(len(branches)))
    changes_only = zero_where_clean(measurements)

    def make(budget: int) -> Plan:
        return plan_for(
            model,
            branches,
            lengths,
            max_rows=max_rows,
            max_row_tokens=budget,
            changes_only=changes_only,
            only=pending,
        )

    def run_pending(plan: Plan) -> None:
        for top in plan.passes:
            for result in run_top(model, prompts, branches, plan, top, measurements):
                gathered.add(result)
                pending.difference_update(result.table.pass_.measured)
                if on_pass:
                    on_pass()

    budget = max_row_tokens or default_row_tokens(model)
    first = plan = make(budget)
    with model.evaluating():
        while not fits(partial(run_pending, plan)):  # what is done stays done
            budget = min(budget, plan.peak_row_tokens) // 2
            if not budget:
                raise HookdepthError(
                    "not even one branch beside its clean run fits into memory",
                    "use shorter prompts, a smaller dtype, --quantize 8bit or --device-map auto",
                    1,
                )
            plan = make(budget)
    return gathered.results(first)


def run_top(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    branches: Sequence[Branch],
    plan: Plan,
    top: ForwardPass,
    measurements: Sequence[Measurement],
) -> Iterator[PassResult]:
    """Run a pass and those that start from its keys and values, one after the other.

    Gradients flow where the caller enabled them; its graph lives until the caller lets go of a result.
    """
    parent: PassResult | None = None
    for pass_ in top.walk():
        lengths = [len(prompts[prompt]) for prompt in pass_.prompts]
        token_ids = _pad([prompts[prompt] for prompt in pass_.prompts], model.device)
        table = RowTable(pass_, branches, plan.spans, model.n_layers, model.layer_device)
        result = run_pass(model, token_ids, table, branches, measurements, lengths, parent=parent)
        if pass_.record:
            parent = result
        yield result


def plan_for(
    model: Decoder,
    branches: Sequence[Branch],
    lengths: Sequence[int],
    *,
    max_rows: int | None = None,
    max_row_tokens: int | None = None,
    changes_only: bool = True,
    only: set[int] | None = None,
) -> Plan:
    """The plan that `run_branches` would follow; `changes_only` as in `make_plan`.

    print(plan_for(model, branches, [180]).table())
    """
    on_gpu = model.device.type == "cuda"
    return make_plan(
        branches,
        lengths,
        model.n_layers,
        max_row_tokens=max_row_tokens or default_row_tokens(model),
        max_rows=max_rows,
        # Below this many row-tokens a GPU waits for its weights and a CPU's matrix product runs short.
        pack_row_tokens=16384 if on_gpu else 2048,
        # What weights and calls cost in tokens; on a CPU seen in the rate of products with few rows (see benchmarks/).
        pass_cost=256 if on_gpu else 10 if model.dtype.itemsize == 4 else 28,
        changes_only=changes_only,
        only=only,
    )


def _pad(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    longest = max(len(prompt) for prompt in prompts)
    # On the right, any token serves: causal attention never looks there, so no mask is needed.
    return torch.tensor([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts], device=device)


def _check(model: Decoder, prompts: Sequence[Sequence[int]], branches: Sequence[Branch]) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise HookdepthError(f"prompt {number} has no tokens", "give at least one token")
        limit = model.context_length
        if limit is not None and len(prompt) > limit:
            raise HookdepthError(
                f"prompt {number} has {len(prompt)} tokens, the model's context {limit}", "shorten the prompt"
            )
        model.check_ids(prompt, f"prompt {number}")
    for branch in branches:
        if not 0 <= branch.prompt < len(prompts):
            raise HookdepthError(f"a branch of prompt {branch.prompt} of {len(prompts)}", "give one of the prompts")
        branch.check(model.n_layers, len(prompts[branch.prompt]), model.d_model)


class _Gathered:
    """Results of passes as they come, kept on the device until all are there."""

    def __init__(self, model: Decoder, branches: Sequence[Branch], n_prompts: int) -> None:
        self.model, self.branches, self.n_prompts = model, branches, n_prompts
        self.parts: list[PassResult] = []

    def add(self, result: PassResult) -> None:
        """Take a pass's values; its keys and values are not kept."""
        self.parts.append(PassResult(result.table, result.layer, result.output))

    def results(self, plan: Plan) -> BranchResults:
        """Copy to the host, put in the order of the branches, and look for the noise floor."""
        names_layer = list(dict.fromkeys(name for part in self.parts for name in part.layer))
        names_output = list(dict.fromkeys(name for part in self.parts for name in part.output))
        n, prompts, n_layers = len(self.branches), self.n_prompts, self.model.n_layers
        layer = {name: torch.zeros(n, n_layers) for name in names_layer}
        output = {name: torch.zeros(n) for name in names_output}
        trunk_layer = {name: torch.zeros(prompts, n_layers) for name in names_layer}
        trunk_output = {name: torch.zeros(prompts) for name in names_output}
        floor, where = 0.0, None
        for part in self.parts:
            pass_, n_clean = part.table.pass_, part.table.n_prompts
            branch_ids = [k for k in range(len(pass_.rows)) if pass_.rows[k] in pass_.measured]
            targets = [pass_.rows[k] for k in branch_ids]
            sources = [2 * n_clean + k for k in branch_ids]
            for values, into, into_clean in (
                *((part.layer[name], layer[name], trunk_layer[name]) for name in part.layer),
                *((part.output[name], output[name], trunk_output[name]) for name in part.output),
            ):
                host = values.detach().float().cpu()
                self._check_finite(host, pass_)
                into[targets] = host[sources]
                into_clean[list(pass_.prompts)] = host[:n_clean]
                difference = (host[n_clean : 2 * n_clean] - host[:n_clean]).abs()
                if difference.max().item() > floor:
                    floor = difference.max().item()
                    where = _describe(difference, pass_)
        passes = len(self.parts)
        return BranchResults(layer, output, trunk_layer, trunk_output, floor, where, passes, plan)

    def _check_finite(self, host: Tensor, pass_: ForwardPass) -> None:
        bad = (~torch.isfinite(host)).nonzero()
        if len(bad):
            place = f"from layer {bad[:, 1].min().item()} on" if host.ndim == 2 else "in the output"
            raise NotFiniteError(
                f"non-finite values {place} (prompts {', '.join(map(str, pass_.prompts))})",
                "check the weights, or use a dtype of wider range (--dtype bfloat16 or float32)",
                1,
            )


def _describe(difference: Tensor, pass_: ForwardPass) -> str:
    place = divmod(int(difference.argmax()), difference.shape[1]) if difference.ndim == 2 else None
    slot = place[0] if place else int(difference.argmax())
    site = f"layer {place[1]}" if place else "output"
    span = f"tokens {pass_.start}..{pass_.stop - 1}"
    return f"{site}, prompt {pass_.prompts[slot]}, pass of {len(pass_.rows)} branches on {span}"

"""What a list of branches gave: put together from the results of its passes.

result = run(model, [ids], [Branch((Skip(4),))], [LayerEffect(), OutputEffect()])
result.output["output"], result.clean_output["output"]     # [branch] each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.forward import PassResult
from hookdepth.engine.measurements import LayerMeasurement, Measurement
from hookdepth.engine.plan import ForwardPass, Plan
from hookdepth.errors import HookdepthError, NotFiniteError
from hookdepth.model.decoder import Decoder

_MOST_CHANGE_OF_THE_CLEAN_RUN = 1e-4  # of a `change`: far above rounding, far below what anybody measures


@dataclass
class BranchResults:
    """What `run` measured, in float32 on the CPU.

        result = run(model, [ids], [Branch((Skip(4),)), Branch((Skip(5),))], [LayerEffect(), OutputEffect()])
        result.layer["effect"][1]                          # [L], of layer 5 skipped
        result.output["output"]                            # [branch]
        result.clean_output["output"]                      # [branch], 0: changes are measured against the clean run
        result.null_effect, result.null_where              # 0.0 and None where the kernels add no noise
        result.passes, result.plan.n_passes            # equal, unless a pass did not fit

    Attributes:
        layer: layer measurement → [branch, L]. Before a branch is born: its clean run's value.
        output: output measurement → [branch].
        clean_layer, clean_output: the same of each branch's clean run, measured at the branch's own tokens and in the
            same pass: what the branch is to be compared with.
        trunk_layer, trunk_output: the clean run of each prompt, [prompt, L] and [prompt], at the tokens at which its
            branches are measured; NaN where they are not all measured at the same ones, or there are none.
        null_effect: largest difference between a null branch and its clean run in any measurement.
        null_where: where that was, None while it is 0.
        passes: forward calls made.
        plan: what was planned at first.
    """

    layer: dict[str, Float[Tensor, "branch layer"]]
    output: dict[str, Float[Tensor, " branch"]]
    clean_layer: dict[str, Float[Tensor, "branch layer"]]
    clean_output: dict[str, Float[Tensor, " branch"]]
    trunk_layer: dict[str, Float[Tensor, "prompt layer"]]
    trunk_output: dict[str, Float[Tensor, " prompt"]]
    null_effect: float
    null_where: str | None
    passes: int
    plan: Plan


@dataclass
class HostValues:
    """What one pass gave for one measurement, in float32 on the CPU.

    Attributes:
        branches: those that the pass measured.
        values, clean: [branch, …], theirs and their clean runs'.
        null_effect, null_where: largest difference between a control and its clean run, and where it was.
    """

    branches: list[int]
    values: Tensor
    clean: Tensor
    null_effect: float
    null_where: str | None


def on_host(part: PassResult, name: str) -> HostValues:
    """Copy to the host what a pass gave for a measurement, and look for the noise floor.

        on_host(result, "effect").values     # [branch, L]

    Raises:
        NotFiniteError: a value that is read is not finite.
    """
    table, (own, of_clean) = part.table, part.of(name)
    here, there = torch.stack([own.detach().float(), of_clean.detach().float()]).cpu()
    measured = table.measured_rows()
    sources = [id_ for id_, _ in measured]
    # Only the prompts of measured branches have a clean run and a control that are measured.
    slots = sorted({table.slot[source] for source in sources})
    controls = [table.control_ids[slot] for slot in slots]
    read = [*(table.clean_ids[slot] for slot in slots), *controls, *sources]
    for host in (here, there):
        _check_finite(host[read], table.pass_)
    if here.ndim == 2:
        for source, row in measured:
            here[source, table.unvisited(row)] = torch.nan  # a path that never came there has no value
    difference = (here[controls] - there[controls]).abs()
    floor = difference.max().item() if len(controls) else 0.0
    where = _describe(difference, table.pass_, slots) if floor else None
    return HostValues([row for _, row in measured], here[sources], there[sources], floor, where)


class Gathered:
    """Results of passes as they come, kept on the device until all are there."""

    def __init__(
        self, model: Decoder, branches: Sequence[Branch], lengths: Sequence[int], measurements: Sequence[Measurement]
    ) -> None:
        self.model, self.branches, self.lengths, self.measurements = model, branches, lengths, measurements
        self.parts: list[PassResult] = []

    def add(self, result: PassResult) -> None:
        """Take a pass's values."""
        self.parts.append(result)

    def results(self, plan: Plan) -> BranchResults:
        """Copy to the host, put in the order of the branches, and look for the noise floor."""
        n, shapes = len(self.branches), {True: (self.model.n_layers,), False: ()}
        of_layers = {m.name: isinstance(m, LayerMeasurement) for m in self.measurements}
        values, clean = (
            {name: torch.full((n, *shapes[kind]), torch.nan) for name, kind in of_layers.items()} for _ in "ab"
        )
        floor, where = 0.0, None
        for part in self.parts:
            for name in (*part.layer, *part.output):
                found = on_host(part, name)
                values[name][found.branches], clean[name][found.branches] = found.values, found.clean
                if found.null_effect > floor:
                    floor, where = found.null_effect, found.null_where
        self._check_changes(clean)
        trunk = {name: self._at_common_tokens(found) for name, found in clean.items()}

        def split(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            layer = {name: value for name, value in found.items() if of_layers[name]}
            return layer, {name: value for name, value in found.items() if not of_layers[name]}

        tensors = (*split(values), *split(clean), *split(trunk))
        return BranchResults(*tensors, null_effect=floor, null_where=where, passes=len(self.parts), plan=plan)

    def _at_common_tokens(self, clean: Tensor) -> Tensor:
        """The value of each prompt's clean run, where all of its branches are measured at the same tokens."""
        found: dict[int, list[int]] = {}
        for number, branch in enumerate(self.branches):
            found.setdefault(branch.prompt, []).append(number)
        trunk = torch.full((len(self.lengths), *clean.shape[1:]), torch.nan)
        for prompt, numbers in found.items():
            tokens = {tuple(sorted(self.branches[n].measured_positions(self.lengths[prompt]))) for n in numbers}
            if len(tokens) == 1:
                trunk[prompt] = clean[numbers[0]]
        return trunk

    def _check_changes(self, clean: Mapping[str, Tensor]) -> None:
        """A change of the clean run is 0: because of that promise, tokens were left out where nothing changes."""
        for measurement in self.measurements:
            most = clean[measurement.name].abs().max().item() if measurement.change and self.branches else 0.0
            if most > _MOST_CHANGE_OF_THE_CLEAN_RUN:
                raise HookdepthError(
                    f"the measurement {measurement.name!r} has change = True and gives {most:.3g} on the clean run",
                    "a change is 0 there; set change = False",
                )


def _check_finite(host: Tensor, pass_: ForwardPass) -> None:
    bad = (~torch.isfinite(host)).nonzero()
    if len(bad):
        place = f"from layer {bad[:, 1].min().item()} on" if host.ndim == 2 else "in the output"
        raise NotFiniteError(
            f"non-finite values {place} (prompts {', '.join(map(str, pass_.prompts))})",
            "check the weights, or use a dtype of wider range (--dtype bfloat16 or float32)",
            1,
        )


def _describe(difference: Tensor, pass_: ForwardPass, slots: Sequence[int]) -> str:
    place = divmod(int(difference.argmax()), difference.shape[1]) if difference.ndim == 2 else None
    slot = place[0] if place else int(difference.argmax())
    site = f"layer {place[1]}" if place else "output"
    span = f"tokens {pass_.start}..{pass_.stop - 1}"
    return f"{site}, prompt {pass_.prompts[slots[slot]]}, pass of {len(pass_.rows)} branches on {span}"

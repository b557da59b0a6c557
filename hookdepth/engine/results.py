"""What a list of branches gave: put together from the results of its passes.

found = measure(model, [ids], [Branch((Skip(4),))], [LayerEffect(), OutputEffect()])
found.output["output"], found.clean_output["output"]     # [branch] each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.measurement import LayerMeasurement, Measurement
from hookdepth.engine.pass_result import PassResult
from hookdepth.engine.plan import ForwardPass, Plan
from hookdepth.errors import HookdepthError, NotFiniteError
from hookdepth.model.decoder import Decoder

_MOST_CHANGE_OF_THE_CLEAN_RUN = 1e-4  # of a `change`: far above rounding, far below what anybody measures


@dataclass
class Outcome:
    """What branches gave, in float32 on the CPU.

        found = measure(model, [ids], [Branch((Skip(4),)), Branch((Skip(5),))], [LayerEffect(), OutputEffect()])
        found.layer["effect"][1]                           # [L], of layer 5 skipped
        found.output["output"]                             # [branch]
        found.clean_output["output"]                       # [branch], 0: changes are measured against the clean run
        found.null_effect, found.null_where                # 0.0 and None where the kernels add no noise
        found.passes, found.plan.n_passes                  # equal, unless a pass did not fit

    Attributes:
        layer: layer measurement → [branch, L]. Before a branch is born: its clean run's value.
        output: output measurement → [branch].
        clean_layer, clean_output: the same of each branch's clean run, measured at the branch's own tokens and in the
            same pass: what the branch is to be compared with. Of a measurement without reduction, all four have an
            axis more, of tokens up to the longest prompt's, and NaN where a branch is not measured.
        null_effect: largest difference between a null branch and its clean run in any measurement.
        null_where: where that was, None while it is 0.
        passes: forward calls made.
        plan: what was planned at first.
    """

    layer: dict[str, Tensor]
    output: dict[str, Tensor]
    clean_layer: dict[str, Tensor]
    clean_output: dict[str, Tensor]
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


def on_host(part: PassResult, names: Sequence[str]) -> dict[str, HostValues]:
    """Copy to the host what a pass gave for measurements, at once, and look for the noise floor of each.

        on_host(result, ["effect"])["effect"].values     # [branch, L]

    Raises:
        NotFiniteError: a value that is read is not finite.
    """
    both = [torch.stack([values.detach().float() for values in part.of(name)]) for name in names]
    every = torch.cat([values.flatten().to(both[0].device) for values in both]).cpu()
    apart = every.split([values.numel() for values in both])
    return {
        name: _read(part, name, own.view(values.shape)) for name, values, own in zip(names, both, apart, strict=True)
    }


def _read(part: PassResult, name: str, both: Tensor) -> HostValues:
    table, (here, there) = part.table, both
    measured = table.measured_rows()
    sources = [id_ for id_, _ in measured]
    # Only the prompts of measured branches have a clean run and a control that are measured.
    slots = sorted({table.slot[source] for source in sources})
    controls = [table.control_ids[slot] for slot in slots]
    read = [*(table.clean_ids[slot] for slot in slots), *controls, *sources]
    for host in (here, there):
        _check_finite(host[read], table.pass_, name in part.layer)
    if name in part.layer:
        for source, row in measured:
            here[source, table.unvisited(row)] = torch.nan  # a path that never came there has no value
    difference = (here[controls] - there[controls]).abs()
    floor = difference.max().item() if len(controls) else 0.0
    where = _describe(difference, table.pass_, slots, name in part.layer) if floor else None
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

    def results(self, plan: Plan) -> Outcome:
        """Copy to the host, put in the order of the branches, and look for the noise floor."""
        values, clean = ({m.name: self._empty(m) for m in self.measurements} for _ in "ab")
        floor, where = 0.0, None
        for part in self.parts:
            tokens = slice(part.table.pass_.start, part.table.pass_.stop)
            measured = self.measurements if part.table.pass_.measured else ()
            of_pass = on_host(part, [m.name for m in measured]) if measured else {}
            for measurement in measured:
                name, per_token = measurement.name, measurement.reduce is None
                found = of_pass[name]
                for kept, given in ((values[name], found.values), (clean[name], found.clean)):
                    place = kept[..., tokens] if per_token else kept
                    place[found.branches] = given
                if found.null_effect > floor:
                    floor, where = found.null_effect, found.null_where
        for measurement in self.measurements:
            if measurement.reduce is None:
                unmeasured = self._unmeasured(measurement)
                for kept in (values[measurement.name], clean[measurement.name]):
                    kept.movedim(-1, 1)[unmeasured] = torch.nan
        self._check_changes(clean)
        of_layers = {m.name for m in self.measurements if isinstance(m, LayerMeasurement)}

        def split(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            layer = {name: value for name, value in found.items() if name in of_layers}
            return layer, {name: value for name, value in found.items() if name not in of_layers}

        return Outcome(
            *split(values), *split(clean), null_effect=floor, null_where=where, passes=len(self.parts), plan=plan
        )

    def _empty(self, measurement: Measurement) -> Tensor:
        layers = [self.model.n_layers] if isinstance(measurement, LayerMeasurement) else []
        if measurement.reduce is None:  # what a pass leaves out left of its tokens is 0
            return torch.zeros(len(self.branches), *layers, max(self.lengths, default=0))
        return torch.full((len(self.branches), *layers), torch.nan)

    def _unmeasured(self, measurement: Measurement) -> Bool[Tensor, "branch token"]:
        mask = torch.ones(len(self.branches), max(self.lengths, default=0), dtype=torch.bool)
        for number, branch in enumerate(self.branches):
            length = self.lengths[branch.prompt]
            followed = length - getattr(measurement, "needs_target", False)
            mask[number, [p for p in branch.measured_positions(length) if p < followed]] = False
        return mask

    def _check_changes(self, clean: Mapping[str, Tensor]) -> None:
        """A change of the clean run is 0: because of that promise, tokens were left out where nothing changes."""
        for measurement in self.measurements:
            own = clean[measurement.name].nan_to_num().abs()
            most = own.max().item() if measurement.change and own.numel() else 0.0
            if most > _MOST_CHANGE_OF_THE_CLEAN_RUN:
                raise HookdepthError(
                    f"the measurement {measurement.name!r} has change = True and gives {most:.3g} on the clean run",
                    "a change is 0 there; set change = False",
                )


def _check_finite(host: Tensor, pass_: ForwardPass, layers: bool) -> None:
    bad = (~torch.isfinite(host)).nonzero()
    if len(bad):
        place = f"from layer {bad[:, 1].min().item()} on" if layers else "in the output"
        raise NotFiniteError(
            f"non-finite values {place} (prompts {', '.join(map(str, pass_.prompts))})",
            "check the weights and what branches bring, or use a dtype of wider range (--dtype bfloat16 or float32)",
            1,
        )


def _describe(difference: Tensor, pass_: ForwardPass, slots: Sequence[int], layers: bool) -> str:
    place = [int(one) for one in torch.unravel_index(difference.argmax(), difference.shape)]
    site = f"layer {place[1]}" if layers else "output"
    span = f"tokens {pass_.start}..{pass_.stop - 1}"
    return f"{site}, prompt {pass_.prompts[slots[place[0]]]}, pass of {len(pass_.rows)} branches on {span}"

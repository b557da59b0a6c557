"""What a counterfactual run is: interventions on one prompt, how long it lives, and where it is measured.

    Branch((Skip(4),), cut=16)     # skipped on tokens < 16, measured at tokens ≥ 16

`hookdepth.run` runs any list of branches in shared passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

from hookdepth.engine.intervention import Intervention
from hookdepth.engine.paths import LayerPath
from hookdepth.engine.tokens import Tokens, as_tokens, extent, positions
from hookdepth.errors import HookdepthError, shown, whole_number
from hookdepth.model.decoder import Decoder
from hookdepth.model.sites import ORDER


@dataclass(frozen=True, eq=False)
class Branch:
    """One counterfactual run of one prompt.

        skip = Skip(4)
        Branch((skip,))                        # propagated to the end, measured everywhere
        Branch((skip,), cut=16)                # only on tokens < 16, measured at tokens ≥ 16
        Branch((skip,), prompt=2, until=9)     # dropped after layer 9

    Branches of a prompt that hold the same intervention objects and differ in `cut` share their states
    left of the cuts.

    Attributes:
        interventions: what it changes; at least one.
        prompt: index of the prompt it belongs to.
        cut: intervene on tokens < cut only, and measure at tokens ≥ cut.
        until: last layer it lives through, after which it is its clean run; None for all of them and the output.
        measured: positions at which measurements read; default all from the cut on.

    Raises:
        HookdepthError: no interventions, or what is none; a prompt, cut or layer that is no whole number; what does
            not fit model or prompt is refused by `run`.
    """

    interventions: tuple[Intervention, ...]
    prompt: int = 0
    cut: int | None = None
    until: int | None = None
    measured: Tokens | None = None

    def __post_init__(self) -> None:
        given = self.interventions
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise HookdepthError(f"a branch of {shown(given)}", "give a tuple of interventions: Branch((Skip(4),))")
        if not given:
            raise HookdepthError("a branch without interventions", "give at least one, e.g. Identity('resid_pre', 0)")
        for one in given:
            if not isinstance(one, Intervention):
                raise HookdepthError(
                    f"a branch has {shown(one)} for an intervention", "give instances, e.g. Branch((Skip(4),))"
                )
        object.__setattr__(self, "interventions", tuple(given))
        object.__setattr__(self, "prompt", whole_number("a branch's prompt", self.prompt, 0))
        for name in ("cut", "until"):
            if (number := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole_number(f"a branch's {name}", number))
        if self.measured is not None:
            object.__setattr__(self, "measured", as_tokens(self.measured, "where a branch is measured"))

    def of_prompt(self, prompt: int) -> Branch:
        """The same of another prompt, whose number is known to be one: Branch((Skip(4),)).of_prompt(2)"""
        other = copy(self)
        vars(other)["prompt"] = prompt  # not by `replace`, which checks everything anew: plans have thousands
        return other

    @cached_property
    def path(self) -> LayerPath | None:
        """The sequence of layers that it visits; None for the model's own."""
        return next((one for one in self.interventions if isinstance(one, LayerPath)), None)

    def joins(self) -> tuple[int, str]:
        """(layer, site) of its first intervention: before that the branch is the clean run."""
        if len(self.interventions) == 1:  # as nearly always; plans have thousands
            return self.interventions[0].layer, self.interventions[0].site
        layer, order = min((one.layer, ORDER.index(one.site)) for one in self.interventions)
        return layer, ORDER[order]

    def check(self, model: Decoder, length: int) -> None:
        """Raise where the branch does not fit the model or the prompt."""
        for intervention in self.interventions:
            intervention.check(model, length)
        if self.path is not None:
            self._check_path(self.path, length)
        if self.cut is not None and not 0 < self.cut < length:
            raise HookdepthError(f"a cut at {self.cut} in a prompt of {length} tokens", f"give 1 to {length - 1}")
        if self.until is not None:
            self._check_until(self.until, model.n_layers)
        if self.measured_extent(length) is None:
            raise HookdepthError("a branch that is measured nowhere", "measure at least one token, from its cut on")

    def _check_until(self, until: int, n_layers: int) -> None:
        last = max(one.layer for one in self.interventions)
        if not last <= until < n_layers:
            raise HookdepthError(
                f"a branch until layer {until} that intervenes at layer {last} of {n_layers}",
                "let it live at least through the layer of its last intervention",
            )

    def _check_path(self, path: LayerPath, length: int) -> None:
        others = [one for one in self.interventions if one is not path]
        if any(isinstance(one, LayerPath) for one in others):
            raise HookdepthError(f"a branch along {path!r} and another path", "give each a branch of its own")
        if self.cut is not None or self.until is not None:
            name = "until" if self.cut is None else "cut"
            remedy = "give none: a path runs to the end, over all tokens (LayerPath's keep_front leaves the first out)"
            raise HookdepthError(f"a branch along {path!r} has {name}={getattr(self, name)}", remedy)
        visited = path.layers()
        for one in others:
            if one.layer not in visited:
                problem = f"{type(one).__name__} at layer {one.layer}, which {path!r} never visits"
                raise HookdepthError(problem, "intervene at a layer of the path")
            if min(positions(one.tokens, length), default=length) < path.keep_front:
                problem = f"{type(one).__name__} changes one of the first tokens, which {path!r} leaves alone"
                raise HookdepthError(problem, f"give it tokens from {path.keep_front} on, or the path no keep_front")

    def measured_positions(self, length: int) -> range | list[int]:
        """The positions at which it is measured, in a prompt of `length` tokens."""
        first = self.cut or 0
        chosen = positions(self.measured if self.measured is not None else slice(None), length)
        if isinstance(chosen, range) and chosen.step == 1:
            return range(max(chosen.start, first), max(chosen.stop, first))
        return [position for position in chosen if position >= first] if first else list(chosen)

    def measured_extent(self, length: int) -> tuple[int, int] | None:
        """The first and the last of `measured_positions`; None where there are none."""
        if self.cut:
            chosen = self.measured_positions(length)
            return (min(chosen), max(chosen)) if chosen else None
        return extent(self.measured if self.measured is not None else slice(None), length)

"""linear-maps: how far one residual stream is a linear function of another (2505.13898, Fig. 8).

    hookdepth.analyse("demo", "linear-maps", dataset="demo-text", limit=84)["relative_error"]     # [L+1, L'+1]

For each point i of the model and j of the target (default: the same model) a ridge regression with intercept, solved
in closed form: half of the prompts test, a third of the rest chooses the ridge, the others train. Test means of
‖error‖/‖target‖ and R²; and the same with the target's tokens permuted (random pairs change places), which is what a
map of nothing but the mean reaches. The first `keep_front` tokens (1) are left out. Tokens of two tokenizers meet where
both have read the same characters. The authors train a layer a source by 10,000 steps of AdamW, and draw a row and a
column of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hookdepth.analyses.alignment import aligned
from hookdepth.analyses.base import Analysis
from hookdepth.analyses.map_errors import map_errors
from hookdepth.analyses.ridge import TILE, refuse_few, split_prompts, states_of
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.subject import OnPass, Partial, Subject, Tensors
from hookdepth.engine.work import Work, plain_work
from hookdepth.model.decoder import Decoder
from hookdepth.model.identity import identity_of
from hookdepth.model.loading import load
from hookdepth.report.figures import Heatmap

_MEASURED = ("relative_error", "r2", "permuted_error")
_MAP: dict[str, Any] = {"rows": "Source point", "columns": "Target point", "reduction": "mean over tokens that test"}


class LinearMaps(Analysis):
    """Linear maps between residual streams: analyse(model, "linear-maps", dataset="demo-text", limit=84)["r2"]."""

    name = "linear-maps"
    question = "how far one residual stream is a linear function of another"
    heading = "Linear maps between residual streams"
    paper = "2505.13898, Fig. 8"
    order = 21
    options = ("target", "keep_front")
    keep_front = 1
    tensors = {
        **dict.fromkeys(_MEASURED, "source target"),
        **{f"per_prompt.{name}": "test source target" for name in _MEASURED},
    }
    figures = (
        Heatmap(
            "relative_error",
            "Row i, column j: what is left of target point j when it is predicted from source point i by the best "
            "linear map. The line is the best source of each target: where it follows the diagonal, or its stretched "
            "image, the deeper model spreads the same computation over more layers.",
            label="Relative error",
            caption="relative error of the best linear map",
            limits=(0.0, 1.0),
            signed=False,
            path=True,
            **_MAP,
        ),
        Heatmap(
            "permuted_error",
            "The same for targets whose tokens are permuted, in random pairs: as far as the mean alone goes.",
            label="Relative error",
            caption="floor: relative error with permuted targets",
            limits=(0.0, 1.0),
            signed=False,
            **_MAP,
        ),
        Heatmap("r2", "The share of the target's variance that is predicted.", "R²", "R²", limits=(0.0, 1.0), **_MAP),
    )

    def items(self, subject: Subject) -> Sequence[int]:
        """All prompts make one item: no map comes of a single one."""
        return range(1)

    def refuse(self, subject: Subject) -> None:
        """Too few prompts or training tokens."""
        super().refuse(subject)
        train, _, _ = split_prompts(len(subject.inputs.prompts))
        tokens = self.measured_tokens(subject)
        refuse_few(sum(tokens[number] for number in train), subject.model.d_model, self.name)

    def identity(self, subject: Subject) -> dict[str, Any]:
        """The target's weights count as well."""
        known = super().identity(subject)
        known["settings"] |= {"target": None}
        if subject.settings.target is not None:
            target = target_of(subject)
            known["settings"] |= {"target": target.name, "target_model": identity_of(target)}
        return known

    def measure(self, subject: Subject, item: int, on_pass: OnPass) -> Partial:
        """One pass of each prompt through both models; then a fit for each source, and all targets tile by tile."""
        target = target_of(subject)
        parts = split_prompts(len(subject.inputs.prompts))
        pairs = {
            number: aligned(subject, target, number, self.front(subject.settings)) for part in parts for number in part
        }
        refuse_few(sum(len(pairs[number][1]) for number in parts[0]), subject.model.d_model, self.name)
        streams = [
            [states_of(model, [pairs[number][which : which + 2] for number in part], on_pass) for part in parts]
            for model, which in ([(subject.model, 0)] if target is subject.model else [(subject.model, 0), (target, 2)])
        ]
        counts = [len(pairs[number][1]) for number in parts[2]]
        return Partial(map_errors(streams[0], streams[-1], counts, subject.model.device), len(pairs) * len(streams))

    def work(self, subject: Subject) -> Work:
        """A forward pass of each prompt through both models, and the algebra; states of all tokens are held."""
        model, target, prompts = subject.model, target_of(subject), subject.inputs.prompts
        tokens, size = sum(self.measured_tokens(subject)), model.dtype.itemsize
        points, others, width, wide = model.n_layers + 1, target.n_layers + 1, model.d_model, target.d_model
        # Half of the tokens train or choose, the others test; of one model's points half of the sums are taken.
        summed = 0.5 * (1 + 1 / points) if target is model else 1.0
        algebra = points * others * width * wide * (tokens * (summed + 1) + 14.0 * width)
        algebra += points * (25.0 * width**3 + width**2 * tokens)  # of each source alone: its eigenvectors
        held, work = points * width, plain_work(model, prompts)
        notes: tuple[str, ...] = ()
        if target is not model:
            theirs = plain_work(target, prompts)
            weights = sum(one.numel() * one.element_size() for one in target.hf.parameters()) / 2**30
            notes = (f"note: {target.name}, the target, has {weights:.1f} GiB of weights besides",)
            algebra, held = algebra + sum(theirs.flops(target)), held + others * wide
            work += replace(theirs, token_layers=0)
        # A tile of targets, at least one, of all tokens in float32, a source, and what a point is read with; then what
        # is solved of each source.
        tile = min(others, max(1, TILE // max(1, tokens * wide))) * wide + width + 2 * max(width, wide)
        room = work.bytes + 4 * tile * tokens + 16 * points * width**2
        if model.device.type != "cpu":
            states = f"note: {held * tokens * size / 2**30:.1f} GiB of residual streams lie in the host's memory"
            return work + Work(algebra=algebra, bytes=room, notes=(*notes, states))
        return work + Work(algebra=algebra, bytes=held * tokens * size + room, notes=notes)

    def sample(self, settings: Settings, times: int) -> Settings:
        """Onto itself: the small model of a dry run is none of the target's."""
        return replace(settings, target=None)

    def metadata(self, subject: Subject, tensors: Tensors) -> dict[str, Any]:
        """Which prompts test: `per_prompt.…` is of these, in this order."""
        return {"tested": split_prompts(len(subject.inputs.prompts))[2]}

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """There is one item."""
        return dict(items[0])


def target_of(subject: Subject) -> Decoder:
    """The model whose stream is predicted, loaded once: target_of(subject)."""
    given = subject.settings.target
    if given is None or isinstance(given, Decoder):
        return given or subject.model
    if "target" not in subject.shared:
        dtype = str(subject.model.dtype).removeprefix("torch.")
        subject.shared["target"] = load(given, dtype=dtype, device=str(subject.model.device))
    model: Decoder = subject.shared["target"]
    return model

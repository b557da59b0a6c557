"""integrated-gradients: which tokens, at which layer, the answer is made of (2505.13898, Fig. 6a).

    hookdepth.analyse("demo", "integrated-gradients", ig_steps=8)["attribution.0"]   # [L, T]

f = Σ p(answer token); path: from the prompt's own token mean of resid_post[l] (or attn_out, mlp_out) to the
activation itself; attribution of a token: ∫ of ∂f/∂activation · (activation − mean) along the path
(Sundararajan et al., 1703.01365). They add up to f(x) − f(baseline) where the integral has converged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from hookdepth.analyses import depth, quadrature
from hookdepth.analyses.base import Analysis
from hookdepth.analyses.integrals import Path, attribute, check_gradients, default_tolerance, path_work
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.subject import OnPass, Partial, Subject, Tensors, noise_floor
from hookdepth.engine.work import Work
from hookdepth.report.figures import Strip, TokenMap
from hookdepth.results import Result

NODES = 88
"""A layer's, of an adaptive path: the mean over layers, weighted by their work, on the demo model."""


def relative_error(values: Mapping[str, Tensor]) -> Tensor | None:
    """Completeness error of each layer relative to |f(x) − f(baseline)|; None where it was not measured.

    relative_error({"completeness_error": …, "f_input": …, "f_baseline": …})   # [L]
    """
    if not {"completeness_error", "f_input", "f_baseline"} <= set(values):
        return None
    return values["completeness_error"] / depth.f_change(values, "f_baseline").clamp(min=quadrature.FLOOR)


_ATTRIBUTION: dict[str, Any] = {
    "label": "Attribution",
    "caption": "",
    "signed": True,
    "without_first": True,
    "without_last": True,
    "over_training": "Size of the attribution\n(mean over tokens)",
    "strip": Strip(
        "Relative\ncompleteness\nerror",
        ("completeness_error", "evaluations", "f_input", "f_baseline", "converged"),
        relative_error,
        ok="converged",
        tolerance="ig_tolerance",
    ),
}
_ATTRIBUTION_READING = (
    "Red raises the probability of the answer and blue lowers it, relative to the prompt's mean activation "
    "at that layer; the colour limits do not count the first token. The strip shows how far each layer's "
    "attributions are from adding up to the change they explain: rows with a cross have not converged and "
    "should not be read."
)


class IntegratedGradients(Analysis):
    """Integrated gradients: analyse(model, "integrated-gradients")["attribution.0"]."""

    name = "integrated-gradients"
    question = "which tokens an answer is made of, layer by layer"
    heading = "Integrated gradients: what the answer is made of"
    paper = "2505.13898, Fig. 6a"
    order = 8
    in_all = True
    needs = "probes"
    options = ("parts", "max_rows", "ig_method", "ig_steps", "ig_tolerance", "ig_max_evaluations")
    tensors = {
        f"{prefix}{name}": f"{axes}?"
        for prefix in ("", "{part}.")
        for name, axes in {
            "attribution.{i}": "layer token{i}",
            "completeness_error.{i}": "layer",
            "evaluations.{i}": "layer",
            "f_baseline.{i}": "layer",
            "converged.{i}": "layer",
            "f_input.{i}": "",
        }.items()
    }
    figures = (
        TokenMap(
            "attribution.{i}",
            _ATTRIBUTION_READING,
            name="layer-{i}",
            **{**_ATTRIBUTION, "caption": "whole layer"},
        ),
        TokenMap("{part}.attribution.{i}", _ATTRIBUTION_READING, name="{part}-{i}", **_ATTRIBUTION),
    )

    def numbers(self, result: Result) -> dict[str, Any]:
        """What the noise floor, which is one of f, is compared with."""
        return {"largest_effect": depth.largest_f_change(result.tensors)}

    def used(self, subject: Subject) -> dict[str, Any]:
        """With the tolerance that the model's dtype can resolve, where none is given."""
        given = super().used(subject)
        return given | {"ig_tolerance": given["ig_tolerance"] or default_tolerance(subject.model)}

    def refuse(self, subject: Subject) -> None:
        """More steps than a rule can be made of."""
        quadrature.check_steps(subject.settings.ig_method, subject.settings.ig_steps)

    def work(self, subject: Subject) -> Work:
        """The nodes of all paths, layer by layer, as many as fit in a pass; and the run that finds their ends."""
        settings = subject.settings
        notes: tuple[str, ...] = ()
        nodes = settings.ig_steps + (settings.ig_method != "riemann")  # Riemann's have the baseline among them
        if settings.ig_method == "adaptive":
            nodes, most = min(NODES, settings.ig_max_evaluations), settings.ig_max_evaluations
            notes = (
                f"note: adaptive integrated gradients take as many nodes as they need, here {nodes} a layer are "
                f"assumed; with --ig-max-evaluations {most} it may be up to {most / nodes:.0f} times as many",
            )
        own = [
            path_work(subject.model, probe, part, nodes, settings.max_rows)
            for part in settings.parts
            for probe in subject.inputs.probes
        ]
        return sum(own, Work(notes=notes))

    def sample(self, settings: Settings, times: int) -> Settings:
        """A few nodes a layer: how many an adaptive path through random weights would take says nothing."""
        return replace(settings, ig_method="riemann", ig_steps=4 * times)

    def measure(self, subject: Subject, item: int, on_pass: OnPass) -> Partial:
        """All layers of every part, for one probe."""
        settings = subject.settings
        tensors: Tensors = {}
        partials = []
        for part in settings.parts:
            path = Path(subject.model, subject.inputs.probes[item], part, settings.max_rows, on_pass)
            if subject.model.describe()["quantization"] != "none":
                check_gradients(path, self.name)
            prefix = "" if part == "layer" else f"{part}."
            tensors |= {f"{prefix}{name}": value for name, value in attribute(path, settings).items()}
            partials.append(Partial({}, path.passes, path.null_effect, path.null_where))
        return Partial(tensors, sum(own.passes for own in partials), **noise_floor(partials))

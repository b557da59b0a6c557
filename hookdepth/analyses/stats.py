"""residual-stats: what attention, MLP and layer add to the residual stream, relative to it (2505.13898, Fig. 2).

    hookdepth.analyse("demo", "residual-stats", limit=2)["relative_contribution.attn"]   # [L]

attn: ‖a‖/‖h‖ and cos(a, h); mlp: ‖m‖/‖h+a‖ and cos(m, h+a); layer: ‖c‖/‖h‖ and cos(c, h). What other families add,
a mixer or a third contribution, is likewise compared with the stream that it is added to. Means over all
tokens of all prompts but the first `keep_front` of each (0), so a long prompt counts for more. Beside them, in
float64, angular distances arccos(cos(h_i, h_j))/π of all pairs of points (2403.17887), at each prompt's last token and
over all tokens, and block influence 1 − cos(h_l, h_{l+1}) (2403.03853). What the first tokens alone give, as means over
prompts, is in `first_token.…`, so that the report can say where they make a bar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.analyses import depth
from hookdepth.analyses.base import Analysis, token_means
from hookdepth.analyses.subject import OnPass, Partial, Subject, Tensors
from hookdepth.engine.reading import LayerSites, each_layer
from hookdepth.engine.work import Work, plain_work
from hookdepth.metrics import EPS, cosine
from hookdepth.model.decoder import Decoder
from hookdepth.model.devices import send
from hookdepth.report.figures import Bars, Heatmap, Lines
from hookdepth.results import Result

_PARTS = ("attn", "mlp", "layer")
_MEANS = ("relative_contribution", "cosine", "norm")
STATISTICS = tuple(f"{kind}.{part}" for kind in _MEANS for part in _PARTS)
"""The means of each layer of attention and MLP."""
_LARGEST = "relative_contribution_max."
_LAST = "angular_distance.last"
_FIRST = "first_token."
_HELD = 1 << 23  # values in float64


_MEAN = "mean over tokens and prompts"


class ResidualStats(Analysis):
    """Residual statistics: analyse(model, "residual-stats")["cosine.layer"]."""

    name = "residual-stats"
    question = "how much attention and MLP add, and in which direction"
    heading = "What each layer adds to the residual stream"
    paper = "2505.13898, Fig. 2"
    order = 1
    in_all = True
    options = ("keep_front",)
    tensors = {
        "norm.resid": "point",
        **{f"{kind}.layer": "layer" for kind in _MEANS},
        **{f"{kind}.{{part}}": "layer?" for kind in _MEANS},
        "relative_contribution_max.{part}": "layer?",
        "first_token.relative_contribution.{part}": "layer?",
        "first_token.norm.resid": "point?",
        "first_token.norm.{part}": "layer?",
        "angular_distance.{how}": "point point?",
        "block_influence": "layer?",
    }
    figures = (
        Bars(
            "relative_contribution.*",
            "How long the vector is that attention, MLP or both add, relative to the residual stream "
            "that it is added to. Where the bars drop for good, the remaining layers change little.",
            label="Mean relative contribution",
            caption="mean relative contribution",
            name="contribution",
            reduction=_MEAN,
            limit=1.5,
            grow_to=3.0,
            also={"relative_contribution_max.*": "largest {}"},
            over_training="Relative contribution\nof the layer",
        ),
        Bars(
            "cosine.*",
            "Above zero a layer strengthens what is there, below zero it erases it, and what is new and "
            "orthogonal shows as zero. The dashed line is where the mean turns positive for the last time: from "
            "there on, layers sharpen what has been found.",
            label="Cosine similarity",
            caption="cosine similarity with the residual stream",
            reduction=_MEAN,
            signed=True,
            mean=True,
            mark=depth.last_crossing,
            over_training="Cosine similarity\n(mean of the three)",
        ),
        Lines(
            "norm.*",
            "The residual stream grows from layer to layer, and so must a contribution to count. Note the "
            "logarithmic axis: equal distances are equal factors.",
            label="Mean norm",
            caption="mean norms, logarithmic",
            name="norms",
            reduction=_MEAN,
            log=True,
            compared="resid",
            over_training=None,
        ),
        Heatmap(
            "angular_distance.{how}",
            "How far the residual stream turns between any two points, as a share of half a turn. Blocks of small "
            "distances are spans of layers that turn it little, and could be left out at little cost.",
            label="Angular distance",
            caption="angular distance between points",
            rows="Point",
            columns="Point",
            signed=False,
            paper="2403.17887",
            reduction="mean over prompts",
        ),
        Bars(
            "block_influence",
            "How far each layer turns the residual stream, 1 − cos(h_l, h_l+1): the lower, the less it does.",
            label="Block influence",
            caption="block influence",
            reduction=_MEAN,
            paper="2403.03853",
            over_training=None,
        ),
    )

    def numbers(self, result: Result) -> dict[str, Any]:
        """The effective depth by cosines."""
        return {"effective_depth": depth.cosine_depth(result.tensors)}

    def measure(self, subject: Subject, item: int, on_pass: OnPass) -> Partial:
        """Means over the tokens of a prompt, and maxima, from one forward pass."""
        prompt, front = subject.inputs.prompts[item], self.front(subject.settings)
        points: list[Tensor] = []
        found = residual_sums(subject.model, prompt, front, points)
        on_pass()
        found |= turns(torch.stack([point.to(points[-1].device) for point in points]))
        whole = (_LARGEST, _LAST, _FIRST)
        tokens = len(prompt) - front
        return Partial({name: own if name.startswith(whole) else own / tokens for name, own in found.items()}, 1)

    def work(self, subject: Subject) -> Work:
        """A forward pass of each prompt; all points are kept."""
        return plain_work(subject.model, subject.inputs.prompts, kept=2 * subject.model.n_layers)

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """Means over all tokens, so that a long prompt counts for more, and each prompt's own; maxima over all."""
        single = [{name: value for name, value in own.items() if name.startswith((_LAST, _FIRST))} for own in items]
        several = [{name: value for name, value in own.items() if name not in single[0]} for own in items]
        means = token_means(several, self.measured_tokens(subject), largest=_LARGEST)
        return means | token_means(single, [1] * len(items))

    def notes(self, result: Result) -> list[str]:
        """Where the first tokens, a few of all, make more than half of a mean."""
        lengths = (result.metadata.get("data") or {}).get("lengths") or []
        rest, found = sum(lengths) - len(lengths), []
        for name in sorted(name for name in result.tensors if name.startswith(_FIRST) and rest):
            what = name.removeprefix(_FIRST)
            first, mean = len(lengths) * result.tensors[name].double(), result.tensors[what].double()
            share = first / (mean * sum(lengths))
            if more := (share > 0.5).sum().item():
                most = int(share.nan_to_num(0).argmax())
                without = (mean[most] * sum(lengths) - first[most]) / rest
                place = f"{'point' if what == 'norm.resid' else 'layer'} {most}"
                others = f" and {more - 1} more" if more > 1 else ""
                found.append(f"{what} at {place}{others} ({mean[most]:.3g}; {without:.3g} without it)")
        if not found:
            return []
        return [f"The first token of each prompt alone makes most of {', '.join(found)}. --keep-front 1 leaves it out."]


def turns(resid: Float[Tensor, "point token width"]) -> Tensors:
    """Sums over tokens of angular distances and block influence, in float64, and the last token's distances.

    turns(resid_pre[:, 0])["block_influence"]   # [L], where resid_pre are L + 1 points
    """
    n_points, _, width = resid.shape
    total = torch.zeros(n_points, n_points, dtype=torch.float64, device=resid.device)
    influence = total[0, 1:].clone()
    for some in resid.split(max(1, _HELD // (n_points * width)), dim=1):
        unit = torch.nn.functional.normalize(some.double(), dim=-1, eps=EPS)
        cosines = torch.einsum("itd,jtd->tij", unit, unit).clamp(-1, 1)
        angles = cosines.arccos() / torch.pi
        angles.diagonal(dim1=1, dim2=2).zero_()  # else rounding of 1 by an ulp, which arccos makes a hundred million
        total, influence = total + angles.sum(0), influence + (1 - cosines.diagonal(1, 1, 2)).sum(0)
    size = n_points * n_points
    found = torch.cat([angles[-1].flatten(), total.flatten(), influence]).cpu()  # one copy to the host for all three
    last, mean = found[: 2 * size].view(2, n_points, n_points)
    return {_LAST: last, "angular_distance.mean": mean, "block_influence": found[2 * size :]}


def residual_sums(model: Decoder, prompt: Sequence[int], front: int = 0, points: list[Tensor] | None = None) -> Tensors:
    """Sums over a prompt's tokens from `front` on of everything that is averaged; `*_max` are maxima.

    Where no token is left out, `first_token.…` are what the first one alone gives.

        residual_sums(model, ids)["norm.resid"]   # [L+1]

    Args:
        points: a list that gets the residual stream at each point, [token, width].
    """
    points = [] if points is None else points
    per_layer: list[Tensor] = []
    last_norm: list[Tensor] = []

    def norms_of(resid: Tensor) -> Tensor:
        return resid[0, front:].float().norm(dim=-1)

    def summed(norms: Tensor) -> Tensor:
        return torch.stack([norms.sum(), norms[0]])

    parts = [*(part for part in model.parts if part != "layer"), "layer"]

    def measure(layer: int, sites: LayerSites) -> None:
        points.append(sites.resid_pre[0, front:])
        added = {**sites.added, "layer": sites.resid_post.float() - sites.resid_pre.float()}
        for part in set(parts) - set(added):  # layers differ
            added[part] = torch.full_like(sites.resid_pre, torch.nan)
        pairs, pre = [(added[part], _added_to(model, part, sites)) for part in parts], norms_of(sites.resid_pre)
        norms = torch.stack([norms_of(part) for part, _ in pairs])  # [part, token]
        sizes = torch.stack([pre if whole is sites.resid_pre else norms_of(whole) for _, whole in pairs])
        relative = norms / sizes.clamp(min=EPS)
        cosines = torch.stack([cosine(part, whole)[0, front:] for part, whole in pairs])
        sums = [relative.sum(-1), cosines.sum(-1), norms.sum(-1), relative.amax(-1), relative[:, 0], norms[:, 0]]
        per_layer.append(torch.cat([*sums, summed(pre)]))
        if layer == model.n_layers - 1:
            points.append(sites.resid_post[0, front:])
            last_norm.append(summed(norms_of(sites.resid_post)))

    with model.evaluating(), each_layer(model, measure):
        model.forward(send([list(prompt)], model.device))
    every = torch.cat([values.to(model.device) for values in (*per_layer, *last_norm)]).cpu()  # one copy to the host
    table = every[:-2].view(model.n_layers, -1).T  # [6 · part + 2, L]
    kinds = [*_MEANS, "relative_contribution_max"]
    kinds += [f"{_FIRST}relative_contribution", f"{_FIRST}norm"]
    names = [f"{kind}.{part}" for kind in kinds for part in parts]
    found = dict(zip(names, table, strict=False))
    resid = torch.cat([table[-2:], every[-2:, None]], dim=1)
    found |= {"norm.resid": resid[0], f"{_FIRST}norm.resid": resid[1]}
    return {name: own for name, own in found.items() if not (front and name.startswith(_FIRST))}


def _added_to(model: Decoder, part: str, sites: LayerSites) -> Tensor:
    """The stream that a part is added to: the layer's input, with what the parts before it have added."""
    before = {"mlp": () if model.sites.parallel else ("mixer", "attn"), "extra": ("mixer", "attn", "mlp")}.get(part, ())
    return sum((sites.added[other] for other in before if other in sites.added), sites.resid_pre)

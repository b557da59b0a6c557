"""Integrals of gradients along the paths of a probe, at any nodes of any layers.

    path = Path(model, probe, "layer")
    attribute(path, Settings(ig_method="riemann", ig_steps=256))["attribution"]      # [L, T]

A node of the path is a branch that is born where the activation is replaced. Nodes of all layers share passes;
parameters are frozen, gradients reach the interpolated activations and stop there, and only the positions that predict
the answer are unembedded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.analyses import quadrature
from hookdepth.analyses.quadrature import AdaptivePath
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.subject import Tensors
from hookdepth.data import Probe
from hookdepth.engine.branches import Branch
from hookdepth.engine.gradients import Derivatives, Given, differentiate
from hookdepth.engine.measurements import TargetProbability
from hookdepth.engine.memory import Budget
from hookdepth.engine.passes import plan_within
from hookdepth.engine.reading import capture
from hookdepth.engine.work import Work, plain_work, work_of_plan
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.model.devices import send
from hookdepth.model.sites import part_site

_WINDOW = 8192  # nodes that are planned together: 256 steps at all of 30 layers are 7,680
_CHECKED_STEPS = 8

Node = tuple[int, float]
"""(layer, position on the path)."""


class Path:
    """f and its derivative along the paths of one probe, at any nodes of any layers.

    Attributes:
        activation: [L, T, d], what the paths end at, in float32; baseline: [L, d], what they start from: the prompt's
            own token mean.
        f_input: f(x), of the first pass's clean run.
        passes, null_effect, null_where: so far.
    """

    def __init__(
        self,
        model: Decoder,
        probe: Probe,
        part: str,
        max_rows: int | None = None,
        on_pass: Callable[[], object] = lambda: None,
    ) -> None:
        self.model, self.probe, self.site, self.on_pass = model, probe, part_site(part), on_pass
        self.budget = Budget.of(model, max_rows, gradients=True)
        self.measured = [position - 1 for position in probe.answer_positions]
        self.f_input: float | None = None
        self.passes, self.null_effect = 0, 0.0
        self.null_where: str | None = None
        with model.evaluating(), capture(model, self.site) as acts:
            model.forward(send([list(probe.token_ids)], model.device))
            found = [acts[self.site, layer][0].float().to(model.device) for layer in range(model.n_layers)]
            self.activation = torch.stack(found)
            self.baseline = torch.stack([one.mean(0) for one in found])

    def evaluate(self, nodes: Iterable[Node]) -> Iterator[tuple[Node, float, Float[Tensor, " token"]]]:
        """f and its derivative along the path, split over tokens, at each node; a layer's in the order as given.

        There may be very many, so they are taken some thousands at a time and handed on as passes give them.
        """
        coming = iter(nodes)
        while window := list(islice(coming, _WINDOW)):
            yield from self._evaluate(window)

    def _evaluate(self, nodes: Sequence[Node]) -> Iterator[tuple[Node, float, Tensor]]:
        layers = [layer for layer, _ in nodes]
        alphas = torch.tensor([alpha for _, alpha in nodes], dtype=torch.float64)
        # One minus alpha in float64, as a sum over Python's numbers has it; then both are rounded.
        shares = torch.stack([alphas, 1 - alphas]).float()[..., None, None]

        def ends(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
            of_layer = send([layers[row] for row in rows], self.model.device)
            return self.activation.index_select(0, of_layer), self.baseline.index_select(0, of_layer)[:, None]

        def points(rows: Sequence[int]) -> Tensor:
            # The notebook's order of operations: at layer 0 of the demo model another rounding of the points alone
            # moves a sum of 32 steps by 6e-4 of its largest entry. It also gives both ends exactly.
            (x, mean), (to, rest) = ends(rows), send(shares[:, list(rows)], self.model.device)
            return x * to + mean * rest

        def split(rows: Sequence[int], gradient: Tensor) -> Tensor:
            x, mean = ends(rows)
            return (gradient * (x - mean)).sum(-1)

        for part in self._differentiate([layer for layer, _ in nodes], points, split):
            yield from zip([nodes[row] for row in part.branches], part.values.tolist(), part.reduced, strict=True)

    def value_and_gradient(
        self, layer: int, points: Float[Tensor, "point token width"]
    ) -> tuple[Float[Tensor, " point"], Float[Tensor, "point token width"]]:
        """f, and its gradient in float32, with a layer's activation replaced by each of the points."""
        parts = list(self._differentiate([layer] * len(points), lambda rows: points[list(rows)], lambda _, g: g))
        order = torch.tensor([row for part in parts for row in part.branches]).argsort()
        return torch.cat([part.values for part in parts])[order], torch.cat([part.reduced for part in parts])[order]

    def _differentiate(
        self,
        layers: Sequence[int],
        points: Callable[[Sequence[int]], Tensor],
        reduce: Callable[[Sequence[int], Tensor], Tensor],
    ) -> Iterator[Derivatives]:
        branches = [Branch((Given(self.site, layer),), measured=self.measured) for layer in layers]
        ids, what = list(self.probe.token_ids), TargetProbability()
        for part in differentiate(
            self.model, ids, branches, what, points, reduce, budget=self.budget, on_pass=self.on_pass
        ):
            self.passes += 1
            clean = part.clean[0].item()
            if self.f_input is None:
                self.f_input = clean
            # What one pass gives is compared with what others gave, and their kernels may round otherwise.
            for floor, where in ((part.null_effect, part.null_where), (abs(clean - self.f_input), "between passes")):
                if floor > self.null_effect:
                    self.null_effect, self.null_where = floor, where
            yield part


def attribute(path: Path, settings: Settings, layers: Sequence[int] | None = None) -> Tensors:
    """Attributions of all layers, or of some, with what they miss.

        attribute(Path(model, probe, "layer"), Settings())["completeness_error"]   # [L]

    Returns:
        attribution [L, T], completeness_error [L], evaluations [L], f_input [], f_baseline [L], converged [L]
        (1 where |Σ attribution − (f(x) − f(baseline))| ≤ tolerance · max(|f(x) − f(baseline)|, 0.01)).
    """
    chosen = list(range(path.model.n_layers)) if layers is None else list(layers)
    tolerance = settings.ig_tolerance or default_tolerance(path.model)
    if settings.ig_method == "adaptive":
        attribution, f_baseline, evaluations = _adaptive(path, chosen, tolerance, settings.ig_max_evaluations)
    else:
        rule = quadrature.riemann if settings.ig_method == "riemann" else quadrature.gauss_legendre
        attribution, f_baseline, evaluations = _fixed(path, chosen, *rule(settings.ig_steps))
    assert path.f_input is not None
    change = path.f_input - f_baseline
    error = (attribution.sum(-1) - change).abs()
    return {
        "attribution": attribution.float(),
        "completeness_error": error.float(),
        "evaluations": evaluations,
        "f_input": torch.tensor(path.f_input),
        "f_baseline": f_baseline.float(),
        "converged": (error <= tolerance * change.abs().clamp(min=quadrature.FLOOR)).float(),
    }


def _fixed(path: Path, layers: list[int], nodes: list[float], weights: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    # f(baseline) is a node of the Riemann sum already.
    extra = [] if 0.0 in nodes else [0.0]
    weight_of = dict(zip(nodes, weights, strict=True))
    place = {layer: n for n, layer in enumerate(layers)}
    attribution = torch.zeros(len(layers), len(path.probe.token_ids), dtype=torch.float64)
    f_baseline = torch.zeros(len(layers), dtype=torch.float64)
    every = ((layer, alpha) for layer in layers for alpha in [*nodes, *extra])
    for (layer, alpha), f, gradient in path.evaluate(every):
        attribution[place[layer]] += weight_of.get(alpha, 0.0) * gradient.double()
        if alpha == 0.0:
            f_baseline[place[layer]] = f
    return attribution, f_baseline, torch.full((len(layers),), float(len(nodes) + len(extra)))


def _adaptive(path: Path, layers: list[int], tolerance: float, most_evaluations: int) -> tuple[Tensor, Tensor, Tensor]:
    narrowest = torch.finfo(path.model.dtype).eps
    # Of tokens: half, since their errors are estimates; in 16 bits noise never settles.
    settled = tolerance / 2 if path.model.dtype == torch.float32 else math.inf
    by_layer = {
        layer: AdaptivePath(tolerance, most_evaluations, narrowest, token_tolerance=settled) for layer in layers
    }
    paths = list(by_layer.values())
    while nodes := [(layer, alpha) for layer, own in by_layer.items() for alpha in own.wanted()]:
        for (layer, alpha), f, gradient in path.evaluate(nodes):
            by_layer[layer].accept(alpha, f, gradient)
    return (
        torch.stack([own.integral() for own in paths]),
        torch.tensor([own.values[0.0][0] for own in paths], dtype=torch.float64),
        torch.tensor([float(own.evaluations) for own in paths]),
    )


def path_work(model: Decoder, probe: Probe, part: str, nodes: int, max_rows: int | None) -> Work:
    """What all layers of one `Path` take, each with as many nodes; an outline will do for the model."""
    listed = [layer for layer in range(model.n_layers) for _ in range(nodes)]
    calls = [listed[begin : begin + _WINDOW] for begin in range(0, len(listed), _WINDOW)]
    if model.describe()["quantization"] != "none":
        calls += [[layer] * count for layer in _checked_layers(model) for count in (1, 2 * _CHECKED_STEPS)]
    measured, what = [position - 1 for position in probe.answer_positions], [TargetProbability()]
    lengths, budget = [len(probe.token_ids)], Budget.of(model, max_rows, gradients=True)
    found = replace(plain_work(model, [probe.token_ids]), passes=0)
    for layers in calls:
        branches = [Branch((Given(part_site(part), layer),), measured=measured) for layer in layers]
        plan = plan_within(model, branches, lengths, what, budget)
        found += work_of_plan(model, plan, branches, lengths, what, gradients=True)
    return found


def default_tolerance(model: Decoder) -> float:
    """0.01; less than float32 cannot hold a tighter one than its own noise allows: 0.1 in bfloat16 and float16."""
    return 0.01 if model.dtype == torch.float32 else 0.1


def _checked_layers(model: Decoder) -> list[int]:
    return sorted({0, model.n_layers // 2, model.n_layers - 1})


def check_gradients(path: Path, name: str = "what needs them") -> None:
    """Compare gradients with finite differences: some quantised kernels give wrong ones, with only a warning.

    A step along the gradient changes f by the gradient's norm, if it is the gradient. Steps of several sizes
    are tried at three layers: one that is neither drowned in noise nor bent by curvature is enough for each.

    Raises:
        HookdepthError: at some layer no step changes f as the gradient says.
    """
    for layer in _checked_layers(path.model):
        x = path.activation[layer]
        _, gradients = path.value_and_gradient(layer, x[None])
        gradient = gradients[0].to(x.device)
        slope = gradient.norm().item()
        size = x.norm(dim=-1).median().item()
        steps = [size * 2.0**-k for k in range(1, _CHECKED_STEPS + 1)]
        direction = gradient / max(slope, 1e-30)
        stepped = torch.stack([x + sign * step * direction for step in steps for sign in (1, -1)])
        values = path.value_and_gradient(layer, stepped)[0].tolist()
        found = [(up - down) / (2 * step) for up, down, step in zip(values[::2], values[1::2], steps, strict=True)]
        if not any(0.8 * slope <= difference <= 1.25 * slope for difference in found):
            nearest = min(found, key=lambda difference: abs(difference - slope))
            raise HookdepthError(
                f"the gradient at layer {layer} promises a slope of {slope:.3g}, finite differences find {nearest:.3g}:"
                f" this model's {path.model.describe()['quantization']} kernels are not differentiable as they are",
                f"leave {name} out, or use --quantize none",
                1,
            )

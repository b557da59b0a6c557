"""The mean Jacobian of the final residual by each residual before it, by backward passes over one retained graph.

jacobian, error = mean_jacobian(model, prompts, front=0, samples=2, longest=64)    # [L+1, d, d], [L]

J_l is the mean over prompts and source tokens t of Σ_{t' ≥ t} ∂h_L[t']/∂h_l[t]. The gradient of one entry of h_L,
summed over all tokens, is the row of that entry for every layer and every source token at once: later tokens are in
the sum because attention lets them see t, earlier ones are not. Copies of a prompt share a pass, and each asks for a
row of its own. Every row is measured on `samples` prompts, other rows on others, so that few passes see many prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.engine.reading import LayerSites, each_layer
from hookdepth.model.decoder import Decoder

_AT_ONCE = 512  # tokens of all copies: enough for a product to be worth its call, few enough for their graph


def mean_jacobian(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    front: int,
    samples: int,
    longest: int,
    on_pass: Callable[[], object] = lambda: None,
) -> tuple[Float[Tensor, "point width width"], Float[Tensor, " layer"]]:
    """J, whose last is the identity, and the standard error of each over prompts, relative to its size.

        mean_jacobian(model, prompts, front=0, samples=2, longest=64)[0][3] @ resid_pre[3, 0, 5]

    Args:
        front: first tokens that are no sources.
        samples: how many prompts each row is measured on; all, where there are fewer. An error needs two.
        longest: tokens of a prompt that are read.
    """
    width, m = model.d_model, min(samples, len(prompts))
    total = torch.zeros(model.n_layers, width, width, dtype=torch.float64)
    squares = torch.zeros(model.n_layers, dtype=torch.float64)
    for number, prompt in enumerate(prompts):
        rows = [row for row in range(width) if (number - row) % len(prompts) < m]
        own = jacobian_rows(model, prompt[:longest], rows, front)
        total[:, rows] += own
        squares += own.square().sum((1, 2))
        on_pass()
    mean = total / m
    size = mean.square().sum((1, 2))
    error = ((squares - m * size).clamp(min=0) / (m * (m - 1))).sqrt() / size.sqrt() if m > 1 else size * torch.nan
    return torch.cat([mean, torch.eye(width, dtype=torch.float64)[None]]).float(), error.float()


def jacobian_rows(
    model: Decoder, prompt: Sequence[int], rows: Sequence[int], front: int = 0
) -> Float[Tensor, "layer row width"]:
    """Some rows of J on one prompt, float64 on the CPU.

    jacobian_rows(model, prompts[0], rows=[0, 1, 2])   # [L, 3, d]
    """
    copies = min(len(rows), max(1, _AT_ONCE // len(prompt)))
    points: list[Tensor] = []
    last: list[Tensor] = []

    def keep(layer: int, sites: LayerSites) -> None:
        points.append(sites.resid_pre)
        last[:] = [sites.resid_post]

    with model.evaluating(grad=True):
        leaf = model.on("resid_pre", 0, lambda value: value.detach().requires_grad_())
        try:
            with each_layer(model, keep):
                model.forward(torch.tensor([list(prompt)] * copies, device=model.device))
        finally:
            leaf.remove()
        found = [
            _rows_of(points, last[0], rows[begin : begin + copies], front) for begin in range(0, len(rows), copies)
        ]
    return torch.cat(found, dim=1)


def _rows_of(points: list[Tensor], last: Tensor, rows: Sequence[int], front: int) -> Tensor:
    asked = torch.zeros_like(last)
    asked[torch.arange(len(rows)), :, torch.tensor(rows)] = 1
    gradients = torch.autograd.grad(last, points, asked, retain_graph=True)
    return torch.stack([one[: len(rows), front:].double().mean(1).cpu() for one in gradients])

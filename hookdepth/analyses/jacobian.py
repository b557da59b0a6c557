"""The mean Jacobian of the final residual by each residual before it, by backward passes over one retained graph.

jacobian, error = mean_jacobian(model, prompts, front=0, samples=2, longest=64)    # [L+1, d, d], [L]

J_l is the mean over prompts and source tokens t of Σ_{t' ≥ t} ∂h_L[t']/∂h_l[t]. The gradient of one entry of h_L,
summed over all tokens, is the row of that entry for every layer and every source token at once: later tokens are in
the sum because attention lets them see t, earlier ones are not. Copies of a prompt share a pass, and each asks for a
row of its own. Every row is measured on `samples` prompts, other rows on others, so that few passes see many prompts.

Files of the reference implementation (`jlens`, of *Verbalizable Representations Form a Global Workspace in Language
Models*, 2026) hold the same matrices, but averaged without a prompt's first 16 tokens; `load_lens` reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookdepth.engine.reading import LayerSites, each_layer
from hookdepth.errors import HookdepthError, as_path
from hookdepth.model.decoder import Decoder
from hookdepth.results import Result

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
        with model.on("resid_pre", 0, lambda value: value.detach().requires_grad_()), each_layer(model, keep):
            model.forward(torch.tensor([list(prompt)] * copies, device=model.device))
        found = [
            _rows_of(points, last[0], rows[begin : begin + copies], front) for begin in range(0, len(rows), copies)
        ]
    return torch.cat(found, dim=1)


def _rows_of(points: list[Tensor], last: Tensor, rows: Sequence[int], front: int) -> Tensor:
    asked = torch.zeros_like(last)
    asked[torch.arange(len(rows)), :, torch.tensor(rows)] = 1
    gradients = torch.autograd.grad(last, points, asked, retain_graph=True)
    return torch.stack([one[: len(rows), front:].double().mean(1).cpu() for one in gradients])


def load_lens(path: str | os.PathLike[str], model: Decoder) -> Result:
    """The Jacobian lens that another tool has written for a model, as the `lenses` of this one hold it.

        lens = load_lens("Qwen3-8B_jacobian_lens_n1000.pt", model)
        model.norm(resid @ lens["jacobian.weight"][12].T)      # resid: resid_pre of layer 12, as the lens sees it

    Args:
        path: what `jlens` and those who share its lenses save by torch: "J" (layer → [d, d], to be applied to what
            comes out of that layer), "d_model" and "n_prompts". Nothing but tensors is unpickled.
        model: the one that it was made for.

    Returns:
        "jacobian.weight", [L+1, d, d], float32: the identity at L, NaN where the file has no layer, so at 0.

    Raises:
        HookdepthError: no such file, one that holds no lens, or one of another model.
    """
    remedy = "give a file with 'J', 'd_model' and 'n_prompts', made for this model"
    if not as_path(path).is_file():
        raise HookdepthError(f"there is no lens {str(path)!r}", remedy)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise HookdepthError(f"{str(path)!r} is no lens ({' '.join(str(error).split())[:100]})", remedy) from error
    given = found.get("J") if isinstance(found, Mapping) else None
    if not isinstance(given, Mapping) or not given or not all(map(_is_matrix, given.keys(), given.values())):
        raise HookdepthError(f"{str(path)!r} is no lens", remedy)
    n, width = model.n_layers, model.d_model
    shapes = {tuple(one.shape) for one in given.values()}
    if shapes != {(width, width)} or max(given) >= n or min(given) < 0:
        raise HookdepthError(
            f"{str(path)!r} is a lens of layers {min(given)} to {max(given)} and of width {shapes.pop()[-1]}, and the "
            f"model has {n} layers and width {width}",
            remedy,
        )
    weight = torch.full((n + 1, width, width), torch.nan)
    for layer, matrix in given.items():
        weight[layer + 1] = matrix.float()
    weight[n] = torch.eye(width)
    facts = {"imported": Path(path).name, "n_prompts": found.get("n_prompts"), "layers": sorted(given)}
    return Result("jacobian-lens", {"jacobian.weight": weight}, facts)


def _is_matrix(layer: Any, matrix: Any) -> bool:
    return type(layer) is int and isinstance(matrix, Tensor) and matrix.ndim == 2

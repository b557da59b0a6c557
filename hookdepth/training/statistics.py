"""The arithmetic of a sampled step: residual statistics from six numbers a token.

    statistics(torch.stack([products(h, a, m) for h, a, m in layers]))      # [10, layer, row, token]

The norms of the residual h, of attention's contribution a and of the MLP's m, and their products a·h, m·h and a·m:
all of `residual-stats` follows from these, since the stream is h, h + a, h + a + m. So one pass over three tensors
serves, without copies of their sums. In 16-bit streams, what the additions round away is therefore not in the
layer's contribution. Products are plain ones: matrix products would follow the user's TF32 and bfloat16 settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hookdepth.metrics import EPS, differs_by_rounding

PARTS = ("attn", "mlp", "layer")
KINDS = ("relative_contribution", "cosine", "norm")


def products(h: Tensor, a: Tensor, m: Tensor) -> Float[Tensor, "6 row token"]:
    """‖h‖, ‖a‖, ‖m‖, a·h, m·h, a·m of every token, in float32.

    products(resid_pre, attn_out, mlp_out)
    """
    h, a, m = (x.float() if x.dtype == torch.float64 else x for x in (h, a, m))
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (h, a, m)]
    wide_h, wide_m = h.float(), m.float()  # the other factor is widened within the multiplication
    return torch.stack([*norms, (wide_h * a).sum(-1), (wide_h * wide_m).sum(-1), (wide_m * a).sum(-1)])


def statistics(table: Float[Tensor, "layer 6 row token"]) -> Float[Tensor, "10 layer row token"]:
    """Relative contribution, cosine and norm of attention, MLP and layer, and the residual's norm, token by token."""
    h, a, m, ah, mh, am = table.unbind(1)
    mid = (h.square() + 2 * ah + a.square()).clamp(min=0).sqrt()
    c = (a.square() + 2 * am + m.square()).clamp(min=0).sqrt()

    def cosine(product: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return product / (x.clamp(min=EPS) * y.clamp(min=EPS))

    relative = [a / h.clamp(min=EPS), m / mid.clamp(min=EPS), c / h.clamp(min=EPS)]
    cosines = [cosine(ah, a, h), cosine(mh + am, m, mid), cosine(ah + mh, c, h)]
    return torch.stack([*relative, *cosines, a, m, c, h])


def unpack(gathered: Sequence[Tensor], n_layers: int) -> tuple[bool, int, dict[str, Tensor]]:
    """Whether a rank failed, the tokens of all ranks, and the tensors of `residual-stats`.

    failed, tokens, tensors = unpack(gather(reader.packed()), target.decoder.n_layers)
    tensors["cosine.layer"]   # [L]
    """
    everyone = torch.stack([packed.double() for packed in gathered])
    failed, tokens, last = everyone[:, :3].sum(0).tolist()
    n_sums = 10 * n_layers
    means = (everyone[:, 3 : 3 + n_sums].sum(0) / max(tokens, 1)).view(10, n_layers)
    maxima = everyone[:, 3 + n_sums :].amax(0).view(3, n_layers)
    names = [f"{kind}.{part}" for kind in KINDS for part in PARTS]
    tensors = dict(zip(names, means, strict=False))
    tensors["norm.resid"] = torch.cat([means[-1], means.new_tensor([last / max(tokens, 1)])])
    tensors |= {f"relative_contribution_max.{part}": row for part, row in zip(PARTS, maxima, strict=True)}
    return bool(failed), int(tokens), {name: value.float() for name, value in tensors.items()}


def adds_up(terms: Sequence[Tensor], total: Tensor) -> Bool[Tensor, ""]:
    """Whether the total is the sum of the terms but for rounding; a value that is not finite says nothing.

    adds_up([resid_pre, attn_out, mlp_out], resid_post).item()   # True
    """
    first, *others = terms
    size, summed = first.abs(), first
    for term in others:
        size, summed = size + term.abs(), summed + term
    return (differs_by_rounding(summed, total, size) | ~(summed - total).isfinite()).all()

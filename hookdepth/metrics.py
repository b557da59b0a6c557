"""Pure functions on tensors; norms, cosines and softmax in float32, denominators clamped at 1e-6.

relative_change(clean_contribution, branch_contribution)   # [row, token], 0 where nothing changed
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hookdepth.errors import choose

EPS = 1e-6
_RUN = 128  # tokens


def relative_norm(part: Float[Tensor, "*b d"], whole: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """‖part‖ / ‖whole‖, ≥ 0.

    relative_norm(attn_out, resid_pre)   # [row, token]
    """
    return part.float().norm(dim=-1) / whole.float().norm(dim=-1).clamp(min=EPS)


def cosine(a: Float[Tensor, "*b d"], b: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Cosine similarity, from −1 to 1.

    cosine(attn_out, resid_pre)   # [row, token]
    """
    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1, eps=EPS)


def relative_change(
    clean: Float[Tensor, "*b d"], changed: Float[Tensor, "*b d"], size: Float[Tensor, "*b"] | None = None
) -> Float[Tensor, "*b"]:
    """‖clean − changed‖ / ‖clean‖, ≥ 0: the layer effect of 2505.13898, Fig. 3.

        relative_change(c[0:1], c)   # [row, token]: every row against the clean run

    Args:
        size: ‖clean‖, where many are compared with the same.
    """
    return (clean - changed).norm(dim=-1) / (clean.norm(dim=-1) if size is None else size).clamp(min=EPS)


def layer_change(
    resid_pre: Float[Tensor, "r t d"],
    resid_post: Float[Tensor, "r t d"],
    clean_runs: slice,
    slots: Int[Tensor, " r"] | None,
) -> Float[Tensor, "r t"]:
    """`relative_change` of what a layer adds in every row, against the row's own clean run.

        layer_change(resid_pre, resid_post, slice(0, 1), None)   # [row, token], 0 in the clean run

    Args:
        clean_runs: the rows that are clean runs.
        slots: which of these is a row's own; None where there is only one.
    """
    clean = resid_post[clean_runs].float() - resid_pre[clean_runs].float()
    sizes = clean.norm(dim=-1)
    changes = []
    for rows in blocks(resid_post.shape[0], resid_post[0].numel(), resid_post.device):
        own = slice(None) if slots is None else slots[rows]
        contribution = resid_post[rows].float() - resid_pre[rows].float()
        changes.append(relative_change(clean[own], contribution, sizes[own]))
    return torch.cat(changes)


def output_change(logits: Float[Tensor, "r p v"]) -> Float[Tensor, "r p"]:
    """‖softmax(z) − softmax(z₀)‖₂ of every row's logits against those of row 0: 0 to √2 (2505.13898).

    output_change(logits)   # [row, position], 0 in row 0
    """
    n_rows, n_positions, vocab = logits.shape
    distances = []
    for positions in blocks(n_positions, vocab, logits.device):
        here = logits[:, positions]
        clean = torch.softmax(here[:1], dim=-1, dtype=torch.float32)
        rows_of = [here[rows] for rows in blocks(n_rows, clean.numel(), logits.device)]
        moved = [torch.softmax(rows, dim=-1, dtype=torch.float32).sub_(clean).norm(dim=-1) for rows in rows_of]
        distances.append(torch.cat(moved))
    return torch.cat(distances, dim=1)


def differs_by_rounding(a: Tensor, b: Tensor, size: Tensor) -> Bool[Tensor, "*b"]:
    """Where a is b but for the order in which the same terms were added: a few units in the last place of b's dtype.

        differs_by_rounding(resid_pre + attn_out, attn_out + resid_pre, resid_pre.abs() + attn_out.abs())

    Args:
        size: what the terms amount to, entry by entry. In bfloat16 that allows far less than a share of the largest
            entry would, beside which a whole sublayer may be small.
    """
    return (a - b).abs() <= 4 * torch.finfo(b.dtype).eps * size


def wilson_interval(right: Tensor, total: int) -> Float[Tensor, "*b 2"]:
    """The 95 % interval of a share, after Wilson (1927): right also for few trials, and shares of 0 and 1.

    wilson_interval(torch.tensor([0.0, 5.0]), 10)   # 0 to 0.28, and 0.24 to 0.76
    """
    z, share = 1.96, right.double() / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = (share * (1 - share) / total + z * z / (4 * total * total)).sqrt() * z / (1 + z * z / total)
    return torch.stack([(centre - half).clamp(min=0), (centre + half).clamp(max=1)], dim=-1).float()


def kl_divergence(log_p: Float[Tensor, "*b v"], log_q: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """KL(p‖q) in nats from log-probabilities, ≥ 0.

    kl_divergence(lens.log_softmax(-1), final.log_softmax(-1))
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def probabilities_and_logs(logits: Float[Tensor, "*b v"]) -> tuple[Float[Tensor, "*b v"], Float[Tensor, "*b v"]]:
    """Softmax and log-softmax with one exponential between them: the likeliest entry tells the sum of all.

    p, log_p = probabilities_and_logs(logits.float())
    """
    p = torch.softmax(logits, dim=-1)
    return p, logits - (logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log())


def divergences(log_probabilities: Float[Tensor, "r p v"]) -> Float[Tensor, "r p"]:
    """`kl_divergence` of row 0's distributions from every row's, ≥ 0, in pieces that caches hold.

    divergences(logits.log_softmax(-1))   # [row, position], 0 in row 0
    """
    clean = log_probabilities[:1]
    p, rows_of = clean.exp(), blocks(len(log_probabilities), clean.numel(), clean.device)
    return torch.cat([(clean - log_probabilities[rows]).mul_(p).sum(-1) for rows in rows_of])


def topk_overlap(a: Float[Tensor, "*b v"], b: Float[Tensor, "*b v"], k: int = 5) -> Float[Tensor, "*b"]:
    """Share of the k likeliest tokens that two predictions have in common, from 0 to 1.

    topk_overlap(lens_logits, final_logits)
    """
    return in_common(likeliest(a, k), likeliest(b, k))


def in_common(a: Int[Tensor, "*b k"], b: Int[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    """Share of the first numbers that are among the second: in_common(likeliest(here, 5), likeliest(final, 5))"""
    return (a[..., :, None] == b[..., None, :]).any(-1).float().mean(-1)


def likeliest(logits: Float[Tensor, "*b v"], k: int) -> Int[Tensor, "*b k"]:
    """`logits.topk(k).indices` in a third of the time: of all runs of tokens, only the k with the largest maxima are
    looked through. Of equal logits it is open which come first, as in `topk`.

    likeliest(torch.arange(4999.0), 2)   # [4998, 4997]
    """
    vocab, n_runs = logits.shape[-1], logits.shape[-1] // _RUN
    if n_runs <= k:
        return logits.topk(k, dim=-1).indices
    runs = logits[..., : n_runs * _RUN].unflatten(-1, (n_runs, _RUN))
    chosen = runs.amax(-1).topk(k, dim=-1).indices[..., None]
    ids = torch.arange(vocab, device=logits.device)
    rest = ids[n_runs * _RUN :]  # too few for a run
    found = torch.cat([runs.gather(-2, chosen.expand(*chosen.shape[:-1], _RUN)).flatten(-2), logits[..., rest]], -1)
    places = torch.cat([(chosen * _RUN + ids[:_RUN]).flatten(-2), rest.expand(*chosen.shape[:-2], -1)], -1)
    return places.gather(-1, found.topk(k, dim=-1).indices)


REDUCTIONS = ("max", "min", "mean", "sum")


def check_reduction(how: object, of: str = "") -> None:
    """Raise for what is no reduction over tokens; None is one, and leaves a value a token: check_reduction("mean")."""
    if how is not None:
        choose(f"reduction{of}", how, REDUCTIONS)


def masked_reduce(
    values: Float[Tensor, "*more r t"],
    mask: Bool[Tensor, "r t"],
    how: str | None,
    zeros: Int[Tensor, " r"] | None = None,
) -> Tensor:
    """Reduce over the tokens that the mask selects, and over no others: [*more, r]; NaN where it selects none.

        masked_reduce(effect, measured, "max")   # [row]

    Args:
        values: what stands at tokens that are not selected may be anything.
        mask: the tokens reduced over.
        how: one of `REDUCTIONS`; None leaves a value a token, 0 where the mask selects none.
        zeros: further tokens of each row, not among the columns, whose value is known to be 0.

    Raises:
        HookdepthError: another reduction.
    """
    if how is None:
        return values.masked_fill(~mask, 0.0)
    check_reduction(how)
    if not values.shape[-1]:
        values, mask = values.new_zeros(*values.shape[:-1], 1), mask.new_zeros(mask.shape[0], 1)
    left_out = ~mask
    empty = left_out.all(-1)
    if how in ("max", "min"):
        worst = float("-inf") if how == "max" else float("inf")
        kept = values.masked_fill(left_out, worst)
        reduced = kept.amax(-1) if how == "max" else kept.amin(-1)
        if zeros is not None:
            with_zero = reduced.clamp(min=0.0) if how == "max" else reduced.clamp(max=0.0)
            reduced = torch.where(zeros > 0, with_zero, reduced)
    else:
        reduced = values.masked_fill(left_out, 0.0).sum(-1)
        if how == "mean":
            count = mask.sum(-1) if zeros is None else mask.sum(-1) + zeros
            reduced = reduced / count.clamp(min=1)
    return reduced.masked_fill(empty if zeros is None else empty & (zeros == 0), float("nan"))


def over_prompts(values: Float[Tensor, "prompt *rest"], how: str) -> Tensor:  # noqa: UP037 (a shape)
    """Reduce over prompts, axis 0; a prompt that is NaN somewhere does not count there, and NaN is where none counts.

        over_prompts(torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), "mean")   # [2, 2]

    Raises:
        HookdepthError: another reduction than max, mean and median.
    """
    choose("reduction over prompts", how, ("max", "mean", "median"))
    if how == "max":
        most = values.masked_fill(values.isnan(), -torch.inf).amax(0)
        return most.masked_fill(values.isnan().all(0), torch.nan)
    if how == "mean":
        return values.double().nanmean(0).float()
    return values.nanquantile(0.5, dim=0)  # of an even number the mean of the middle two


def mean_interval(
    values: Float[Tensor, "prompt place"], weights: Float[Tensor, " prompt"] | None = None, samples: int = 1000
) -> Float[Tensor, "3 place"]:
    """Mean over prompts, and the ends of its 95 % interval by bootstrap: prompts drawn again with replacement.

        mean_interval(torch.rand(9, 4))[1:]     # [2, place]: from, to

    Args:
        weights: what a prompt counts for, e.g. its tokens. The draws are the same in every call.
    """
    n = len(values)
    drawn = torch.randint(n, (samples, n), generator=torch.Generator().manual_seed(123))
    once = torch.ones(samples, n, dtype=torch.float64)
    counts = torch.zeros_like(once).scatter_add_(1, drawn, once)
    counts = torch.cat([torch.ones(1, n, dtype=torch.float64), counts])
    share = counts * (1.0 if weights is None else weights.double())
    seen = (~values.isnan()).double()
    means = (share @ values.double().nan_to_num()) / (share @ seen)
    return torch.cat([means[:1], means[1:].nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)])


def blocks(n: int, elements: int, device: torch.device) -> Iterator[slice]:
    """0..n−1 in slices that a CPU's caches hold: elementwise work takes a third of the time there. A GPU gets one.

        for rows in blocks(logits.shape[0], logits[0].numel(), logits.device): ...

    Args:
        n: how many pieces.
        elements: numbers in a piece; a slice has at most 2^18, or one piece.
    """
    size = n if device.type != "cpu" else max(1, (1 << 18) // max(elements, 1))
    return (slice(begin, begin + size) for begin in range(0, n, max(size, 1)))


def rank_correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float | None:
    """Spearman's: the correlation of ranks, equal values sharing theirs; None where one of the two does not vary.

    rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.7, 0.2]))   # 0.5
    """
    ranks = torch.stack([_ranks(a), _ranks(b)])
    if a.numel() < 2 or ranks.std(dim=1).min() == 0:
        return None
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[places]

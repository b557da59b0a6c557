"""The engine's own reductions as one kernel each, in Triton: what is read is read once or twice, and nothing is kept.

    layer_change(resid_pre, resid_post, own)     # [row, token]
    output_change(logits)                        # [row, position]
    lens(logits)                                 # [2, point, token]: KL from the last point, share of its top tokens

Each is what `metrics` has in several operations, in float32 as there; sums run in another order. Values of one row
do not depend on the others beside it, and a row that equals its clean run differs from it by exactly 0.
As custom operators they have a meaning for tensors without data, too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hookdepth.metrics import EPS

_BLOCK = 2048


def layer_change(resid_pre: Tensor, resid_post: Tensor, own: Tensor) -> Tensor:
    """‖clean − contribution‖ / ‖clean‖ of every row and token; `own` tells which row is a row's clean run.

    layer_change(resid_pre, resid_post, torch.zeros(rows, dtype=torch.long, device=device))
    """
    found: Tensor = torch.ops.hookdepth.layer_change(resid_pre, resid_post, own)
    return found


def output_change(logits: Tensor) -> Tensor:
    """‖softmax − softmax of row 0‖ of every row and position: output_change(logits)."""
    found: Tensor = torch.ops.hookdepth.output_change(logits)
    return found


def lens(logits: Tensor, k: int = 5) -> Tensor:
    """KL(point ‖ last point), and the share of the k likeliest tokens in common: lens(logits)[1], [point, token].

    Of equal logits those of the first tokens count as the largest; `torch.topk` leaves open which.
    """
    final = logits[-1].float()
    bits = final.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32  # integers in the order of the numbers
    first = torch.arange(final.shape[-1] - 1, -1, -1, device=logits.device)
    likeliest = (ordered + first).topk(k, dim=-1).indices
    found: Tensor = torch.ops.hookdepth.lens(logits, likeliest)
    return found


@triton.jit
def _layer_change(pre, post, own, out, n_tokens, width, row_stride, token_stride, eps, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64)
    row, token = place // n_tokens, place % n_tokens
    here = row * row_stride + token * token_stride
    there = tl.load(own + row) * row_stride + token * token_stride
    changed = tl.zeros((block,), dtype=tl.float32)
    size = tl.zeros((block,), dtype=tl.float32)
    for begin in range(0, width, block):
        at = begin + tl.arange(0, block)
        inside = at < width
        clean = tl.load(post + there + at, inside, 0.0).to(tl.float32) - tl.load(pre + there + at, inside, 0.0).to(
            tl.float32
        )
        added = tl.load(post + here + at, inside, 0.0).to(tl.float32) - tl.load(pre + here + at, inside, 0.0).to(
            tl.float32
        )
        changed += (clean - added) * (clean - added)
        size += clean * clean
    whole = tl.sqrt(tl.sum(size, axis=0))
    tl.store(out + place, tl.sqrt(tl.sum(changed, axis=0)) / tl.where(whole < eps, eps, whole))


@triton.jit
def _output_change(logits, out, n_rows, n_positions, vocab, row_stride, position_stride, block: tl.constexpr):  # type: ignore[no-untyped-def]
    # Rows of one position lie side by side in time, so that their clean run's logits are in the cache.
    place = tl.program_id(0).to(tl.int64)
    row, position = place % n_rows, place // n_rows
    there = position * position_stride
    here = row * row_stride + there
    own_top = tl.full((block,), float("-inf"), dtype=tl.float32)
    clean_top = tl.full((block,), float("-inf"), dtype=tl.float32)
    own_sum = tl.zeros((block,), dtype=tl.float32)
    clean_sum = tl.zeros((block,), dtype=tl.float32)
    for begin in range(0, vocab, block):
        at = begin + tl.arange(0, block)
        own = tl.load(logits + here + at, at < vocab, float("-inf")).to(tl.float32)
        clean = tl.load(logits + there + at, at < vocab, float("-inf")).to(tl.float32)
        top = tl.maximum(own_top, own)
        own_sum = own_sum * _scaled(own_top, top) + _scaled(own, top)
        own_top = top
        top = tl.maximum(clean_top, clean)
        clean_sum = clean_sum * _scaled(clean_top, top) + _scaled(clean, top)
        clean_top = top
    own_most, clean_most = tl.max(own_top, axis=0), tl.max(clean_top, axis=0)
    own_all = tl.sum(own_sum * _scaled(own_top, own_most), axis=0)
    clean_all = tl.sum(clean_sum * _scaled(clean_top, clean_most), axis=0)
    moved = tl.zeros((block,), dtype=tl.float32)
    for begin in range(0, vocab, block):
        at = begin + tl.arange(0, block)
        own = tl.load(logits + here + at, at < vocab, float("-inf")).to(tl.float32)
        clean = tl.load(logits + there + at, at < vocab, float("-inf")).to(tl.float32)
        apart = tl.exp(own - own_most) / own_all - tl.exp(clean - clean_most) / clean_all
        moved += tl.where(at < vocab, apart * apart, 0.0)
    tl.store(out + row * n_positions + position, tl.sqrt(tl.sum(moved, axis=0)))


@triton.jit
def _scaled(value, top):  # type: ignore[no-untyped-def]
    # exp(value − top), where both may still be −∞: then there is nothing yet.
    return tl.where(top == float("-inf"), 0.0, tl.exp(value - top))


@triton.jit
def _lens(  # type: ignore[no-untyped-def]
    logits,
    likeliest,
    out,
    n_points,
    n_tokens,
    vocab,
    point_stride,
    token_stride,
    k: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    point, token = place % n_points, place // n_points
    here = point * point_stride + token * token_stride
    there = (n_points - 1) * point_stride + token * token_stride
    choice = tl.arange(0, padded)
    chosen = tl.load(likeliest + token * k + choice, choice < k, 0)
    bar = tl.load(logits + here + chosen).to(tl.float32)
    above = tl.zeros((padded, block), dtype=tl.int32)  # how many logits of this point are before each of them
    own_top = tl.full((block,), float("-inf"), dtype=tl.float32)
    last_top = tl.full((block,), float("-inf"), dtype=tl.float32)
    own_sum = tl.zeros((block,), dtype=tl.float32)
    last_sum = tl.zeros((block,), dtype=tl.float32)
    cross = tl.zeros((block,), dtype=tl.float32)  # Σ exp(own − top) · (own − last)
    for begin in range(0, vocab, block):
        at = begin + tl.arange(0, block)
        own = tl.load(logits + here + at, at < vocab, float("-inf")).to(tl.float32)
        last = tl.load(logits + there + at, at < vocab, float("-inf")).to(tl.float32)
        before = (own[None, :] > bar[:, None]) | ((own[None, :] == bar[:, None]) & (at[None, :] < chosen[:, None]))
        above += (before & (at < vocab)[None, :]).to(tl.int32)
        top = tl.maximum(own_top, own)
        weight = _scaled(own, top)
        own_sum = own_sum * _scaled(own_top, top) + weight
        cross = cross * _scaled(own_top, top) + tl.where(weight == 0.0, 0.0, weight * (own - last))
        own_top = top
        top = tl.maximum(last_top, last)
        last_sum = last_sum * _scaled(last_top, top) + _scaled(last, top)
        last_top = top
    own_most, last_most = tl.max(own_top, axis=0), tl.max(last_top, axis=0)
    rescaled = _scaled(own_top, own_most)
    own_all = tl.sum(own_sum * rescaled, axis=0)
    last_all = tl.sum(last_sum * _scaled(last_top, last_most), axis=0)
    apart = (last_most + tl.log(last_all)) - (own_most + tl.log(own_all))
    within = (tl.sum(above, axis=1) < k) & (choice < k)
    tl.store(out + point * n_tokens + token, tl.sum(cross * rescaled, axis=0) / own_all + apart)
    tl.store(out + (n_points + point) * n_tokens + token, tl.sum(within.to(tl.float32), axis=0) / k)


def _block(width: int) -> int:
    return min(_BLOCK, int(triton.next_power_of_2(width)))


def _run_layer_change(resid_pre: Tensor, resid_post: Tensor, own: Tensor) -> Tensor:
    pre, post = resid_pre.contiguous(), resid_post.contiguous()
    n_rows, n_tokens, width = pre.shape
    out = torch.empty(n_rows, n_tokens, dtype=torch.float32, device=pre.device)
    _layer_change[(n_rows * n_tokens,)](
        pre, post, own, out, n_tokens, width, pre.stride(0), pre.stride(1), EPS, block=_block(width)
    )
    return out


def _run_output_change(logits: Tensor) -> Tensor:
    given = logits if logits.stride(-1) == 1 else logits.contiguous()
    n_rows, n_positions, vocab = given.shape
    out = torch.empty(n_rows, n_positions, dtype=torch.float32, device=given.device)
    _output_change[(n_rows * n_positions,)](
        given, out, n_rows, n_positions, vocab, given.stride(0), given.stride(1), block=_block(vocab)
    )
    return out


def _run_lens(logits: Tensor, likeliest: Tensor) -> Tensor:
    given = logits if logits.stride(-1) == 1 else logits.contiguous()
    n_points, n_tokens, vocab = given.shape
    k = likeliest.shape[-1]
    out = torch.empty(2, n_points, n_tokens, dtype=torch.float32, device=given.device)
    _lens[(n_points * n_tokens,)](
        given,
        likeliest.contiguous(),
        out,
        n_points,
        n_tokens,
        vocab,
        given.stride(0),
        given.stride(1),
        k=k,
        padded=int(triton.next_power_of_2(k)),
        block=_block(vocab) // 2,
    )
    return out


def _like_rows(first: Tensor, *_: Any) -> Tensor:
    return first.new_empty(first.shape[:2], dtype=torch.float32)


def _like_points(logits: Tensor, _likeliest: Tensor) -> Tensor:
    return logits.new_empty(2, *logits.shape[:2], dtype=torch.float32)


_OPERATORS = (
    ("layer_change", "(Tensor resid_pre, Tensor resid_post, Tensor own) -> Tensor", _run_layer_change, _like_rows),
    ("output_change", "(Tensor logits) -> Tensor", _run_output_change, _like_rows),
    ("lens", "(Tensor logits, Tensor likeliest) -> Tensor", _run_lens, _like_points),
)
for _name, _schema, _run, _fake in _OPERATORS:
    torch.library.custom_op(f"hookdepth::{_name}", _run, mutates_args=(), schema=_schema).register_fake(_fake)

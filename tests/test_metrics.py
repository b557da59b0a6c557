"""Metrics: their values by hand, their ranges, and float32 whatever comes in."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hookdepth import metrics
from hookdepth.errors import HookdepthError

SHAPE = (3, 5, 8)


def rows(seed, scale=1.0):
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_relative_norm_by_hand():
    part, whole = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert metrics.relative_norm(part, whole).tolist() == [2.5]
    # Nothing divided by nothing is nothing; something divided by nothing is large and finite.
    assert metrics.relative_norm(torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [0.0]
    assert metrics.relative_norm(part, torch.zeros(1, 2)).item() == pytest.approx(5e6)


def test_cosine_by_hand():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 0.0]])
    assert metrics.cosine(a, b).tolist() == [1.0, 0.0, -1.0, 0.0]


def test_relative_change_by_hand():
    clean, changed = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    assert metrics.relative_change(clean, changed).tolist() == [0.0, 1.0, 1.0]
    assert metrics.relative_change(torch.zeros(1, 2), clean).item() == pytest.approx(5e6)


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert metrics.kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert metrics.kl_divergence(p, p).item() == 0
    assert metrics.kl_divergence(q, p).item() != pytest.approx(metrics.kl_divergence(p, q).item()), (
        "first argument is p"
    )


def test_topk_overlap_by_hand():
    a = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    b = torch.tensor([[0.0, 5.0, 4.0, 9.0, 1.0, 2.0]])
    assert metrics.topk_overlap(a, b, k=2).tolist() == [0.5]  # {0, 1} and {3, 1}
    assert metrics.topk_overlap(a, b, k=1).tolist() == [0.0]
    assert metrics.topk_overlap(a, b).tolist() == pytest.approx([0.8])
    assert metrics.topk_overlap(a, a).tolist() == [1.0]


def same(found, expected):
    return torch.equal(found.nan_to_num(-99.0), torch.tensor(expected).nan_to_num(-99.0))


def test_masked_reduce_by_hand():
    values = torch.tensor([[-1.0, 5.0, -3.0], [7.0, 2.0, 4.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, False, True], [False, True, True], [False, False, False]])
    nan = float("nan")
    assert same(metrics.masked_reduce(values, mask, "max"), [-1.0, 4.0, nan])
    assert same(metrics.masked_reduce(values, mask, "min"), [-3.0, 2.0, nan])
    assert same(metrics.masked_reduce(values, mask, "sum"), [-4.0, 6.0, nan])
    assert same(metrics.masked_reduce(values, mask, "mean"), [-2.0, 3.0, nan])


@pytest.mark.parametrize("how", metrics.REDUCTIONS)
@given(data=st.data())
@settings(max_examples=60)
def test_zeros_that_are_known_count_like_columns(how, data):
    """Tokens that need not be computed, because their value is 0, count as if they were there."""
    numbers = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 3.0]), max_size=4)
    rows = data.draw(st.lists(st.tuples(numbers, st.integers(0, 3)), min_size=1, max_size=4))
    width = max(len(row) for row, _ in rows)
    values = torch.tensor([row + [float("nan")] * (width - len(row)) for row, _ in rows]).reshape(len(rows), width)
    mask = torch.tensor([[n < len(row) for n in range(width)] for row, _ in rows], dtype=torch.bool)
    mask, zeros = mask.reshape(len(rows), width), torch.tensor([n for _, n in rows])
    plain = {"max": max, "min": min, "sum": sum, "mean": lambda row: sum(row) / len(row)}[how]
    whole = [row + [0.0] * n for row, n in rows]
    expected = [plain(row) if row else float("nan") for row in whole]
    torch.testing.assert_close(metrics.masked_reduce(values, mask, how, zeros), torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("how", ["median", "MAX", max, ["max"]])
def test_other_reductions_are_refused(how):
    with pytest.raises(HookdepthError, match="unknown reduction"):
        metrics.masked_reduce(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), how)


def test_what_is_not_selected_may_be_anything():
    values, mask = torch.tensor([[1.0, float("nan"), float("inf")]]), torch.tensor([[True, False, False]])
    for how in metrics.REDUCTIONS:
        assert metrics.masked_reduce(values, mask, how).tolist() == [1.0]


@given(st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=25)
def test_ranges_and_scale(seed, scale):
    a, b = rows(seed, scale), rows(seed + 1)
    assert (metrics.relative_norm(a, b) >= 0).all()
    assert (metrics.cosine(a, b).abs() <= 1 + 1e-6).all()
    torch.testing.assert_close(metrics.cosine(2 * a, 3 * b), metrics.cosine(a, b), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics.relative_norm(2 * a, b), 2 * metrics.relative_norm(a, b))
    torch.testing.assert_close(metrics.relative_change(b, b + a), metrics.relative_norm(a, b), atol=1e-4, rtol=1e-3)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    assert (metrics.kl_divergence(log_p, log_q) >= -1e-6).all()
    overlap = metrics.topk_overlap(a, b)
    assert ((overlap >= 0) & (overlap <= 1)).all()
    torch.testing.assert_close(overlap, metrics.topk_overlap(b, a))


def test_norms_and_cosines_are_taken_in_float32():
    a, b = rows(0).bfloat16(), rows(1).bfloat16()
    for function in (metrics.relative_norm, metrics.cosine):
        assert function(a, b).dtype == torch.float32
        assert torch.equal(function(a, b), function(a.float(), b.float()))
    large = torch.full((1, 64), 300.0, dtype=torch.float16)  # its squares overflow float16
    assert metrics.relative_norm(large, large).item() == 1
    assert metrics.cosine(large, large).item() == pytest.approx(1)


def test_blocks_cover_everything_once():
    for n, elements in ((0, 7), (1, 1), (10, 1 << 17), (10, 1 << 30), (7, 1 << 16)):
        slices = list(metrics.blocks(n, elements, torch.device("cpu")))
        assert [i for piece in slices for i in range(n)[piece]] == list(range(n))
        assert all(
            (piece.stop - piece.start) * elements <= 1 << 18 or piece.stop - piece.start == 1 for piece in slices
        )
    assert list(metrics.blocks(10, 1 << 30, torch.device("cuda"))) == [slice(0, 10)]


def test_the_interval_of_a_mean_over_prompts():
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 5.0, 9.0])
    mean, low, high = metrics.mean_interval(values)
    torch.testing.assert_close(mean, values.double().mean(0))
    width = 2 * 1.96 * values.double().std(0) / 40**0.5
    torch.testing.assert_close(high - low, width, rtol=0.15, atol=0)
    weights = torch.arange(1.0, 41.0)
    torch.testing.assert_close(
        metrics.mean_interval(values, weights)[0], (weights[:, None] * values).double().sum(0) / 820
    )
    values[3, 1] = torch.nan
    torch.testing.assert_close(metrics.mean_interval(values)[0, 1], values.double()[:, 1].nanmean())


def test_over_prompts_minds_no_prompt_that_was_not_measured():
    values = torch.tensor([[1.0, torch.nan], [3.0, torch.nan], [8.0, torch.nan]])
    for how, expected in (("max", 8.0), ("mean", 4.0), ("median", 3.0)):
        found = metrics.over_prompts(values, how)
        assert found[0].item() == expected
        assert found[1].isnan()
    with pytest.raises(HookdepthError, match="unknown reduction over prompts"):
        metrics.over_prompts(values, "none")


def test_divergences_from_the_first_row_are_those_of_each_row_to_the_bit():
    logs = torch.randn(7, 3, 50_000, generator=torch.Generator().manual_seed(0)).log_softmax(-1).requires_grad_()
    found, expected = metrics.divergences(logs), torch.cat([metrics.kl_divergence(logs[:1], row[None]) for row in logs])
    assert found.equal(expected)
    assert found[0].count_nonzero() == 0 < found[1:].min()
    (own,), (other,) = (torch.autograd.grad(values[1:].sum(), logs) for values in (found, expected))
    torch.testing.assert_close(own, other)


@pytest.mark.parametrize("vocab", [5, 128 * 5, 128 * 6 + 1, 4999])
def test_the_likeliest_are_those_of_topk(vocab):
    logits = torch.stack([torch.randperm(vocab) for _ in range(6)]).view(2, 3, vocab).float()
    for k in (1, 5):
        assert torch.equal(metrics.likeliest(logits, k), logits.topk(k).indices)
    logits[..., -1] = vocab  # not in a whole run, where the vocabulary is no multiple of one
    assert torch.equal(metrics.likeliest(logits, 5), logits.topk(5).indices)


def test_equal_logits_are_all_found_whichever_come_first():
    logits = torch.zeros(2, 4000).index_fill_(1, torch.tensor([3, 700, 701, 3999]), 2.0)
    assert metrics.likeliest(logits, 4).sort().values.tolist() == [[3, 700, 701, 3999]] * 2
    assert (logits.gather(1, found := metrics.likeliest(logits, 6)) > 0).sum().item() == 8
    assert all(len(set(row)) == 6 for row in found.tolist())


def test_probabilities_and_their_logs_are_those_of_torch():
    logits = 9 * torch.randn(3, 4, 3000)
    p, logs = metrics.probabilities_and_logs(logits)
    assert torch.equal(p, logits.softmax(-1))
    torch.testing.assert_close(logs, logits.double().log_softmax(-1).float(), atol=3e-6, rtol=1e-6)
    alone = metrics.probabilities_and_logs(logits[:1, :1])[1]
    assert torch.equal(alone, logs[:1, :1])  # to the bit, however many rows there are

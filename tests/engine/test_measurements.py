"""Measurements: values by hand on views made by hand."""

import pytest
import torch

from hookdepth import metrics
from hookdepth.engine.measurement import LayerMeasurement, LayerView, OutputMeasurement, OutputView
from hookdepth.engine.measurements import Custom, LayerEffect, LogitDifference, OutputEffect, TargetProbability
from hookdepth.errors import HookdepthError


def output_view():
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[100.0, 0.0], [2.0, 0.0]]])  # [row, position, vocab]
    return OutputView(logits, positions=[4, 6], next_tokens=torch.tensor([1, 0]), prompt=0)


def test_output_effect():
    values = OutputEffect().values(output_view())
    assert values[0].tolist() == [0.0, 0.0]
    assert values[1].tolist() == pytest.approx([0.5**0.5, 0.0])  # (½, ½) against (1, 0)
    far = OutputView(torch.tensor([[[99.0, 0.0]], [[0.0, 99.0]]]), [0], torch.tensor([0]), 0)
    assert OutputEffect().values(far)[1].item() == pytest.approx(2**0.5), "the largest there is"


def test_target_probability():
    p = torch.tensor(2.0).sigmoid().item()
    assert TargetProbability().values(output_view()).flatten().tolist() == pytest.approx([0.5, p, 0.0, p])


def test_logit_difference():
    assert LogitDifference(0, 1).values(output_view()).tolist() == [[0.0, 2.0], [100.0, 2.0]]
    assert LogitDifference(1, 0, name="other").values(output_view())[0, 1] == -2
    assert (LogitDifference(0, 1).name, LogitDifference(1, 0, name="other").name) == ("logit_difference", "other")


def test_probabilities_are_float32():
    view = OutputView(torch.randn(1, 2, 50).bfloat16(), [0, 1], torch.zeros(2, dtype=torch.long), 0)
    assert view.probabilities.dtype == torch.float32
    torch.testing.assert_close(view.probabilities.sum(-1), torch.ones(1, 2))
    assert LogitDifference(0, 1).values(view).dtype == torch.float32


def test_custom():
    measurement = Custom("count", lambda view: torch.full((2, 2), float(len(view.positions))), "sum")
    assert (measurement.name, measurement.reduce, measurement.change) == ("count", "sum", False)
    assert measurement.values(output_view()).tolist() == [[2.0, 2.0], [2.0, 2.0]]


@pytest.mark.parametrize("clean", [None, [0, 1, 0, 1]])
def test_layer_effect_compares_every_row_with_its_own_trunk(clean):
    pre, post = torch.zeros(4, 2, 3), torch.zeros(4, 2, 3)
    post[:, :, 0] = torch.tensor([[1.0, 1.0], [4.0, 4.0], [1.0, 3.0], [4.0, 6.0]])
    runs = slice(0, 1 if clean is None else 2)
    view = LayerView(0, pre, post, None if clean is None else torch.tensor(clean), runs)
    expected = [[0, 0], [3, 3], [0, 2], [3, 5]] if clean is None else [[0, 0], [0, 0], [0, 2], [0, 0.5]]
    assert LayerEffect().values(view).tolist() == expected


def test_contributions_are_taken_in_float32():
    pre = torch.full((1, 1, 4), 256.0).bfloat16()
    post = pre + torch.tensor(2.0).bfloat16()
    view = LayerView(0, pre, post, None)
    assert view.contribution.dtype == torch.float32
    assert view.contribution.unique().item() == 2


def test_only_changes_promise_to_be_zero_on_the_trunk():
    view = output_view()
    same = OutputView(view.logits[:1].expand(2, -1, -1), [4, 6], view.next_tokens, 0)
    for measurement in (OutputEffect(), TargetProbability(), LogitDifference(0, 1)):
        assert measurement.change == (measurement.values(same).abs().max().item() == 0)
    assert LayerEffect.change
    assert not LayerMeasurement.change
    assert not OutputMeasurement.change


def test_a_measurement_must_say_what_it_measures():
    class Nothing(LayerMeasurement):
        name = "nothing"

    with pytest.raises(HookdepthError, match=r"Nothing says nothing to measure; define values\(view\)"):
        Nothing().values(None)
    with pytest.raises(HookdepthError, match="OutputMeasurement says nothing"):
        OutputMeasurement().values(None)
    assert metrics.EPS == 1e-6


def test_large_vocabularies_go_in_blocks_and_give_the_same():
    # Twice the size of a block in one position, so that rows and positions are both split.
    logits = torch.randn(3, 4, 1 << 19, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert len(list(metrics.blocks(4, 1 << 19, logits.device))) == 4
    p = logits.float().softmax(-1)
    values = OutputEffect().values(OutputView(logits, range(4), torch.zeros(4, dtype=torch.long), 0))
    torch.testing.assert_close(values, (p - p[:1]).norm(dim=-1))
    assert (values[0] == 0).all()


def test_many_rows_go_in_blocks_and_give_the_same():
    pre, post = (torch.randn(9, 5, 1 << 15, generator=torch.Generator().manual_seed(k)) for k in range(2))
    assert len(list(metrics.blocks(9, 5 << 15, pre.device))) > 1
    change = post - pre
    for row, own in ((None, change[:1]), (torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 1]), None)):
        clean = change[row] if own is None else own
        values = LayerEffect().values(LayerView(0, pre, post, row, slice(0, 1 if row is None else 2)))
        torch.testing.assert_close(values, metrics.relative_change(clean, change))

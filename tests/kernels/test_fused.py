"""Fused kernels against the plain path, in Triton's interpreter on the CPU; skipped where Triton is not installed."""

import os

import pytest
import torch
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth import metrics
from hookdepth.analyses import Inputs, Settings, Subject, chosen
from hookdepth.analyses.lens import _kl_and_overlap
from hookdepth.data import Probe
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.runs.sharing import groups_of

IDS = tuple(tuple(ids) for ids in prompts(2, lengths=(9, 7)))
INPUTS = Inputs(IDS, ((4,), (3,)), IDS, (Probe("", "", IDS[0], tuple(map(str, IDS[0])), (8,)),))


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run by the interpreter, and a CPU taken for a GPU."""
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    rms_norm = pytest.importorskip("liger_kernel.ops.rms_norm")
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    from hookdepth.kernels import fused

    if not isinstance(
        __import__("hookdepth.kernels._reductions", fromlist=["_lens"])._lens, interpreter.InterpretedFunction
    ):
        pytest.skip("Triton was imported before, to compile")
    as_given = interpreter._implicit_cvt

    def scalar(given):  # compiled kernels get tensors for numbers, interpreted ones do not
        if type(given) is not float:
            return as_given(given)
        return tl.tensor(interpreter.TensorHandle(numpy.array([given], dtype=numpy.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", scalar)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: 1.0 / tl.sqrt(x))  # a function of CUDA's library
    monkeypatch.setattr(fused, "_DEVICES", {"cpu"})


def test_they_need_a_gpu():
    model = Decoder(tiny_model("llama-gqa"), name="tiny")
    with pytest.raises(HookdepthError, match="fused kernels for a model on cpu"):
        model.use_kernels("fused")
    with pytest.raises(HookdepthError, match="kernels"):
        hookdepth.load("demo", kernels="fuse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions_are_the_plain_ones(interpreted, dtype):
    from hookdepth.kernels import _reductions as reductions

    torch.manual_seed(0)
    pre, added, own = torch.randn(4, 3, 300), torch.randn(4, 3, 300), torch.tensor([0, 1, 0, 1])
    pre, post = pre.to(dtype), (pre + added).to(dtype)
    pre[2], post[2] = pre[0], post[0]
    contributions = post.float() - pre.float()
    found = reductions.layer_change(pre, post, own)
    torch.testing.assert_close(found, metrics.relative_change(contributions[own], contributions))
    assert not found[2].any(), "a row that is its clean run"

    logits = (3 * torch.randn(4, 3, 5000)).to(dtype)
    logits[1] = logits[0]
    shares = logits.float().softmax(-1)
    found = reductions.output_change(logits)
    torch.testing.assert_close(found, (shares - shares[:1]).norm(dim=-1))
    assert not found[:2].any()

    logits = torch.randn(4, 3, 5000)  # no two are equal, which `topk` would have to choose from
    logits[2] = logits[3] + 0.3 * torch.randn(3, 5000)
    found = reductions.lens(logits)
    torch.testing.assert_close(found.sum(-1), _kl_and_overlap(logits), atol=1e-5, rtol=1e-5)
    assert not found[0, -1].any()
    assert (found[1, -1] == 1).all()
    assert reductions.lens(torch.ones(2, 1, 9))[1].eq(1).all(), "of equal logits the first ones count"
    assert reductions.lens(logits.to("meta")).shape == (2, 4, 3)


@pytest.mark.parametrize(("family", "kinds"), [("llama-gqa", {"norm", "mlp", "rotation"}), ("gemma3", {"norm"})])
def test_modules_are_replaced_where_they_agree_and_put_back(interpreted, family, kinds):
    from hookdepth.kernels.fused import Fused

    hf = tiny_model(family)
    fused = Fused(hf, torch.device("cpu"))
    assert kinds <= set(fused.replaced)
    assert max(fused.differences.values()) < 1e-4
    ids = torch.tensor([IDS[0]])
    with torch.no_grad():
        plain = hf(ids).logits
        with fused.in_use(True):
            torch.testing.assert_close(hf(ids).logits, plain, atol=1e-4, rtol=1e-4)
            with fused.in_use(False):
                assert torch.equal(hf(ids).logits, plain)
        assert torch.equal(hf(ids).logits, plain)
    assert not any("forward" in vars(module) for module in hf.modules())


def tensors_of(names, model):
    """Analysis → its tensors."""
    found = {}
    for group in groups_of(chosen(names), Subject(model, INPUTS, Settings(ig_method="riemann", ig_steps=2))):
        found |= group.finish([group.run(chunk, lambda: None) for chunk in range(group.n_chunks)])
    return found


def test_analyses_give_the_same_numbers(interpreted):
    names = ["logit-lens", "skip-current", "residual-erasure", "integrated-gradients", "residual-stats"]
    plain = Decoder(tiny_model("llama-gqa", num_hidden_layers=2), name="tiny")
    model = Decoder(tiny_model("llama-gqa", num_hidden_layers=2), name="tiny")
    model.use_kernels("fused")
    assert "kernels" not in plain.describe()
    assert model.describe()["kernels"]["replaced"] == {"rotation": 2, "mlp": 2, "norm": 5}
    expected = tensors_of(names, plain)
    for name, tensors in tensors_of(names, model).items():
        for key, value in tensors.items():
            torch.testing.assert_close(value, expected[name][key], atol=1e-4, rtol=1e-3, equal_nan=True)

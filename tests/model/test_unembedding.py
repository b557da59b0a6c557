"""The unembedding's product: the module's own numbers, and the module itself wherever it is more than a product."""

import pytest
import torch
from torch import nn

from hookdepth.model.unembedding import most_logits, product


def head(vocab=4000, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(64, vocab, bias=bias).to(dtype)


def hidden(*shape, dtype=torch.float32):
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("vocab", [300, 1536, 4000])
@pytest.mark.parametrize("shape", [(7,), (3, 50)])
def test_slices_give_the_modules_logits(vocab, shape):
    module, x = head(vocab), hidden(*shape)
    logits = product(module, x)
    assert logits.shape == (*shape, vocab)
    # The same sums over the width; a kernel may take them in another order for another shape.
    torch.testing.assert_close(logits, module(x), atol=1e-6, rtol=1e-6)


def test_gradients_pass_through_the_slices():
    module, x = head(), hidden(7).requires_grad_()
    (ours,) = torch.autograd.grad(product(module, x).square().sum(), x)
    (plain,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-5)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_forward(module):
    plain = module.forward
    module.forward = lambda x: 2 * plain(x)  # as accelerate wraps it
    return module


def hooked(module):
    module.register_forward_hook(lambda _module, _args, output: 2 * output)
    return module


def hooked_before(module):
    module.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    return module


@pytest.mark.parametrize(
    "module",
    [Scaled(64, 4000), own_forward(head()), hooked(head()), hooked_before(head()), head(bias=True)],
    ids=["subclass", "wrapped", "hook", "pre-hook", "bias"],
)
def test_what_is_more_than_a_product_is_called(module):
    x = hidden(7)
    assert torch.equal(product(module, x), module(x))
    assert not torch.allclose(product(module, x), x @ module.weight.T, atol=1e-3)


@pytest.mark.parametrize(("dtype", "products"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_float32_goes_in_slices_and_bfloat16_whole(monkeypatch, dtype, products):
    module, x, plain, widths = head(dtype=dtype), hidden(7, dtype=dtype), nn.functional.linear, []
    expected = module(x)
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, *more: (widths.append(len(w)), plain(x, w, *more))[1])
    assert torch.allclose(product(module, x), expected, atol=1e-6)
    assert (len(widths), sum(widths)) == (products, 4000)


def test_a_gpu_holds_more_logits_than_a_cpu():
    assert most_logits(torch.device("cpu")) < most_logits(torch.device("cuda"))
    assert most_logits(torch.device("cpu")) * 4 <= 32 << 20

"""Keys and values handed in from outside: a prompt in two passes is the prompt in one."""

import pytest
import torch
from tiny_models import FAMILIES, prompts, tiny_model

import hookdepth
from hookdepth.model.kv_cache import PrefixCache


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return hookdepth.wrap(tiny_model(request.param))


@pytest.mark.parametrize("start", [1, 5, 12, 19])  # sliding windows are 8 wide
def test_the_rest_of_a_prompt_continues_its_beginning(model, start):
    ids = torch.tensor(prompts(3, 20))
    with torch.no_grad():
        whole = model.forward(ids)
        recorder = PrefixCache(record=slice(None))
        torch.testing.assert_close(model.forward(ids, recorder), whole)
        assert set(recorder.recorded) == set(range(model.n_layers))
        left = {n: (keys[:, :, :start], values[:, :, :start]) for n, (keys, values) in recorder.recorded.items()}
        rest = model.forward(ids[:, start:], PrefixCache(start, prefix=left.__getitem__))
    assert rest.shape == whole[:, start:].shape
    assert (rest - whole[:, start:]).abs().max() <= 1e-5 * whole.abs().max()


def test_a_beginning_may_be_recorded_alone(model):
    ids = torch.tensor(prompts(2, 20))
    with torch.no_grad():
        whole = model.forward(ids)
        recorder = PrefixCache(record=slice(None))
        model.forward(ids[:, :9], recorder)
        rest = model.forward(ids[:, 9:], PrefixCache(9, prefix=recorder.recorded.__getitem__))
    assert (rest - whole[:, 9:]).abs().max() <= 1e-5 * whole.abs().max()


def test_a_cache_without_prefix_changes_no_bit(model):
    ids = torch.tensor(prompts(2, 20))
    with torch.no_grad():
        assert torch.equal(model.forward(ids, PrefixCache()), model.forward(ids))


def test_it_neither_grows_nor_forgets():
    cache = PrefixCache(start=3, prefix=lambda layer: (torch.full((1, 1, 3, 2), float(layer)),) * 2)
    own = torch.ones(1, 1, 4, 2)
    for _ in range(2):
        keys, values = cache.update(own, 2 * own, 5)
        assert keys.shape == (1, 1, 7, 2)
        assert torch.equal(keys[:, :, 3:], own)
        assert torch.equal(values[:, :, 3:], 2 * own)
        assert keys[:, :, :3].unique().item() == 5
    assert cache.recorded == {}
    assert cache.get_seq_length() == cache.get_query_offset() == 3
    assert cache.get_mask_sizes(4) == cache.get_mask_sizes(torch.arange(3, 7)) == (7, 0)
    assert not cache.is_compileable

"""What the engine sets while it works is the user's again afterwards, whatever happens."""

import pytest
import torch
from tiny_models import tiny_model

import hookdepth
from hookdepth.model.rounding import rounding_of

cuda = torch.backends.cuda


@pytest.fixture
def model():
    return hookdepth.wrap(tiny_model("llama"))


@pytest.fixture
def cudnn():
    before = cuda.cudnn_sdp_enabled()
    yield cuda.enable_cudnn_sdp
    cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("user", [True, False])
def test_cudnn_attention_is_off_while_the_engine_works(model, cudnn, user):
    cudnn(user)
    seen = []

    def fail():
        with model.evaluating():
            seen.append(cuda.cudnn_sdp_enabled())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [False]
    assert cuda.cudnn_sdp_enabled() is user


def test_where_the_user_left_no_other_kernel_it_stays(model):
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.CUDNN_ATTENTION]):
        with model.evaluating():
            assert cuda.cudnn_sdp_enabled()
        assert rounding_of(torch.device("cpu"))["sdp"] == ["cudnn"]


def test_it_is_no_part_of_what_a_result_depends_on(cudnn):
    cudnn(False)
    without = rounding_of(torch.device("cpu"))
    cudnn(True)
    assert rounding_of(torch.device("cpu")) == without

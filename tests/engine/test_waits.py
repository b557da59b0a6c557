"""No pass waits for a device that has a queue, and nothing is left on the host: on a device that is not there."""

import pytest
import torch
from absent_gpu import AbsentGPU
from tiny_models import prompts, tiny_model

from hookdepth.analyses import Inputs, Settings, Subject, chosen
from hookdepth.data import Probe
from hookdepth.model.decoder import Decoder
from hookdepth.runs.sharing import groups_of

LAYERS = 4  # more than the three times that a pass may wait: to wait at every layer is too often
IDS = tuple(tuple(ids) for ids in prompts(4, lengths=(14, 11, 14, 11)))
PROBE = Probe("", "", IDS[0], tuple(map(str, IDS[0])), (13,))
INPUTS = Inputs(IDS, ((5, 8), (4,), (), ()), IDS[:2], (PROBE,))
SETTINGS = Settings(ig_method="riemann", ig_steps=4)


def tensors_of(names, model):
    """Analysis → its tensors, and how many passes all took."""
    found, passes = {}, 0
    for group in groups_of(chosen(names), Subject(model, INPUTS, SETTINGS)):
        partials = [group.run(chunk, lambda: None) for chunk in range(group.n_chunks)]
        passes += sum(partial.passes for partial in partials)
        found |= group.finish(partials)
    return found, passes


@pytest.mark.parametrize(
    ("names", "besides"),
    [
        # `besides`: plain passes of whole prompts, which are not counted as passes of branches
        (["residual-stats"], 0),
        (["logit-lens"], 0),
        (["skip-current", "skip-future"], 0),
        (["local-current", "local-future"], 0),
        (["residual-erasure"], 2),
        (["integrated-gradients"], 1),
        (["head-ablation"], 2),
        (["layer-paths"], 4),
        (["layer-pruning"], 0),
    ],
    ids=str,
)
def test_a_pass_waits_at_most_three_times(names, besides, monkeypatch):
    expected, passes = tensors_of(names, Decoder(tiny_model("llama-gqa", num_hidden_layers=LAYERS), name="tiny"))
    gpu = AbsentGPU(monkeypatch)
    model = Decoder(gpu.take(tiny_model("llama-gqa", num_hidden_layers=LAYERS)), name="tiny")
    with gpu:
        found, there = tensors_of(names, model)
    assert there == passes
    assert 0 < gpu.waits.total() <= 3 * (passes + besides), gpu.waits
    for name, tensors in expected.items():
        for key, value in tensors.items():
            torch.testing.assert_close(
                found[name][key], value, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_it_sees_an_index_of_the_host_and_what_was_left_there(monkeypatch):
    gpu = AbsentGPU(monkeypatch)
    hf = gpu.take(tiny_model("llama-gqa"))
    weight = next(hf.parameters())
    with gpu:
        weight[torch.tensor([0, 2])]
        assert gpu.waits.total() == 1
        with pytest.raises(RuntimeError, match="of the host and of the device"):
            weight + torch.ones(weight.shape)

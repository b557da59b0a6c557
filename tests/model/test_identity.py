"""What a model's identity must notice, and what it must not."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny_models import prompts, tiny_model

import hookdepth
from hookdepth.errors import HookdepthError
from hookdepth.model.identity import identity_of, weights_digest
from hookdepth.model.rounding import rounding_of


def layers(**sizes):
    """Tensors of several blocks of the checksum, and of no whole number of its words."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.big = torch.nn.Parameter(torch.randn(500, 700))
    module.twin = torch.nn.Parameter(torch.randn(500, 700))
    module.odd = torch.nn.Parameter(torch.randn(7).bfloat16())
    module.register_buffer("kept", torch.arange(5))
    module.register_buffer("passing", torch.ones(3), persistent=False)
    return module


def flip(tensor, byte, bit):
    raw = tensor.detach().view(-1).view(torch.uint8)
    raw[byte] ^= 1 << bit


TENSORS = ("big", "twin", "odd", "kept", "passing")


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.71, 1.0])
def test_any_single_bit_counts(name, place):
    module = layers()
    plain, tensor = weights_digest(module), getattr(module, name)
    byte = int(place * (tensor.numel() * tensor.element_size() - 1))
    seen = {plain}
    for bit in range(8):
        flip(tensor, byte, bit)
        seen.add(weights_digest(module))
        flip(tensor, byte, bit)
    assert len(seen) == 9
    assert weights_digest(module) == plain


def swap(one, other):
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


CHANGES = {
    "rows": lambda m: swap(m.big[3], m.big[400]),
    "neighbours": lambda m: swap(m.big[3, 4:5], m.big[3, 5:6]),
    "tensors": lambda m: swap(m.big, m.twin),
    "signs": lambda m: m.big.neg_(),
    "signs of a row": lambda m: m.big[7].neg_(),
    "doubled": lambda m: m.twin.mul_(2),
    "a page of zeros": lambda m: m.big.view(-1)[1024:2048].zero_(),
    "a block of zeros": lambda m: m.big.view(-1)[: 1 << 15].zero_(),
    "a page twice": lambda m: m.big.view(-1)[1024:2048].copy_(m.big.view(-1)[2048:3072].clone()),
    "shape": lambda m: setattr(m, "big", torch.nn.Parameter(m.big.detach().view(700, 500))),
    "dtype": lambda m: setattr(m, "kept", m.kept.view(torch.float64)),
    "name": lambda m: m.register_buffer("kept2", m._buffers.pop("kept")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_damaged_or_another_checkpoint_changes(change):
    module = layers()
    plain = weights_digest(module)
    with torch.no_grad():
        CHANGES[change](module)
    assert weights_digest(module) != plain


def test_memory_layout_order_and_threads_do_not_count():
    plain = weights_digest(layers())
    other, again = layers(), torch.nn.Module()
    for name in reversed(TENSORS):
        value = getattr(other, name)
        if name == "big":
            value = torch.nn.Parameter(value.detach().T.contiguous().T)
            assert not value.is_contiguous()
        if name == "odd":  # at an address that is no multiple of eight
            value = torch.nn.Parameter(torch.cat([torch.zeros(1).bfloat16(), value.detach()])[1:])
        if isinstance(value, torch.nn.Parameter):
            again.register_parameter(name, value)
        else:
            again.register_buffer(name, value, persistent=name == "kept")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert weights_digest(again) == plain
    finally:
        torch.set_num_threads(threads)


def test_every_call_reads_the_weights_anew():
    """`.data` changes no version counter."""
    module = layers()
    plain = weights_digest(module)
    module.big.data[0, 0] += 1
    assert weights_digest(module) != plain


@pytest.mark.parametrize("family", ["llama-untied", "gemma2"])
@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_offloaded_weights_are_the_same_weights(tmp_path, family, offload):
    plain = weights_digest(tiny_model(family))
    for seed, same in ((0, True), (1, False)):
        hf = tiny_model(family, seed=seed)
        if offload == "memory":
            cpu_offload(hf, execution_device=torch.device("cpu"))
        else:
            disk_offload(hf, str(tmp_path / str(seed)), execution_device=torch.device("cpu"))
        assert all(parameter.device.type == "meta" for parameter in hf.parameters())
        assert (weights_digest(hf) == plain) is same


def test_weights_that_are_nowhere():
    module = layers().to("meta")
    with pytest.raises(HookdepthError, match="is on the meta device, and nothing says where its values are"):
        weights_digest(module)


def test_rotary_factors_of_the_last_text_do_not_count():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    hf = tiny_model("llama", rope_scaling=rope, max_position_embeddings=16)
    plain = weights_digest(hf)
    factors = hf.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        hf(torch.tensor(prompts(1, 40)))
    assert not torch.equal(hf.model.rotary_emb.inv_freq, factors), "the text was longer than the original context"
    assert weights_digest(hf) == plain


def test_rotary_factors_that_were_edited_do_count():
    hf = tiny_model("llama")
    plain = weights_digest(hf)
    hf.model.rotary_emb.inv_freq.mul_(1.5)
    assert weights_digest(hf) != plain


def test_hooks_of_the_users_own_are_named_and_never_those_of_another_process():
    model = hookdepth.wrap(tiny_model("llama"), name="tiny")
    assert "hooks" not in identity_of(model)

    def steer(_module, _args, output):
        return output

    handle = model.layers[3].register_forward_hook(steer)
    (first,) = identity_of(model)["hooks"]
    assert "model.layers.3" in first
    assert "steer" in first
    assert identity_of(model)["hooks"] == [first]
    handle.remove()
    handle = model.layers[3].register_forward_hook(steer)
    assert identity_of(model)["hooks"] != [first], "another hook, or the same: nobody can tell"
    handle.remove()


def test_adapters_that_are_switched_off():
    hf = tiny_model("llama")
    adapter = hf.model.layers[0].self_attn.q_proj
    adapter.active_adapters, adapter.disable_adapters, adapter.scaling = ["default"], False, {"default": 2.0}
    model = hookdepth.wrap(hf, name="tiny")
    on = identity_of(model)
    assert on["adapters"] == {
        "model.layers.0.self_attn.q_proj": {
            "active": ["default"],
            "merged": [],
            "scaling": {"default": 2.0},
            "off": False,
        }
    }
    adapter.disable_adapters = True
    assert identity_of(model) != on


def test_settings_that_change_rounding(monkeypatch):
    cpu = torch.device("cpu")
    plain, threads = rounding_of(cpu), torch.get_num_threads()
    seen = [plain]
    torch.set_num_threads(threads + 1)
    seen.append(rounding_of(cpu))
    torch.set_num_threads(threads)
    torch.backends.mkldnn.set_flags(False)
    seen.append(rounding_of(cpu))
    torch.backends.mkldnn.set_flags(True)
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        seen.append(rounding_of(cpu))
    torch.set_float32_matmul_precision("medium")
    seen.append(rounding_of(cpu))
    torch.set_float32_matmul_precision("highest")
    if torch.set_flush_denormal(True):
        seen.append(rounding_of(cpu))
        torch.set_flush_denormal(False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    seen.append(rounding_of(cpu))
    assert all(one != other for number, one in enumerate(seen) for other in seen[:number])
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert rounding_of(cpu) == plain, "each was put back"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "phi3"])
def test_what_modules_keep_beside_their_weights_counts(family):
    """Whoever changes an epsilon, a window or an activation in a module changes neither weights nor config."""
    hf = tiny_model(family, num_hidden_layers=2)
    model = hookdepth.wrap(hf)
    plain, layer = identity_of(model)["modules_sha256"], hf.model.layers[1]
    changes = [
        (layer.input_layernorm, "eps" if family == "gemma3" else "variance_epsilon", 1e-2),
        (layer.self_attn, "scaling", 0.5),
        (layer.mlp, "activation_fn" if family == "phi3" else "act_fn", torch.nn.Tanh()),
    ]
    if family == "gemma3":
        changes.append((layer.self_attn, "sliding_window", 3))
    seen = {plain}
    for module, name, value in changes:
        before = getattr(module, name)
        setattr(module, name, value)
        seen.add(identity_of(model)["modules_sha256"])
        setattr(module, name, before)
    assert len(seen) == 1 + len(changes)
    hf(torch.tensor(prompts(1, 30)))
    assert identity_of(model)["modules_sha256"] == plain

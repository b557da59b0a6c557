"""The models of the benchmarks: the demo model, a tiny one, and random weights in the shapes of Llamas.

    subject = make("llama-3.1-8b", "bfloat16", torch.device("cuda"))
    subject.model, subject.inputs                  # a Decoder, and token ids at the notebook's settings

Random weights are drawn on the device, large enough that every layer changes every other and that predictions are
sharp; prompts are random token ids. Weights are rounded to bfloat16 whatever the dtype, so that what a
bfloat16 run differs by from a float32 one is the arithmetic's doing.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hookdepth
from hookdepth import Decoder, wrap
from hookdepth.analyses import Inputs
from hookdepth.data import DEFAULT_PROBES, Probe, encode, load_examples, make_probe, sample_cuts

_LLAMA_3 = {"vocab_size": 128256, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    # For the sweeps: every dimension in proportion to the demo model, small enough to be run many times.
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
NAMES = ("demo", *SHAPES)


@dataclass(frozen=True)
class Subject:
    """A model with what runs on it.

    Attributes:
        inputs: two prompts of about 180 and 120 tokens with four cuts, ten baseline prompts, the probe.
        layers: those of integrated gradients.
    """

    name: str
    model: Decoder
    inputs: Inputs
    layers: tuple[int, ...]

    @property
    def label(self) -> str:
        """Name and dtype."""
        return f"{self.name}, {str(self.model.dtype).removeprefix('torch.')}"


def make(name: str, dtype: str, device: torch.device) -> Subject:
    """Load or make a model in a dtype.

    make("tiny", "float32", torch.device("cpu")).model.n_layers   # 4
    """
    if name == "demo":
        return _demo(dtype, device)
    model = cast(random_model(name, device, **SHAPES[name]), getattr(torch, dtype))
    decoder = wrap(model, name=name)
    short = name == "tiny"
    prompts = random_prompts(decoder, (24, 16) if short else (180, 120))
    baseline = random_prompts(decoder, (12,) * 10 if short else (150,) * 10, seed=1)
    inputs = Inputs(prompts, _cuts(prompts), baseline, (_probe(decoder, 10 if short else 20),))
    return Subject(name, decoder, inputs, tuple(range(decoder.n_layers)))


def random_model(name: str, device: torch.device, **shape: Any) -> LlamaForCausalLM:
    """A Llama with random weights that bfloat16 holds exactly: random_model("x", device, **SHAPES["tiny"])."""
    shape = {"tie_word_embeddings": False, "max_position_embeddings": 8192, **shape}
    big = shape["hidden_size"] > 1024
    with torch.device(device):
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**shape, pad_token_id=None, bos_token_id=1, eos_token_id=2),
            dtype=torch.bfloat16 if big else torch.float32,
            attn_implementation="sdpa",
        )
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                gain = 8.0 if "lm_head" in parameter_name or "embed" in parameter_name else 1.0
                parameter.normal_(0.0, gain / shape["hidden_size"] ** 0.5, generator=generator)
                if "down_proj" in parameter_name:
                    parameter.mul_((shape["hidden_size"] / shape["intermediate_size"]) ** 0.5)
    model.config._name_or_path = name
    return model.eval() if big else rounded(model).eval()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Its parameters in a dtype; buffers stay as they are, as where a checkpoint is loaded: cast(model, torch.bfloat16)

    `model.to` would round the rotary frequencies, too.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def rounded(model: Any) -> Any:
    """Weights rounded to bfloat16, in the dtype that they had."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


def twin(hf: Any) -> Any:
    """A model of its own with the same weights in the same memory: peers change modules, never weights."""
    return copy.deepcopy(hf, {id(parameter): parameter for parameter in hf.parameters()})


def warm_up(subject: Subject) -> None:
    """A pass of each prompt, so that whoever is timed first does not fetch the weights for all."""
    with subject.model.evaluating():
        for prompt in subject.inputs.prompts:
            subject.model.forward(torch.tensor([prompt], device=subject.model.device))


def in_float32(subject: Subject) -> Subject:
    """The same model and inputs in float32, with weights of its own: what bfloat16 results are compared with."""
    hf = cast(copy.deepcopy(subject.model.hf), torch.float32)
    model = wrap(hf, subject.model.tokenizer, name=subject.model.name)
    return Subject(subject.name, model, subject.inputs, subject.layers)


def shorter(subject: Subject, tokens: int) -> Subject:
    """The same with this many tokens less in every prompt: what has never run at this length is cold."""
    inputs = subject.inputs
    prompts = tuple(ids[: len(ids) - tokens] for ids in inputs.prompts)
    pairs = zip(inputs.cuts, prompts, strict=True)
    cuts = tuple(tuple(min(cut, len(ids) - 2) for cut in own) for own, ids in pairs)
    probes = tuple(
        replace(
            probe,
            token_ids=probe.token_ids[tokens:],
            tokens=probe.tokens[tokens:],
            answer_positions=tuple(position - tokens for position in probe.answer_positions),
        )
        for probe in inputs.probes
    )
    return replace(subject, inputs=replace(inputs, prompts=prompts, cuts=cuts, probes=probes))


def random_prompts(model: Decoder, lengths: Sequence[int], seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Random token ids: random_prompts(model, (180, 120))."""
    source = random.Random(seed)
    vocab = int(model.config.vocab_size)
    return tuple(tuple(source.randrange(3, vocab) for _ in range(length)) for length in lengths)


def _probe(model: Decoder, length: int) -> Probe:
    """Random tokens whose last one is what the model predicts, so that there is something to attribute."""
    (ids,) = random_prompts(model, (length - 1,), seed=2)
    with model.evaluating():
        logits = model.unembed(model.forward(torch.tensor([ids], device=model.device)))
    whole = (*ids, int(logits[0, -1].argmax()))
    return Probe("", "", whole, tuple(map(str, whole)), (length - 1,))


def _cuts(prompts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(sample_cuts([len(prompt) for prompt in prompts]))


def _demo(dtype: str, device: torch.device) -> Subject:
    model = hookdepth.load("demo", dtype=dtype, device=str(device))
    rounded(model.hf)
    texts: list[list[int]] = [encode(model.tokenizer, example.text) for example in load_examples("demo").examples]
    prompts = tuple(tuple(_nearest(texts, wanted)) for wanted in (180, 120))
    probe = make_probe(model.tokenizer, *DEFAULT_PROBES[0])
    inputs = Inputs(prompts, _cuts(prompts), tuple(map(tuple, texts[:10])), (probe,))
    # Three layers: all thirty would take minutes for each contestant, and all cost what these cost on average.
    return Subject("demo", model, inputs, (0, model.n_layers // 2, model.n_layers - 1))


def _nearest(texts: Sequence[Sequence[int]], tokens: int) -> Sequence[int]:
    return min(texts, key=lambda ids: abs(len(ids) - tokens))

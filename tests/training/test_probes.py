"""Probes that the model cannot take are refused when the monitor is made: on a GPU they would end the training."""

import numpy as np
import pytest
import torch
from training_runs import LAYERS, fresh_model, make_batches, n_hooks, train
from transformers import Trainer, TrainingArguments

from hookdepth.analyses import Settings
from hookdepth.data import Probe
from hookdepth.errors import HookdepthError
from hookdepth.training import DepthCallback, DepthMonitor

IDS = list(range(3, 20))
ROWS = 300  # of tiny models' embedding
POSITIONS = 40


def probe(ids=tuple(IDS[:6]), positions=(4, 5)):
    return Probe("a", "b", tuple(ids), tuple(map(str, ids)), positions)


def monitor(model, prompt, prompts=None):
    return DepthMonitor(model, 1, probes=["logit-lens"], prompts=[prompt] if prompts is None else prompts, strict=True)


def short(**overrides):
    return fresh_model(max_position_embeddings=POSITIONS, **overrides)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([3, ROWS], "token id 300, .* embeds 0 to 299"),
        (probe((3, 4, 10**6), (2,)), "token id 1000000"),
        ([3] * (POSITIONS + 1), "41 tokens, .* has 40 positions"),
        (probe([3] * (POSITIONS + 1)), "41 tokens, .* has 40 positions"),
        ([], "is no prompt"),
        ([3, -1], "is no prompt"),
        ([3, True], "is no prompt"),
        ([3, 4.0], "is no prompt"),
        ([3, None], "is no prompt"),
        (3, "is no prompt"),
        (None, "is no prompt"),
        ([[3, 4]], "is no prompt"),
        (torch.tensor([3.0, 4.0]), "is no prompt"),
        (torch.tensor([[3, 4]]), "is no prompt"),
        (torch.tensor(3), "is no prompt"),
        (probe((3, -4, 5)), "is no prompt"),
        (probe(positions=()), r"answer at \[\]"),
        (probe(positions=(0,)), r"answer at \[0\]"),
        (probe(positions=(6,)), r"answer at \[6\]"),
        (probe(positions=(1.5,)), r"answer at \[1.5\]"),
    ],
)
def test_prompts_that_the_model_cannot_take(prompt, says):
    with pytest.raises(HookdepthError, match=says):
        monitor(short(), prompt)


@pytest.mark.parametrize("prompts", [7, torch.tensor(IDS), {3: 4}, iter([IDS])])
def test_prompts_that_are_no_list(prompts):
    with pytest.raises(HookdepthError, match="is no list"):
        monitor(short(), None, prompts)


def test_a_flat_list_is_not_a_prompt_for_each_of_its_tokens():
    with pytest.raises(HookdepthError, match="3 is no prompt"):
        monitor(short(), None, IDS)


def test_prompts_at_the_limit_run():
    model = short()
    at_the_limit = [[3] * (POSITIONS - 1) + [ROWS - 1], torch.tensor(IDS), list(np.arange(3, 9))]
    watching = monitor(model, None, at_the_limit)
    train(model, make_batches(1), watching)
    facts = watching.results["logit-lens"].metadata["data"]
    assert facts["lengths"] == [POSITIONS, len(IDS), 6]
    one = monitor(model, None, probe())
    assert one.probes.inputs.probes == (probe(),)


@pytest.mark.parametrize("how", ["function", "in place"])
def test_a_compiled_model(how):
    model = short()
    if how == "function":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    with pytest.raises(HookdepthError, match="token id 300"):
        monitor(model, [ROWS])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5]},
    ],
    ids=["LoRA", "LoRA of the embedding", "embedding saved", "some tokens"],
)
def test_peft(options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(short(), peft.LoraConfig(task_type="CAUSAL_LM", **options)).train()
    monitor(model, [ROWS - 1])
    with pytest.raises(HookdepthError, match="token id 300"):
        monitor(model, [ROWS])


def test_an_embedding_with_more_rows_than_the_tokenizer_has_words():
    model = short()
    model.resize_token_embeddings(ROWS + 20)
    monitor(model, [ROWS + 19])
    with pytest.raises(HookdepthError, match="token id 320"):
        monitor(model, [ROWS + 20])


def test_the_callback_refuses_when_it_is_made(tmp_path):
    trainer = Trainer(fresh_model(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(HookdepthError, match="token id 300"):
        DepthCallback(trainer, probes=["logit-lens"], prompts=[[ROWS]])
    with pytest.raises(HookdepthError, match="every is 0"):
        DepthCallback(trainer, 0)
    with pytest.raises(HookdepthError, match="make the Trainer first"):
        DepthCallback(fresh_model())
    assert n_hooks(trainer.model) == 0
    assert trainer.model.config.num_hidden_layers == LAYERS


def test_what_an_analysis_refuses_is_refused_before_the_training():
    settings = Settings(keep_front=len(IDS))
    with pytest.raises(HookdepthError, match="leaves nothing of prompt 0"):
        DepthMonitor(short(), probes=["skip-current"], prompts=[IDS], settings=settings)

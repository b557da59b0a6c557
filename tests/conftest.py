"""Fixtures: the demo model, and the numbers that the seed notebook gave for it where shared/ is there."""

import gc
import json
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hookdepth.errors import HookdepthError
from hookdepth.model.demo import demo_folder

SHARED = Path(__file__).resolve().parents[2] / "shared"
TEMPLATE = (
    "Given the following problem, reason and give a final answer to the problem.\nProblem: {question}\n"
    'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.\n'
    "\n{reasoning}The final answer is {final}"
)


# Tiny models gain nothing from more, several runs beside each other lose a lot, and how the products of a few rows are
# shared out among threads depends on how many rows there are: some tiny models' noise floor is 0 with one thread only.
torch.set_num_threads(1)

hypothesis.settings.register_profile("without-clock", deadline=None)  # what fails fails on a busy machine, too
hypothesis.settings.load_profile("without-clock")


def pytest_collection_modifyitems(items):
    """The files of few and long tests first, so that two processes that share the files end together."""
    items.sort(key=lambda item: item.path.name not in ("test_readme.py", "test_docs.py", "test_demo.py"))


def pytest_collection_finish():
    """What has been imported stays: else each collection of garbage walks through torch and transformers, in 0.6 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def demo_model():
    """`hf_model, tokenizer = demo_model`: SmolLM2-135M-Instruct, dequantised to float32, in eval mode."""
    try:
        folder = demo_folder()
    except HookdepthError as error:
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def golden():
    """`golden("skip-current")["layer.effect"]`: what the seed notebook's functions gave on the demo model."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("shared/golden is not there")
    return lambda name: load_file(SHARED / "golden" / f"{name}.safetensors")


@pytest.fixture(scope="session")
def gsm8k_texts():
    """`gsm8k_texts[0]`: the first ten rows of GSM8K's test split in the notebook's template."""
    file = SHARED / "data" / "gsm8k_head.jsonl"
    if not file.is_file():
        pytest.skip("shared/data is not there")
    texts = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reasoning, final = row["answer"].split("####")
        texts.append(TEMPLATE.format(question=row["question"], reasoning=reasoning, final=final.strip()))
    return texts

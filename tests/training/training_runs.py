"""Short trainings of tiny models, and everything about them that a diagnostic must not change.

assert_same(train(model_a, batches), train(model_b, batches, DepthMonitor(model_b, every=1)))
"""

import random

import numpy as np
import torch
from tiny_models import tiny_model

from hookdepth.analyses.stats import residual_sums
from hookdepth.model.decoder import Decoder
from hookdepth.results import Result

LAYERS = 3


def fresh_model(family="llama", **overrides):
    """A tiny model in training mode, with dropout in its attention, so that random state matters."""
    return tiny_model(family, **{"num_hidden_layers": LAYERS, "attention_dropout": 0.1, **overrides}).train()


def make_batches(n, rows=2, tokens=12, padding=(0, 5), seed=0):
    """n batches, each row padded on the right by so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n):
        ids = torch.randint(3, 300, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        for row, pad in enumerate(padding[:rows]):
            mask[row, tokens - pad :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


def train(model, batches, monitor=None, *, accumulate=1, autocast=False, call=None):
    """A plain loop with AdamW; returns what `assert_same` compares. `call` is what the loop calls, if not the model."""
    seed_everything()
    call = model if call is None else call
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []

    def step(parts):
        for part in parts:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = call(**part).loss
            (loss / len(parts)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()

    for start in range(0, len(batches), accumulate):
        parts = batches[start : start + accumulate]
        if monitor is None:
            step(parts)
        else:
            with monitor.step():
                step(parts)
    return fingerprint(model, optimizer, losses)


def seed_everything():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def fingerprint(model, optimizer, losses):
    config = getattr(model, "config", None)
    return {
        "losses": losses,
        "weights": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "optimiser": [value for state in optimizer.state.values() for value in state.values()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "training": [module.training for module in model.modules()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "use_cache": getattr(config, "use_cache", None),
        "hooks": n_hooks(model),
    }


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_same(a, b, path=""):
    """Bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}[{number}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def expected_stats(model, batches):
    """What residual-stats gives on the rows of these batches, each without its padding, on a model as it is now."""
    decoder = Decoder(model)
    rows = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    sums = [residual_sums(decoder, row) for row in rows if row]
    tokens = sum(len(row) for row in rows)
    return {
        name: torch.stack([s[name] for s in sums]).amax(0)
        if "_max" in name
        else torch.stack([s[name] for s in sums]).sum(0) / tokens
        for name in sums[0]
        if not name.startswith("first_token")  # a training's rows are read together
    }


def assert_close(result, expected, tolerance=2e-5):
    tensors = result.tensors if isinstance(result, Result) else result
    assert tensors.keys() == expected.keys()
    options = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}  # a prompt that cannot be measured is NaN
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value, msg=lambda m, n=name: f"{n}: {m}", **options)

"""Random branches of every kind, for the sites that a model has."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from hookdepth.engine.ablation import Ablate, Clamp
from hookdepth.engine.branches import Branch
from hookdepth.engine.intervention import Intervention
from hookdepth.engine.interventions import AddVector, Patch, Skip
from hookdepth.model.decoder import Decoder
from hookdepth.model.sites import part_of

LENGTHS = (14, 9, 6)


def random_branches(model: Decoder, kind: str, n: int, source: random.Random) -> Iterator[Branch]:
    """Branches of one kind: `n`, or one for every site where that takes more; none where the model has no such site."""
    where = [(site, layer) for layer in range(model.n_layers) for site in model.sites.of(layer)]
    having = {"heads": "z", "neurons": "neurons"}.get(kind)
    where = [place for place in where if having in (None, place[0])]
    if kind == "cuts":  # a later layer must be there to see it
        where = [place for place in where if 2 * place[1] < model.n_layers]
    if kind in ("sites", "tokens"):  # every site at least once
        source.shuffle(where)
        first = list({site: (site, layer) for site, layer in where}.values())
        where = [*first, *where[: max(0, n - len(first))]]
    elif where:
        where = [source.choice(where) for _ in range(n)]
    for number, (site, layer) in enumerate(where):
        prompt = number % len(LENGTHS) if kind == "lengths" else 0
        length = LENGTHS[prompt]
        drawn = [_drawn(model, kind, site, layer, source, length)]
        if kind == "several":
            drawn += [_drawn(model, kind, *source.choice(where), source, length) for _ in range(2)]
        cut = source.randrange(2, length - 1) if kind == "cuts" else None
        measured = sorted(source.sample(range(cut or 0, length), 3 if (cut or 0) + 3 < length else 1))
        yield Branch(tuple(drawn), prompt, cut, measured=measured if number % 2 else None)


def _drawn(model: Decoder, kind: str, site: str, layer: int, source: random.Random, length: int) -> Intervention:
    shape, tokens = model.shape_of(site, layer), slice(source.randrange(2), None)
    head = source.randrange(shape[0]) if site == "z" else None
    part = part_of(site) if site.endswith("_out") else "layer" if site == "resid_post" else None
    if kind in ("skips", "cuts", "lengths", "several") and part and source.random() < 0.7:
        return Skip(layer, part, tokens)
    if kind == "neurons":
        return Clamp(site, layer, source.randrange(shape[0]), 3.0, tokens)
    if kind == "heads" or (kind == "lengths" and site != "resid_mid" and source.random() < 0.5):
        return Ablate(site, layer, head, "mean" if source.random() < 0.5 else 0.0, tokens)
    generator = torch.Generator().manual_seed(source.randrange(1 << 30))
    value = torch.randn(shape if head is None else shape[1:], generator=generator)
    if kind == "tokens":
        return Patch(site, layer, value, [source.randrange(length)], head)
    change = AddVector if source.random() < 0.5 else Patch
    return change(site, layer, value, tokens, head)

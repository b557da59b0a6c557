"""layer-paths: the model run along other sequences of layers, and what that costs.

    hookdepth.analyse("demo", "layer-paths", limit=1)["skip.loss"]     # [L, L]: layers a … b left out

A span a … b is left out (`skip`), visited twice (`repeat`) or in reverse order (`reverse`); a and a + 1 are exchanged
(`swap`) or read the same input, and what they add is summed (`parallel`). Mean next-token loss, mean KL(clean‖path) and
the share of equal likeliest tokens: over tokens, so that a long prompt counts for more. Beside them what magnitudes say
without any intervention: 1 − cos(h_l, h_{l+1}) (block influence, 2403.03853), and the angular distance
arccos(cos(h_a, h_{b+1}))/π at the last token (2403.17887).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.spans import best, magnitudes, over_lengths, rearranged, refuse_unpredicted
from hookdepth.analyses.subject import Measured, Subject, Tensors
from hookdepth.engine.branches import Branch
from hookdepth.engine.measurements import KL, Loss, Top1
from hookdepth.engine.paths import LayerPath
from hookdepth.engine.work import Work, plain_work
from hookdepth.metrics import rank_correlation
from hookdepth.report.figures import Lines, Triangles
from hookdepth.results import Result

SPANS, PAIRS = ("skip", "repeat", "reverse"), ("swap", "parallel")
VALUES = {"loss": "loss", "kl": "kl", "agreement": "top1"}


class LayerPaths(Analysis):
    """Other sequences of layers: analyse(model, "layer-paths")["repeat.loss"]."""

    name = "layer-paths"
    question = "what leaving out, repeating, reversing or exchanging layers costs"
    heading = "Other paths through the layers"
    paper = "2407.09298; 2403.03853; 2403.17887"
    order = 8
    options = ("paths", "keep_front", "max_rows")
    measurements = (Loss(), KL(), Top1())
    tensors = {
        **{f"{kind}.{value}": "layer layer" for kind in SPANS for value in VALUES},
        **{f"{kind}.{value}": "pair?" for kind in PAIRS for value in VALUES},
        **{f"paths.{value}": "path?" for value in VALUES},
        "clean_loss": "",
        "block_influence": "layer",
        "angular_distance": "layer layer",
    }
    figures = (
        Triangles(
            ("repeat.loss", "skip.loss"),
            "What the loss rises by. Below the line: layers a … b left out, a at the bottom, b at the left. Above it: "
            "layers a … b visited twice, a at the right, b at the top. Blue is a path that is better than the model.",
            minus="clean_loss",
            label="Loss − loss of the model (nats)",
            caption="spans of layers left out (below the line) and visited twice (above it)",
            name="spans",
            limits=(-2.0, 2.0),
            rows="Last layer left out",
            columns="First layer left out",
            other=("First layer visited twice", "Last layer visited twice"),
            reduction="mean over tokens",
        ),
        Lines(
            ("swap.loss", "parallel.loss"),
            "What the loss rises by with two neighbours exchanged, and with both on the same input. Where both stay "
            "near zero, the two layers do not build on each other.",
            label="Loss − loss of the model (nats)",
            caption="neighbours exchanged, or side by side",
            name="pairs",
            minus="clean_loss",
            axis="First of the two layers",
            labels={"swap.loss": "exchanged", "parallel.loss": "on the same input"},
            signed=True,
            limit=2.0,
            reduction="mean over tokens",
            over_training=None,
        ),
    )

    def _listed(self, subject: Subject) -> Iterator[tuple[str, int, int, LayerPath]]:
        """(kind, a, b, path) of all branches; of the user's own paths a is their number."""
        n, front = subject.model.n_layers, self.front(subject.settings)
        for kind in (*SPANS, *PAIRS):
            for a in range(n if kind in SPANS else n - 1):
                for b in range(a, n) if kind in SPANS else [a + 1]:
                    yield kind, a, b, LayerPath(rearranged(kind, a, b, n), keep_front=front)
        for number, text in enumerate(subject.settings.paths):
            yield "paths", number, 0, LayerPath(text, keep_front=front)

    def refuse(self, subject: Subject) -> None:
        """Also paths through layers that are not there, and prompts of which no next token can be predicted."""
        super().refuse(subject)
        refuse_unpredicted(subject, self.front(subject.settings))
        for path in subject.settings.paths:
            LayerPath(path).check(subject.model, 1)

    def branches(self, subject: Subject, item: int) -> list[Branch]:
        """All spans, each in three ways, all pairs of neighbours in two, and the user's own paths."""
        measured = slice(self.front(subject.settings), None)
        return [Branch((path,), measured=measured) for *_, path in self._listed(subject)]

    def sample(self, settings: Settings, times: int) -> Settings:
        """Without the user's own paths, which the small model of a dry run does not have."""
        return replace(settings, paths=())

    def work(self, subject: Subject) -> Work:
        """A plain forward pass of each prompt, for the magnitudes."""
        return plain_work(subject.model, subject.inputs.prompts)

    def collect(self, subject: Subject, item: int, measured: Measured) -> Tensors:
        """Maps [L, L], NaN below the diagonal, and [L − 1] of neighbours."""
        n, found = subject.model.n_layers, {"clean_loss": measured.clean["loss"][0]}
        shapes = dict.fromkeys(SPANS, (n, n)) | {kind: (n - 1,) for kind in PAIRS if n > 1}
        shapes |= {"paths": (len(subject.settings.paths),)} if subject.settings.paths else {}
        for kind, shape in shapes.items():
            found |= {f"{kind}.{value}": torch.full(shape, torch.nan) for value in VALUES}
        for number, (kind, a, b, _) in enumerate(self._listed(subject)):
            for value, name in VALUES.items():
                found[f"{kind}.{value}"][(a, b) if kind in SPANS else a] = measured.output[name][number]
        return found | magnitudes(subject.model, subject.inputs.prompts[item], self.front(subject.settings))

    def reduce(self, subject: Subject, items: Sequence[Tensors]) -> Tensors:
        """Means over the tokens of all prompts, and each prompt's own."""
        tokens = torch.tensor(self.measured_tokens(subject), dtype=torch.float64)
        result: Tensors = {}
        for name in items[0]:
            own = torch.stack([values[name] for values in items])
            # The last token predicts nothing that is known; distances are of one token a prompt.
            weights = tokens - 1 if name.endswith("loss") else tokens.sign() if name.endswith("distance") else tokens
            result[name] = (torch.tensordot(weights, own.double(), 1) / weights.sum()).float()
            result[f"per_prompt.{name}"] = own.float()
        return result

    def numbers(self, result: Result) -> dict[str, Any]:
        """The best repeats, the cheapest omissions, and how well magnitudes rank what leaving out a layer costs."""
        if not result.tensors:
            return {}
        clean, skip = result["clean_loss"].item(), result["skip.loss"]
        floor = result.metadata.get("null_effect") or 0.0
        single = skip.diagonal()
        texts, losses = (result.metadata.get("settings") or {}).get("paths", ()), result.tensors.get("paths.loss", ())
        return {
            "clean_loss": clean,
            "paths": [
                {"path": text, "loss": loss.item(), "more": loss.item() - clean}
                for text, loss in zip(texts, losses, strict=False)
            ],
            "best_repeats": best(result["repeat.loss"], clean),
            "repeats_below_the_model": int((result["repeat.loss"] < clean - floor).sum()),
            "cheapest_omissions": best(skip, clean),
            "cheapest_layers": best(torch.diag(single).masked_fill(torch.eye(len(single)) == 0, torch.nan), clean),
            "rank_correlation": {
                "block_influence": rank_correlation(result["block_influence"], single),
                "angular_distance": rank_correlation(result["angular_distance"].diagonal(), single),
                "angular_distance_of_spans": over_lengths(result["angular_distance"], skip),
            },
        }

    def notes(self, result: Result) -> list[str]:
        """What the best and the cheapest are, and what magnitudes know of it."""
        own = self.numbers(result)
        repeat, omitted, ranks = own["best_repeats"][0], own["cheapest_layers"], own["rank_correlation"]
        known = {name: "none" if value is None else f"{value:.2f}" for name, value in ranks.items()}
        one, last = repeat["first"], repeat["last"]
        best_span = f"layer {one}" if one == last else f"layers {one} to {last}"
        return [
            *(f"{path['path']}: loss {path['loss']:.4f} ({path['more']:+.3f})." for path in own["paths"]),
            f"{own['repeats_below_the_model']} repeats have a lower loss than the model ({own['clean_loss']:.4f}); the "
            f"best is that of {best_span} ({repeat['loss']:.4f}).",
            "Cheapest to leave out: "
            + ", ".join(f"layer {one['first']} ({one['more']:+.3f})" for one in omitted)
            + ".",
            f"Rank correlation with the loss when a layer is left out: block influence {known['block_influence']}, "
            f"angular distance {known['angular_distance']}; with that of spans of equal length: angular distance "
            f"{known['angular_distance_of_spans']}.",
        ]

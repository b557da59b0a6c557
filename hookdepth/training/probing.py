"""Analyses of the package on fixed prompts, between two steps of a training that does not notice.

    probes = Probes(["logit-lens", "skip-current"], ["The capital of France is"], tokenizer)
    probes.run(unwrap(model))["logit-lens"]["tensors"]["kl"]      # [L+1]

In evaluation mode, without gradients to parameters, without autocast, whatever the training around has; training
mode, gradients' flags and random state come back as they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hookdepth.analyses.base import BASELINE_PROMPTS, Analysis, Inputs, Subject, noise_floor
from hookdepth.analyses.registry import chosen
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.sharing import groups_of
from hookdepth.data import Probe, encode, make_probe, sample_cuts
from hookdepth.errors import HookdepthError
from hookdepth.training.wrapping import Target, autocast_without_memory, run_eagerly, same_randomness, whole_weights

Prompt = str | Sequence[int] | tuple[str, str] | Probe


class Probes:
    """What to measure between steps.

        Probes(["residual-erasure"], [("2 + 2 = ", "4")], tokenizer)

    Args:
        names: of analyses.
        prompts: texts, lists of token ids, pairs of prompt and answer, or `hookdepth.data.Probe`s. Analyses of
            answers (residual-erasure, integrated-gradients) need pairs or probes; the others take prompt and answer
            as one text.
        tokenizer: needed for texts.
        settings: of the analyses.

    Raises:
        HookdepthError: unknown analysis, no prompt or none that serves, text without a tokenizer.
    """

    def __init__(
        self,
        names: Sequence[str | Analysis],
        prompts: Sequence[Prompt],
        tokenizer: Any = None,
        settings: Settings | None = None,
    ) -> None:
        self.analyses = chosen(names) if names else []
        self.settings = settings or Settings()
        if bool(self.analyses) != bool(prompts):
            lacking = "prompts" if self.analyses else "probes"
            raise HookdepthError(
                f"{lacking} are missing", "give probes=[analyses] and prompts=[…] together, or neither"
            )
        prompts = [prompts] if isinstance(prompts, str) else prompts
        encoded = [_encode(prompt, tokenizer) for prompt in prompts]
        ids = tuple(each.token_ids if isinstance(each, Probe) else each for each in encoded)
        answers = tuple(each for each in encoded if isinstance(each, Probe))
        cuts = tuple(sample_cuts([len(own) for own in ids]))
        if any(one.needs == "cuts" for one in self.analyses) and not any(cuts):
            raise HookdepthError("no prompt is long enough to be cut", "give one of 13 tokens or more")
        needing = [one.name for one in self.analyses if one.needs == "probes"]
        if needing and not answers:
            raise HookdepthError(
                f"{' and '.join(needing)} measure answers, and no prompt has one",
                "give pairs: prompts=[(prompt, answer), …]",
            )
        self.inputs = Inputs(ids, cuts, ids[:BASELINE_PROMPTS], answers)

    def run(self, target: Target) -> dict[str, dict[str, Any]]:
        """Analysis → its tensors, noise floor and settings, ready for a `Result`. Under FSDP2, on every rank."""
        decoder = target.decoder
        results: dict[str, dict[str, Any]] = {}
        with (
            same_randomness(decoder),
            autocast_without_memory(decoder, keep=False),
            run_eagerly(target),
            decoder.evaluating(),
            whole_weights(target),
        ):
            subject = Subject(decoder, self.inputs, self.settings)
            for group in groups_of(self.analyses, subject):
                partials = [group.run(chunk, lambda: None) for chunk in range(group.n_chunks)]
                metadata = {"passes": sum(partial.passes for partial in partials), **noise_floor(partials)}
                finished = group.finish(partials)
                for analysis in group.members:
                    results[analysis.name] = {"tensors": finished[analysis.name], **metadata, **self._facts(analysis)}
        return results

    def _facts(self, analysis: Analysis) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "data": {
                "name": "probes",
                "n_prompts": len(self.inputs.prompts),
                "lengths": [len(prompt) for prompt in self.inputs.prompts],
                "tokens_sha256": hashlib.sha256(json.dumps(self.inputs.prompts).encode()).hexdigest(),
            },
            "settings": asdict(self.settings),
        }
        if analysis.needs == "probes":
            facts["probes"] = [asdict(probe) for probe in self.inputs.probes]
        return facts


def _encode(prompt: Prompt, tokenizer: Any) -> Probe | tuple[int, ...]:
    if isinstance(prompt, Probe):
        return prompt
    texts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if texts and len(texts) <= 2 and all(isinstance(text, str) for text in texts):
        if tokenizer is None:
            raise HookdepthError(f"the prompt {prompt!r} is text, and there is no tokenizer", "give tokenizer=")
        words = [str(text) for text in texts]
        return make_probe(tokenizer, words[0], words[1]) if len(words) == 2 else tuple(encode(tokenizer, words[0]))
    ids = tuple(token for token in texts if isinstance(token, int) and token >= 0)
    if not ids or len(ids) < len(texts):
        raise HookdepthError(
            f"{prompt!r} is no prompt", "give a text, a list of token ids, a pair of prompt and answer, or a Probe"
        )
    return ids

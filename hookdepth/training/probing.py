"""Analyses of the package on fixed prompts, between two steps of a training that does not notice.

In evaluation mode, without gradients to parameters, without autocast, whatever the training around has; training
mode, gradients' flags and random state come back as they were.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from hookdepth.analyses.base import Analysis
from hookdepth.analyses.registry import chosen
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.stored import declaration_of
from hookdepth.analyses.subject import BASELINE_PROMPTS, Inputs, Subject, noise_floor
from hookdepth.data import Probe, encode, make_probe, sample_cuts
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.runs.sharing import groups_of
from hookdepth.training.wrapping import Target, autocast_without_memory, run_eagerly, same_randomness, whole_weights

Prompt = str | Sequence[int] | Tensor | tuple[str, str] | Probe


class Probes:
    """What to measure between steps: Probes(names, ["The capital of France is"], tokenizer).run(unwrap(model))

    Args:
        names: of analyses.
        prompts: texts, lists of token ids, pairs of prompt and answer, or `hookdepth.data.Probe`s. Analyses of
            answers need pairs or probes; the others take prompt and answer as one text.
        tokenizer: needed for texts.
        settings: of the analyses.
    """

    def __init__(
        self,
        names: Sequence[str | Analysis],
        prompts: Sequence[Prompt],
        tokenizer: Any = None,
        settings: Settings | None = None,
    ) -> None:
        self.analyses = chosen(names) if names else []
        self.settings = Settings() if settings is None else settings
        if not isinstance(self.settings, Settings):
            raise HookdepthError(f"settings={settings!r} are no Settings", "give hookdepth.analyses.Settings(…)")
        prompts = [prompts] if isinstance(prompts, str | Probe) else prompts
        if not isinstance(prompts, Sequence):
            raise HookdepthError(f"prompts={reprlib.repr(prompts)} is no list", "give a list of prompts")
        if bool(self.analyses) != bool(prompts):
            lacking = "prompts" if self.analyses else "probes"
            raise HookdepthError(
                f"{lacking} are missing", "give probes=[analyses] and prompts=[…] together, or neither"
            )
        encoded = [_encode(prompt, tokenizer) for prompt in prompts]
        ids = tuple(each.token_ids if isinstance(each, Probe) else each for each in encoded)
        answers = tuple(each for each in encoded if isinstance(each, Probe))
        cuts = tuple(sample_cuts([len(own) for own in ids]))
        if any(one.needs == "cuts" for one in self.analyses) and not any(cuts):
            raise HookdepthError("no prompt is long enough to be cut", "give one of 13 tokens or more")
        needing = [one.name for one in self.analyses if one.needs == "probes"]
        if needing and not answers:
            what = f"{' and '.join(needing)} measure answers, and no prompt has one"
            raise HookdepthError(what, "give pairs: prompts=[(prompt, answer), …]")
        self.inputs = Inputs(ids, cuts, ids[:BASELINE_PROMPTS], answers)

    def check(self, decoder: Decoder) -> None:
        """Refuse what the model or an analysis cannot take, before the training begins.

        On a GPU, an id that is out of range ends every use of it, and so the training. A sharded embedding knows
        the number of all its rows: nothing is gathered.
        """
        longest = decoder.context_length
        for number, ids in enumerate(self.inputs.prompts):
            decoder.check_ids(ids, f"prompt {number} of the probes")
            if longest is not None and len(ids) > longest:
                what = f"prompt {number} of the probes has {len(ids)} tokens, {decoder.name!r} has {longest} positions"
                raise HookdepthError(what, "give shorter prompts")
        for one in self.analyses:
            one.refuse(Subject(decoder, self.inputs, self.settings))

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
                for one in group.members:
                    facts = one.identity(subject) | declaration_of(one)
                    facts["data"]["name"] = "probes"
                    results[one.name] = {"tensors": finished[one.name], **metadata, **facts}
        return results


def _encode(prompt: Prompt, tokenizer: Any) -> Probe | tuple[int, ...]:
    if isinstance(prompt, Probe):
        last = len(_whole_ids(prompt.token_ids)) - 1
        positions = prompt.answer_positions
        if not positions or not all(isinstance(p, Integral) and 1 <= int(p) <= last for p in positions):
            remedy = "give the answer's positions, after the first token: see hookdepth.data.make_probe"
            raise HookdepthError(f"a probe of {last + 1} tokens with its answer at {list(positions)}", remedy)
        return prompt
    if isinstance(prompt, str):
        return _whole_ids(encode(_needed(tokenizer, prompt), prompt))
    if isinstance(prompt, Sequence) and len(prompt) == 2 and all(isinstance(text, str) for text in prompt):
        question, answer = map(str, prompt)
        return make_probe(_needed(tokenizer, prompt), question, answer)
    return _whole_ids(prompt)


def _needed(tokenizer: Any, prompt: Any) -> Any:
    if tokenizer is None:
        raise HookdepthError(f"the prompt {prompt!r} is text, and there is no tokenizer", "give tokenizer=")
    return tokenizer


def _whole_ids(given: Any) -> tuple[int, ...]:
    ids = given.tolist() if isinstance(given, Tensor) else given
    whole = isinstance(ids, Sequence) and all(
        isinstance(token, Integral) and not isinstance(token, bool) and int(token) >= 0 for token in ids
    )
    if not whole or not len(ids):
        what = f"{reprlib.repr(given)} is no prompt"
        raise HookdepthError(what, "give a text, a list of token ids, a pair of prompt and answer, or a Probe")
    return tuple(map(int, ids))

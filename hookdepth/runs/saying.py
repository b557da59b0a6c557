"""What a run says while it works: a bar over its passes, and a word about its noise floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from hookdepth.analyses.subject import Inputs
from hookdepth.engine.reading import first_not_finite
from hookdepth.errors import HookdepthError
from hookdepth.model.decoder import Decoder
from hookdepth.runs.sharing import Group


def bar_over(group: Group, shown: bool) -> Any:
    """A bar over the passes of a group; it shows itself only where stderr is a terminal."""
    if not shown:
        return tqdm(disable=True)
    plans, times = group.plans()
    total = round(times * sum(plan.n_passes for plan, _, _ in plans)) if group.branching else group.n_chunks
    return tqdm(total=total, desc=group.name, unit="pass", disable=None, leave=False, dynamic_ncols=True)


def announce_floor(name: str, metadata: dict[str, Any], tensors: dict[str, Any], warn: Callable[[str], None]) -> None:
    """A line where branches that change nothing differ from their clean runs: announce_floor("mine", {}, {}, print)"""
    floor = metadata.get("null_effect")
    if floor:
        effects = [value.nan_to_num().abs().max().item() for key, value in tensors.items() if "baseline" not in key]
        warn(
            f"{name}: noise floor {floor:.2g} ({metadata['null_where']}), "
            f"{floor / max(*effects, 1e-30):.1g} of the largest effect {max(effects):.3g}"
        )


def blame(analysis: str, model: Decoder, inputs: Inputs) -> None:
    """Raise, naming prompt and layer, where the clean run gives values that are not finite."""
    texts = {"prompt": inputs.prompts, "baseline prompt": inputs.baseline}
    texts["probe"] = tuple(probe.token_ids for probe in inputs.probes)
    for what, prompts in texts.items():
        for number, prompt in enumerate(prompts):
            layer = first_not_finite(model, prompt)
            if layer is not None:
                place = f"from layer {layer} onward" if layer < model.n_layers else "in the logits"
                raise HookdepthError(
                    f"{analysis}: {model.name!r} on {what} {number}: non-finite values {place}",
                    "check the checkpoint's weights, load it with another --dtype, or leave that text out",
                    1,
                )

"""Where a model's parts are: its decoder, layers and final norm, and what each layer adds to the stream.

By the names that transformers gives its modules; whether they are right is for the self-check to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hookdepth.model.families import Family, unsupported
from hookdepth.model.shape import said

_DECODERS = ("model.language_model", "model.text_model", "language_model.model", "model.decoder", "model")
_MORE_DECODERS = ("transformer", "gpt_neox", "backbone", "biogpt")
_LAYERS = ("layers", "h", "blocks")
_NORMS = (
    *("norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "final_norm", "embedding_norm"),
    *("layer_norm", "layernorm"),
)
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "multi_head_attention")
# These carry a state from token to token, and neither keys nor values.
_RECURRENT = ("linear_attn", "conv", "mamba", "temporal_block")
_PARTS = {
    "mixer": ("mixer",),
    "attn": (*_ATTENTION, *_RECURRENT),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "mlp_block", "ffn", "fc1", "shared_mlp"),
    "extra": ("per_layer_input_gate", "shared_mlp"),
}
# A norm or convolution between a sublayer and the stream; only where both names are there. The first pair counts.
_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_mlp_layernorm"),
    ("post_operator_norm", "post_ffn_norm"),
    ("post_norm1", "post_norm2"),
    ("attn_sconv", "mlp_sconv"),
)
_INNER = {
    "attn": ("o_proj", "out_proj", "c_proj", "dense", "attention.out_proj"),
    "mlp": ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2"),
}
INNER_SITE = {"attn": "z", "mlp": "neurons"}


@dataclass(frozen=True, eq=False)
class Contribution:
    """One of the things that a layer adds to its stream."""

    reads: nn.Module  # gets the (normed) stream; its batch may be narrowed there
    output: nn.Module  # its output is added, perhaps in a tuple
    inner: nn.Module | None  # the projection whose input is `z` or `neurons`; None where there is no such thing
    scale: float  # by what the output is multiplied first
    heads: int  # query heads of its `z`; 0 where there is none


@dataclass(frozen=True, eq=False)
class Found:
    """The parts of a model."""

    base: nn.Module  # runs the layers; its output is the hidden state after the final norm
    layers: nn.ModuleList
    norms: tuple[nn.Module, ...]  # what is applied after the last layer, in order
    contributions: tuple[dict[str, Contribution], ...]  # of each layer, by name, in the order of the sites
    recurrent: bool  # whether some layer carries a state from token to token, so that every pass starts at token 0

    @property
    def heads(self) -> int:
        """Query heads of an attention, the most where layers differ."""
        return max((own["attn"].heads for own in self.contributions if "attn" in own), default=0)


def find(hf: nn.Module, config: Any, name: str, family: Family) -> Found:
    """The parts of a Hugging Face model; one that lacks some, or a family that is known not to work, is refused."""
    if family.refused:
        raise unsupported(name, family, family.refused)
    if getattr(config, "num_kv_shared_layers", 0):
        raise unsupported(name, family, "some layers share their keys and values with others")
    if getattr(config, "do_layer_norm_before", True) is False:
        raise unsupported(name, family, "it norms the stream itself after each sublayer (do_layer_norm_before=False)")
    paths = [family.decoder] if family.decoder else [*_DECODERS, *_MORE_DECODERS]
    lists = [family.layers] if family.layers else _LAYERS
    places = ((path, each) for path in paths for each in lists)
    for path, each in places:
        base = module_at(hf, path)
        layers = module_at(base, each)
        if base is not None and isinstance(layers, nn.ModuleList) and len(layers):
            break
    else:
        raise unsupported(name, family, f"it has no list of decoder layers at {' or '.join(paths)}")
    norm = _first(base, [family.norm] if family.norm else _NORMS)
    if norm is None:
        raise unsupported(name, family, "it has no final norm")
    after = getattr(base, "project_out", None)
    norms = tuple(module for module in (norm, after) if isinstance(module, nn.Module))
    contributions = tuple(_contributions(layer, config, family) for layer in layers)
    for number, (found, layer) in enumerate(zip(contributions, layers, strict=True)):
        if not set(found) & {"attn", "mixer"}:
            names = ", ".join(child for child, _ in layer.named_children())
            raise unsupported(name, family, f"layer {number} has neither attention nor a mixer that is known ({names})")
    _refuse_missing(name, family, config, layers)
    _refuse_shared(name, family, layers, contributions)
    recurrent = any(
        "mixer" in own or _first(layer, _RECURRENT) for own, layer in zip(contributions, layers, strict=True)
    )
    return Found(base, layers, norms, contributions, recurrent)


def _refuse_missing(name: str, family: Family, config: Any, layers: nn.ModuleList) -> None:
    """What a family names must be in some layer, or a typo would be found by other names, or not at all."""
    for where in ("parts", "outputs", "inner"):
        for part, path in getattr(family, where).items():
            if not any(module_at(layer, path) for layer in layers):
                raise unsupported(name, family, f"no layer has {path!r}, which {where} says of {part}")
    for part, word in family.multipliers.items():
        if not hasattr(config, word):
            raise unsupported(name, family, f"its config has no {word!r}, which multipliers says of {part}")
    stream = int(said(config, "hidden_size") or 0)
    for part, path in family.inner.items():
        given = {width_given(one) for layer in layers if (one := module_at(layer, path)) is not None}
        if stream and given - {0, stream}:
            raise unsupported(name, family, f"{path!r}, inner of {part}, gives {max(given)} numbers, not {stream}")


def _refuse_shared(
    name: str, family: Family, layers: nn.ModuleList, contributions: Sequence[dict[str, Contribution]]
) -> None:
    """A hook on a module that runs in several layers would change them all."""
    owner: dict[nn.Module, int] = {}
    for number, (layer, own) in enumerate(zip(layers, contributions, strict=True)):
        hooked = [layer, *(module for one in own.values() for module in (one.reads, one.output, one.inner))]
        for module in hooked:
            if module is not None and owner.setdefault(module, number) != number:
                kind = type(module).__name__
                raise unsupported(name, family, f"layers {owner[module]} and {number} are one module in part ({kind})")


def module_at(parent: Any, path: str) -> nn.Module | None:
    """A submodule by its path; None where there is none: module_at(hf_model, "model.norm")."""
    for name in path.split("."):
        parent = getattr(parent, name, None)
    return parent if isinstance(parent, nn.Module) else None


def _first(parent: nn.Module, paths: Sequence[str]) -> nn.Module | None:
    return next((module for path in paths if (module := module_at(parent, path)) is not None), None)


def _contributions(layer: nn.Module, config: Any, family: Family) -> dict[str, Contribution]:
    found: dict[str, Contribution] = {}
    pairs = (dict(zip(("attn", "mlp"), pair, strict=True)) for pair in _POST_NORMS)
    post = next((pair for pair in pairs if all(module_at(layer, name) for name in pair.values())), {})
    beside = _first(layer, _ATTENTION) is not None and module_at(layer, "mamba") is not None
    for part, names in _PARTS.items():
        given = family.parts.get(part)
        reads = _first(layer, [given] if given else ("mamba",) if part == "mixer" and beside else names)
        if reads is None or any(reads is one.reads for one in found.values()):
            continue
        own = {"extra": "post_per_layer_input_norm", "mlp": "fc2" if reads is module_at(layer, "fc1") else ""}
        path = family.outputs.get(part) or post.get(part) or own.get(part) or ""
        output = module_at(layer, path) if path else reads
        inner = module_at(layer, family.inner[part]) if part in family.inner else _first(reads, _INNER.get(part, ()))
        if path == "fc2":
            inner = output
        if part == "attn" and _first(layer, _RECURRENT) is reads and module_at(reads, "k_proj") is None:
            inner = None  # what a recurrent mixer's projection reads has no heads
        if inner is not None and (not width_read(inner) or width_given(inner) not in (0, said(config, "hidden_size"))):
            inner = None  # no projection, or none back to the stream's width
        heads = _heads(reads, width_read(inner), config) if part == "attn" and inner is not None else 0
        multiplier = getattr(config, family.multipliers.get(part, "residual_multiplier"), None)
        scale = 1.0 if multiplier is None else float(multiplier)
        found[part] = Contribution(reads, output or reads, inner, scale, heads)
    return found


def _heads(attention: nn.Module, width: int, config: Any) -> int:
    """Query heads of one attention, as it says itself: a config may mean another layer's, or an encoder's."""
    names = ("num_heads", "num_attention_heads", "num_v_heads", "v_head_dim", "head_dim")
    given = [getattr(attention, name, None) for name in names]
    counted = [one for one in given[:3] if isinstance(one, int)]
    counted += [width // size for size in given[3:] if isinstance(size, int) and size and width % size == 0]
    return int(counted[0] if counted else said(config, "num_attention_heads") or 1)


def width_read(projection: Any) -> int:
    """How wide a projection's input is, also where its weights are packed (quantised) or turned (GPT-2's); else 0."""
    if hasattr(projection, "in_features"):
        return int(projection.in_features)
    shape = getattr(getattr(projection, "weight", None), "shape", ())
    return int(shape[0 if hasattr(projection, "nf") else 1]) if len(shape) == 2 else 0


def width_given(projection: Any) -> int:
    """How wide a projection's output is; 0 where it does not say: width_given(layer.mlp.down_proj) is d."""
    return int(getattr(projection, "out_features", getattr(projection, "nf", 0)))


def layer_scale(layer: nn.Module) -> float | Tensor:
    """By what a layer multiplies its whole output (Gemma 4); else 1."""
    scale: float | Tensor = getattr(layer, "layer_scalar", 1.0)
    return scale

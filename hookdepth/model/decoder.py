"""The adapter: a Hugging Face decoder with named sites to read and write.

The sites are those of `sites` (2505.13898); which modules they belong to, `contributions` finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookdepth.errors import HookdepthError, choose, refuse_second_beginning, shown
from hookdepth.model.ambient import plain_model, plain_state
from hookdepth.model.choices import KERNELS
from hookdepth.model.contributions import INNER_SITE, find, width_read
from hookdepth.model.devices import device_name, runs_on
from hookdepth.model.families import Family, family_of
from hookdepth.model.hooks import Edit, Handles
from hookdepth.model.positions import LengthDependent
from hookdepth.model.shape import described, said
from hookdepth.model.sites import PARTS, Sites, part_of
from hookdepth.model.turns import turn_of
from hookdepth.model.unembedding import as_configured, product

if TYPE_CHECKING:
    from hookdepth.kernels.fused import Fused


class Decoder:
    """A causal language model whose residual stream can be read and rewritten; `load` and `wrap` make one.

        model = hookdepth.wrap(hf_model, tokenizer)
        with model.evaluating():
            hidden = model.forward(model.ids("The capital of France is"))   # [row, token, width]
            logits = model.unembed(hidden)

    Args:
        hf: a Hugging Face causal language model.
        tokenizer: its tokenizer; None where token ids are all that is ever given.
        name, revision: what to call it in results; default the config's name.
        family: where its parts are, of a family that nobody knows; default by its config's `model_type`.

    Raises:
        HookdepthError: the model has no decoder layers of the expected kind.
    """

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        family: Family | None = None,
    ) -> None:
        hf = getattr(hf, "_orig_mod", hf)  # torch.compile's wrapper: hooks belong on what it wraps
        self.hf: Any = hf
        self.tokenizer = tokenizer
        whole: Any = getattr(hf, "config", None)
        # Of a model that also sees or hears, the part that reads text is measured.
        self.config: Any = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
        self.name = name or str(getattr(whole, "_name_or_path", "") or type(hf).__name__)
        self.revision = revision
        self.family: Family = family or family_of(str(getattr(self.config, "model_type", "unknown")))
        found = find(hf, self.config, self.name, self.family)
        self.base: Any = found.base
        self.layers = found.layers
        self.sites = Sites(found, self.name, self.family, self.layer_device)
        self.rotary = LengthDependent(self.base)
        # What passes may do, as far as the structure says; the self-check tries it (`trials`).
        self.prefixes, self.shares = not found.recurrent, True
        self.fused: Fused | None = None  # kernels that a user asked for (`load(kernels="fused")`)

    @property
    def n_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.sites.found.contributions)

    @property
    def n_heads(self) -> int:
        """H, the number of query heads, the most where layers differ; 0 where no layer has any."""
        return self.sites.found.heads

    @cached_property
    def d_model(self) -> int:
        """d, the width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def d_mlp(self) -> int:
        """The width of the MLP's hidden layer, as far as the config says; the widest, where layers differ."""
        given = said(self.config, "intermediate_size")
        return int(max(given) if isinstance(given, list | tuple) else given or 4 * self.d_model)

    @property
    def attention_width(self) -> int:
        """Width of all query heads together; most models' is d, but not every one's."""
        inner = (own["attn"].inner for own in self.sites.found.contributions if "attn" in own)
        return max((width_read(module) for module in inner if module is not None), default=0)

    @property
    def parts(self) -> tuple[str, ...]:
        """What some layer of the model can be skipped by: layer, attn and mlp, or others."""
        own = {part for layer in self.sites.found.contributions for part in layer}
        return tuple(part for part in PARTS if part == "layer" or part in own)

    def shape_of(self, site: str, layer: int) -> tuple[int, ...]:
        """The shape of one token's value: (width,), or (head, head_dim) of `z`; (0,) where the layer has none."""
        known, key = self.sites.shapes, (site, layer, self.sites.parallel)  # every intervention of a plan asks
        return known[key] if key in known else known.setdefault(key, self._shape_of(site, layer))

    def _shape_of(self, site: str, layer: int) -> tuple[int, ...]:
        if site not in self.sites.of(layer):
            return (0,)
        inside = site in INNER_SITE.values()
        own = self.sites.found.contributions[layer].get(part_of(site) or "") if inside else None
        if own is None or own.inner is None:
            return (self.d_model,)
        width = width_read(own.inner)
        return (width,) if site == "neurons" else (own.heads, width // own.heads)

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device of the embedding."""
        return runs_on(self.hf.get_input_embeddings())

    @property
    def device_name(self) -> str:
        """What its device is called."""
        return device_name(self.device)

    @property
    def device_memory(self) -> int:
        """Bytes of memory of its GPU."""
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    @property
    def weight_bytes(self) -> int:
        """What its weights take."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.hf.parameters())

    def layer_device(self, layer: int) -> torch.device:
        """Where a layer runs, also when a device map spreads or offloads the model."""
        return runs_on(self.layers[layer])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        weight = getattr(self.sites.found.norms[0], "weight", None)  # OLMo's norm has none
        return (self.hf.get_input_embeddings().weight if weight is None else weight).dtype

    @property
    def context_length(self) -> int | None:
        """Most tokens that the positions were made for; None where the config does not say."""
        return self.rotary.reach or getattr(self.config, "max_position_embeddings", None)

    def ids(self, text: str) -> Int[Tensor, "1 token"]:
        """Token ids of a text, on the model's device."""
        if self.tokenizer is None:
            raise HookdepthError("this model has no tokenizer", "give token ids, or wrap(model, tokenizer)")
        if not isinstance(text, str):
            raise HookdepthError(f"the text is {shown(text)}", "give one text; of several, one at a time")
        ids = self.tokenizer(text)["input_ids"]
        refuse_second_beginning(self.tokenizer, text, ids)
        return torch.tensor([ids], device=self.device)

    @cached_property
    def placeholders(self) -> dict[int, str]:
        """Ids in whose place a model that also sees or hears puts what it saw or heard → what its config calls them."""
        whole = self.hf.config
        kinds = () if whole is self.config else ("image", "video", "audio", "image_patch")
        words = [f"{kind}_token_{end}" for kind in kinds for end in ("id", "index")]
        return {found: word for word in words if isinstance(found := getattr(whole, word, None), int)}

    def check_ids(self, token_ids: Any, what: str) -> None:
        """Refuse what the embedding has no row for, which on a GPU would end the process's use of it, and what is no
        text."""
        rows = int(self.hf.get_input_embeddings().weight.shape[0])
        for given in token_ids:
            token = given.item() if isinstance(given, Tensor) else given
            if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= int(token) < rows:
                raise HookdepthError(
                    f"{what} has the token id {token!r}, {self.name!r} embeds 0 to {rows - 1}",
                    "give whole numbers in that range, from the model's own tokenizer",
                )
            if int(token) in self.placeholders:
                problem = f"{what} has the token id {token}, in whose place {self.name!r} puts what it sees or hears"
                raise HookdepthError(f"{problem} ({self.placeholders[int(token)]})", "give text alone")

    def forward(
        self, token_ids: Int[Tensor, "row token"], cache: Any = None, length: int | None = None, **more: Any
    ) -> Float[Tensor, "row token width"]:
        """Run the decoder once; hooks may have grown the rows of what comes back.

            hidden = model.forward(token_ids)   # after the final norm: give it to `unembed`

        Args:
            token_ids: unpadded, or padded on the right (causal attention never looks there).
            cache: keys and values to the left of the given tokens (`kv_cache.PrefixCache`).
            length: tokens of the whole prompts, where these are only some of them and the model's rotary factors
                depend on the length (`rotary`); default up to the last given.
            more: what the decoder's own call takes besides: position_ids, attention_mask.
        """
        # Whatever the user's config asks for: only the first value of the output is read, a named one or a tuple's.
        options = {"use_cache": False, "output_hidden_states": False}
        if cache is not None:  # models without attention do not know the words
            options |= {"past_key_values": cache, "output_attentions": False}
        start = 0 if cache is None else cache.get_seq_length()
        with self.rotary.of_length(length or start + token_ids.shape[1]):
            return self.base(input_ids=token_ids, **options, **more)[0]

    def norm(self, resid: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The final norm, as the logit lens applies it to any residual."""
        for module in self.sites.found.norms:
            resid = module(resid)
        return resid

    def unembed(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of normed hidden states, with what the family does to its logits (soft cap, scale).

        model.unembed(model.norm(resid_pre[12]))   # logit lens at layer 12
        """
        return as_configured(product(self.hf.get_output_embeddings(), hidden), self.config)

    def on(self, site: str, layer: int, edit: Edit, *, raw: bool = False) -> Handles:
        """Hook a site of a layer (`sites`); the hook comes off with `remove()`, or at the end of a `with` block.

            with model.on("mlp_out", 3, lambda added: added * 0.5):
                hidden = model.forward(token_ids)

        Args:
            site, layer: where.
            edit: gets the value, [row, token, …]; returns what takes its place, or None. At `resid_pre` and
                `resid_post` it may return other rows than it was given.
            raw: what the module gave, before the family multiplies it.

        Raises:
            HookdepthError: the layer has no such site.
        """
        return self.sites.on(site, layer, edit, raw)

    def mlp_only_at(self, layer: int, tokens: Int[Tensor, " token"]) -> Handles:
        """Run a layer's MLP at some tokens only; at the others it gives 0. For a last layer that nobody reads there."""
        return self.sites.only_at(layer, tokens)

    @contextmanager
    def evaluating(self, grad: bool = False) -> Iterator[Decoder]:
        """The engine's own state, whatever the caller's is; the caller's comes back at the end.

            with model.evaluating():
                hidden = model.forward(token_ids)

        Evaluation mode, parameters frozen, no autocast, no inference mode, float32 and the CPU as defaults; with `grad`
        gradients flow through activations, never to parameters. Other threads that use hookdepth on this model wait
        until the block ends. One that calls the model itself meets no hook of ours, but evaluation mode and frozen
        parameters: let it wait where it trains.

        Raises:
            HookdepthError: gradients are wanted, and the weights were made in inference mode.
        """
        with ExitStack() as stack:
            stack.enter_context(turn_of(self.hf))
            stack.enter_context(plain_state((self.device.type,), grad))
            stack.enter_context(plain_model(self.hf, self.name, grad))
            if self.fused is not None:  # with gradients only where a graph is used once: some work in place
                stack.enter_context(self.fused.in_use(not grad))
            yield self

    def use_kernels(self, kernels: str) -> None:
        """From now on "plain" kernels, or "fused" ones, on a GPU (see `hookdepth.kernels.fused`)."""
        from hookdepth.kernels.fused import Fused

        self.fused = Fused(self.hf, self.device) if choose("kernels", kernels, KERNELS) == "fused" else None

    @property
    def fused_now(self) -> Fused | None:
        """The fused kernels while they are in use."""
        return self.fused if self.fused is not None and self.fused.on else None

    def describe(self) -> dict[str, Any]:
        """What a model is called and made like; quick, and without its weights: JSON-able."""
        return {
            "id": self.name,
            "revision": self.revision,
            "family": self.family.name,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_parameters": sum(parameter.numel() for parameter in self.hf.parameters()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device_name,
            **described(self.hf.config),
            **({"parallel": True} if self.sites.parallel else {}),
            **({} if self.fused is None else {"kernels": self.fused.describe()}),
        }

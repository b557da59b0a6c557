"""The adapter: a Hugging Face decoder with named sites to read and write.

    import hookdepth

    model = hookdepth.wrap(hf_model, tokenizer)     # a model you already hold
    hidden = model.forward(token_ids)               # [row, token, width], after the final norm
    logits = model.unembed(hidden)

Nothing above this module knows what a layer's output looks like (a tensor from transformers 4.54, a
tuple before), that `self_attn` takes its input by keyword, or what a family adds to its stream.

Sites of layer l, in the order in which a forward pass meets them (2505.13898):
resid_pre → attn_out → mlp_out → resid_post.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hookdepth.errors import HookdepthError
from hookdepth.model.ambient import plain_state
from hookdepth.model.families import Family, family_of, missing_modules, unsupported
from hookdepth.model.positions import LengthDependent
from hookdepth.model.shape import described
from hookdepth.model.turns import OwnThread, turn_of
from hookdepth.model.unembedding import product

SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""Sites of a layer in the order in which a forward pass meets them."""
PARTS = ("layer", "attn", "mlp")
PART_SITE = {"layer": "resid_post", "attn": "attn_out", "mlp": "mlp_out"}
LOAD = "load it with from_pretrained, or give hookdepth the folder"
Edit = Callable[[Tensor], Tensor | None]
"""A hook's body: gets a site's value, returns its replacement or None to leave it."""


class Decoder:
    """A causal language model whose residual stream can be read and rewritten.

        model = hookdepth.wrap(hf_model, tokenizer)
        with model.evaluating():
            logits = model.unembed(model.forward(model.ids("The capital of France is")))

    Args:
        hf: a Hugging Face causal language model.
        tokenizer: its tokenizer; None where token ids are all that is ever given.
        name, revision: what to call it in results; default the config's name.

    Raises:
        HookdepthError: the model has no decoder layers of the expected kind.
    """

    def __init__(self, hf: nn.Module, tokenizer: Any = None, *, name: str | None = None, revision: str | None = None):
        hf = getattr(hf, "_orig_mod", hf)  # torch.compile's wrapper: hooks belong on what it wraps
        self.hf: Any = hf
        self.tokenizer = tokenizer
        self.config: Any = getattr(hf, "config", None)
        self.name = name or str(getattr(self.config, "_name_or_path", "") or type(hf).__name__)
        self.revision = revision
        self.family: Family = family_of(str(getattr(self.config, "model_type", "unknown")))
        base: Any = getattr(hf, "model", None)
        layers = getattr(base, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(base, "norm"):
            raise unsupported(self.name, self.family, "it has no model.layers and model.norm")
        missing = missing_modules(layers[0], self.family)
        if missing:
            raise unsupported(self.name, self.family, f"its decoder layers have no {', '.join(missing)}")
        self.base = base
        self.layers: nn.ModuleList = layers
        self.rotary = LengthDependent(base)
        self._scale = self.family.scale(self.config)

    @property
    def n_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.layers)

    @property
    def d_model(self) -> int:
        """d, the width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def attention_width(self) -> int:
        """Width of all query heads together; most models' is d, but not every one's."""
        heads = int(self.config.num_attention_heads)
        return heads * int(getattr(self.config, "head_dim", None) or self.d_model // heads)

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device of the embedding."""
        return _runs_on(self.hf.get_input_embeddings())

    def layer_device(self, layer: int) -> torch.device:
        """Where a layer runs, also when a device map spreads or offloads the model."""
        return _runs_on(self.layers[layer])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        weight = getattr(self.base.norm, "weight", None)  # OLMo's norm has none
        return (self.hf.get_input_embeddings().weight if weight is None else weight).dtype

    @property
    def context_length(self) -> int | None:
        """Most tokens that the positions were made for; None where the config does not say."""
        return self.rotary.reach or getattr(self.config, "max_position_embeddings", None)

    def ids(self, text: str) -> Int[Tensor, "1 token"]:
        """Token ids of a text, on the model's device."""
        if self.tokenizer is None:
            raise HookdepthError("this model has no tokenizer", "give token ids, or wrap(model, tokenizer)")
        return torch.tensor([self.tokenizer(text)["input_ids"]], device=self.device)

    def check_ids(self, token_ids: Any, what: str) -> None:
        """Refuse what the embedding has no row for; on a GPU that would end the process's use of it."""
        rows = int(self.hf.get_input_embeddings().weight.shape[0])
        for given in token_ids:
            token = given.item() if isinstance(given, Tensor) else given
            if not isinstance(token, Integral) or not 0 <= int(token) < rows:
                raise HookdepthError(
                    f"{what} has the token id {token!r}, {self.name!r} embeds 0 to {rows - 1}",
                    "give whole numbers in that range, from the model's own tokenizer",
                )

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
        options = {"use_cache": False, "output_hidden_states": False, "output_attentions": False}
        start = 0 if cache is None else cache.get_seq_length()
        with self.rotary.of_length(length or start + token_ids.shape[1]):
            return self.base(input_ids=token_ids, past_key_values=cache, **options, **more)[0]

    def norm(self, resid: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The final norm, as the logit lens applies it to any residual."""
        return self.base.norm(resid)

    def unembed(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of normed hidden states, with what the family does to its logits (soft cap, scale).

        model.unembed(model.norm(resid_pre[12]))   # logit lens at layer 12
        """
        logits = product(self.hf.get_output_embeddings(), hidden)
        if (divisor := getattr(self.config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def on_resid_pre(self, layer: int, edit: Edit) -> RemovableHandle:
        """Hook a layer's input. `edit` may return more rows than it was given."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            # accelerate would move it there only after the hooks.
            edited = edit(hidden.to(self.layer_device(layer)))
            n_rows = (hidden if edited is None else edited).shape[0]
            # Masks made for several unpadded rows are copies of one: one broadcasts over grown rows.
            mask = kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 4 and 1 < mask.shape[0] != n_rows:
                kwargs = {**kwargs, "attention_mask": mask[:1]}
            return (args, kwargs) if edited is None else _with_hidden(edited, args, kwargs)

        return self.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)

    def on_attn_in(self, layer: int, edit: Edit) -> RemovableHandle:
        """Hook the (normed) input of a layer's attention. `edit` may return fewer rows."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            edited = edit(args[0] if args else kwargs["hidden_states"])
            return None if edited is None else _with_hidden(edited, args, kwargs)

        attention: Any = self.layers[layer].self_attn
        return attention.register_forward_pre_hook(hook, with_kwargs=True)

    def on_attn_out(self, layer: int, edit: Edit) -> RemovableHandle:
        """Hook what a layer's attention adds to the residual stream."""
        return self._on_output(getattr(self.layers[layer], self.family.attn_site), edit, self._scale)

    def on_mlp_out(self, layer: int, edit: Edit) -> RemovableHandle:
        """Hook what a layer's MLP adds to the residual stream."""
        return self._on_output(getattr(self.layers[layer], self.family.mlp_site), edit, self._scale)

    def mlp_only_at(self, layer: int, tokens: Int[Tensor, " token"]) -> tuple[RemovableHandle, RemovableHandle]:
        """Run a layer's MLP at some tokens only; at the others it gives 0. For a last layer that nobody reads there.

        first, second = model.mlp_only_at(model.n_layers - 1, torch.tensor([17, 18]))
        hidden = model.forward(token_ids)   # right at tokens 17 and 18
        first.remove(), second.remove()
        """
        length, mine = 0, OwnThread()

        def narrow(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            nonlocal length
            if not mine:
                return None
            length = args[0].shape[1]
            return (args[0].index_select(1, tokens.to(args[0].device)), *args[1:])

        def widen(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not mine:
                return None
            value = _value_of(output)
            zeros = value.new_zeros(value.shape[0], length, value.shape[2])
            return _with_value(zeros.index_copy(1, tokens.to(value.device), value), output)

        mlp: Any = self.layers[layer].mlp
        return mlp.register_forward_pre_hook(narrow), mlp.register_forward_hook(widen, prepend=True)

    def on_resid_post(self, layer: int, edit: Edit) -> RemovableHandle:
        """Hook a layer's output. `edit` may return more or fewer rows than it was given."""
        return self._on_output(self.layers[layer], edit, 1.0)

    def landed(self, added: Tensor) -> Tensor:
        """What reaches the stream of a value that a sublayer's hook returned: where a family multiplies it, the
        value is divided first, and in bfloat16 the round trip loses a bit now and then."""
        return added if self._scale == 1.0 else added / self._scale * self._scale

    @staticmethod
    def _on_output(module: nn.Module, edit: Edit, scale: float) -> RemovableHandle:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            value = _value_of(output)
            edited = edit(value if scale == 1.0 else value * scale)
            if edited is None:
                return None
            return _with_value(edited if scale == 1.0 else edited / scale, output)

        return module.register_forward_hook(hook)

    @contextmanager
    def evaluating(self, grad: bool = False) -> Iterator[Decoder]:
        """The engine's own state, whatever the caller's is; the caller's comes back at the end.

            with model.evaluating():
                hidden = model.forward(token_ids)

        Evaluation mode, parameters frozen, no autocast, no inference mode, float32 and the CPU as defaults. Other
        threads that use hookdepth on this model wait until the block ends. One that calls the model itself meets no
        hook of ours, but evaluation mode and frozen parameters: let it wait where it trains.

        Args:
            grad: let gradients flow through activations (never to parameters).

        Raises:
            HookdepthError: gradients are wanted, and the weights were made in inference mode.
        """
        with ExitStack() as stack:
            stack.enter_context(turn_of(self.hf))
            stack.enter_context(plain_state((self.device.type,), grad))
            modules = list(self.hf.modules())
            if any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in modules):
                # Compiled code may not see hooks that come later, and every pass has other shapes.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if grad and any(parameter.is_inference() for parameter in self.hf.parameters()):
                raise HookdepthError(
                    f"the weights of {self.name!r} were made in inference mode, and no gradient flows through them",
                    "load the model outside of torch.inference_mode()",
                )
            for module in modules:
                stack.callback(setattr, module, "training", module.training)
            for parameter in self.hf.parameters() if grad else ():
                if parameter.requires_grad:
                    stack.callback(parameter.requires_grad_, True)
                    parameter.requires_grad_(False)
            self.hf.eval()
            yield self

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
            "device": device_name(self.device),
            **described(self.config),
        }


def device_name(device: torch.device) -> str:
    """A GPU by its name, all others by their kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _with_hidden(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _value_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_value(value: Tensor, output: Any) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


def _runs_on(module: nn.Module) -> torch.device:
    # accelerate's hooks know; they are on the module itself or, where weights are offloaded one by one, inside it.
    own = next(module.parameters()).device
    if own.type != "meta" and not hasattr(module, "_hf_hook"):
        return own
    for part in module.modules():
        place = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    return own

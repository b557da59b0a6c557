"""One sampled step: residual statistics of the training forward pass itself, reduced where they arise.

    reader = Reader(target, padding_mask)
    reader.attach()
    model(**batch).loss.backward()       # any number of micro-batches
    reader.detach()
    reader.packed()                      # one vector, still on the device

Only a forward pass that starts with gradients, outside the backward pass, counts: not what gradient checkpointing
computes again, and not evaluation or generation within the step. Where the model is compiled, hooks that come after
the compilation never run; then the step's forward pass is repeated without compilation and without gradients.

Six numbers a token serve: the norms of the residual h, of attention's contribution a and of the MLP's m, and a·h, m·h
and a·m. All of the analysis follows from these, since the stream is h, h + a, h + a + m; so one pass over three
tensors is enough, without copies of their sums. In 16-bit streams, what the additions round away is therefore not in
the layer's contribution. Products are plain ones: matrix products would follow the user's TF32 and bfloat16 settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hookdepth.analyses.stats import STATISTICS
from hookdepth.errors import HookdepthError
from hookdepth.metrics import EPS, differs_by_rounding
from hookdepth.training.wrapping import Target, autocast_without_memory, run_eagerly, same_randomness

Mask = Callable[[Mapping[str, Any]], Tensor | None]
LARGEST = [f"relative_contribution_max.{name.partition('.')[2]}" for name in STATISTICS[:3]]


def padding_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens count, [row, token]; None for all of them.

        DepthMonitor(model, mask=lambda inputs: inputs["input_ids"] != pad_token_id)

    Those of the attention mask, where the model is given one. Else, where it is given labels, those up to the
    last label of each row: no loss depends on what is right of it. `inputs` are the arguments of the model's call by
    name, and of the decoder's inside it.
    """
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.bool()
    if isinstance(labels, Tensor) and labels.ndim == 2:
        return (labels != -100).flip(-1).cumsum(-1).flip(-1) > 0
    return None


class Reader:
    """Hooks of one sampled step, and the sums over its tokens: Reader(unwrap(model), padding_mask, verify=True).

    With `verify` it also checks, layer by layer, that resid_pre + attn_out + mlp_out is resid_post. `error` is what
    went wrong in a hook; from then on there are no hooks.
    """

    def __init__(self, target: Target, mask: Mask = padding_mask, verify: bool = False) -> None:
        self.target, self.mask, self.verify = target, mask, verify
        self.error: Exception | None = None
        self._hooks = ExitStack()
        self._inside = self._repeating = self._with_gradients = False
        self._inputs: dict[str, Any] = {}
        self._stream: dict[str, Tensor] = {}
        self._products: dict[int, Tensor] = {}
        self._last: Tensor | None = None
        self._verdicts: dict[int, Tensor] = {}
        self._sums: Tensor | None = None
        self._maxima: Tensor | None = None

    def attach(self) -> None:
        """Register the hooks, unless something went wrong before."""
        if self.error is None:
            (self._attach_around if self.target.compiled else self._attach_sites)()

    def detach(self) -> None:
        """Remove them, and let go of every activation."""
        self._hooks.close()
        self._forget()

    def packed(self) -> Float[Tensor, " n"]:
        """Failed (0 or 1), tokens, last norm's sum, 10 sums and 3 maxima per layer: what `unpack` reads."""
        if self._sums is None or self._maxima is None or self.error is not None:
            decoder = self.target.decoder
            empty = torch.zeros(3 + 13 * decoder.n_layers, device=decoder.device, dtype=torch.float32)
            empty[0] = float(self.error is not None)
            return empty
        return torch.cat([self._sums.new_zeros(1), self._sums, self._maxima])

    def verdict(self) -> None:
        """Raise where the step has shown that the residual stream is not made as expected; waits for the device."""
        for layer, fits in self._verdicts.items():
            if not fits.item():
                what = f"{self.target.decoder.name!r}: layer {layer} is not resid_pre + attn_out + mlp_out"
                raise HookdepthError(what, "see the families in hookdepth's README")

    def _add(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def _attach_around(self) -> None:
        outer, again = self.target.outer, self._guarded(self._repeat, anywhere=True)
        compiled = getattr(outer, "_compiled_call_impl", None)
        if compiled is None:
            self._add(outer.register_forward_hook(again, with_kwargs=True))
            return

        # By its own compile(): a hook would be compiled with it, or never be called.
        @wraps(compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            output = compiled(*args, **kwargs)
            if not call.done:  # type: ignore[attr-defined]
                again(outer, args, kwargs, output)
            return output

        def take_off() -> None:
            # Another reader may have put its own around this one, and may go later or sooner.
            call.done = True  # type: ignore[attr-defined]
            while getattr(outer._compiled_call_impl, "done", False):
                outer._compiled_call_impl = outer._compiled_call_impl.__wrapped__  # type: ignore[union-attr]

        call.done = False  # type: ignore[attr-defined]
        outer._compiled_call_impl = call
        self._hooks.callback(take_off)

    def _attach_sites(self) -> None:
        decoder = self.target.decoder
        note, enter = self._guarded(self._note_call, anywhere=True), self._guarded(self._enter, anywhere=True)
        self._add(decoder.hf.register_forward_pre_hook(note, with_kwargs=True))
        self._add(decoder.base.register_forward_pre_hook(enter, with_kwargs=True))
        self._add(decoder.base.register_forward_hook(self._guarded(self._leave), always_call=True))
        for layer in range(decoder.n_layers):
            self._add(decoder.on("resid_pre", layer, self._guarded(partial(self._keep, "resid_pre"))))
            self._add(decoder.on("attn_out", layer, self._guarded(partial(self._keep, "attn_out"))))
            self._add(decoder.on("mlp_out", layer, self._guarded(partial(self._measure, layer))))
            if self.verify or layer == decoder.n_layers - 1:
                self._add(decoder.on("resid_post", layer, self._guarded(partial(self._finish, layer))))

    def _guarded(self, body: Callable[..., None], anywhere: bool = False) -> Callable[..., None]:
        """The body as a hook that reads only, within a pass that counts or `anywhere`: without gradients, and an error
        ends the reading and not the training."""

        @wraps(body)
        def hook(*args: Any, **kwargs: Any) -> None:
            # A graph that is compiled while the hook is there must not have it inside for ever.
            if torch.compiler.is_compiling() or self.error is not None or not (anywhere or self._inside):
                return
            self._with_gradients = torch.is_grad_enabled()
            try:
                with torch.no_grad():
                    body(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 (whatever it is: it is ours, and the training goes on)
                self.error = error
                self.detach()

        return hook

    def _note_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs = _by_name(module, args, kwargs)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside = self._repeating or self._is_training()
        if self._inside:
            self._inputs |= _by_name(module, args, kwargs)

    def _keep(self, site: str, value: Tensor) -> None:
        self._stream[site] = value.detach()

    def _measure(self, layer: int, mlp_out: Tensor) -> None:
        resid_pre, attn_out = self._stream["resid_pre"], self._stream["attn_out"]
        self._products[layer] = products(resid_pre, attn_out, mlp_out.detach())
        if self.verify and layer not in self._verdicts:
            self._stream["mlp_out"] = mlp_out.detach()
        else:
            self._stream.clear()

    def _finish(self, layer: int, resid_post: Tensor) -> None:
        if layer == self.target.decoder.n_layers - 1:
            self._last = torch.linalg.vector_norm(resid_post.detach().float(), dim=-1)
        if self._stream:
            self._verdicts[layer] = adds_up(list(self._stream.values()), resid_post.detach())
            self._stream.clear()

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if output is not None:  # None: the forward pass raised
            self._reduce()
        self._forget()

    def _forget(self) -> None:
        self._inside = False
        for kept in (self._inputs, self._stream, self._products):
            kept.clear()
        self._last = None

    def _reduce(self) -> None:
        n_layers = self.target.decoder.n_layers
        if len(self._products) < n_layers or self._last is None:
            raise HookdepthError(
                f"only {len(self._products)} of {n_layers} layers were seen in a forward pass: the others are compiled",
                "give DepthMonitor the compiled model, as the loop calls it",
            )
        device = self._last.device
        values = statistics(torch.stack([self._products[layer].to(device) for layer in range(n_layers)]))
        counted = self._counted(self._last).to(device)
        values = torch.where(counted, values, 0.0)  # and not times 0: padding may be NaN
        last = torch.where(counted, self._last, 0.0).sum()
        sums = torch.cat([counted.sum(dtype=torch.float32)[None], last[None], values.sum((-2, -1)).flatten()])
        maxima = values[:3].amax((-2, -1)).flatten()
        self._sums = sums if self._sums is None else self._sums + sums
        self._maxima = maxima if self._maxima is None else torch.maximum(self._maxima, maxima)

    def _counted(self, norms: Tensor) -> Tensor:
        rows, tokens = norms.shape
        mask = self.mask(self._inputs)
        if mask is None:
            return torch.ones_like(norms, dtype=torch.bool)
        if mask.ndim != 2 or mask.shape[0] != rows or mask.shape[1] < tokens:
            what = f"a mask of shape {list(mask.shape)} for {rows} rows of {tokens} tokens"
            raise HookdepthError(what, "give DepthMonitor a mask= that returns [row, token]")
        return mask[:, -tokens:].bool()  # with keys and values put in front (prefix tuning) it is longer

    def _repeat(self, _module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        if self._repeating or not self._is_training():
            return
        decoder, outer_hooks = self.target.decoder, self._hooks
        self._hooks, self._repeating = ExitStack(), True
        try:
            self._attach_sites()
            with run_eagerly(self.target), same_randomness(decoder), autocast_without_memory(decoder, keep=True):
                self.target.core(*args, **kwargs)
        finally:
            self._hooks.close()
            self._hooks, self._repeating = outer_hooks, False

    def _is_training(self) -> bool:
        """Whether the call whose hook this is began with gradients, and not within a backward pass."""
        return self._with_gradients and torch._C._current_graph_task_id() == -1


def _by_name(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    return {**inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments, **kwargs}


def products(h: Tensor, a: Tensor, m: Tensor) -> Float[Tensor, "6 row token"]:
    """‖h‖, ‖a‖, ‖m‖, a·h, m·h, a·m of every token, in float32: products(resid_pre, attn_out, mlp_out)."""
    h, a, m = (x.float() if x.dtype == torch.float64 else x for x in (h, a, m))
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (h, a, m)]
    wide_h, wide_m = h.float(), m.float()  # the other factor is widened within the multiplication
    return torch.stack([*norms, (wide_h * a).sum(-1), (wide_h * wide_m).sum(-1), (wide_m * a).sum(-1)])


def statistics(table: Float[Tensor, "layer 6 row token"]) -> Float[Tensor, "10 layer row token"]:
    """STATISTICS, and the residual's norm, of every token, from its `products`."""
    h, a, m, ah, mh, am = table.unbind(1)
    mid = (h.square() + 2 * ah + a.square()).clamp(min=0).sqrt()
    c = (a.square() + 2 * am + m.square()).clamp(min=0).sqrt()

    def cosine(product: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return product / (x.clamp(min=EPS) * y.clamp(min=EPS))

    relative = [a / h.clamp(min=EPS), m / mid.clamp(min=EPS), c / h.clamp(min=EPS)]
    cosines = [cosine(ah, a, h), cosine(mh + am, m, mid), cosine(ah + mh, c, h)]
    return torch.stack([*relative, *cosines, a, m, c, h])


def unpack(gathered: Sequence[Tensor], n_layers: int) -> tuple[bool, int, dict[str, Tensor]]:
    """Whether a rank failed, the tokens of all ranks, and the tensors of the analysis, each [L]."""
    everyone = torch.stack([packed.double() for packed in gathered])
    failed, tokens, last = everyone[:, :3].sum(0).tolist()
    n_sums = 10 * n_layers
    means = (everyone[:, 3 : 3 + n_sums].sum(0) / max(tokens, 1)).view(10, n_layers)
    maxima = everyone[:, 3 + n_sums :].amax(0).view(3, n_layers)
    tensors = dict(zip([*STATISTICS, *LARGEST], [*means[:-1], *maxima], strict=True))
    tensors["norm.resid"] = torch.cat([means[-1], means.new_tensor([last / max(tokens, 1)])])
    return bool(failed), int(tokens), {name: value.float() for name, value in tensors.items()}


def adds_up(terms: Sequence[Tensor], total: Tensor) -> Bool[Tensor, ""]:
    """Whether the total is the sum of the terms but for rounding; a value that is not finite says nothing."""
    summed, size = sum(terms[1:], terms[0]), sum((term.abs() for term in terms[1:]), terms[0].abs())
    return (differs_by_rounding(summed, total, size) | ~(summed - total).isfinite()).all()

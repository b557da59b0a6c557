"""A checkpoint without some of the layers, which `from_pretrained` loads and which equals the path through the others.

What a config says of each layer (`layer_types` and the like) goes with the layers. Some configs say it by a rule of the
layer's number instead, which means another kind of layer once layers before it are gone. So what was written is loaded
again and run beside the path, and is kept only where the two agree.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.measurement import OutputView
from hookdepth.engine.measurements import Custom
from hookdepth.engine.passes import measure
from hookdepth.engine.paths import LayerPath
from hookdepth.errors import HookdepthError, as_path
from hookdepth.model.decoder import Decoder
from hookdepth.model.hub import quiet
from hookdepth.model.loading import load
from hookdepth.results import check_folder_name

_REMEDY = "keep other layers, or run those as a LayerPath"
_NUMBERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_INDICES = ("mlp_only_layers", "moe_layers")  # lists of layers' numbers, where others have an entry a layer
_NOT_BY_LAYER = ("eos_token_id", "architectures")
# So many of the first layers are of another kind.
_FIRST_LAYERS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")


def prune(model: Decoder, keep: str | Sequence[int], out: str | os.PathLike[str]) -> Path:
    """Write a folder, not there yet or empty, that holds the model without the other layers.

        prune(model, "0-9,12", "pruned")     # of 13 layers 11 are left

    Args:
        keep: the layers that stay, as `LayerPath` takes them, in rising order.

    Raises:
        HookdepthError: layers that are repeated, reordered or not there; a model whose weights cannot be written, or
            whose config cannot say what the layers are once some are gone.
    """
    kept, folder = _kept(model, keep), as_path(out)
    check_folder_name(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HookdepthError(f"{str(folder)!r} is there already", "give a new folder")
    _check_weights(model)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _save(model, kept, unfinished)
        _compare(model, kept, unfinished)
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _kept(model: Decoder, keep: str | Sequence[int]) -> list[int]:
    path = LayerPath(keep)
    path.check(model, 1)
    kept = [layer for stage in path.stages for layer in stage]
    if not kept or kept != sorted(set(kept)) or len(kept) != len(path.stages):
        raise HookdepthError(
            f"--keep {path} repeats, exchanges or merges layers, or names none", "name those that stay, in rising order"
        )
    return kept


def _check_weights(model: Decoder) -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise HookdepthError(f"{model.name!r} is quantised", "prune the model that it was made from")
    if any(parameter.is_meta for parameter in model.hf.parameters()):
        raise HookdepthError(f"not all weights of {model.name!r} are in memory", "load it without --device-map")


def _save(model: Decoder, kept: Sequence[int], folder: Path) -> None:
    try:
        with quiet():
            with _only(model, kept):
                model.hf.save_pretrained(folder)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # a config may refuse to be so; each library has errors of its own for it
        why = " ".join(str(error).split())[:200]
        raise HookdepthError(f"{model.name!r} cannot be written with these layers alone ({why})", _REMEDY, 1) from error


@contextmanager
def _only(model: Decoder, kept: Sequence[int]) -> Iterator[None]:
    """While the block runs, the model has these layers alone, and a config that says so."""
    config, layers = model.hf.config.get_text_config(), model.layers
    own, whole = copy.deepcopy(vars(config)), dict(layers._modules)
    try:
        with model.evaluating():
            _shorten(config, model.n_layers, kept)
            layers._modules = {str(n): whole[str(layer)] for n, layer in enumerate(kept)}
            yield
    finally:
        layers._modules = whole
        vars(config).clear()
        vars(config).update(own)


def _shorten(config: Any, n_layers: int, kept: Sequence[int]) -> None:
    by_layer = config.to_dict().get("per_layer_config") or {}
    differing = {int(layer): changes for layer, changes in by_layer.items()}
    for name, value in list(vars(config).items()):
        if name in _INDICES and isinstance(value, list):
            setattr(config, name, [kept.index(layer) for layer in value if layer in kept])
        elif isinstance(value, list) and len(value) == n_layers and name not in _NOT_BY_LAYER:
            setattr(config, name, [value[layer] for layer in kept])
        elif name in _FIRST_LAYERS and isinstance(value, int):
            setattr(config, name, sum(layer < value for layer in kept))
    for name in _NUMBERS:
        if getattr(config, name, None) == n_layers:
            setattr(config, name, len(kept))
    if differing:  # at last, since it is held against the number of layers
        config.per_layer_config = {n: differing[layer] for n, layer in enumerate(kept) if layer in differing}


def _logits(model: Decoder, path: Sequence[int], row: int) -> Tensor:
    kept: list[Tensor] = []

    def keep(view: OutputView) -> Tensor:
        kept[:] = [view.logits[row].float().cpu()]
        return view.logits[..., 0].float()

    ids = [(7 * n + 3) % int(model.config.vocab_size) for n in range(24)]
    measure(model, [ids], [Branch((LayerPath(path),))], [Custom("logits", keep, "mean")])
    return kept[0]


def _compare(model: Decoder, kept: Sequence[int], folder: Path) -> None:
    expected = _logits(model, kept, -1)  # of the branch; of what was written, of its clean run
    try:
        written = load(str(folder), dtype=str(model.dtype).removeprefix("torch."), device=model.device.type)
        found = _logits(written, range(len(kept)), 0)
    except HookdepthError as error:
        raise HookdepthError(f"what is left of {model.name!r} does not run ({error.problem})", _REMEDY, 1) from error
    size = expected.abs().max().item()
    most = (expected - found).abs().max().item() / size
    if not most <= (1e-4 if model.dtype.itemsize == 4 else 0.05):
        raise HookdepthError(
            f"the config of {model.name!r} says what a layer is by its number: without the others, those that are kept "
            f"would be other layers (logits differ by {most:.2g} of the largest)",
            _REMEDY,
            1,
        )

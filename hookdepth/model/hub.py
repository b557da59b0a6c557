"""The model hub, asked once whether it is there, so that a machine without a network need not wait for retries.

The hub's own libraries retry every file five times with growing pauses: about 25 s before they give up. What was
downloaded before is found without the network, too.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from hookdepth.errors import HookdepthError, clipped

TIMEOUT_S = 10.0
NOT_THERE = "the hub cannot be reached, and it was not downloaded before"


def _reachable(address: str) -> bool:
    """Whether anything answers at an address, by one request, through the proxy of the environment if there is one."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True  # a refusal is an answer
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # so is a certificate; the hub's library may know its issuer
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def hub_or_cache() -> Iterator[bool]:
    """Whether the hub can be reached; where it cannot, its libraries look only at what was downloaded before."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield False
        return
    if _reachable(constants.ENDPOINT):
        yield True
        return
    with ExitStack() as stack:
        # Read by the libraries at every request; `datasets` keeps a copy of its own.
        for module in (constants, sys.modules.get("datasets.config")):
            if module is not None:
                stack.callback(setattr, module, "HF_HUB_OFFLINE", getattr(module, "HF_HUB_OFFLINE", False))
                setattr(module, "HF_HUB_OFFLINE", True)  # noqa: B010 (to a type checker a module is read-only)
        yield False


def check_source(source: str) -> None:
    """Refuse what can only be meant as a folder, and is none."""
    wanted = source.startswith((".", "/", "~")) or source.count("/") > 1 or not source.strip()
    if wanted and not os.path.isdir(source):
        raise HookdepthError(f"no model folder {clipped(source, 200)!r}", "give an existing folder, a hub id, or demo")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and warnings: ours says what matters."""
    from transformers.utils import logging as of_transformers

    verbosity, bars = of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        of_transformers.set_verbosity(verbosity)
        if bars:
            of_transformers.enable_progress_bar()


def one_line(what: str, error: BaseException | str) -> str:
    """The first line of what a library said, behind what was tried."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{what} ({lines[0][:300] if lines else type(error).__name__})"

"""One at a time: threads that use hookdepth on the same model take turns, and hooks serve the thread that set them.

    with turn_of(hf_model):
        ...                                    # no other thread is inside such a block of the same model

    handle = model.on("resid_post", 3, in_this_thread(lambda value: value * 2))   # other threads see the plain model
    handle.remove()

A hook is called in every thread that runs the module. A plain forward pass that another thread makes while the engine
runs must neither be changed by our hooks nor be taken for a part of our pass, so each of them asks whose call it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

T = TypeVar("T")
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_making = threading.Lock()


def turn_of(hf: nn.Module) -> threading.RLock:
    """The lock of a model: a thread that holds it may enter again, others wait."""
    with _making:
        return _locks.setdefault(hf, threading.RLock())


class OwnThread:
    """True in the thread that made it, and false in every other: bool(OwnThread())."""

    def __init__(self) -> None:
        self._ident = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._ident


def in_this_thread(body: Callable[..., T]) -> Callable[..., T | None]:
    """`body`, which does nothing and returns None when another thread calls it."""
    mine = OwnThread()
    return lambda *args: body(*args) if mine else None

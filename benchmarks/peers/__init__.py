"""Which peers there are, what they do, and how to get one that works on a model.

    for peer in peers_of(subject.model, "skip"): peer.name, peer.object, peer.absent

Peers beyond PyTorch come with the extra `bench`; one that is not installed keeps its line in every table.
Those that change modules (nnsight, TransformerLens) get a model of their own that shares the weights.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from benchmarks.models import twin
from hookdepth import Decoder


@dataclass(frozen=True)
class Listed:
    """A peer that may be installed or not."""

    name: str
    module: str
    type: str
    does: frozenset[str]
    alters: bool = True


LISTED = (
    Listed(
        "hook loop",
        "benchmarks.peers.hooks",
        "HookLoop",
        frozenset({"skip", "local", "erasure", "patching", "stats", "lens", "gradients"}),
        False,
    ),
    Listed("hook loop, frozen, blocks of 32", "benchmarks.peers.hooks", "FrozenLoop", frozenset({"gradients"}), False),
    Listed("loop batched by layer", "benchmarks.peers.hooks", "LayerLoop", frozenset({"patching"}), False),
    Listed("whole batch", "benchmarks.peers.batch", "WholeBatch", frozenset({"skip", "local", "erasure"}), False),
    Listed(
        "nnsight, a trace each",
        "benchmarks.peers.nnsight_",
        "TracePerIntervention",
        frozenset({"skip", "erasure", "patching", "stats", "lens", "gradients"}),
    ),
    Listed("nnsight, one trace", "benchmarks.peers.nnsight_", "OneTrace", frozenset({"skip", "erasure"})),
    Listed(
        "TransformerLens",
        "benchmarks.peers.transformer_lens_",
        "Lens",
        frozenset({"skip", "erasure", "patching", "stats", "lens", "gradients"}),
    ),
)


@dataclass(frozen=True)
class Peer:
    """A peer on a model: its object, or why there is none."""

    name: str
    object: Any = None
    absent: str | None = None


class Peers:
    """The peers on one model, each made when it is first asked for.

    Peers(model).that("skip")
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self._made: dict[str, Peer] = {}

    def that(self, does: str) -> list[Peer]:
        """The peers that do a kind of work, installed or not."""
        return [self._get(listed) for listed in LISTED if does in listed.does]

    def _get(self, listed: Listed) -> Peer:
        if listed.name not in self._made:
            self._made[listed.name] = self._make(listed)
        return self._made[listed.name]

    def _make(self, listed: Listed) -> Peer:
        try:
            maker = getattr(importlib.import_module(listed.module), listed.type)
        except ImportError as error:
            return Peer(listed.name, absent=f"not installed ({error.name})")
        try:
            return Peer(listed.name, maker(twin(self.model.hf) if listed.alters else self.model.hf))
        except Exception as error:  # noqa: BLE001 - a peer that fails loses its own lines, no others; the run exits 1
            return Peer(listed.name, absent=f"FAILED: {type(error).__name__}: {error}"[:200])

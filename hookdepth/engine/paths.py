"""Runs along other sequences of layers: spans left out, repeated, reversed, looped, or side by side.

    hookdepth.run(model, [ids], LayerPath("0-9,4-9,10-12"), [OutputEffect()])

A path that begins as the model does is the clean run up to its first own stage, and paths that begin alike are one row
until they part (`trie`). A pass runs through the layers once, in order, so it carries a path as long as its stages
ascend (a *sweep*): over a gap the state is held and put back. Where a path descends, the next sweep takes its state up.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hookdepth.engine.intervention import Intervention, Surroundings
from hookdepth.engine.stages import Piece, Stage, parsed, path_text, pieces_of, stages_of
from hookdepth.engine.tokens import Tokens, Where  # noqa: F401 (pdoc resolves inherited fields here)
from hookdepth.errors import HookdepthError, shown, whole_number
from hookdepth.model.decoder import Decoder


@dataclass(frozen=True, eq=False, init=False, repr=False)
class LayerPath(Intervention):
    """Visit these layers, in this order, in place of 0 … L−1.

        LayerPath("0-9,4-9,10-29")              # layers 4 to 9 twice
        LayerPath([*range(10), *range(12, 30)]) # layers 10 and 11 left out
        LayerPath("0-3,7-4,8-29")               # 4 to 7 in reverse
        LayerPath("0-3,4+5,6-29")               # 4 and 5 on the same input, what they add is summed
        LayerPath([0, 1, {2, 3}, 4], mean=True) # … or averaged

    Layers attend to what the same visit makes of the tokens before. Interventions beside it act at every visit of
    their layer; at the input of one of several parallel layers they change what that one adds. A layer measurement
    gives, for a layer that is visited again, the value of its last visit, and NaN for one that is never visited. On
    the first `keep_front` tokens the run stays the clean one.

    Args:
        path: as text; or layers in a row, of which a set or tuple is one stage. An empty list: no layer at all.
        mean: what parallel layers add is averaged.
        keep_front: first tokens that are left alone.

    Raises:
        HookdepthError: no layers, a layer twice in one stage; in a run, a layer that the model does not have, or a
            branch with a cut, an `until`, a second path or changes of tokens that the path leaves alone.

    Sources: 2407.09298 (skipped, swapped, reversed, parallel, looped layers), 2406.19384.
    """

    tokenwise: ClassVar[bool] = True
    stages: tuple[Stage, ...] = ()
    mean: bool = False
    keep_front: int = 0
    _pieces: tuple[Piece, ...] = ()

    def __init__(self, path: str | Sequence[Any], mean: bool = False, keep_front: int = 0) -> None:
        if not isinstance(mean, bool):
            raise HookdepthError(f"LayerPath: mean is {shown(mean)}", "give True or False")
        object.__setattr__(self, "stages", parsed(path) if isinstance(path, str) else stages_of(path))
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "keep_front", whole_number("LayerPath: keep_front", keep_front, 0))
        object.__setattr__(self, "_pieces", tuple(pieces_of(self.stages)))
        self._place("resid_pre", 0, slice(self.keep_front, None))

    def __str__(self) -> str:
        return path_text(self.stages)

    def __repr__(self) -> str:
        more = ", mean=True" * self.mean + f", keep_front={self.keep_front}" * bool(self.keep_front)
        return f"LayerPath({str(self)!r}{more})"

    def clean_layers(self, most: int) -> int:
        """How many of the model's layers, at most so many, it visits first as the clean run does."""
        first, last, together = self._pieces[0] if self._pieces else (0, -1, ())
        return 0 if first or together else min(last + 1, most)

    def pieces(self, begin: int, apart: Container[int] = ()) -> Iterator[Piece]:
        """What follows the first `begin` stages: layers in a row, those of `apart` alone."""
        for first, last, together in self._pieces:
            first, begin = first + begin, 0
            while first <= last:
                stop = next((n for n in range(first, last) if n in apart or n + 1 in apart), last) if apart else last
                stop = last if together else stop
                yield first, stop, together
                first = stop + 1

    def layers(self) -> set[int]:
        """All layers that it visits."""
        return {layer for stage in self.stages for layer in stage}

    def apply(self, row: Tensor, where: Where, around: Surroundings) -> None:
        """Nothing at a site: the engine leads the row through the layers."""

    def check(self, model: Decoder, length: int) -> None:
        """Also check that the model has its layers, and the prompt more than the first tokens."""
        self._place(self.site, self.layer, self.tokens)
        if wrong := sorted(layer for layer in self.layers() if not 0 <= layer < model.n_layers):
            raise HookdepthError(
                f"{self!r} visits layer {wrong[-1]} of a model of {model.n_layers} layers",
                f"give layers 0 to {model.n_layers - 1}",
            )
        if self.keep_front >= length:
            raise HookdepthError(
                f"{self!r} changes nothing in a prompt of {length} tokens", "give a smaller keep_front"
            )

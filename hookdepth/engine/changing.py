"""How a row is changed: by a branch's interventions at one site, one after the other, and by what they read there.

from hookdepth.engine.interventions import Skip
from hookdepth.engine.tokens import locate

pre, row = torch.zeros(12, 8), torch.ones(12, 8)
around = Readable(pre, row, {}, slot=0, tokens=12)
changed(row, [(Skip(3), locate(slice(1, None), 12, 0, 12))], around, scale=1.0)     # 0 from the second token on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hookdepth.engine.intervention import Intervention
from hookdepth.engine.measured import only_read
from hookdepth.engine.tokens import Where
from hookdepth.model.hooks import rescaled


@dataclass
class Readable:
    """What lies around a row in its pass.

    Attributes:
        pre: the layer's input, of the row; None while it is not complete.
        clean: the site's value, of its clean run.
        contributions: layer → what it added to the clean runs, [slot, token, width].
        slot, tokens: which of the pass's prompts is the row's, and how many of its tokens the pass holds.
    """

    pre: Tensor | None
    clean: Tensor
    contributions: Mapping[int, Tensor]
    slot: int
    tokens: int


class _Around:
    """What one intervention may read: see `intervention.Surroundings`."""

    def __init__(self, readable: Readable, clean: Tensor) -> None:
        self._readable, self._clean = readable, clean

    def clean(self) -> Tensor:
        return self._clean

    def resid_pre(self) -> Tensor:
        assert self._readable.pre is not None, "asked for resid_pre before the layer's input is complete"
        return self._readable.pre[: self._readable.tokens]

    def contribution(self, layer: int) -> Tensor:
        return self._readable.contributions[layer][self._readable.slot, : self._readable.tokens]

    def lent(self) -> dict[str, Tensor]:
        """All that it may read, by name."""
        pre = {} if self._readable.pre is None else {"resid_pre": self._readable.pre}
        added = {f"contribution({layer})": values for layer, values in self._readable.contributions.items()}
        return {"clean": self._clean} | pre | added


def changed(raw: Tensor, own: Sequence[tuple[Intervention, Where]], readable: Readable, scale: float) -> Tensor:
    """A copy of a row, changed; `scale` is the family's factor for what is added to the stream there.

    row = torch.ones(12, 8)
    changed(row, [], Readable(None, row, {}, slot=0, tokens=12), 1.0)     # [token, width]
    """

    def change(row: Tensor) -> Tensor:
        row = row.clone()
        for one, where in own:
            seen = (slice(readable.tokens),) if one.head is None else (slice(readable.tokens), one.head)
            around = _Around(readable, readable.clean[seen])
            with only_read(f"the intervention {type(one).__name__}", around.lent()):
                one.apply(row[seen], where, around)
        return row

    return rescaled(change, raw, scale)

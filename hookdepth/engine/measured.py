"""Where the rows of a pass are measured, and how their values there become one number.

    measured = measured_tokens(table, table.measured_rows(), branches, lengths)
    measured.mask                                      # [row, token of the pass]
    values = checked(measurement, view, shape)         # [row, token]: what the measurement gave
    own, clean = measured.reduce(measurement, values, places)     # [row] each: the row's, and its clean run's

A pass may begin right of tokens at which a branch is measured. It does so only where all measurements are changes
and the branch is its clean run at these tokens, so that their values are 0: they count as zeros, and are not computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hookdepth.engine.branches import Branch
from hookdepth.engine.measurement import LayerView, Measurement, OutputView
from hookdepth.engine.rows import RowTable
from hookdepth.errors import HookdepthError, shown
from hookdepth.metrics import masked_reduce
from hookdepth.model.devices import numbers, send


@dataclass
class MeasuredTokens:
    """Where each row of a pass is measured; clean runs and null branches wherever any branch of their prompt is.

    Attributes:
        mask: [row, token of the pass].
        outside: [row], how many measured tokens lie left of the pass; None where none does.
    """

    mask: Bool[Tensor, "row token"]
    outside: Int[Tensor, " row"] | None

    def to(self, device: torch.device) -> MeasuredTokens:
        """The same on a device."""
        return MeasuredTokens(send(self.mask, device), None if self.outside is None else send(self.outside, device))

    def of(self, rows: Sequence[int], tokens: Sequence[int]) -> MeasuredTokens:
        """The same for some of the rows and tokens."""
        return MeasuredTokens(self.mask[rows][:, tokens], None if self.outside is None else self.outside[rows])

    def reduce(
        self, measurement: Measurement, values: Float[Tensor, "here token"], places: Int[Tensor, "2 row"]
    ) -> Float[Tensor, "2 row"]:
        """One number for each row, and the same of its clean run at the same tokens.

        Args:
            measurement: whose values they are.
            values: of the rows that are here.
            places: for each row, which of these are its own; then, which are its clean run's.
        """
        if self.outside is not None and not measurement.change:
            raise HookdepthError(
                f"the pass holds only some of the tokens at which {measurement.name!r} is wanted, and it is no change",
                "plan with changes_only=False",
            )
        here = self.to(values.device)
        both = values.index_select(0, places.flatten()).unflatten(0, places.shape)
        return masked_reduce(both, here.mask, measurement.reduce, here.outside)


def measured_tokens(
    table: RowTable,
    rows: Iterable[tuple[int, int]],
    branches: Sequence[Branch],
    lengths: Sequence[int],
    targets: bool = False,
) -> MeasuredTokens:
    """Work out, on the host, where each row of a pass is measured.

    Args:
        table: the rows of the pass.
        rows: those that are measured: (id, index of the branch).
        branches: of the whole plan.
        lengths: tokens of the pass's prompts.
        targets: leave out the last token of each prompt, which has no next one.
    """
    pass_ = table.pass_
    whole = torch.zeros(table.n_rows, max(*lengths, pass_.stop), dtype=torch.bool)
    alike: dict[range | tuple[int, ...], list[int]] = {}  # there may be hundreds of rows, at few choices of tokens
    for id_, row in rows:
        chosen = branches[row].measured_positions(lengths[table.slot[id_]])
        alike.setdefault(chosen if isinstance(chosen, range) else tuple(chosen), []).append(id_)
    for tokens, ids in alike.items():
        whole[numbers(ids)[:, None], numbers(tokens)] = True
    if targets:
        whole[torch.arange(table.n_rows), numbers([lengths[slot] - 1 for slot in table.slot])] = False
    for slot, both in enumerate(zip(table.clean_ids, table.control_ids, strict=True)):
        whole[list(both)] = whole[table.of_prompt(slot)].any(0)
    mask = whole[:, pass_.start : pass_.stop]
    outside = whole.sum(-1) - mask.sum(-1)
    return MeasuredTokens(mask, outside if outside.any() else None)


def checked(measurement: Measurement, view: LayerView | OutputView, shape: tuple[int, int]) -> Tensor:
    """The values of a measurement, in float32 (or float64), if they are one a row and token.

    Raises:
        HookdepthError: no tensor, one of another shape, or complex numbers.
    """
    with only_read(f"the measurement {measurement.name!r}", vars(view)):
        values = measurement.values(view)  # type: ignore[arg-type]
    if not isinstance(values, Tensor):
        problem = f"gave {shown(values)} for its values"
    elif values.is_complex():
        problem = f"gave values of dtype {values.dtype}"
    elif tuple(values.shape) != shape:
        problem = f"gave values of shape {list(values.shape)}"
    else:
        return values if values.dtype in (torch.float32, torch.float64) else values.float()
    raise HookdepthError(
        f"the measurement {measurement.name!r} {problem}",
        f"give a real number for each row and token: a tensor of shape [{shape[0]}, {shape[1]}] here",
    )


@contextmanager
def only_read(who: str, lent: Mapping[str, object]) -> Iterator[None]:
    """Refuse a write into what was lent for reading: PyTorch counts the writes into a tensor, on the host."""
    before = {name: value._version for name, value in lent.items() if isinstance(value, Tensor)}
    yield
    for name, value in lent.items():
        if isinstance(value, Tensor) and value._version != before.get(name, 0):
            raise HookdepthError(
                f"{who} writes into {name}, which others read as well", "let it work on a copy (clone)"
            )

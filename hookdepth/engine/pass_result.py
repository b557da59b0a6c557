"""What a pass gives: what was measured, and the keys and values from which later passes start.

result = run_pass(model, padded_ids, table, branches, measurements, lengths)
own, of_clean = result.of("effect")     # [rows of the pass, L] each
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from hookdepth.engine.rows import RowTable
from hookdepth.model.devices import send
from hookdepth.model.kv_cache import KeysValues


@dataclass
class PassResult:
    """What a pass measured, on the devices where it was measured.

    Attributes:
        table: its rows.
        layer: measurement → [row, L]; before a branch is born, its clean run's value.
        output: measurement → [row]; for branches that did not live to the end, their clean run's value.
        clean_layer, clean_output: the clean run's, at the tokens at which each row is measured. All four are NaN where
            a row is not measured in this pass; of a measurement without reduction they have an axis more, of tokens.
        recorded: layer → keys and values, where suffix passes need them.
    """

    table: RowTable
    layer: dict[str, Float[Tensor, "row layer"]]
    clean_layer: dict[str, Float[Tensor, "row layer"]]
    output: dict[str, Float[Tensor, " row"]]
    clean_output: dict[str, Float[Tensor, " row"]]
    recorded: dict[int, KeysValues] = field(default_factory=dict)

    @classmethod
    def of_both(
        cls, table: RowTable, layer: dict[str, Tensor], output: dict[str, Tensor], recorded: dict[int, KeysValues]
    ) -> PassResult:
        """Of values [2, row, …], the rows' and their clean runs'."""
        own, clean = ([{name: both[n] for name, both in found.items()} for found in (layer, output)] for n in (0, 1))
        return cls(table, own[0], clean[0], own[1], clean[1], recorded)

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """What a measurement gave, [row, …]: the rows' and their clean runs'."""
        own, clean = (self.layer, self.clean_layer) if name in self.layer else (self.output, self.clean_output)
        return own[name], clean[name]

    def settled(self) -> PassResult:
        """The same, which holds on to no keys and values, and to no graph."""
        kinds = (self.layer, self.clean_layer, self.output, self.clean_output)
        layer, clean_layer, output, clean_output = ({n: own.detach() for n, own in kind.items()} for kind in kinds)
        return PassResult(self.table, layer, clean_layer, output, clean_output)

    def prefix(self, table: RowTable) -> Callable[[int], KeysValues]:
        """Layer → the keys and values left of a pass that starts from this one, a row for each attending row."""
        start = table.pass_.start
        rows = [table.prefix_rows(layer, self.table) for layer in range(table.n_layers)]

        def prefix(layer: int) -> KeysValues:
            keys, values = (states[:, :, :start] for states in self.recorded[layer])
            chosen = rows[layer]
            if chosen == list(range(keys.shape[0])):
                return keys, values
            if len(set(chosen)) == 1:
                row = slice(chosen[0], chosen[0] + 1)
                return keys[row].expand(len(chosen), -1, -1, -1), values[row].expand(len(chosen), -1, -1, -1)
            index = send(chosen, keys.device)
            return keys.index_select(0, index), values.index_select(0, index)

        return prefix

"""How much is to be done, counted before anything runs: a plan and a model's shape are enough, weights are not.

work = work_of_plan(model, plan_for(model, branches, [180]), branches, [180], [OutputEffect()])
work.passes, work.token_layers, work.flops(model)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hookdepth.engine.branches import Branch
from hookdepth.engine.machines import Machine, cost_of, matrices
from hookdepth.engine.measurement import LayerMeasurement, Measurement, OutputMeasurement
from hookdepth.engine.memory import bytes_per_row_token, kept_bytes
from hookdepth.engine.plan import ROWS_PER_PROMPT, Plan, pass_work
from hookdepth.model.decoder import Decoder
from hookdepth.model.unembedding import most_logits

_COUNTS = ("passes", "token_layers", "positions", "backward", "overhead", "unread", "algebra")


@dataclass(frozen=True)
class Work:
    """What is done; two add up, where they are done one after the other.

    Attributes:
        passes: forward calls.
        token_layers: tokens of rows through layers, forward.
        positions: unembedded positions of rows.
        bytes: at the peak, beside the weights.
        width: tokens of a typical pass, those handed in as keys and values included.
        backward: token-layers through which gradients flow back.
        overhead: what passes cost beside their tokens (weights that are read, kernels that are launched), in
            token-layers.
        unread: of `token_layers`, those of a last layer whose MLP is left out, since nobody reads it there.
        algebra: FLOPs beside those of the model, which take as long.
        notes: sentences on what was assumed.
    """

    passes: float = 0
    token_layers: float = 0
    positions: float = 0
    bytes: float = 0
    width: float = 0
    backward: float = 0
    overhead: float = 0
    unread: float = 0
    algebra: float = 0
    notes: tuple[str, ...] = ()

    def __add__(self, other: Work) -> Work:
        layers = self.token_layers + other.token_layers
        return Work(
            **{name: getattr(self, name) + getattr(other, name) for name in _COUNTS},
            bytes=max(self.bytes, other.bytes),
            width=(self.width * self.token_layers + other.width * other.token_layers) / max(1, layers),
            notes=tuple(dict.fromkeys(self.notes + other.notes)),
        )

    def times(self, factor: float) -> Work:
        """The same done several times, one after the other: work.times(2.5)."""
        return replace(self, **{name: getattr(self, name) * factor for name in _COUNTS})

    def flops(self, model: Decoder) -> tuple[float, float]:
        """FLOPs in the layers, and of the unembedding: work.flops(model).

        A layer's are its matrices', and attention's to half of all pairs of tokens. Parameters are frozen, so that
        the way back costs as much as the way there.
        """
        layer = 2.0 * matrices(model.layers[0]) + 2.0 * model.attention_width * self.width
        through = (self.token_layers * layer - self.unread * 2.0 * _mlp_matrices(model)) * self._ways
        out = 2.0 * model.d_model * int(model.config.vocab_size) * self.positions
        return through + self.algebra, out * (2 if self.backward else 1)

    @property
    def _ways(self) -> float:
        """1 forward; up to 2 with the way back."""
        return 1 + (self.backward / self.token_layers if self.token_layers else 0)

    def seconds(self, model: Decoder, machine: Machine) -> float:
        """What it takes in one process on a machine that need not be there: work.seconds(outline, MACHINES["h100"])"""
        logits, ways = self.positions * int(model.config.vocab_size), self._ways
        flops = sum(self.flops(model))
        return machine.seconds(model, flops, ways * self.token_layers, ways * logits, ways * self.overhead)

    def fits(self, model: Decoder, machine: Machine) -> bool:
        """Whether the weights, and passes beside them, fit into its memory."""
        return model.weight_bytes + self.bytes <= machine.memory * 2**30


def _mlp_matrices(model: Decoder) -> int:
    own = model.sites.found.contributions[-1].get("mlp")
    return 0 if own is None else sum(matrices(module) for module in {own.reads, own.output})


def logit_bytes(model: Decoder) -> float:
    """What unembedding takes at its peak: logits of the model's dtype, of float32, and a difference."""
    return most_logits(model.device) * 12.0


def plain_work(model: Decoder, prompts: Sequence[Sequence[int]], unembedded: int = 0, kept: int = 6) -> Work:
    """One forward pass of each prompt, without branches.

    Args:
        unembedded: points of the stream that are unembedded, at every token.
        kept: values of the stream that are held at once.
    """
    tokens, longest = sum(map(len, prompts)), max(map(len, prompts), default=0)
    room = longest * model.d_model * model.dtype.itemsize * kept + (logit_bytes(model) if unembedded else 0)
    width, layers = tokens / max(1, len(prompts)), tokens * model.n_layers
    overhead = sum(overhead_of(model, len(prompt) * model.n_layers) for prompt in prompts)
    return Work(len(prompts), layers, tokens * unembedded, room, width, overhead=overhead)


def overhead_of(model: Decoder, token_layers: float, passes: int = 1) -> float:
    """What passes cost beside the tokens that they share: overhead_of(model, 900)"""
    return cost_of(model)(token_layers, model.n_layers, passes) - token_layers


def work_of_plan(
    model: Decoder,
    plan: Plan,
    branches: Sequence[Branch],
    lengths: Sequence[int],
    measurements: Sequence[Measurement],
    gradients: bool = False,
) -> Work:
    """The work of all passes of a plan; an outline will do for the model.

    work_of_plan(model, plan_for(model, branches, [20]), branches, [20], [LayerEffect()]).positions     # 0
    """
    by_layer = any(isinstance(one, LayerMeasurement) for one in measurements)
    outputs = any(isinstance(one, OutputMeasurement) for one in measurements)
    last, total = plan.n_layers - 1, Work(overhead=plan.cost - plan.work)
    for pass_ in plan.walk():
        ending = pass_.measured if pass_.sweep else pass_.rows
        alive = [row for row in ending if plan.spans[row].last == last]
        read: set[int] = set()
        positions = 0
        for prompt in pass_.prompts:
            own = [branches[row] for row in pass_.measured if branches[row].prompt == prompt]
            measured = {position for branch in own for position in branch.measured_positions(lengths[prompt])}
            here = measured & set(range(pass_.start, pass_.stop))
            positions += len(here) * (ROWS_PER_PROMPT + sum(branches[row].prompt == prompt for row in alive))
            read |= here
        # As `forward.leave_out_unread` does it, which only an intervention that is not tokenwise keeps from it.
        inside = ROWS_PER_PROMPT * len(pass_.prompts) + sum(plan.spans[row].first <= last for row in alive)
        unread = inside * (pass_.stop - pass_.start - max(1, len(read)))
        work = pass_work(pass_, plan.spans, plan.n_layers)
        # Gradients flow back through all rows of the batch, to the lowest layer at which a branch joins.
        below = min((plan.spans[row].first for row in pass_.rows), default=0)
        untouched = ROWS_PER_PROMPT * len(pass_.prompts) * below * (pass_.stop - pass_.start)
        total += Work(
            1,
            work,
            positions if outputs else 0,
            backward=work - untouched if gradients else 0,
            width=pass_.start + pass_.stop,  # a token looks back at half of this
            unread=0 if pass_.sweep or (by_layer and pass_.measured) else unread,
        )
    if gradients:
        return replace(total, bytes=plan.peak_kept_tokens * kept_bytes(model))
    room = plan.peak_row_tokens * bytes_per_row_token(model) + (logit_bytes(model) if total.positions else 0)
    return replace(total, bytes=room)

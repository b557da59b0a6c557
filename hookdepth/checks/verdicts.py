"""What a verification says: a verdict on each kind of branches."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass
class Verdict:
    """What one kind of branches gave."""

    kind: str
    verdict: str = "none"  # right (equal bits), rounding, wrong, or none (the model has no such site)
    branches: int = 0
    difference: float = 0.0  # the largest between the engine and a plain pass
    effect: float = 0.0  # the largest of these branches on the output; where it is 0, agreeing means nothing
    case: str = ""  # the smallest wrong one


@dataclass
class Verification:
    """All verdicts on a model: print it, or `json()` it."""

    model: str
    family: str
    dtype: str
    device: str
    prefixes: bool
    null_effect: float
    seconds: float
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(one.verdict != "wrong" for one in self.verdicts)

    def json(self) -> str:
        """The same as JSON."""
        return json.dumps({**asdict(self), "ok": self.ok}, indent=2)

    def __str__(self) -> str:
        head = f"{self.model} ({self.family}), {self.dtype} on {self.device}, noise floor {self.null_effect:.2g}"
        if not self.prefixes:
            head += "\nIts layers keep no keys and values that can be handed on: passes start at token 0."
        lines = [f"{'branches':<12}{'verdict':<10}{'number':>7}{'difference':>12}{'effect':>9}"]
        for one in self.verdicts:
            still = "  nothing moved" if one.branches and not one.effect else ""
            numbers = f"{one.branches:>7}{one.difference:>12.2g}{one.effect:>9.2g}"
            lines.append(f"{one.kind:<12}{one.verdict:<10}{numbers}{still}{'  ' + one.case if one.case else ''}")
        return "\n".join([head, *lines])

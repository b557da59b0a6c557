"""What every kind of figure has: a pattern, how to read it, and its pictures of one run, of several, and over training.

    for picture in Heatmap("effect", "How to read it.").pictures(result, declaration):
        picture.name, picture.caption, picture.draw()

Importing this imports no matplotlib: analyses declare their figures, and who only computes need not wait for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from hookdepth.errors import HookdepthError
from hookdepth.report.hover import Values
from hookdepth.report.patterns import PART_NAMES, assignments, fill, match, probe_of
from hookdepth.report.tables import shorten
from hookdepth.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Assignment = Mapping[str, str]


class Declaration(Protocol):
    """What an analysis says about itself, as far as a report wants to know it.

    Declaration   # anything with these attributes: the classes of `hookdepth.analyses`, and a user's own
    """

    # Properties, so that class attributes and frozen ones are as good.
    @property
    def name(self) -> str:
        """As on the command line: "logit-lens"."""

    @property
    def heading(self) -> str:
        """Over its section of the report."""

    @property
    def question(self) -> str:
        """What it answers, below the heading."""

    @property
    def paper(self) -> str:
        """Source and figure, "2505.13898, Fig. 3a", or nothing."""

    @property
    def order(self) -> float:
        """Its place in the report: smaller is earlier."""

    @property
    def tensors(self) -> Mapping[str, str]:
        """Pattern → names of the axes: {"{part}.effect": "layer layer", "kl": "point"}."""

    @property
    def figures(self) -> Sequence[Kind]:
        """How its tensors are drawn."""

    def numbers(self, result: Result) -> Mapping[str, Any]:
        """Its share of the summary, JSON-able; of a result without tensors, what it says where nothing was measured."""

    def notes(self, result: Result) -> Sequence[str]:
        """Sentences for the report that depend on the numbers."""


Lookup = Callable[[Result], Declaration | None]


@dataclass(frozen=True)
class Drawing:
    """What a kind knows of one figure: Drawing([values], "nothing is clipped", lambda: figure).

    Attributes:
        values: of each pair of axes, in order.
        clipped: what is not shown, in words.
        draw: makes the figure.
    """

    values: Sequence[Values]
    clipped: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Picture:
    """A figure that can be drawn, with all that is said about it: picture.draw().savefig(f"{picture.name}.png").

    Attributes:
        name: of its files, without ending.
        caption: what it shows.
        said: how many prompts, which reduction, what is clipped, the noise floor.
        values: the numbers of each pair of axes.
        render: draws it; use `draw`.
    """

    name: str
    caption: str
    said: str
    values: Sequence[Values]
    render: Callable[[], Figure]

    def draw(self) -> Figure:
        """The figure, with what is said about it under it: picture.draw()"""
        from hookdepth.report.drawing.style import say_below

        figure = self.render()
        say_below(figure, self.said)
        return figure


@dataclass(frozen=True)
class Panel:
    """A curve over layers at every step of a training, as a map: Panel("KL", "Layer", {0: kl, 100: kl}, False, None).

    Attributes:
        label, rows: of the colour bar, of the layers' axis.
        curves: step → [layer].
        signed: whether zero is white.
        end: from the largest value, where the colours end; None for the 98th percentile.
    """

    label: str
    rows: str
    curves: Mapping[int, Tensor]
    signed: bool
    end: Callable[[float], float] | None


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of figure: what to draw, and how to read it.

    Heatmap("{part}.effect", "Row s, column i: …", label="Relative change", paper="2505.13898, Fig. 3a")

    Attributes:
        tensor: pattern of the tensors to draw, or several; see `hookdepth.report.patterns`.
        reading: how to read it, in two sentences.
        label: of the values: the axis or the colour bar.
        caption: what it shows, in a few words; None for the tensor's name.
        paper: source and figure, where it is not the analysis' own.
        name: of the files, after the analysis' own name, with placeholders; None for the tensor's name.
        reduction: how tokens and prompts became one value: "largest over tokens and prompts".
    """

    tensor: str | tuple[str, ...]
    reading: str
    label: str = ""
    caption: str | None = None
    paper: str = ""
    name: str | None = None
    reduction: str = ""

    @abstractmethod
    def drawing(self, result: Result, declaration: Declaration, values: Assignment) -> Drawing:
        """The figure of one result for one assignment of the placeholders: kind.drawing(result, declaration, {})."""

    @abstractmethod
    def together(self, results: Mapping[str, Result], declaration: Declaration, values: Assignment) -> Drawing:
        """The figure of several runs: kind.together({"small": result, "large": other}, declaration, {})."""

    def panel(self, history: Mapping[int, Result], declaration: Declaration) -> Panel | None:
        """A map over training time, of kinds whose values are curves: kind.panel({0: result}, declaration)."""
        return None

    @property
    def patterns(self) -> tuple[str, ...]:
        """All patterns of it: Heatmap("effect", "…").patterns   # ("effect",)"""
        return (self.tensor,) if isinstance(self.tensor, str) else self.tensor

    def tensors(self, result: Result) -> list[str]:
        """The tensors of a result that it draws: kind.tensors(result)   # ["layer.effect"]"""
        return [name for name in result.tensors if any(match(pattern, name) is not None for pattern in self.patterns)]

    def pictures(self, result: Result, declaration: Declaration) -> list[Picture]:
        """Its figures of a result, one for each assignment of the placeholders: kind.pictures(result, declaration)."""
        found = []
        for values in assignments(self.patterns[0], result.tensors):
            drawing = self.drawing(result, declaration, values)
            said = [_prompts(result, values), self.reduction, drawing.clipped, floor_of(result.metadata)]
            said_by = ". ".join(text[:1].upper() + text[1:] for text in said if text)
            name = f"{result.analysis}-{self._name(values)}"
            found.append(Picture(name, self.caption_of(result, values), said_by, drawing.values, drawing.draw))
        return found

    def compare(self, results: Mapping[str, Result], declaration: Declaration, least: int) -> list[Picture]:
        """Its figures of several runs, where at least so many have it: kind.compare(results, declaration, 2).

        Probes are compared where their prompts are the same.
        """
        names = {name: None for result in results.values() for name in result.tensors}
        found = []
        for values in assignments(self.patterns[0], names):
            own = {label: result for label, result in results.items() if self._is_in(result, values)}
            if "i" in values:
                prompts = {label: probe_of(result, int(values["i"])).get("prompt") for label, result in results.items()}
                first = next(iter(prompts.values()))
                own = {label: result for label, result in own.items() if prompts[label] == first}
            if len(own) < least or not own:
                continue
            drawing = self.together(own, declaration, values)
            any_one = next(iter(own.values()))
            name, caption = f"{any_one.analysis}-{self._name(values)}", self.caption_of(any_one, values)
            said = ". ".join(text[:1].upper() + text[1:] for text in (self.reduction, drawing.clipped) if text)
            found.append(Picture(name, caption, said, drawing.values, drawing.draw))
        return found

    def caption_of(self, result: Result, values: Assignment) -> str:
        """What a figure shows: the part, the kind of value, the probe: kind.caption_of(result, {"part": "layer"})."""
        what = self.caption
        if what is None:
            literal = [word for word in self.patterns[0].split(".") if "{" not in word and word != "*"]
            what = " ".join(literal).replace("_", " ")
        probe = _probe_in_words(result, int(values["i"])) if "i" in values else ""
        others = [PART_NAMES.get(value, value) for key, value in values.items() if key != "i"]
        caption = ", ".join(text for text in (*others, what, probe) if text)
        return caption[:1].upper() + caption[1:]

    def _name(self, values: Assignment) -> str:
        pattern = self.patterns[0] if self.name is None else self.name
        return fill(pattern, values).replace(".*", "").replace("*", "").replace(".", "-").strip("-")

    def _is_in(self, result: Result, values: Assignment) -> bool:
        return any(match(fill(self.patterns[0], values), name) is not None for name in result.tensors)

    def _map(self, result: Result, values: Assignment) -> Tensor:
        """The one tensor with two axes that a map shows."""
        name = fill(self.patterns[0], values)
        tensor = result.tensors[name]
        if tensor.ndim != 2 or 0 in tensor.shape:
            kind, shape = type(self).__name__, list(tensor.shape)
            raise HookdepthError(
                f"{result.analysis}: a {kind} shows two axes, and {name!r} has the shape {shape}",
                "declare another kind of figure for it",
            )
        return tensor


def floor_of(facts: Mapping[str, Any]) -> str:
    """The noise floor of an analysis in a few words; nothing where nothing is intervened on.

    floor_of({"null_effect": 0.00012})   # 'Noise floor 0.00012'
    """
    if "null_effect" not in facts:
        return ""
    floor = facts["null_effect"]
    return "Noise floor not measured" if floor is None else f"Noise floor {floor:.2g}"


def _prompts(result: Result, values: Assignment) -> str:
    if "i" in values:
        return "one prompt with its answer"
    count = (result.metadata.get("data") or {}).get("n_prompts")
    return "" if count is None else f"{count} prompt{'' if count == 1 else 's'}"


def _probe_in_words(result: Result, number: int) -> str:
    probe = probe_of(result, number)
    if not probe:
        return f"probe {number}"
    prompt, answer = (shorten(str(probe.get(key, "")), 120) for key in ("prompt", "answer"))
    return f"“{prompt}” → “{answer}”"

"""What every kind of figure has: a pattern, how to read it, and its pictures of one run, of several, and over training.

Importing this imports no matplotlib: analyses declare their figures, and who only computes need not wait for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from hookdepth.errors import HookdepthError, shown
from hookdepth.report.hover import Values
from hookdepth.report.patterns import PART_NAMES, assignments, fill, match, probe_of, series
from hookdepth.report.tables import counted, shorten
from hookdepth.results import PER_PROMPT, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Assignment = Mapping[str, str]


class Declaration(Protocol):
    """What an analysis says about itself, as far as a report wants to know it."""

    name: ClassVar[str]  # as on the command line
    heading: ClassVar[str]  # over its section of the report
    question: ClassVar[str]  # what it answers, below the heading
    paper: ClassVar[str]  # source and figure, "2505.13898, Fig. 3a", or nothing
    order: ClassVar[float]  # its place in the report: smaller is earlier
    tensors: ClassVar[Mapping[str, str]]  # pattern → names of the axes: {"{part}.effect": "layer layer"}
    figures: ClassVar[Sequence[Kind]]  # how its tensors are drawn
    labels: ClassVar[Mapping[str, Sequence[str]]]  # of the places along an axis, where they are not numbers

    def numbers(self, result: Result) -> Mapping[str, Any]:
        """Its share of the summary, JSON-able; of a result without tensors, what it says where nothing was measured."""

    def notes(self, result: Result) -> Sequence[str]:
        """Sentences for the report that depend on the numbers."""


Lookup = Callable[[Result], Declaration | None]


@dataclass(frozen=True)
class Drawing:
    """What a kind knows of one figure: Drawing([values], ["nothing is clipped"], lambda: figure)."""

    values: Sequence[Values]  # of each pair of axes, in order
    clipped: Sequence[str]  # what is not shown, in words
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Picture:
    """A figure that can be drawn, with all that is said about it: picture.draw().savefig(f"{picture.name}.png")."""

    name: str  # of its files, without ending
    caption: str  # what it shows
    said: str  # how many prompts, which reduction, what is clipped, the noise floor
    values: Sequence[Values]  # the numbers of each pair of axes
    render: Callable[[], Figure]  # draws it, without what is said
    of: Assignment = field(default_factory=dict)  # what the placeholders stand for

    def draw(self) -> Figure:
        """The figure, with what is said about it under it: picture.draw()"""
        from hookdepth.report.drawing.style import lay_out, say_below, style

        with style():
            figure = self.render()
            say_below(figure, self.said)
            lay_out(figure)  # once is not enough for the layout where names are long
        return figure


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
        minus: name of a tensor, a number, that is taken off all values, of each prompt its own.
        over_training: the label of its panel over training time; empty for `label`, None for no panel.
    """

    tensor: str | tuple[str, ...]
    reading: str
    label: str = ""
    caption: str | None = None
    paper: str = ""
    name: str | None = None
    reduction: str = ""
    minus: str = ""
    over_training: str | None = ""
    page_only: ClassVar[bool] = False  # whether it is on the interactive page alone

    def drawing(self, result: Result, declaration: Declaration, values: Assignment) -> Drawing:
        """The figure of one result for one assignment of the placeholders: kind.drawing(result, declaration, {})."""
        return self.together({"": result}, declaration, values)

    @abstractmethod
    def together(self, results: Mapping[str, Result], declaration: Declaration, values: Assignment) -> Drawing:
        """The figure of several runs: kind.together({"small": result, "large": other}, declaration, {})."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """All patterns of it: Heatmap("effect", "…").patterns   # ("effect",)"""
        return (self.tensor,) if isinstance(self.tensor, str) else self.tensor

    def tensors(self, result: Result) -> list[str]:
        """The tensors of a result that it draws: kind.tensors(result)   # ["layer.effect"]"""
        return [name for name in result.tensors if any(match(pattern, name) is not None for pattern in self.patterns)]

    def pictures(self, result: Result, declaration: Declaration) -> list[Picture]:
        """Its figures of a result, one for each assignment of the placeholders: kind.pictures(result, declaration)."""
        found, result = [], self._less(result)
        for values in assignments(self.patterns[0], self._meant(result.tensors, declaration)):
            drawing = self.drawing(result, declaration, values)
            prompts = _prompts(result, values, series(fill(self.patterns[0], values), result.tensors).values())
            found.append(self._picture(result, values, drawing, prompts, floor_of(result.metadata)))
        return found

    def compare(self, results: Mapping[str, Result], declaration: Declaration, least: int) -> list[Picture]:
        """Its figures of several runs, where at least so many have it; of probes, where prompts are alike."""
        results = {label: self._less(result) for label, result in results.items()}
        names = {name: None for result in results.values() for name in result.tensors}
        found = []
        for values in assignments(self.patterns[0], self._meant(names, declaration)):
            first = fill(self.patterns[0], values)
            own = {label: result for label, result in results.items() if series(first, result.tensors)}
            if "i" in values:
                prompts = {label: probe_of(result, values).get("prompt") for label, result in results.items()}
                same = next(iter(prompts.values()))
                own = {label: result for label, result in own.items() if prompts[label] == same}
            if own and len(own) >= least:
                drawing = self.together(own, declaration, values)
                found.append(self._picture(next(iter(own.values())), values, drawing))
        return found

    def over_time(self, history: Mapping[int, Result], declaration: Declaration) -> tuple[str, dict[int, Tensor]]:
        """What the places of a curve are, and the curve of each step; none for a kind that has no panel over time."""
        return "", {}

    def _less(self, result: Result) -> Result:
        if not self.minus:
            return result
        tensors, drawn = dict(result.tensors), self.tensors(result)
        for name in drawn:
            tensors[name] = tensors[name] - tensors[self.minus]
            if (own := f"{PER_PROMPT}{name}") in tensors:
                off = tensors[f"{PER_PROMPT}{self.minus}"]
                tensors[own] = tensors[own] - off.view(-1, *[1] * (tensors[own].ndim - 1))
        return replace(result, tensors=tensors)

    def _meant(self, names: Iterable[str], declaration: Declaration) -> list[str]:
        """Without those that are declared in full and merely look like this pattern: "score.output" is no level's."""
        own = self.patterns[0] in declaration.tensors
        return [name for name in names if name == self.patterns[0] or not own or name not in declaration.tensors]

    def _picture(
        self, result: Result, values: Assignment, drawing: Drawing, prompts: str = "", floor: str = ""
    ) -> Picture:
        pattern = self.patterns[0] if self.name is None else self.name
        name = fill(pattern, values).replace(".*", "").replace("*", "").replace(".", "-").strip("-")
        said = (prompts, self._reduced(result), "; ".join(filter(None, drawing.clipped)), floor)
        sentences = ". ".join(text[:1].upper() + text[1:] for text in said if text)
        caption = self._caption(result, values)
        return Picture(f"{result.analysis}-{name}", caption, sentences, drawing.values, drawing.draw, values)

    def _reduced(self, result: Result) -> str:
        how = (result.metadata.get("settings") or {}).get("over_prompts")
        if how is None or (how == "max" and "prompts" in self.reduction):
            return self.reduction
        tokens = self.reduction.replace(" and prompts", "")
        return ", ".join(filter(None, (tokens, f"{'largest' if how == 'max' else how} over prompts")))

    def limited(self, norm: Any, low: float | None, high: float | None) -> Kind:
        """The same with colours or an axis that end where a user says: kind.limited(None, 0.0, 2.0)"""
        low = getattr(norm, "vmin", None) if low is None else low
        high = getattr(norm, "vmax", None) if high is None else high
        for name, value in (("vmin", low), ("vmax", high)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value)):
                raise HookdepthError(f"{name} is {shown(value)}", "give a finite number")
        return self if norm is None and low is None and high is None else self._limited(low, high)

    def _limited(self, low: float | None, high: float | None) -> Kind:
        raise HookdepthError(f"{type(self).__name__} take no limits", "leave out vmin, vmax and norm")

    def _caption(self, result: Result, values: Assignment) -> str:
        what = self.caption
        if what is None:
            literal = [word for word in self.patterns[0].split(".") if "{" not in word and word != "*"]
            what = " ".join(literal).replace("_", " ")
        parts = [PART_NAMES.get(value, value) for key, value in values.items() if key != "i"]
        caption = ", ".join(text for text in (*parts, what, _probe_in_words(result, values)) if text)
        return caption[:1].upper() + caption[1:]

    def _tensor(self, result: Result, name: str, n_axes: int) -> Tensor:
        tensor = result.tensors[name]
        if tensor.ndim != n_axes or 0 in tensor.shape:
            kind = type(self).__name__
            shows = f"{kind} show one axis" if n_axes == 1 else f"a {kind} shows two axes"
            what = f"{result.analysis}: {shows}, and {name!r} has the shape {list(tensor.shape)}"
            raise HookdepthError(what, "declare another kind of figure for it")
        return tensor

    def _map(self, result: Result, values: Assignment) -> Tensor:
        return self._tensor(result, fill(self.patterns[0], values), 2)


def floor_of(facts: Mapping[str, Any]) -> str:
    """The noise floor of an analysis in a few words; nothing where nothing is intervened on."""
    if "null_effect" not in facts:
        return ""
    floor = facts["null_effect"]
    return "Noise floor not measured" if floor is None else f"Noise floor {floor:.2g}"


def _prompts(result: Result, values: Assignment, names: Iterable[str]) -> str:
    """Of how many the tensors are: those of their level, those that test, else all."""
    if "i" in values:
        return "one prompt with its answer" if probe_of(result, values).get("answer") else "one prompt"
    own = {len(result.tensors[each]) for name in names if (each := f"{PER_PROMPT}{name}") in result.tensors}
    count = own.pop() if len(own) == 1 else (result.metadata.get("data") or {}).get("n_prompts")
    return "" if count is None else counted(count, "prompt")


def _probe_in_words(result: Result, values: Assignment) -> str:
    if "i" not in values:
        return ""
    probe = probe_of(result, values)
    if not probe:
        return f"probe {int(values['i'])}"
    prompt, answer = (shorten(str(probe.get(key, "")), 120) for key in ("prompt", "answer"))
    return f"“{prompt}” → “{answer}”" if answer else f"“{prompt}”"

"""Which analyses there are: ours, those of installed packages, and a class in a file of the user's own.

    find(name)                             # an analysis
    find("my_analyses.py:HalfSkip")        # in a file of one's own

A package offers its analyses through the entry-point group `hookdepth.analyses`: name → class.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import pkgutil
import sys
from functools import cache
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from hookdepth.errors import HookdepthError, choose, line_in

if TYPE_CHECKING:
    from hookdepth.analyses.base import Analysis
    from hookdepth.results import Result

ENTRY_POINTS = "hookdepth.analyses"
_FOLDER = Path(__file__).parent
_ALSO = {"ig": "gradients", "stats": "residual", "patching": "erasure", "attribution": "gradients"}
_SEEN: dict[str, Analysis] = {}  # those of somebody else's that this process has met


@cache
def known() -> dict[str, type[Analysis]]:
    """Our analyses by name, in their order.

    list(known())     # their names
    """
    from hookdepth.analyses.base import Analysis

    modules = [import_module(f"hookdepth.analyses.{found.name}") for found in pkgutil.iter_modules([str(_FOLDER)])]
    classes = [
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Analysis) and value.__module__ == module.__name__
    ]
    named = [one for one in classes if "name" in vars(one)]
    return {one.name: one for one in sorted(named, key=lambda one: one.order)}


def find(wanted: str) -> Analysis:
    """An analysis by its name, or by the file and class that it is.

    Raises:
        HookdepthError: no such analysis, file or class, a file that does not run, or a class that is no analysis.
    """
    file, _, name = wanted.rpartition(":")
    if wanted.endswith(".py") or (file.endswith(".py") and not name):
        raise HookdepthError(f"{wanted!r} names no class", "give FILE.py:CLASS, the file's path and a class in it")
    if file.endswith(".py"):
        return _instance(_class_in(file, name), wanted)
    if wanted in known():
        return known()[wanted]()
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}  # reads files of all packages
    if wanted in offered:
        return _of_package(offered[wanted])
    also = {word: name for word, part in _ALSO.items() for name in known() if part in name}
    return known()[choose("analysis", wanted, [*known(), *offered], also)]()


def _of_package(point: EntryPoint) -> Analysis:
    try:
        given = point.load()
    except (Exception, SystemExit) as error:  # whatever an installed package does when it is imported
        raise HookdepthError(
            f"the analysis {point.name!r} of an installed package does not load ({error!r})", "mend or remove it"
        ) from error
    made = _instance(given, point.value)
    if made.name != point.name:
        raise HookdepthError(
            f"an installed package offers {point.name!r}, and that analysis is called {made.name!r}",
            "give both the same name in the package",
        )
    return made


class _Afresh(SourceFileLoader):
    # Python takes the bytecode that it keeps for that of a file of the same size, changed within the same second.
    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _class_in(file: str, name: str) -> Any:
    path = Path(file).expanduser()
    if not path.is_file():
        raise HookdepthError(
            f"no file {file!r} for the analysis {name!r}", "give FILE.py:CLASS, the file's path and a class in it"
        )
    # Two files of one name in two folders are two modules; the same file again is the same.
    label = f"hookdepth_analysis_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(label, path, loader=_Afresh(label, str(path)))
    assert spec is not None
    assert spec.loader is not None, "it was given one"
    module = sys.modules[label] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is the user's code: anything may happen there
        raise HookdepthError(f"{file!r} does not run{line_in(path, error)} ({error!r})", "mend the file") from error
    classes = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == label]
    return getattr(module, choose(f"class in {path.name}", name, classes or ["none"]))


def _instance(given: Any, where: str) -> Analysis:
    from hookdepth.analyses.base import Analysis

    if not (inspect.isclass(given) and issubclass(given, Analysis)):
        raise HookdepthError(f"{where!r} is no Analysis", "give a class derived from hookdepth.Analysis")
    try:
        made = given()
    except TypeError as error:
        raise HookdepthError(
            f"{where!r} cannot be made without arguments ({error})", "give its arguments defaults"
        ) from error
    return checked(made)


def checked(analysis: Analysis) -> Analysis:
    """The analysis, if its declaration can be used: checked(HalfSkip()).

    Raises:
        HookdepthError: what it declares cannot be used, or it takes the name of another one.
    """
    from hookdepth.analyses.base import NEEDS, Analysis
    from hookdepth.analyses.declaration import check_declaration

    if not isinstance(analysis, Analysis):
        kind = f"the class {analysis.__name__}" if inspect.isclass(analysis) else repr(analysis)
        raise HookdepthError(f"{kind} is no analysis", "give a name, or an instance of a class derived from Analysis")
    check_declaration(analysis, NEEDS)
    name = analysis.name
    if known().get(name, type(analysis)) is not type(analysis):
        raise HookdepthError(
            f"{type(analysis).__name__} is called {name!r}, as one of hookdepth's own analyses is",
            "give it another name",
        )
    _SEEN[name] = analysis
    return analysis


def declared(result: Result) -> Analysis | None:
    """The analysis that a result is of, ours, one that this process has met, or as its file declares it; or None.

    Raises:
        HookdepthError: the file's own declaration cannot be read.
    """
    if result.analysis in known():
        return known()[result.analysis]()
    from hookdepth.analyses.stored import read, written

    stored, met = result.metadata.get("declaration"), _SEEN.get(result.analysis)
    # A class that was changed since declares something else than this file, which knows best what is in it.
    return met if stored is None or (met is not None and written(met) == stored) else read(stored)


def chosen(wanted: Any) -> list[Analysis]:
    """Analyses from names, instances, "all" (the notebook's eight), "every", or several; each once, in their order.

        [one.order for one in chosen("every")]     # ascending

    Raises:
        HookdepthError: none, an unknown one, or two different ones of one name.
    """
    listed = [wanted] if not isinstance(wanted, list | tuple) else list(wanted)
    words = [word.strip() for one in listed if isinstance(one, str) for word in one.split(",")]
    given = [one for one in listed if not isinstance(one, str)]
    names = [word for word in words if word]
    if not names and not given:
        raise HookdepthError("--analyses names none", f"use all, every, or some of {', '.join(known())}")
    found = [checked(one) for one in given]
    for word in names:
        several = {"all": [kind for kind in known().values() if kind.in_all], "every": known().values()}
        found += [kind() for kind in several[word]] if word in several else [find(word)]
    named: dict[str, Analysis] = {}
    for one in found:
        if type(named.setdefault(one.name, one)) is not type(one):
            raise HookdepthError(f"two analyses are called {one.name!r}", "give one of them another name")
    return sorted(named.values(), key=lambda one: one.order)

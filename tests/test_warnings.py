"""Deprecation warnings of ours are errors: the settings in pyproject.toml are what they should be."""

import warnings
from pathlib import Path

import pytest

import hookdepth

KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def warn_from(module, kind):
    """As if `module` did something that is on its way out."""
    warnings.warn_explicit("on its way out", kind, f"{module}.py", 1, module=module)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", ["hookdepth", "hookdepth.model.loading", "hookdepth.analyses.skip"])
def test_ours_are_errors(module, kind):
    with pytest.raises(kind):
        warn_from(module, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_those_of_others_are_not(kind):
    with warnings.catch_warnings(record=True) as caught:
        warn_from("transformers.modeling_utils", kind)
    assert len(caught) <= 1


def test_a_call_of_ours_is_ours(tmp_path):
    """Python names the module of the code that calls, so that the filter sees what our code does."""
    file = Path(hookdepth.__file__).parent / "made_up.py"
    code = compile("import warnings\nwarnings.warn('old', FutureWarning)", str(file), "exec")
    with pytest.raises(FutureWarning):
        exec(code, {"__name__": "hookdepth.made_up"})

"""Any bytes at all: a result or a HookdepthError, nothing else."""

import json
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from synthetic_results import some_results, synthetic_results
from tiny_tokenizer import tiny_tokenizer

from hookdepth.data import encode, load_examples, make_probe
from hookdepth.errors import HookdepthError, choose, suggestion
from hookdepth.report.drawing import style as plots_base
from hookdepth.report.tables import describe
from hookdepth.results import Result, digest_of, write_atomic
from hookdepth.runs.contract import load_folder, violation
from hookdepth.runs.reporting import report

# The same file is written again and again: no fixture need be made anew.
many = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """What is drawn here is not looked at."""
    monkeypatch.setitem(plots_base._STYLE, "savefig.dpi", 30)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["prompt", "question", "answer", "text"])
ROWS = st.lists(st.dictionaries(KEYS, ANYTHING | st.just("a #### 3"), max_size=3), min_size=1, max_size=4)


def raw(rows):
    return "\n".join(json.dumps(row) for row in rows).encode("utf-8", "surrogatepass")


@given(content=st.binary(max_size=300) | ROWS.map(raw), name=st.sampled_from(["a.txt", "a.jsonl"]))
@many
def test_data_sets(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with suppress(HookdepthError):
        dataset = load_examples(tmp_path / name)
        assert dataset.examples
        for example in dataset.examples:
            with suppress(HookdepthError):
                assert encode(tiny_tokenizer(), example.text, 64)


@given(prompt=st.text(max_size=20), answer=st.text(max_size=20))
@many
def test_probes(prompt, answer):
    with suppress(HookdepthError):
        probe = make_probe(tiny_tokenizer(), prompt, answer, 64)
        assert 0 < min(probe.answer_positions) <= max(probe.answer_positions) < len(probe.token_ids)


@given(given_word=st.text(max_size=30))
@many
def test_choices(given_word):
    words = ["layer", "attn", "mlp"]
    with suppress(HookdepthError):
        assert choose("part", given_word, words) in words
    assert suggestion(given_word, words) in (None, *words)


KEYS_OF_METADATA = st.sampled_from(
    ["model", "data", "settings", "versions", "probes", "null_effect", "wall_time_s", "passes", "seed", "null_where"]
)
INNER = st.dictionaries(
    st.sampled_from(["id", "n_layers", "n_parameters", "dtype", "name", "lengths", "n_prompts", "prompt", "tokens"]),
    ANYTHING,
    max_size=3,
)
METADATA = st.dictionaries(KEYS_OF_METADATA, ANYTHING | INNER | st.lists(INNER, max_size=2), max_size=4)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


def file_of(analysis, tensors, metadata):
    whole = json.loads(json.dumps({"schema": 2, "analysis": analysis, **metadata}))
    whole["digest"] = digest_of(tensors, whole)
    return save(tensors, metadata={"hookdepth": json.dumps(whole)})


def read(tmp_path, content):
    """What `info`, and what a reader of the folder, makes of a file."""
    path = write_atomic(tmp_path / "logit-lens.safetensors", content)
    with suppress(HookdepthError):
        text = describe(path)
        assert "\x1b" not in text, "no control character reaches the terminal"
        assert text.encode()
    with suppress(HookdepthError):
        load_folder(tmp_path)


@given(content=st.binary(max_size=300))
@many
def test_bytes_as_a_result(tmp_path, content):
    read(tmp_path, content)


@given(where=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), cut=st.integers(0, 40))
@many
def test_a_result_with_changed_bytes(tmp_path, where, cut):
    content = bytearray(file_of("logit-lens", {"kl": torch.zeros(3), "topk_overlap": torch.ones(3)}, {"seed": 1}))
    for place, value in where:
        content[place % len(content)] = value
    read(tmp_path, bytes(content[: len(content) - cut]))


@given(metadata=METADATA, shape=SHAPES, name=st.text(st.characters(codec="utf-8"), max_size=8))
@many
def test_a_result_of_other_contents(tmp_path, metadata, shape, name):
    read(tmp_path, file_of("logit-lens", {"kl": torch.zeros(shape), f"x{name}": torch.zeros(2)}, metadata))


@pytest.mark.parametrize("analysis", ["residual-stats", "skip-current", "residual-erasure", "integrated-gradients"])
def test_what_every_tensor_must_be(analysis):
    """Taking a row from any one tensor that is drawn is noticed."""
    tensors = synthetic_results(n_layers=3, n_tokens=4, parts=("layer", "attn"))[analysis].tensors
    assert violation(Result(analysis, tensors)) is None
    for name, value in tensors.items():
        if value.ndim and name not in ("baseline",) and not name.startswith("relative_contribution_max"):
            assert violation(Result(analysis, {**tensors, name: value[:-1]})), name


@given(metadata=METADATA)
@few
def test_a_report_of_any_metadata(tmp_path, metadata):
    tensors = {"kl": torch.tensor([2.0, 1.0, 0.0]), "topk_overlap": torch.tensor([0.0, 0.5, 1.0])}
    write_atomic(tmp_path / "logit-lens.safetensors", file_of("logit-lens", tensors, metadata))
    with suppress(HookdepthError):
        assert report(tmp_path).read_text(encoding="utf-8").count("<img ") == 2


@given(probe=st.dictionaries(st.sampled_from(["prompt", "answer", "tokens", "answer_positions"]), ANYTHING, max_size=4))
@few
def test_a_report_of_any_probe(tmp_path, probe):
    tensors = {"effect.0": torch.rand(3, 4), "baseline": torch.rand(3, 2)}
    content = file_of("residual-erasure", tensors, {"probes": [probe]})
    write_atomic(tmp_path / "residual-erasure.safetensors", content)
    with suppress(HookdepthError):
        assert report(tmp_path).read_text(encoding="utf-8").count("<img ") == 1


def test_values_that_are_not_finite(tmp_path):
    """Results with holes are drawn, the holes in grey; nothing warns."""
    for name, result in some_results(n_layers=3, n_tokens=4).items():
        hurt = {
            key: value.masked_fill(torch.rand_like(value) < 0.3, float("nan")) for key, value in result.tensors.items()
        }
        Result(name, hurt, result.metadata).save(tmp_path / f"{name}.safetensors")
    assert report(tmp_path).is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_but_holes(tmp_path, value):
    for name, result in some_results(n_layers=2, n_tokens=3).items():
        hurt = {key: torch.full_like(tensor, value) for key, tensor in result.tensors.items()}
        Result(name, hurt, result.metadata).save(tmp_path / f"{name}.safetensors")
    assert report(tmp_path).is_file()

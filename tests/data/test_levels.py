"""Data sets with levels, and text: what ships is right, and hub data sets become the rows that SPEC names."""

import importlib.util
import json
import random
import re
import sys
import types
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer

from hookdepth.data import Example, leveled_examples, load_examples
from hookdepth.errors import HookdepthError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo_levels.py"


def refusal(function, *args, **options):
    with pytest.raises(HookdepthError) as caught:
        function(*args, **options)
    assert caught.value.exit_status == 2
    return str(caught.value)


def fake_hub(monkeypatch, rows):
    asked = []
    module = types.ModuleType("datasets")
    module.load_dataset = lambda *args, **options: asked.append((args, options)) or iter(rows)
    module.disable_progress_bars = lambda: None
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_the_levels_that_ship_are_what_the_script_writes():
    spec = importlib.util.spec_from_file_location("demo_levels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = [Example(r["prompt"] + r["answer"], r["prompt"], r["answer"], r["level"]) for r in module.rows()]
    assert list(load_examples("demo-levels").examples) == written


def test_every_sum_that_ships_is_right():
    sums = [e for e in load_examples("demo-levels").examples if e.prompt.startswith("Problem")]
    assert len(sums) == 60
    for one in sums:
        asked = re.fullmatch(r"Problem: Work out ([\d +-]+) step by step\.\nAnswer:", one.prompt)[1]
        steps, result = re.fullmatch(r" (.+)\. The result is (\d+)\.", one.answer).groups()
        terms = asked.split()
        assert len(terms) == 1 + 2 * one.level
        total = int(terms[0])
        for sign, term, step in zip(terms[1::2], terms[2::2], steps.split(", "), strict=True):
            after = total + int(term) if sign == "+" else total - int(term)
            assert step == f"{total} {sign} {term} = {after}"
            assert after >= 0
            total = after
        assert total == int(result)


def test_every_chain_that_ships_is_right():
    chains = [e for e in load_examples("demo-levels").examples if e.prompt.startswith("Facts")]
    assert len(chains) == 60
    for one in chains:
        facts, question = one.prompt.removesuffix("\nAnswer:").split("\nQuestion: Who is ")
        known = {(r, a): b for r, a, b in re.findall(r"The (\w+) of (\w+) is (\w+)\.", facts)}
        assert len(known) == 5
        *relations, person = question.removesuffix("?").replace("the ", "").split(" of ")
        assert len(relations) == one.level
        for relation in reversed(relations):
            person = known[relation, person]
        assert one.answer == f" {person}"


def test_each_level_has_enough_and_none_is_there_twice():
    examples = load_examples("demo-levels").examples
    assert [e.level for e in examples] == sorted(e.level for e in examples)
    assert {sum(e.level == level for e in examples) for level in range(1, 6)} == {24}
    assert len({e.prompt for e in examples}) == len(examples)


@pytest.mark.demo
def test_the_text_that_ships_is_long_enough(demo_model):
    _, tokenizer = demo_model
    lengths = [len(tokenizer(e.text)["input_ids"]) for e in load_examples("demo-text").examples]
    assert sum(lengths) >= 20_000
    assert min(lengths) > 100
    assert max(lengths) < 1000


MATH = [{"problem": f"p{n}", "solution": f"s{n}", "level": f"Level {1 + n % 3}", "type": "x"} for n in range(30)]


def test_math(monkeypatch):
    asked = fake_hub(monkeypatch, MATH)
    examples = load_examples("math").examples
    assert asked == [(("EleutherAI/hendrycks_math", "intermediate_algebra"), {"split": "test"})]
    expected = []
    for level in (1, 2, 3):
        own = [row for row in MATH if row["level"] == f"Level {level}"]
        random.Random(42).shuffle(own)
        expected += [(f"Problem: {row['problem']}\nAnswer:", f" {row['solution']}", level) for row in own]
    assert [(e.prompt, e.answer, e.level) for e in examples] == expected
    assert all(e.text == e.prompt + e.answer for e in examples)
    assert load_examples("math", 4).more == 26


def test_mquake(monkeypatch):
    rows = [
        {"questions": [f"q{n}?", "other?"], "answer": f"a{n}", "orig_triples": [["x", "y", "z"]] * (2 + n % 3)}
        for n in range(12)
    ]
    asked = fake_hub(monkeypatch, rows)
    dataset = load_examples("mquake")
    assert asked == [(("henryzhongsc/MQuAKE-Remastered",), {"split": "CF3k"})]
    two = [n for n in range(12) if n % 3 == 0]
    random.Random(42).shuffle(two)
    assert [e.prompt for e in dataset.examples[:4]] == [f"Question: q{n}?\nAnswer:" for n in two]
    assert dataset.examples[0].answer == f" a{two[0]}"
    assert [e.level for e in dataset.examples] == [2] * 4 + [3] * 4 + [4] * 4
    assert all(len(one.cuts) == 1 for one in leveled_examples(dataset, tiny_tokenizer(), 20, 123))


@pytest.mark.parametrize("row", [{"problem": "p", "solution": "s", "level": "Level ?"}, {"problem": "p"}])
def test_a_hub_row_of_another_schema_is_named(monkeypatch, row):
    fake_hub(monkeypatch, [*MATH, row])
    assert "row 31 of EleutherAI/hendrycks_math is not as math is known" in refusal(load_examples, "math")


@pytest.mark.parametrize(("level", "read"), [(3, 3), ("3", 3), ("easy", "easy"), (None, None), (0, 0)])
def test_levels_of_a_file(tmp_path, level, read):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": " a", "level": level}))
    assert load_examples(path).examples[0].level == read


@pytest.mark.parametrize("level", [1.5, True, -1, "", "a/b", "a.b", [1], "x" * 40])
def test_levels_that_are_none(tmp_path, level):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": " a", "level": level}))
    assert 'the "level" of' in refusal(load_examples, path)


def test_rows_without_a_level_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "answer": " a", "level": 1}\n{"prompt": "p", "answer": " a"}\n')
    said = refusal(leveled_examples, load_examples(path), tiny_tokenizer(), 20, 123)
    assert "row 2 of 'rows.jsonl' has no level" in said
    assert "demo-levels, math, mquake" in said


def test_cuts_run_on_through_the_examples_levels_in_rising_order(tmp_path):
    rows = [
        ("two", 2, "5 + 7 + 5 + 3 + 1 + 7 = 28, so 28 it is"),
        ("one", 1, "7"),
        ("ten", 10, "12 apples and 3 of them"),
    ]
    rows.append(("again", 1, "a full basket and 9 apples of the town"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p + ":", "answer": " " + a, "level": v}) + "\n" for p, v, a in rows))
    found = leveled_examples(load_examples(path), tiny_tokenizer(), 20, 7)
    assert [one.level for one in found] == [1, 1, 2, 10]
    source, seen = random.Random(7), set()
    for one in found:
        whole = tiny_tokenizer()(one.probe.prompt + one.probe.answer, return_offsets_mapping=True)
        first = next(n for n, (_, end) in enumerate(whole["offset_mapping"]) if end > len(one.probe.prompt))
        n_answer = len(whole["input_ids"]) - first
        offsets = list(range(0, n_answer - 4, 4))
        source.shuffle(offsets)
        expected = tuple(first + offset for offset in offsets[:4]) or (first,)
        assert one.cuts == expected
        seen.add(len(one.cuts))
    assert 1 in seen
    assert max(seen) == 4


def test_the_limit_counts_per_level():
    found = leveled_examples(load_examples("demo-levels"), tiny_tokenizer(), 3, 123)
    assert [one.level for one in found] == [level for level in range(1, 6) for _ in range(3)]


@pytest.mark.parametrize("level", ["score", "score_interval", "per_prompt"])
def test_a_level_whose_tensors_would_be_others_is_refused(tmp_path, level):
    """`score.output.max` of a level called score would be written over by the scores of all levels."""
    path = tmp_path / "levels.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 2 =", "answer": " 4", "level": level}), encoding="utf-8")
    assert "names something else" in refusal(load_examples, path)

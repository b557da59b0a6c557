"""Data sets, template, tokens and cuts: the package's own and whatever a user may hand in."""

import ast
import gzip
import json
import operator
import os
import random
import re
import sys
import threading
import types
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth import data
from hookdepth.data import (
    DEFAULT_PROBES,
    Example,
    encode,
    lines,
    load_examples,
    make_probe,
    readable_tokens,
    sample_cuts,
)
from hookdepth.errors import HookdepthError

PACKAGED = Path(hookdepth.__file__).parent / "data" / "demo.jsonl"
ROWS = [json.loads(line) for line in PACKAGED.read_text(encoding="utf-8").splitlines()]
KINDS = [
    {"kind": kind, "bos": bos, "trim_offsets": trim}
    for kind, trims in (("byte-level", (False, True)), ("metaspace", (False,)))
    for trim in trims
    for bos in (False, True)
]
# Hypothesis writes one file again and again: no fixture is made anew between its examples, and none needs to be.
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
encodable = st.text(st.characters(exclude_categories=["Cs"]))
filled = encodable.filter(str.strip)


def notebook_format(example):
    """`format_example` of the notebook, word for word."""
    question = example["question"]
    answer = example["answer"].split("####")
    assert len(answer) == 2
    res = f'Given the following problem, reason and give a final answer to the problem.\nProblem: {question}\nYour response should end with "The final answer is [answer]" where [answer] is the response to the problem.\n'  # noqa: E501
    return f"{res}\n{answer[0]}The final answer is {answer[1].strip()}"


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(call, *args):
    """The message of the refusal that `call(*args)` must end in: one line, exit status 2."""
    with pytest.raises(HookdepthError) as caught:
        call(*args)
    assert caught.value.exit_status == 2
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    return str(caught.value)


def attempt(call, *args):
    """What `call(*args)` gives, or its refusal in one line."""
    try:
        return call(*args)
    except HookdepthError as error:
        refused = error
    assert "\n" not in str(refused)
    return refused


# The demo set


def evaluate(expression):
    """Exact value of an arithmetic expression; anything but numbers, + - * / and brackets is an error."""
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node):
        if isinstance(node, ast.BinOp):
            return operators[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        assert isinstance(node, ast.Constant)
        return Fraction(str(node.value))

    return value(ast.parse(expression, mode="eval").body)


def test_demo_has_enough_and_different_problems():
    assert len(ROWS) >= 24
    assert all(set(row) == {"question", "answer"} for row in ROWS)
    assert len({row["question"] for row in ROWS}) == len(ROWS)
    assert len({len(row["answer"]) for row in ROWS}) > len(ROWS) / 2


@pytest.mark.parametrize("row", ROWS, ids=range(1, len(ROWS) + 1))
def test_demo_arithmetic_is_right(row):
    steps = re.findall(r"([^\s$]+) = \$?<<([^=<>]+)=([^=<>]+)>>(\S+)", row["answer"])
    assert len(steps) == row["answer"].count("<<") == row["answer"].count(">>") > 0
    for written, expression, result, after in steps:
        assert written == expression, "the text and the calculator's annotation differ"
        assert evaluate(expression) == Fraction(result)
        assert after.rstrip(".,") == result
    reasoning, final = row["answer"].split("\n#### ")
    assert "####" not in reasoning
    assert Fraction(final) == Fraction(steps[-1][2])


def test_demo_loads_in_gsm8ks_template():
    dataset = load_examples("demo")
    assert dataset.name == "demo"
    assert [e.text for e in dataset.examples] == [notebook_format(row) for row in ROWS]
    assert all(e.prompt is None and e.answer is None for e in dataset.examples)


@pytest.mark.demo
def test_demo_lengths_are_moderate_and_varied(demo_model):
    _, tokenizer = demo_model
    lengths = [len(encode(tokenizer, e.text, 2048)) for e in load_examples("demo").examples]
    assert min(lengths) >= 60
    assert max(lengths) <= 200
    assert len(set(lengths)) > len(lengths) / 2
    assert all(sample_cuts(lengths))


# Reading files


def test_template_is_the_notebooks(tmp_path, gsm8k_texts):
    shared = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_head.jsonl"
    assert [e.text for e in load_examples(shared).examples] == gsm8k_texts


@same_folder
@given(st.lists(st.tuples(filled, filled, filled), min_size=1, max_size=4))
def test_question_rows(tmp_path, rows):
    rows = [{"question": q, "answer": f"{a}\n#### {f}"} for q, a, f in rows if "#" not in a + f]
    assume(rows)
    dataset = load_examples(write(tmp_path, rows))
    assert [e.text for e in dataset.examples] == [notebook_format(row) for row in rows]


@same_folder
@given(st.lists(st.tuples(filled, st.none() | filled), min_size=1, max_size=4))
def test_prompt_rows_come_back_as_they_are(tmp_path, rows):
    path = write(tmp_path, [{"prompt": p} if a is None else {"prompt": p, "answer": a} for p, a in rows])
    dataset = load_examples(path)
    assert dataset.name == "rows.jsonl"
    assert dataset.examples == tuple(Example(p + (a or ""), p, a) for p, a in rows)


@same_folder
@given(st.lists(filled, min_size=1, max_size=5))
def test_text_lines_come_back_as_they_are(tmp_path, prompts):
    prompts = [re.sub("[\r\n\0]", "x", prompt) for prompt in prompts]
    assume(not prompts[0].startswith("\ufeff"))
    path = tmp_path / "prompts.txt"
    path.write_bytes("\n".join(prompts).encode())
    assert load_examples(path).examples == tuple(Example(prompt, prompt) for prompt in prompts)


def test_spaces_at_the_ends_of_a_line_are_part_of_the_prompt(tmp_path):
    (tmp_path / "p.txt").write_text(" 2 + 2 = \n")
    assert load_examples(tmp_path / "p.txt").examples[0].text == " 2 + 2 = "


def test_hash_is_of_what_the_rows_say_not_of_how(tmp_path):
    rows = [{"prompt": "é = ", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    same = load_examples(write(tmp_path, rows, "a.jsonl")).sha256
    reordered = [dict(reversed(row.items()), id=number) for number, row in enumerate(rows)]
    lines = [json.dumps(row, ensure_ascii=False) for row in reordered]
    for name, text in {
        "b.jsonl": "\n\n".join(lines),
        "c.NDJSON": "\r\n".join(["", *lines, " ", ""]),
        "d.jsonl": "\ufeff" + "\n".join(lines),
    }.items():
        (tmp_path / name).write_bytes(text.encode())
        assert load_examples(tmp_path / name).sha256 == same
    for other in ([*rows, rows[0]], rows[::-1], [{"prompt": "é =", "answer": " 1"}, rows[1]]):
        assert load_examples(write(tmp_path, other)).sha256 != same


QA = b'{"question": "q", "answer": "a #### 1"}\n'
PROMPT = b'{"prompt": "p"}\n'
BAD_FILES = {
    "empty.jsonl": (b"", "is empty"),
    "blank.txt": (b" \n\r\n\t\n", "is empty"),
    "bom.txt": (b"\xef\xbb\xbf", "is empty"),
    "binary.txt": (b"a\n\x00\x01", "is a binary file"),
    "latin.txt": ("fine\nnaïve\n".encode("latin-1"), "line 2 is not UTF-8"),
    "utf16.txt": ("né".encode("utf-16"), "UTF-8"),
    "list.json": (b'[{"prompt": "p"}]', "is JSON, not JSON lines"),
    "syntax.jsonl": (PROMPT + b"\n{'prompt': 'p'}\n", "line 3 is not valid JSON (Expecting property name"),
    "cut.jsonl": (PROMPT[:-4], "line 1 is not valid JSON (Unterminated string"),
    "deep.jsonl": (b"[" * 200_000, "line 1 is not valid JSON"),
    "digits.jsonl": (b'{"prompt": ' + b"9" * 5000 + b"}", "line 1 "),
    "array.jsonl": (QA + b'["p"]\n', 'line 2 is no JSON object with either "question" or "prompt"'),
    "keys.jsonl": (b'{"text": "p"}\n', "line 1 is no JSON object with either"),
    "both.jsonl": (b'{"question": "q", "prompt": "p", "answer": "a"}\n', "line 1 is no JSON object with either"),
    "mixed.jsonl": (QA + b"\n" + PROMPT, "line 3 has other keys than 'mixed.jsonl' line 1"),
    "no-answer.jsonl": (b'{"question": "q"}\n', 'line 1 has no "answer"'),
    "number.jsonl": (b'{"prompt": 7}\n', 'line 1 has no "prompt" that is a string'),
    "null.jsonl": (b'{"prompt": "p", "answer": null}\n', 'line 1 has no "answer" that is a string'),
    "no-prompt.jsonl": (b'{"prompt": " "}\n', "the \"prompt\" of 'no-prompt.jsonl' line 1 is empty"),
    "blank-answer.jsonl": (
        b'{"prompt": "p", "answer": ""}\n',
        "the \"answer\" of 'blank-answer.jsonl' line 1 is empty",
    ),
    "half.jsonl": (b'{"prompt": "\\ud800"}\n', "is not Unicode text"),
    "twice.jsonl": (
        b'{"prompt": "p", "answer": "1", "answer": "2"}\n',
        "line 1 is not valid JSON ('answer' stands",
    ),
    "gz.jsonl": (gzip.compress(PROMPT), "is compressed; decompress it first"),
    "zip.txt": (b"PK\x03\x04rest", "is compressed"),
    "none.jsonl": (b'{"question": "q", "answer": "42"}\n', "is not reasoning, one '####' and a final answer"),
    "two.jsonl": (b'{"question": "q", "answer": "a #### 1 #### 2"}\n', "one '####'"),
    "no-final.jsonl": (QA + b'{"question": "q", "answer": "a #### "}\n', "line 2 is not reasoning"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = BAD_FILES[name]
    Path(name).write_bytes(content)
    said = refusal(load_examples, name)
    assert message in said
    assert repr(name) in said


@same_folder
@given(content=st.binary() | st.lists(st.sampled_from([QA, PROMPT, b"\n", b"{", b'"', b"\xff"])).map(b"".join))
def test_no_content_raises_anything_else(tmp_path, content):
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(content)
        assert attempt(load_examples, tmp_path / name)


@pytest.mark.parametrize(
    ("given_name", "said"),
    [
        ("dmeo", "did you mean demo?"),
        ("Demo", "did you mean demo?"),
        ("gsm8", "did you mean gsm8k?"),
        ("GSM8K", "did you mean gsm8k?"),
        ("prompts.txt", "mquake or an existing file"),
        ("", "mquake or an existing file"),
        ("a\0b", "mquake or an existing file"),
        ("~nobody-of-this-name/p.txt", "an existing file"),
        ("a" * 5000, "an existing file"),
        (".", "is a folder"),
    ],
)
def test_names_that_lead_nowhere(given_name, said):
    assert said in refusal(load_examples, given_name)


def test_a_file_with_a_name_near_a_data_set_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dmeo").write_text("a prompt\n")
    assert load_examples("dmeo").examples == (Example("a prompt", "a prompt"),)


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path, [{"prompt": "p"}])

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert "Permission denied" in refusal(load_examples, path)


def test_what_follows_the_limit_is_counted_and_not_looked_at(tmp_path):
    path = write(tmp_path, [{"prompt": f"p{n}"} for n in range(7)])
    with path.open("ab") as file:
        file.write(b"\n{not JSON\n\n\xff\xff\r\n  \n")
    dataset = load_examples(path, 3)
    assert [e.text for e in dataset.examples] == ["p0", "p1", "p2"]
    assert dataset.more == 6
    assert dataset.left_out(2) == "the first 2 of 9 prompts"
    assert "line 9 is not valid JSON" in refusal(load_examples, path, 8)
    assert "line 9 is not valid JSON" in refusal(load_examples, path)


def test_a_limit_that_nothing_exceeds(tmp_path):
    path = write(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    assert load_examples(path, 2) == load_examples(path) == load_examples(path, 50)
    assert load_examples(path, 2).more == 0
    assert load_examples(path).left_out(2) == ""
    assert load_examples(path).left_out(1) == "the first 1 of 2 prompts"


def test_the_digest_of_the_first_rows_does_not_depend_on_how_many_were_read(tmp_path):
    path = write(tmp_path, [{"prompt": f"p{n}"} for n in range(5)])
    few, many = load_examples(path, 2), load_examples(path)
    assert few.sha256 == few.digest(2) == many.digest(2)
    assert many.digest(3) != many.digest(2)


def test_a_file_too_large_to_be_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_COUNTED_BYTES", 10)
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\nfour\n \n")
    assert load_examples(tmp_path / "p.txt", 3).more is None
    assert load_examples(tmp_path / "p.txt", 3).left_out(2) == "the first 2 of more than 3 prompts"
    assert load_examples(tmp_path / "p.txt", 4).more == 0


def test_a_line_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_LONGEST_LINE", 1 << 20)
    path = tmp_path / "p.txt"
    path.write_bytes(b"fine\n" + b"x" * (1 << 20) + b"\n")
    assert len(load_examples(path).examples) == 2
    path.write_bytes(b"fine\n" + b"x" * (2 << 20))
    assert "line 2 is longer than 1 MiB" in refusal(load_examples, path)


def test_a_pipe_is_read_as_far_as_it_is_needed(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    gone = threading.Event()

    def write_on():
        try:
            with pipe.open("wb") as file:
                while True:
                    file.write(b"a prompt\n" * 1000)
        except BrokenPipeError:
            gone.set()

    threading.Thread(target=write_on, daemon=True).start()
    dataset = load_examples(pipe, 2)
    assert (len(dataset.examples), dataset.more) == (2, None)
    assert gone.wait(10)


def test_lines_end_as_on_any_machine(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa\rb\r\nc\n\r\r\nd\r")
    assert [e.text for e in load_examples(tmp_path / "p.txt").examples] == list("abcd")


# GSM8K from the hub


def fake_datasets(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    module.disable_progress_bars = lambda: None
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_gsm8k_is_the_test_split(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return iter(ROWS)

    fake_datasets(monkeypatch, load)
    dataset = load_examples("gsm8k")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert dataset.name == "gsm8k"
    assert dataset.examples == load_examples("demo").examples
    assert dataset.sha256 == load_examples("demo").sha256


def test_gsm8k_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'hookdepth[gsm8k]'" in refusal(load_examples, "gsm8k")


@pytest.mark.parametrize("error", [ConnectionError("no route\nto the hub"), ValueError(), OSError(5, "x")])
def test_gsm8k_without_a_hub(monkeypatch, error):
    def load(*args, **options):
        raise error

    fake_datasets(monkeypatch, load)
    assert "cannot load openai/gsm8k" in refusal(load_examples, "gsm8k")


# Tokens


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_encode_adds_what_the_tokenizer_adds(kind):
    tokenizer = tiny_tokenizer(**kind)
    ids = encode(tokenizer, "the people of the town")
    assert ids == tokenizer("the people of the town")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == kind["bos"]


def test_encode_refuses_what_no_model_can_run_on(capfd):
    tokenizer = tiny_tokenizer(bos=True)
    text = "the people of the town"
    count = len(encode(tokenizer, text))
    assert len(encode(tokenizer, text, count)) == count
    assert f"has {count} tokens, the model takes {count - 1}" in refusal(encode, tokenizer, text, count - 1)
    assert "is empty" in refusal(encode, tokenizer, "")
    assert "only special" in refusal(encode, tokenizer, "</s><s>")
    assert "not Unicode" in refusal(encode, tokenizer, "\udc80")
    assert capfd.readouterr() == ("", "")


def test_readable_tokens():
    tokenizer = tiny_tokenizer()
    assert readable_tokens(tokenizer, encode(tokenizer, "he the\n")) == ("he", "_the", "\\n")
    assert readable_tokens(tiny_tokenizer("metaspace"), encode(tiny_tokenizer("metaspace"), " of"))[0] == "_of"


# Probes

BYTES = {chr(code): code for code in [*range(33, 127), *range(161, 173), *range(174, 256)]}
BYTES |= {chr(256 + n): code for n, code in enumerate(c for c in range(256) if chr(c) not in BYTES)}
# Spaces, words that the tiny tokenizer merges with the space before them, several bytes a character, an accent.
pieces = st.lists(
    st.sampled_from([" ", "\n", "\t", "the", "of", "Yoko", "7", "28", "é", "\u0301", "日", "😀", "x", ".", "\u00a0"]),
    min_size=1,
    max_size=6,
).map("".join)


def raw(tokenizer, ids):
    """The bytes that tokens of a byte-level tokenizer stand for, special ones left out."""
    tokens = tokenizer.convert_ids_to_tokens([i for i in ids if i not in tokenizer.all_special_ids])
    return bytes(BYTES[character] for token in tokens for character in token)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind["kind"] == "byte-level"], ids=str)
@given(prompt=pieces, answer=pieces)
@example(prompt="the people of ", answer="the town")
@example(prompt="a ", answer=" the")
@example(prompt="e", answer="\u0301")
def test_probe_is_aligned_to_the_byte_or_refused(kind, prompt, answer):
    assume(prompt.strip() and answer.strip())
    tokenizer = tiny_tokenizer(**kind)
    ids = tokenizer(prompt + answer)["input_ids"]
    seams = [k for k in range(1, len(ids)) if raw(tokenizer, ids[:k]) == prompt.encode()]
    if not seams:
        assert "merges the end of the prompt" in refusal(make_probe, tokenizer, prompt, answer)
        return
    probe = make_probe(tokenizer, prompt, answer)
    assert list(probe.token_ids) == ids
    assert len(probe.tokens) == len(ids)
    assert probe.answer_positions == tuple(range(seams[-1], len(ids)))
    assert raw(tokenizer, ids[seams[-1] :]) == answer.encode()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(prompt=pieces, answer=pieces)
def test_probe_positions_follow_each_other_up_to_the_end(kind, prompt, answer):
    tokenizer = tiny_tokenizer(**kind)
    probe = attempt(make_probe, tokenizer, prompt, answer)
    if isinstance(probe, HookdepthError):
        return
    first = probe.answer_positions[0]
    assert first >= 1 + kind["bos"]
    assert probe.answer_positions == tuple(range(first, len(probe.token_ids)))
    assert (probe.prompt, probe.answer) == (prompt, answer)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_merge_across_the_seam_is_refused_and_its_remedy_works(kind):
    tokenizer = tiny_tokenizer(**kind)
    said = refusal(make_probe, tokenizer, "the people of ", "the town")
    assert "the token '_the' merges" in said
    assert "end the prompt with 'the people of' and give the rest to the answer" in said
    probe = make_probe(tokenizer, "the people of", " the town")
    assert probe.tokens[probe.answer_positions[0]] == "_the"
    assert "split the text elsewhere" in refusal(make_probe, tokenizer, "h", "e")


def test_token_of_two_characters_broken_in_their_bytes():
    # Two bytes of the prompt's last character, then its third with the answer's first: one does end at the seam.
    with pytest.raises(HookdepthError, match="'b' merges the end of the prompt 'x日'"):
        data.tokens._locate([(0, 1), (1, 2), (1, 3)], ["x", "a", "b"], "x日", "本")


def test_special_tokens_at_the_end_are_no_part_of_the_answer():
    assert data.tokens._locate([(0, 0), (0, 1), (1, 2), (2, 3), (0, 0)], list("^abc$"), "a", "bc") == (2, 3)


@pytest.mark.parametrize("probe", DEFAULT_PROBES)
def test_default_probes_fit_a_byte_level_tokenizer(probe):
    found = make_probe(tiny_tokenizer(), *probe)
    assert raw(tiny_tokenizer(), [found.token_ids[p] for p in found.answer_positions]).decode() == probe[1]


@pytest.mark.demo
def test_default_probes_on_the_demo_tokenizer(demo_model):
    _, tokenizer = demo_model
    digits, spouse = (make_probe(tokenizer, *probe, max_tokens=2048) for probe in DEFAULT_PROBES)
    assert [digits.tokens[p] for p in digits.answer_positions] == ["2", "8"]
    assert [spouse.tokens[p] for p in spouse.answer_positions] == ["_Y", "oko", "_On", "o"]
    assert spouse.tokens[:3] == ("The", "_spouse", "_of")


def test_probes_that_ask_nothing():
    tokenizer = tiny_tokenizer(bos=True)
    assert "the probe's prompt is empty" in refusal(make_probe, tokenizer, "", "28")
    assert "the probe's answer is empty" in refusal(make_probe, tokenizer, "7 = ", " \n")
    assert "not Unicode" in refusal(make_probe, tokenizer, "7 = ", "\udcff")
    assert "the model takes 3" in refusal(make_probe, tokenizer, "5 + 7 = ", "12", 3)


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    assert "character offsets, which Slow does not give" in refusal(make_probe, Slow(), "a", " b")


# Cuts


@given(st.lists(st.integers(0, 300), max_size=12), st.integers(0, 5))
def test_cuts_are_the_notebooks(lengths, seed):
    random.seed(seed)
    expected = []
    for length in lengths:
        positions = list(range(8, length - 4, 8))
        random.shuffle(positions)
        expected.append(tuple(positions[:4]))
    random.seed(0)  # ours must not listen to the global generator
    cuts = sample_cuts(lengths, seed)
    assert cuts == expected
    assert all(len(set(own)) == len(own) <= 4 for own in cuts)
    assert all(8 <= t < length - 4 for own, length in zip(cuts, lengths, strict=True) for t in own)
    assert sample_cuts(lengths[:3], seed) == cuts[:3], "later prompts must not move the cuts of earlier ones"


def test_cuts_by_hand():
    assert sample_cuts([0, 12, 13, 20]) == [(), (), (8,), (8,)]
    assert sample_cuts([40, 12]) == [(24, 32, 16, 8), ()]
    assert sample_cuts([130]) == [(80, 32, 72, 48)]
    assert sample_cuts([130], per_prompt=2) == [(80, 32)]


def test_data_stands_on_errors_alone():
    foreign = set()
    for path in Path(data.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        foreign |= {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in foreign if not name.startswith("hookdepth.data.")} == {
        "hookdepth.errors",
        "hookdepth.model.hub",
    }

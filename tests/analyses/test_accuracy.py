"""layer-accuracy, against the answers that generation gives one by one."""

import json

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth import Branch, LayerPath, Skip, generate
from hookdepth.data import load_examples, questions_of
from hookdepth.data.questions import is_right
from hookdepth.errors import HookdepthError


@pytest.fixture(scope="module")
def model():
    return hookdepth.wrap(tiny_model("llama-gqa", max_position_embeddings=2048), tiny_tokenizer())


def written(folder, rows):
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" Paris.\nAnd so on", " Paris.", True),
        ("\n Paris", "Paris", True),
        (" Paris, France", "Paris", False),
        ("12 is one. The final answer is 1,024\nMore", "1024", True),
        ("The final answer is 7\n\nProblem: 3? The final answer is 3", "7", True),
        ("The final answer is", "7", False),
        ("7\nThe final answer is 8", "7", False),
        ("", "7", False),
        ("New York", "NewYork", True),
    ],
)
def test_when_an_answer_is_right(text, answer, right):
    assert is_right(text, answer) == right


def test_questions_are_asked_alone():
    tokenizer = tiny_tokenizer()
    gsm = questions_of(load_examples("demo", 2), tokenizer)
    assert [one.answer.strip() for one in gsm] == ["27", "300"]
    asked = tokenizer.decode(gsm[0].token_ids)
    assert asked.endswith("is the response to the problem.\n\n")
    assert "A bakery bakes" in asked
    assert gsm[0].most_tokens > 300
    facts = questions_of(load_examples("demo-facts", 1), tokenizer)
    assert (tokenizer.decode(facts[0].token_ids), facts[0].answer) == ("The capital of France is", " Paris.")
    assert len({one.text for one in load_examples("demo-facts").examples}) >= 50
    with pytest.raises(HookdepthError, match="row 1"):
        questions_of(hookdepth.data.texts_as_dataset(["no answer"]), tokenizer)


def test_accuracy_is_the_share_of_right_answers(model, tmp_path):
    prompts = ["Anna has 12 apples", "Imagine all the people: ", "5 + 7 = "]
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    runs = [*(Skip(layer, tokens=slice(0, None)) for layer in range(5)), LayerPath("0-2,1-4")]
    room = 8 + 10
    texts = generate(model, ids, runs, room)
    firsts = [next(iter(str(text).strip().splitlines()), "x") for text in texts.clean]
    rows = [{"prompt": prompt, "answer": first} for prompt, first in zip(prompts, firsts, strict=True)]
    rows[1]["answer"] = next(iter(str(texts[1][3]).strip().splitlines()), "x")  # of a branch, and not of the model
    found = hookdepth.analyse(
        model, "layer-accuracy", dataset=written(tmp_path, rows), paths=["0-2,1-4"], out=str(tmp_path / "out")
    )
    again = [generate(model, [one.token_ids], runs, one.most_tokens) for one in _questions(model, rows)]
    right = [[is_right(text, row["answer"]) for text in own[0]] for own, row in zip(again, rows, strict=True)]
    assert found["per_prompt.accuracy"].tolist() == [[float(one) for one in own] for own in right]
    assert found["accuracy"].tolist() == pytest.approx(torch.tensor(right).float().mean(0).tolist())
    assert found["accuracy"].shape == (6,)
    clean = [is_right(own.clean[0], row["answer"]) for own, row in zip(again, rows, strict=True)]
    assert found["clean_accuracy"].item() == pytest.approx(sum(clean) / 3)
    assert sum(clean) + sum(map(sum, right)) > 0
    assert [one["branches"] for one in found.metadata["answers"]] == [[str(text) for text in own[0]] for own in again]
    assert [one["clean"] for one in found.metadata["answers"]] == [str(own.clean[0]) for own in again]
    low, high = found["accuracy_interval"][0].tolist()
    assert 0 <= low <= found["accuracy"][0] <= high <= 1
    (axes,) = found.plot("accuracy").axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2", "3", "4", "0-2,1-4"]
    report = (tmp_path / "out").iterdir()
    assert "layer-accuracy.safetensors" in {path.name for path in report}


def _questions(model, rows):
    examples = tuple(
        hookdepth.data.Example(row["prompt"] + row["answer"], row["prompt"], row["answer"]) for row in rows
    )
    return questions_of(hookdepth.data.Dataset("mine", examples), model.tokenizer)


def test_what_cannot_be_asked_is_refused(model, tmp_path):
    rows = [{"prompt": "Anna has 12 apples", "answer": "9"}]
    for options, named in (({"keep_front": 500}, "keep-front"), ({"paths": ["0-9"]}, "layer 9"), ({"keep": 3}, "keep")):
        with pytest.raises(HookdepthError, match=named):
            hookdepth.analyse(model, "layer-accuracy", dataset=written(tmp_path, rows), **options)
    with pytest.raises(HookdepthError, match="answer"):
        hookdepth.analyse(model, "layer-accuracy", dataset=written(tmp_path, [{"prompt": "Anna"}]))
    assert Branch((Skip(1),)).prompt == 0

"""depth-by-level against a plain pass for each skip, and what the authors' code gets wrong."""

import csv
import json
import math

import naive
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from test_against_naive import close, results_of
from tiny_models import prompts, tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth.analyses import Inputs
from hookdepth.analyses.levels import DepthByLevel
from hookdepth.cli import main
from hookdepth.data import Leveled, Probe
from hookdepth.errors import HookdepthError
from hookdepth.report.figures import pictures_of
from hookdepth.results import Result

# level, length, answer positions, cuts
EXAMPLES = ((1, 14, range(9, 14), (9, 13)), (1, 11, range(8, 11), (8,)), ("hard", 16, range(8, 16), (12, 8)))


def inputs_of():
    ids = prompts(3, [length for _, length, _, _ in EXAMPLES])
    leveled = [
        Leveled(level, Probe("", "", tuple(own), tuple(map(str, own)), tuple(answer)), cuts)
        for own, (level, _, answer, cuts) in zip(ids, EXAMPLES, strict=True)
    ]
    return Inputs((), levels=tuple(leveled))


def score(per_layer):
    return sum(layer * value for layer, value in enumerate(per_layer)) / sum(per_layer)


def score_of_effect(effect):
    n = len(effect)
    return score([sum(row.tolist()) / max(1, n - 1 - layer) for layer, row in enumerate(effect)])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("cut", ["answer", "question"])
def test_against_a_plain_pass_for_each_skip(family, cut):
    hf = tiny_model(family)
    inputs = inputs_of()
    ours = results_of(["depth-by-level"], hookdepth.wrap(hf), inputs, cut=cut)["depth-by-level"]
    by_level = {"1": [], "hard": []}
    for one in inputs.levels:
        found = [naive.skip(hf, one.probe.token_ids, "layer", at - (cut == "question")) for at in one.cuts]
        effect = torch.stack([effect for effect, _ in found]).amax(0)
        output = torch.stack([output for _, output in found]).amax(0)
        by_level[str(one.level)].append((effect, output))
    for place, (level, own) in enumerate(by_level.items()):
        effects, outputs = (torch.stack(values) for values in zip(*own, strict=True))
        for how, reduce in (("max", lambda v: v.amax(0)), ("mean", lambda v: v.mean(0))):
            close(ours[f"{level}.effect.{how}"], reduce(effects))
            close(ours[f"{level}.output.{how}"], reduce(outputs))
            close(ours[f"per_prompt.{level}.effect.{how}"], effects)
            expected = {"layer": score_of_effect(reduce(effects)), "output": score(reduce(outputs).tolist())}
            for kind, value in expected.items():
                assert ours[f"score.{kind}.{how}"][place].item() == pytest.approx(value, rel=1e-4)
                low, high = ours[f"score_interval.{kind}.{how}"][place].tolist()
                if len(own) == 1:  # nothing to draw from but the one
                    assert math.isnan(low)
                    assert math.isnan(high)
                else:
                    assert low <= high
                if how == "mean" and len(own) > 1:
                    assert low - 1e-6 <= value <= high + 1e-6


def test_an_interval_is_that_of_all_samples_where_they_can_be_counted():
    """Of two examples three samples are possible, with probability 1/4, 1/2, 1/4: both ends are those of one alone."""
    ours = results_of(["depth-by-level"], hookdepth.wrap(tiny_model("llama")), inputs_of())["depth-by-level"]
    alone = sorted(score(one.tolist()) for one in ours["per_prompt.1.output.mean"])
    assert ours["score_interval.output.mean"][0].tolist() == pytest.approx(alone, rel=1e-5)


def level_rows(tmp_path):
    """Level 2 has two examples, the others one."""
    rows = (
        ("Anna has 12 apples and eats 3 of them, so she has", " 12 - 3 = 9 apples", 1),
        ("The spouse of the performer of Imagine is", " Yoko Ono", 2),
        ("The people of the town and", " the town itself", 2),
        ("Imagine all the people of the town and", " the basket", "hard"),
    )
    lines = [json.dumps({"prompt": prompt, "answer": answer, "level": level}) for prompt, answer, level in rows]
    path = tmp_path / "levels.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_a_single_example_has_no_interval_and_each_figure_says_its_own_number(tmp_path):
    model = hookdepth.wrap(tiny_model("llama", num_hidden_layers=3), tiny_tokenizer())
    result = hookdepth.analyse(model, "depth-by-level", dataset=level_rows(tmp_path), limit=2)
    pictures = {one.name: one for _, some in pictures_of(result, DepthByLevel()) for one in some}
    score = pictures["depth-by-level-score"]
    drawn = [one for one in score.draw().axes[0].collections if isinstance(one, LineCollection)]
    assert len(drawn) == 2, "one a series: the whiskers of all levels"
    for whiskers in drawn:
        ends = [own for own in whiskers.get_segments() if len(own)]
        assert len(ends) == 1, "of level 2 alone"
        assert np.ptp(ends[0][:, 1]) > 0
    assert "4 prompts" in score.said
    assert "interval over the examples of a level" in score.said
    assert "not finite" not in score.said, "no interval is no missing value"
    said = {level: pictures[f"depth-by-level-{level}-effect-max"].said for level in ("1", "2", "hard")}
    assert {level: text.split(".")[0] for level, text in said.items()} == {
        "1": "1 prompt",
        "2": "2 prompts",
        "hard": "1 prompt",
    }
    alone = hookdepth.analyse(model, "depth-by-level", dataset=level_rows(tmp_path), limit=1)
    assert alone["score_interval.layer.max"].isnan().all()
    assert "hiskers" not in pictures_of(alone, DepthByLevel())[0][1][0].said


def test_the_summary_has_the_score_of_each_level_as_a_share_of_the_layers():
    result = Result(
        "depth-by-level",
        results_of(["depth-by-level"], hookdepth.wrap(tiny_model("llama")), inputs_of())["depth-by-level"],
    )
    n_layers = result["1.effect.max"].shape[0]
    assert "score_by_level" not in DepthByLevel().numbers(result), "nothing says what the levels are called"
    result.metadata["labels"] = {
        "level": [str(level) for level in dict.fromkeys(one.level for one in inputs_of().levels)]
    }
    told = DepthByLevel().numbers(result)["score_by_level"]
    assert list(told) == result.metadata["labels"]["level"]
    assert list(told.values()) == pytest.approx([(score.item() + 1) / n_layers for score in result["score.layer.max"]])
    assert all(0 < share <= 1 for share in told.values())


def test_a_table_of_values_has_the_names_of_the_levels(tmp_path):
    model = hookdepth.wrap(tiny_model("llama", num_hidden_layers=3), tiny_tokenizer())
    out = tmp_path / "out"
    hookdepth.analyse(model, "depth-by-level", dataset=level_rows(tmp_path), limit=2, out=str(out))
    assert main(["export", str(out / "depth-by-level.safetensors"), "--to", "csv"]) == 0
    with open(out / "depth-by-level.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["tensor"] == "score_interval.layer.max"]
    assert [row["level_label"] for row in rows] == ["1", "1", "2", "2", "hard", "hard"]
    assert [row["end_label"] for row in rows] == ["lower", "upper"] * 3


def test_the_first_answer_tokens_prediction_is_measured_with_cut_question_only():
    """What predicts the first answer token is the last token before it, which a cut at the answer leaves out."""
    hf = tiny_model("llama")
    model, ids = hookdepth.wrap(hf), prompts(1, 12)[0]
    probe = Probe("", "", tuple(ids), tuple(map(str, ids)), (11,))
    inputs = Inputs((), levels=(Leveled(1, probe, (11,)),))
    by_cut = {
        cut: results_of(["depth-by-level"], model, inputs, cut=cut)["depth-by-level"] for cut in ("answer", "question")
    }
    clean = naive.run_with(hf, ids).logits[0, 10]
    moved = []
    for layer in range(model.n_layers):
        states = naive.run_with(hf, ids).resid_pre[layer][:, 1:10]
        changed = naive.run_with(hf, ids, [("resid_post", layer, naive.overwrite(slice(1, 10), states))]).logits[0, 10]
        moved.append((clean.softmax(-1) - changed.softmax(-1)).norm().item())
    assert all(got >= want - 1e-5 for got, want in zip(by_cut["question"]["1.output.max"].tolist(), moved, strict=True))
    assert not torch.allclose(by_cut["answer"]["1.output.max"], by_cut["question"]["1.output.max"], rtol=1e-2)


def test_a_prompt_that_leaves_nothing_to_change_is_refused():
    ids = prompts(1, 6)[0]
    one = Leveled(1, Probe("a prompt", "", tuple(ids), tuple(map(str, ids)), (2, 3)), (2,))
    model = hookdepth.wrap(tiny_model("llama"))
    with pytest.raises(HookdepthError, match="leaves nothing before its answer"):
        results_of(["depth-by-level"], model, Inputs((), levels=(one,)), cut="question")


def test_from_the_data_set_to_the_file(tmp_path):
    model = hookdepth.wrap(tiny_model("llama"), tiny_tokenizer())
    result = hookdepth.analyse(model, "depth-by-level", dataset="demo-levels", limit=2, out=str(tmp_path / "out"))
    assert result["score.layer.max"].shape == (5,)
    assert result["score_interval.output.mean"].shape == (5, 2)
    assert result["per_prompt.3.effect.max"].shape == (2, 5, 5)
    assert len(result.metadata["settings"]["levels"]) == 10
    assert result.metadata["data"]["n_prompts"] == 10
    figures = hookdepth.plot(result)
    assert "depth-by-level-score" in figures
    ticks = [text.get_text() for text in figures["depth-by-level-score"].axes[0].get_xticklabels()]
    assert ticks == ["1", "2", "3", "4", "5"]
    # Titles and labels of the two effects are not exchanged.
    assert figures["depth-by-level-2-effect-max"].axes[0].get_ylabel() == "Layer skipped"
    assert figures["depth-by-level-2-output-max"].axes[0].get_ylabel() == "Output change norm"
    again = Result.load(tmp_path / "out" / "depth-by-level.safetensors")
    assert all(torch.equal(again[name], value) for name, value in result.tensors.items())
    assert not any(math.isnan(value) for value in result["score.output.max"].tolist())


def test_a_data_set_without_levels_is_refused(tmp_path, capsys):
    assert main(["run", "--analyses", "depth-by-level", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "row 1 of 'demo" in said
    assert "demo-levels" in said

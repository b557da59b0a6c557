"""What `hookdepth.run` is given: nonsense ends in one line before anything runs, and never in a number."""

import numpy as np
import pytest
import torch
from tiny_models import prompts, tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth import (
    Ablate,
    AddVector,
    Branch,
    Clamp,
    Custom,
    HookdepthError,
    Identity,
    Intervention,
    LayerEffect,
    LayerMeasurement,
    LogitDifference,
    OutputEffect,
    OutputMeasurement,
    Patch,
    Scale,
    Skip,
    Subtract,
)
from hookdepth.engine.passes import measure
from hookdepth.engine.reading import capture
from hookdepth.errors import whole_number

L, D = 5, 64
IDS = prompts(1, 12)[0]
VECTOR = torch.ones(D)
NAN = float("nan")


@pytest.fixture(scope="module")
def model():
    return hookdepth.wrap(tiny_model("llama"), tiny_tokenizer(bos=True), name="tiny")


@pytest.fixture
def never_runs(model, monkeypatch):
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("something ran"))


class Named(OutputMeasurement):
    def __init__(self, name="named", **attributes):
        self.name = name
        vars(self).update(attributes)

    def values(self, view):
        return view.logits[..., 0].float()


class NoName(LayerMeasurement):
    def values(self, view):
        return view.resid_post[..., 0]


class NoValues(OutputMeasurement):
    name = "none"


class OwnInit(Intervention):
    """Goes round the base's checks when it is made."""

    def __init__(self, layer, tokens=slice(None)):
        object.__setattr__(self, "site", "mlp_out")
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "tokens", tokens)


MADE = {
    "a layer between two": (lambda: Skip(1.5), "Skip: the layer is 1.5; give a whole number"),
    "a whole float": (lambda: Skip(1.0), "the layer is 1.0"),
    "a layer in words": (lambda: Skip("1"), "the layer is '1'"),
    "no layer": (lambda: Scale("mlp_out", None, 2.0), "Scale: the layer is None"),
    "a bool": (lambda: Identity("mlp_out", True), "the layer is True"),
    "a bool of numpy": (lambda: Skip(np.True_), "the layer is"),
    "a bool of torch": (lambda: Skip(torch.tensor(True)), "the layer is tensor(True)"),
    "a float tensor": (lambda: Skip(torch.tensor(1.0)), "the layer is tensor(1.)"),
    "a list of layers": (lambda: Skip([1]), "the layer is [1]"),
    "a tensor of layers": (lambda: Skip(torch.tensor([1])), "the layer is an array of shape [1]"),
    "a layer without data": (lambda: Skip(torch.tensor(1, device="meta")), "the layer is tensor("),
    "a source between two": (lambda: Subtract(0.5, 2), "Subtract: the source is 0.5"),
    "a source that is a bool": (lambda: Subtract(False, 2), "Subtract: the source is False"),
    "no part": (lambda: Skip(1, None), "unknown part None; use one of layer, attn, mlp"),
    "a site that is a number": (lambda: Patch(3, 1, VECTOR), "unknown site 3; use one of resid_pre"),
    "a token between two": (lambda: Skip(1, tokens=[1.5]), "Skip: one of the tokens is 1.5"),
    "a mask": (lambda: Skip(1, tokens=[True, False]), "one of the tokens is True"),
    "a token in words": (lambda: Skip(1, tokens="12"), "tokens are '12'; give a slice or a list"),
    "one token alone": (lambda: Patch("mlp_out", 1, VECTOR, 3), "Patch: tokens are 3; give a slice or a list"),
    "no tokens": (lambda: Skip(1, tokens=None), "tokens are None"),
    "a slice of floats": (lambda: Skip(1, tokens=slice(1.5, None)), "the slice's start is 1.5"),
    "a slice that stands still": (lambda: Skip(1, tokens=slice(0, 5, 0)), "a slice with the step 0"),
    "a list to patch with": (lambda: Patch("mlp_out", 1, [1.0] * D), "Patch got [1.0, 1.0,"),
    "a number to patch with": (lambda: Patch("mlp_out", 1, 0.0), "Patch got 0.0 for a value"),
    "an array to add": (lambda: AddVector("mlp_out", 1, np.ones(D)), "AddVector got an array of shape [64]"),
    "no data": (lambda: Patch("mlp_out", 1, VECTOR.to("meta")), "on the meta device"),
    "complex numbers": (lambda: Patch("mlp_out", 1, VECTOR.to(torch.complex64)), "dtype torch.complex64"),
    "a complex sum": (lambda: AddVector("mlp_out", 1, 1j * VECTOR), "dtype torch.complex64"),
    "truth values": (lambda: Patch("mlp_out", 1, VECTOR > 0), "dtype torch.bool"),
    "no factor": (lambda: Scale("mlp_out", 1, None), "Scale: the factor is None"),
    "a factor that is no number": (lambda: Scale("mlp_out", 1, NAN), "Scale: the factor is nan"),
    "an infinite factor": (lambda: Scale("mlp_out", 1, float("inf")), "the factor is inf"),
    "a tensor that is no number": (lambda: Scale("mlp_out", 1, torch.tensor(NAN)), "the factor is tensor(nan)"),
    "a factor in words": (lambda: Scale("mlp_out", 1, "2"), "the factor is '2'"),
    "a bool for a factor": (lambda: Scale("mlp_out", 1, True), "the factor is True"),
    "factors in a list": (lambda: Scale("mlp_out", 1, [1.0]), "the factor is [1.0]"),
    "complex factors": (lambda: Scale("mlp_out", 1, 1j * VECTOR), "dtype torch.complex64"),
    "no tuple": (lambda: Branch(Skip(1)), "a branch of Skip("),
    "words": (lambda: Branch("skip"), "a branch of 'skip'"),
    "a class": (lambda: Branch((Skip,)), "a branch has the class Skip for an intervention"),
    "a number": (lambda: Branch((3,)), "a branch has 3 for an intervention"),
    "half a prompt": (lambda: Branch((Skip(1),), prompt=0.5), "a branch's prompt is 0.5"),
    "a bool for a prompt": (lambda: Branch((Skip(1),), prompt=False), "a branch's prompt is False"),
    "a prompt from the end": (lambda: Branch((Skip(1),), prompt=-1), "a branch's prompt is -1"),
    "half a cut": (lambda: Branch((Skip(1),), cut=2.5), "a branch's cut is 2.5"),
    "a bool for a cut": (lambda: Branch((Skip(1),), cut=True), "a branch's cut is True"),
    "half a last layer": (lambda: Branch((Skip(1),), until=3.5), "a branch's until is 3.5"),
    "a bool for a last layer": (lambda: Branch((Skip(0),), until=True), "a branch's until is True"),
    "measured at a number": (lambda: Branch((Skip(1),), measured=-1), "where a branch is measured: tokens are -1"),
    "measured at fractions": (lambda: Branch((Skip(1),), measured=[0.5]), "one of the tokens is 0.5"),
    "the same token twice": (lambda: LogitDifference(0, 0), "LogitDifference of 0 and itself"),
    "the same word twice": (lambda: LogitDifference(" a", " a"), "LogitDifference of ' a' and itself"),
    "a token id between two": (lambda: LogitDifference(0.5, 1), "a token id is 0.5"),
    "a bool for a token": (lambda: LogitDifference(True, 3), "a token id is True"),
    "a negative token id": (lambda: LogitDifference(-1, 3), "a token id is -1; give a whole number of at least 0"),
    "no token": (lambda: LogitDifference(None, 3), "a token id is None"),
    "the middle": (lambda: LogitDifference(0, 1, reduce="median"), "unknown reduction 'median'"),
    "no function": (lambda: Custom("x", None), "Custom got None; give a function"),
    "a function's reduction": (lambda: Custom("x", len, "maximum"), "unknown reduction 'maximum'; did you mean max?"),
}


def one_line(caught, says):
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.remedy
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("case", MADE)
def test_what_can_fit_no_model_is_refused_where_it_is_made(case):
    make, says = MADE[case]
    with pytest.raises(HookdepthError) as caught:
        make()
    one_line(caught, says)


def given(**changed):
    def call(model):
        arguments = {"prompts": [IDS], "branches": [Branch((Skip(1),))], "measurements": [OutputEffect()], **changed}
        return measure(model, **arguments)

    return call


def with_one(intervention):
    return given(branches=[Branch((intervention,))])


RUN = {
    "no adapter": (lambda model: given()(model.hf), "the model is LlamaForCausalLM("),
    "bytes": (given(prompts=b"a text"), "the prompts are b'a text'; give a text, texts, or lists of token ids"),
    "a list of bytes": (given(prompts=[b"a text"]), "prompt 0 is b'a text'"),
    "no prompts": (given(prompts=None), "the prompts are None"),
    "three axes": (given(prompts=torch.ones(1, 1, 5).long()), "the prompts are an array of shape [1, 1, 5]"),
    "a prompt of two": (
        given(prompts=[torch.tensor([IDS])]),
        "prompt 0 is an array of shape [1, 12]; give a text or a flat list",
    ),
    "a prompt of one row": (given(prompts=[[IDS]]), "prompt 0 has the token id ["),
    "a prompt of none": (given(prompts=[torch.tensor(3), IDS]), "prompt 0 is tensor(3)"),
    "a mask for a prompt": (given(prompts=[[True, False]]), "prompt 0 holds bools"),
    "floats": (given(prompts=torch.ones(5)), "prompt 0 has the token id 1.0"),
    "a class for a branch": (given(branches=Skip), "the branches are the class Skip"),
    "a tuple": (given(branches=[(Skip(1),)]), "where a branch is meant; give instances"),
    "a class of branches": (given(branches=[Branch]), "the class Branch where a branch is meant"),
    "words for branches": (given(branches="skip"), "the branches are 'skip'"),
    "no branches": (given(branches=None), "the branches are None"),
    "a class of measurements": (given(measurements=[OutputEffect]), "the class OutputEffect where a measurement is"),
    "a class for a measurement": (given(measurements=OutputEffect), "the measurements are the class OutputEffect"),
    "a word": (given(measurements="output"), "the measurements are 'output'"),
    "words": (given(measurements=["output"]), "'output' where a measurement is meant"),
    "two of one name": (given(measurements=[OutputEffect(), OutputEffect()]), "2 measurements are called 'output'"),
    "two kinds of one name": (
        given(measurements=[LayerEffect(), Named("effect")]),
        "2 measurements are called 'effect'; give each its own name",
    ),
    "no name": (given(measurements=[NoName()]), "the measurement NoName has the name None"),
    "a name that is a number": (given(measurements=[Named(3)]), "the measurement Named has the name 3"),
    "nothing to measure": (given(measurements=[NoValues()]), "NoValues says nothing to measure; define values(view)"),
    "the middle": (
        given(measurements=[Named(reduce="median")]),
        "of the measurement 'named': 'median'; did you mean mean? (max, min, mean, sum)",
    ),
    "no such reduction": (given(measurements=[Named(reduce=3)]), "of the measurement 'named': 3; use one of max, min"),
    "perhaps a change": (given(measurements=[Named(change=0.5)]), "'named' has change = 0.5"),
    "perhaps a target": (given(measurements=[Named(needs_target=None)]), "'named' has needs_target = None"),
    "no rows": (given(max_rows=0), "max_rows is 0; give a whole number of at least 3"),
    "fewer than no rows": (given(max_rows=-5), "max_rows is -5"),
    "rows for half a branch": (given(max_rows=2), "max_rows is 2"),
    "half a row": (given(max_rows=7.5), "max_rows is 7.5"),
    "no tokens": (given(max_row_tokens=0), "max_row_tokens is 0"),
    "fewer than no tokens": (given(max_row_tokens=-1), "max_row_tokens is -1"),
    "an id past the vocabulary": (
        given(measurements=[LogitDifference(0, 300)]),
        "a token of 'tiny' is 300; give a whole number from 0 to 299",
    ),
    "a token twice": (
        with_one(AddVector("mlp_out", 1, VECTOR, [2, 2])),
        "token 2 of a prompt of 12 tokens is named 2 times (2, 2); name each token once",
    ),
    "a token from both ends": (with_one(Skip(1, tokens=[11, -1])), "token 11 of a prompt of 12 tokens is named 2"),
    "measured twice": (given(branches=[Branch((Skip(1),), measured=[3, 3])]), "token 3 of a prompt of 12 tokens is"),
    "a narrow factor": (with_one(Scale("mlp_out", 1, torch.ones(D - 1))), "Scale got a value of shape [63] for 12"),
    "a factor for each token": (with_one(Scale("mlp_out", 1, torch.ones(12, 1))), "of shape [12, 1] for 12 tokens"),
    "factors for other tokens": (with_one(Scale("mlp_out", 1, torch.ones(2, D), [1])), "of shape [2, 64] for 1 tokens"),
    "a number in a tensor": (with_one(Patch("mlp_out", 1, torch.tensor(1.0))), "of shape [] for 12 tokens"),
    "a sparse value": (lambda model: Patch("mlp_out", 1, VECTOR.to_sparse()), "Patch got a sparse or quantised tensor"),
    "more than a float32": (with_one(Clamp("neurons", 1, 3, 1e39)), "Clamp to 1e+39, which float32 does not reach"),
    "set to more than that": (with_one(Ablate("z", 1, value=-1e39)), "Ablate to -1e+39, which float32 does not reach"),
    "no prompt": (given(prompts=[]), "there are no prompts"),
    "a clean run's name": (given(measurements=[Named("clean.kl")]), "the measurement Named has the name 'clean.kl'"),
    "a prompt's name": (given(measurements=[Named("per_prompt.kl")]), "that does not begin with clean. or per_prompt."),
    "a path for a name": (given(measurements=[Named("a/b")]), "the measurement Named has the name 'a/b'"),
    "a blank name": (given(measurements=[Named(" ")]), "the measurement Named has the name ' '"),
    "round the checks": (with_one(OwnInit(1.5)), "OwnInit: the layer is 1.5"),
    "round the tokens": (with_one(OwnInit(1, [0.5])), "OwnInit: one of the tokens is 0.5"),
    "layers to read": (lambda model: capture(model, "mlp_out", layers=[1.5]).__enter__(), "a layer to capture is 1.5"),
    "a layer to read": (lambda model: capture(model, "mlp_out", layers=3).__enter__(), "the layers are 3"),
    "a site to read": (lambda model: capture(model, 3).__enter__(), "unknown site 3"),
}


@pytest.mark.parametrize("case", RUN)
def test_what_does_not_fit_is_refused_before_anything_runs(model, never_runs, case):
    call, says = RUN[case]
    with pytest.raises(HookdepthError) as caught:
        call(model)
    one_line(caught, says)


SHAPES = {
    "for the whole pass": (lambda view: torch.tensor(1.0), "gave values of shape []"),
    "for each row": (lambda view: view.logits[:, 0, 0], "gave values of shape [3]"),
    "for each token": (lambda view: view.logits[0, :, 0], "gave values of shape [12]"),
    "for each token of one row": (lambda view: view.logits[:1, :, 0], "gave values of shape [1, 12]"),
    "for each word": (lambda view: view.logits, "gave values of shape [3, 12, 300]"),
    "the wrong way round": (lambda view: view.logits[..., 0].T, "gave values of shape [12, 3]"),
    "in a list": (lambda view: view.logits[..., 0].tolist(), "for its values"),
    "nothing": (lambda view: None, "gave None for its values"),
    "complex": (lambda view: view.logits[..., 0] * 1j, "gave values of dtype torch.complex64"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_measurements_give_a_number_a_row_and_token(model, case):
    function, says = SHAPES[case]
    with pytest.raises(HookdepthError) as caught:
        given(measurements=[Custom("mine", function)])(model)
    one_line(caught, "the measurement 'mine' " + says if says[0] == "g" else says)
    assert "a tensor of shape [3, 12] here" in caught.value.remedy

    class OfLayers(LayerMeasurement):
        name = "deep"

        def values(self, view):
            return view.resid_post.norm(dim=-1)[:, :-1]

    with pytest.raises(HookdepthError, match=r"'deep' gave values of shape \[.*shape \[\d, 12\] here"):
        given(measurements=[OfLayers()])(model)


def test_what_is_right_is_taken_in_any_kind_of_number(model):
    """Integers of other libraries are integers, and truth values can be counted."""
    one, likely = np.int64(1), Custom("likely", lambda view: view.probabilities[..., 5] > 1 / 300, "mean")
    plain = given(branches=[Branch((Skip(1, tokens=[1, 5]),), cut=7, measured=[8, -1])])(model)
    for branch in (
        Branch([Skip(one, tokens=np.array([1, 5]))], prompt=np.int32(0), cut=np.int64(7), measured=np.array([8, 11])),
        Branch((Skip(torch.tensor(1), tokens=torch.tensor([1, 5])),), cut=torch.tensor(7), measured=(8, -1)),
    ):
        again = given(branches=(branch,), measurements=(OutputEffect(), likely), max_rows=np.int64(3))(model)
        assert torch.equal(again.output["output"], plain.output["output"])
        assert again.output["likely"].item() in (0, 0.5, 1)


def test_one_prompt_alone_is_a_list_of_one(model):
    expected = given()(model).output["output"]
    for prompt in (IDS, tuple(IDS), torch.tensor(IDS), torch.tensor([IDS]), [torch.tensor(IDS)], np.array([IDS])):
        assert torch.equal(given(prompts=prompt)(model).output["output"], expected)


def test_factors_may_be_tensors(model):
    """A factor a coordinate, or one for each of the tokens, in passes that begin anywhere."""
    factor = torch.linspace(0, 2, 2 * D).view(2, D)
    branches = [Branch((Scale("resid_pre", 2, f, [9, 10]),), measured=[-1]) for f in (factor, factor[0], 0.5)]
    results = given(branches=branches)(model)
    with model.evaluating():
        with capture(model, "resid_pre", layers=[2]) as acts:
            model.forward(torch.tensor([IDS]))
        here = acts["resid_pre", 2][0, [9, 10]]
    patches = [Branch((Patch("resid_pre", 2, here * f, [9, 10]),), measured=[-1]) for f in (factor, factor[0], 0.5)]
    torch.testing.assert_close(results.output["output"], given(branches=patches)(model).output["output"])
    assert results.output["output"].min() > 1e-3


# Words.


def score(model, *tokens):
    return given(measurements=[LogitDifference(*tokens)])(model).output["logit_difference"].item()


def test_words_are_their_own_token_and_not_the_one_in_front_of_every_text(model):
    tokenizer = model.tokenizer
    assert tokenizer(" a")["input_ids"][0] == tokenizer(" the")["input_ids"][0] == tokenizer.bos_token_id
    a, the = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" a", " the"))
    assert len(a) == len(the) == 1
    expected = score(model, a[0], the[0])
    assert abs(expected) > 1e-3
    assert score(model, " a", " the") == score(model, " a", the[0]) == score(model, np.int64(a[0]), " the") == expected


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (
            (" spouses", " the"),
            "the word ' spouses' is 6 tokens: ' s', 'p', 'o', 'u', 'se', 's'; give one that is a single token",
        ),
        (("", " the"), "the word '' is 0 tokens"),
    ],
)
def test_words_of_several_tokens_are_refused_and_taken_apart(model, never_runs, tokens, says):
    with pytest.raises(HookdepthError) as caught:
        score(model, *tokens)
    one_line(caught, says)


def test_a_word_and_its_own_id_are_one_token(model, never_runs):
    (a,) = model.tokenizer(" a", add_special_tokens=False)["input_ids"]
    with pytest.raises(HookdepthError, match="and itself is 0 everywhere"):
        score(model, " a", a)


def test_unknown_words_are_refused(never_runs):
    model = hookdepth.wrap(tiny_model("llama"), tiny_tokenizer("metaspace", bos=True), name="tiny")
    with pytest.raises(HookdepthError, match="the tokenizer of 'tiny' does not know 'é'"):
        score(model, "é", "a")


def test_words_need_a_tokenizer_that_fits():
    with pytest.raises(HookdepthError, match="the word ' a' for a model without a tokenizer"):
        score(hookdepth.wrap(tiny_model("llama")), " a", " the")
    with pytest.raises(HookdepthError, match="call bind"):
        LogitDifference(" a", " the").values(None)


def test_a_measurement_of_ones_own_is_bound_too(model):
    class Share(OutputMeasurement):
        name, reduce = "share", "mean"

        def bind(self, model):
            bound = Share()
            bound.vocab = model.config.vocab_size
            return bound

        def values(self, view):
            return torch.full(view.logits.shape[:2], 1 / self.vocab)

    assert given(measurements=[Share()])(model).output["share"].item() == pytest.approx(1 / 300)


def test_whole_numbers():
    assert [whole_number("x", n) for n in (3, np.int8(3), torch.tensor(3), np.array(3))] == [3] * 4
    assert type(whole_number("x", np.int64(3))) is int
    for low, high, says in ((4, None, "at least 4"), (4, 9, "from 4 to 9")):
        with pytest.raises(HookdepthError, match=f"x is 3; give a whole number .*{says}"):
            whole_number("x", 3, low, high)

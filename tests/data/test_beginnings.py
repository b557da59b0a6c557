"""A text never begins with BOS twice without a word."""

import pytest
from tiny_models import tiny_model
from tiny_tokenizer import BOS, tiny_tokenizer

import hookdepth
from hookdepth.data import encode, make_probe
from hookdepth.errors import HookdepthError

ADDS, ADDS_NONE = tiny_tokenizer(bos=True), tiny_tokenizer()
MODEL = hookdepth.wrap(tiny_model("llama"), ADDS, name="tiny")


@pytest.mark.parametrize(
    "make",
    [
        MODEL.ids,
        lambda text: encode(ADDS, text),
        lambda text: make_probe(ADDS, text, " 4"),
        lambda text: hookdepth.run(MODEL, text, hookdepth.Skip(1)),
        lambda text: hookdepth.generate(MODEL, text, max_new_tokens=1),
    ],
    ids=["ids", "encode", "probe", "run", "generate"],
)
def test_a_text_that_brings_its_own_bos_is_refused(make):
    with pytest.raises(HookdepthError, match="puts another before it"):
        make(f"{BOS}2 + 2 =")
    make("2 + 2 =")


def test_bos_may_stand_where_the_tokenizer_adds_none_or_where_it_is_meant():
    bos = ADDS.bos_token_id
    assert encode(ADDS_NONE, f"{BOS}2 + 2 =")[0] == bos != encode(ADDS_NONE, f"{BOS}2 + 2 =")[1]
    assert encode(ADDS, f"{BOS}{BOS}2 + 2 =")[:3] == [bos, bos, bos]

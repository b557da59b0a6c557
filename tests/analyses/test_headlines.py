"""What help says of the analyses, without importing them: `hookdepth.analyses.headlines`."""

from hookdepth.analyses.headlines import questions
from hookdepth.analyses.registry import known


def test_the_source_says_what_the_classes_say():
    declared = {name: kind.question for name, kind in known().items()}
    assert list(questions().items()) == list(declared.items()), "the same, in the same order"

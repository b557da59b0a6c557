"""What the analyses run on: data sets, tokens, probes, cuts.

dataset = load_examples("demo")                      # or gsm8k, or a .jsonl or text file
ids = encode(tokenizer, dataset.examples[0].text)    # [T]
probe = make_probe(tokenizer, *DEFAULT_PROBES[0])    # tokens, and which of them are the answer
cuts = sample_cuts([len(ids)])                       # [(80, 32, 72, 48)] for 130 tokens
"""

from hookdepth.data.examples import NAMES, Dataset, Example, load_examples, texts_as_dataset
from hookdepth.data.levels import Leveled, leveled_examples
from hookdepth.data.questions import Question, questions_of
from hookdepth.data.tokens import DEFAULT_PROBES, Probe, encode, make_probe, readable_tokens, sample_cuts

__all__ = [
    "DEFAULT_PROBES",
    "NAMES",
    "Dataset",
    "Example",
    "Leveled",
    "Probe",
    "Question",
    "encode",
    "leveled_examples",
    "load_examples",
    "make_probe",
    "questions_of",
    "readable_tokens",
    "sample_cuts",
    "texts_as_dataset",
]

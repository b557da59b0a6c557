"""A tokenizer small enough to train in a test: no download, the same every time.

    tokenizer = tiny_tokenizer()               # byte-level BPE as SmolLM, Llama 3 and Qwen have it
    tokenizer = tiny_tokenizer("metaspace")    # spaces as ▁, as Llama 2 and Gemma have them

At most 300 tokens. `<s>` is id 0, put in front of every text where `bos` says so.
"""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
CORPUS = [
    "The spouse of the performer of Imagine is Yoko Ono",
    "Given the following problem, reason and give a final answer to the problem.",
    "Anna has 12 apples and eats 3 of them, so she has 12 - 3 = 9 apples and a full basket.",
    "Imagine all the people: the people of the town, and the town itself.\n5 + 7 + 5 + 3 + 1 + 7 = 28\n",
]


@cache
def tiny_tokenizer(kind="byte-level", bos=False, trim_offsets=False):
    """`tiny_tokenizer()("a text")["input_ids"]`: at most 300 ids; `trim_offsets` leaves spaces out of offsets."""
    byte_level = kind == "byte-level"
    tokenizer = Tokenizer(models.BPE(unk_token=None if byte_level else UNKNOWN))
    specials = [BOS, EOS] if byte_level else [BOS, EOS, UNKNOWN]
    if byte_level:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        alphabet = [chr(code) for code in range(33, 127)]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)] if byte_level else []
    if bos:
        steps.append(processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)]))
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
    unknown = {} if byte_level else {"unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, **unknown)

"""Files and folders that are wrong in every way that comes to mind, for test_bad_input.

folder = spoil_results(tmp_path / "out", "truncated")      # results, one of them spoilt
"""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from synthetic_results import synthetic_results
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hookdepth.results import digest_of

LINE = "the people of the town and the town itself were there"
WEIGHTS = "model.safetensors"

# What a data set file holds, and what the refusal says. Names end as the file does.
DATASETS = {
    "empty.txt": (b"", "is empty"),
    "blank.jsonl": (b"\n \n\t\n", "is empty"),
    "binary.txt": (bytes(range(256)) * 8, "is a binary file"),
    "null bytes.jsonl": (b'{"prompt": "a\0b"}', "is a binary file"),
    "utf-16.txt": ("the town".encode("utf-16"), "is a binary file"),
    "latin-1.txt": ("the town\ncaf\xe9".encode("latin-1"), "line 2 is not UTF-8"),
    "cut inside a character.jsonl": ('{"prompt": "é"}'.encode()[:-3], "is not UTF-8"),
    "parquet.jsonl": (b"PAR1\x15\x04\x15" + bytes(40), "is a binary file"),
    "array.json": (b'[{"prompt": "a"}]', "is JSON, not JSON lines"),
    "table.csv": (b"question,answer\na,b\n", "is a table"),
    "no json.jsonl": (b"the town\n", "line 1 is not valid JSON"),
    "cut short.jsonl": (b'{"prompt": "a"}\n{"prompt": "b', "line 2 is not valid JSON"),
    "list.jsonl": (b'["a"]', "is no JSON object"),
    "other keys.jsonl": (b'{"text": "a"}', "is no JSON object with either"),
    "both keys.jsonl": (b'{"prompt": "a", "question": "b"}', "is no JSON object with either"),
    "number.jsonl": (b'{"prompt": 3}', 'has no "prompt" that is a string'),
    "null answer.jsonl": (b'{"prompt": "a", "answer": null}', 'has no "answer" that is a string'),
    "empty answer.jsonl": (b'{"prompt": "a", "answer": ""}', "is empty"),
    "blank prompt.jsonl": (b'{"prompt": " \\n"}', "is empty"),
    "no final answer.jsonl": (b'{"question": "a", "answer": "b"}', "is not reasoning, one '####'"),
    "mixed.jsonl": (b'{"prompt": "a"}\n{"question": "a", "answer": "#### 1"}', "line 2 has other keys"),
    "surrogate.jsonl": (b'{"prompt": "a\\ud800"}', "is not Unicode text"),
    "deep.jsonl": (b"[" * 1_000_000, "is not valid JSON"),
    "deep objects.jsonl": (b'{"prompt":' * 100_000, "is not valid JSON"),
    "long number.jsonl": (b'{"prompt": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
    "beyond the context.txt": ((LINE + " ").encode() * 60, "tokens, the model takes 512"),
    "huge line.txt": (b"the town " * 1_000_000, "more than"),
    "second is too long.txt": (b"the town\n" + (LINE + " ").encode() * 60, "tokens, the model takes 512"),
}


def model_folder(folder, **overrides):
    """`model_folder(tmp_path / "tiny")`: a tiny Llama with its tokenizer, as a folder; returns it."""
    tiny_model("llama", **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def change_weights(folder, change):
    """`change_weights(folder, lambda tensors: tensors.popitem())`: rewrite a model's weights."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _index(folder):
    """The weights as two shards of which the second never arrived."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    half = names[: len(names) // 2]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({name: tensors[name] for name in half}, folder / shards[0], metadata={"format": "pt"})
    where = {name: shards[name not in half] for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / WEIGHTS).unlink()


def change_config(**changes):
    """`change_config(hidden_size=32)(folder)`: other values in a model's config."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def forget_the_tokenizer(folder):
    """`forget_the_tokenizer(folder)`: remove its files."""
    for path in folder.glob("*token*"):
        path.unlink()


def pickle_only(folder):
    """`pickle_only(folder)`: the weights as a pickle, which is not read."""
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _code(folder):
    """A checkpoint that brings code of its own, which leaves a trace if it is ever run."""
    change_config(model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Evil: pass\n")


def _fill(name, row, value):
    return lambda folder: change_weights(folder, lambda tensors: tensors[name][row].fill_(value))


# What is done to a model's folder, the exit status, and what the refusal says.
MODELS = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), 2, "give a folder with config.json"),
    "truncated weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-99]), 2, "give a folder"),
    "missing shard": (_index, 2, "give a folder"),
    "missing tensor": (lambda f: change_weights(f, lambda t: t.pop("model.norm.weight")), 2, "lacks 1 of the model's"),
    "pickle": (pickle_only, 2, "safetensors"),
    "own code": (_code, 2, "cannot load the model"),
    "no config": (lambda folder: (folder / "config.json").unlink(), 2, "give a folder"),
    "binary config": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\0"), 2, "give a folder"),
    "other sizes": (change_config(hidden_size=32), 2, "give a folder"),
    "layers of text": (
        change_config(num_hidden_layers="five"),
        2,
        "num_hidden_layers = 'five', which is no whole number",
    ),
    "no tokenizer": (forget_the_tokenizer, 2, "give a folder"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), 2, "give a folder"),
    "NaN in layer 3": (_fill("model.layers.3.mlp.down_proj.weight", 2, float("nan")), 1, "at layer 3"),
    "infinite norm": (_fill("model.norm.weight", 0, float("inf")), 1, "non-finite logits"),
}


def spoil_results(folder, how):
    """`spoil_results(tmp_path / "out", "truncated")`: synthetic results, the logit lens spoilt; returns the folder."""
    for name in ("logit-lens", "skip-current", "residual-erasure"):
        synthetic_results(n_layers=5, n_tokens=6)[name].save(folder / f"{name}.safetensors")
    RESULTS[how][0](folder / "logit-lens.safetensors")
    return folder


def _metadata(change):
    def spoil(path):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["hookdepth"])
        text, tensors = change(metadata), load_file(path)
        metadata["digest"] = digest_of(tensors, metadata)  # as somebody who means it would write it
        save_file(tensors, path, metadata={"hookdepth": text or json.dumps(metadata)})

    return spoil


def _tensors(**changed):
    def spoil(path):
        result = synthetic_results(n_layers=5)["logit-lens"]
        tensors = {name: value for name, value in {**result.tensors, **changed}.items() if value is not None}
        metadata = {**result.metadata, "schema": 2, "analysis": "logit-lens"}
        metadata["digest"] = digest_of(tensors, json.loads(json.dumps(metadata)))
        save_file(tensors, path, metadata={"hookdepth": json.dumps(metadata)})

    return spoil


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-6] ^= 4
    path.write_bytes(content)


def _strip(path):
    tensors, metadata = load_file(path), {"schema": 2, "analysis": "logit-lens"}
    save_file(tensors, path, metadata={"hookdepth": json.dumps(metadata)})


# What is done to a result file, and what the refusal says of it.
RESULTS = {
    "empty": (lambda path: path.write_bytes(b""), "is not a readable safetensors file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "is not a readable safetensors file"),
    "header cut": (lambda path: path.write_bytes(path.read_bytes()[:30]), "is not a readable safetensors file"),
    "text": (lambda path: path.write_text("not a result"), "is not a readable safetensors file"),
    "a flipped bit": (_flip, "is damaged: its content is not what its digest says"),
    "no digest": (_strip, "is damaged: its content is not what its digest says"),
    "foreign": (lambda path: save_file({"a": torch.ones(2)}, path), "not one of hookdepth's"),
    "model weights": (lambda path: shutil.copy(path.parent / WEIGHTS, path), "not one of hookdepth's"),
    "old schema": (_metadata(lambda m: m.update(schema=0)), "has schema 0, this hookdepth reads 2"),
    "schema of the future": (_metadata(lambda m: m.update(schema=99)), "has schema 99"),
    "no analysis": (_metadata(lambda m: m.pop("analysis") and None), "names no analysis"),
    "deep metadata": (_metadata(lambda m: "[" * 200_000), "is not JSON"),
    "model is a number": (_metadata(lambda m: m.update(model=3)), "its model is int"),
    "lengths are text": (_metadata(lambda m: m["data"].update(lengths="many")), "its data.lengths"),
    "probes of text": (_metadata(lambda m: m.update(probes=["a"])), "its probe 0 is str"),
    "a tensor is missing": (_tensors(topk_overlap=None), "the tensor topk_overlap is missing"),
    "a tensor is too short": (_tensors(kl=torch.zeros(3)), "the tensor"),
    "a tensor is empty": (_tensors(kl=torch.zeros(0), topk_overlap=torch.zeros(0)), "has shape [0]"),
    "a matrix for a curve": (_tensors(kl=torch.zeros(6, 6)), "the tensor kl has shape [6, 6]"),
    "integers": (_tensors(kl=torch.zeros(6, dtype=torch.int64)), "is int64, not float32"),
    "half precision": (_tensors(kl=torch.zeros(6, dtype=torch.bfloat16)), "is bfloat16, not float32"),
    "complex": (_tensors(kl=torch.zeros(6, dtype=torch.complex64)), "is complex64, not float32"),
    "twice": (lambda path: shutil.copy(path, path.with_name("copy.safetensors")), "so does another file"),
}

"""Good inputs of every kind, made once, and the ways to damage them."""

import gzip
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from support.runs import ROOT, finish

TEXT = "A dark night: It was a dark and stormy night; the rain fell in torrents. " * 60
TOKENIZER = ["--tokenizer", "char"]
SHAPE = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2"]
BATCHES = ["--block_size", "16", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "64"]
TRAINING = [*TOKENIZER, *SHAPE, *BATCHES, "--use_cpu", "--sample_max_new_tokens", "1", "--report_to", "none"]

Damage = Callable[[Path], None]


def make_materials(folder: Path) -> None:
    """Write every good input into `folder`: texts, shards, a trained run, a GPT-2, a skipped step, configurations."""
    folder.mkdir()
    (folder / "story.txt").write_text(TEXT)
    (folder / "story.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    with pa.output_stream(str(folder / "story.txt.zst"), compression="zstd") as stream:
        stream.write(TEXT.encode())
    rows = [TEXT[start : start + 200] for start in range(0, len(TEXT), 200)]
    (folder / "story.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (folder / "chat.jsonl").write_text("".join(json.dumps({"prompt": row, "completion": row}) + "\n" for row in rows))
    table = pa.table({"text": rows})
    pyarrow.parquet.write_table(table, folder / "story.parquet")
    with pa.OSFile(str(folder / "story.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    item = {"activity_label": "night", "ctx_a": "It was", "ctx_b": "a dark", "label": 1}
    item["endings"] = ["night.", "and stormy night.", "rain.", "torrents."]
    (folder / "quiz.jsonl").write_text((json.dumps(item) + "\n") * 2)
    (folder / "texts").mkdir()
    shutil.copy(folder / "story.jsonl", folder / "texts")
    (folder / "prompt.txt").write_text("It was")
    shutil.copy(ROOT / "accelerate_configs" / "cpu.yaml", folder / "profile.yaml")
    _write_config(folder / "recipe.yaml")
    _python(folder, "-m", "minigpt", "prepare", "--train_file", "story.txt", "--tokenizer", "char",
            "--output_dir", "tinyshards")  # fmt: skip
    ids = np.fromfile(folder / "tinyshards" / "train-00000.bin", "<u2")
    for name in ("nanoshards", "numpyshards", "llmcshards"):
        (folder / name).mkdir()
        shutil.copytree(folder / "tinyshards" / "tokenizer", folder / name / "tokenizer")
    for split in ("train", "val"):
        ids.tofile(folder / "nanoshards" / f"{split}.bin")
        np.save(folder / "numpyshards" / f"edu_{split}_000000.npy", ids)
        header = struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0")
        (folder / "llmcshards" / f"edu_{split}_000000.bin").write_bytes(header + ids.tobytes())
    train = [str(ROOT / "train_accelerate.py"), *TRAINING, "--cache_dir", str(folder.parent / "cache")]
    train += ["--train_file", "story.txt"]
    _python(folder, *train, "--output_dir", "tinyrun", "--max_steps", "2", "--save_steps", "1")
    explode = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", "3"]
    shutil.rmtree(folder / "tinyrun" / "checkpoint-2")
    _python(folder, *train, "--output_dir", "skipped", *explode)
    record = next((folder / "skipped" / "skipped_steps").iterdir())
    record.rename(folder / "tinystep")
    shutil.rmtree(folder / "skipped")
    torch.manual_seed(0)
    vocab_size = json.loads((folder / "tinyrun" / "config.json").read_text())["vocab_size"]
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(folder / "tinygpt2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "tinyrun" / file, folder / "tinygpt2" / file)
    (folder / "nanogpt").mkdir()
    (folder / "nanogpt" / "data" / "shakespeare_char").mkdir(parents=True)
    for file in ("train.py", "model.py", "data/shakespeare_char/prepare.py"):
        (folder / "nanogpt" / file).write_text("raise SystemExit('this is not nanoGPT')\n")


def _write_config(path: Path) -> None:
    words, lines = list(TRAINING), ["train_file: story.txt"]
    while words:
        name = words.pop(0).removeprefix("--")
        lines.append(f"{name}: {words.pop(0) if words and not words[0].startswith('--') else 'true'}")
    path.write_text("\n".join([*lines, "max_steps: 1", ""]))


def _python(folder: Path, *words: str) -> None:
    here = Path.cwd()
    os.chdir(folder)
    try:
        run = finish([sys.executable, *words])
    finally:
        os.chdir(here)
    assert run.returncode == 0, (words, run.stderr)


def copy_material(source: Path, target: Path) -> None:
    """A copy that a case may damage."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


# --- damages of any file --------------------------------------------------------------------------------------------


def _replaced(make: Callable[[Path], object]) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _directory(path: Path) -> None:
    path.mkdir()
    (path / "note.txt").write_text("It was a dark and stormy night.")


def _content(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def _noise(content: bytes) -> bytes:
    return random.Random(0).randbytes(max(64, len(content)))


PLACES: dict[str, Damage] = {
    "missing": lambda path: path.unlink(),
    "a folder": _replaced(_directory),
    "a FIFO": _replaced(os.mkfifo),
    "a dangling link": _replaced(lambda path: path.symlink_to("nowhere")),
    "a looping link": _replaced(lambda path: path.symlink_to(path.name)),
    "unreadable": _replaced(lambda path: path.symlink_to("/proc/self/mem")),
    "endless": _replaced(lambda path: path.symlink_to("/dev/zero")),
}
BYTES: dict[str, Damage] = {
    "empty": _content(lambda content: b""),
    "truncated": _content(lambda content: content[: len(content) * 2 // 3]),
    "noise": _content(_noise),
    "zeros": _content(lambda content: bytes(len(content))),
    "not UTF-8": _content(lambda content: content[: len(content) // 2] + b"\xe9\xff" + content[len(content) // 2 :]),
}

# --- damages of one format ------------------------------------------------------------------------------------------

SHAPES = {
    "null": "null",
    "a list": "[1, 2]",
    "a number": "17",
    "a text": '"word"',
    "no keys": "{}",
    "deep": "[" * 100_000,
    "a number of 5000 digits": '{"version": ' + "9" * 5000 + "}",
}
# the keys whose values are changed one by one; () is every key
KEYS = {
    "config.json": (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "hidden_act", "layer_norm_epsilon", "resid_pdrop", "dtype", "model_type",
        "tie_word_embeddings", "eos_token_id", "n_embd", "n_layer", "n_head", "n_positions",
    ),
    "tokenizer.json": ("version", "model", "added_tokens", "pre_tokenizer", "decoder"),
    "tokenizer_config.json": ("tokenizer_class", "eos_token", "model_max_length"),
    "generation_config.json": ("eos_token_id", "max_length"),
}  # fmt: skip
WRONG_VALUES: tuple[Any, ...] = (None, "word", -1, 10**12, [], {}, 1.5, True, [None], float("nan"))


def text_file(content: str) -> Damage:
    return lambda path: path.write_text(content) and None


def change_json(change: Callable[[Any], Any]) -> Damage:
    """Change the object of a JSON file, or of the first line of a JSONL file."""

    def damage(path: Path) -> None:
        first, *rest = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
        values = json.loads(first)
        values = change(values) or values
        path.write_text("\n".join([json.dumps(values, indent=None if rest else 2), *rest]))

    return damage


def without_key(key: str) -> Damage:
    return change_json(lambda values: values.pop(key) and None)


def with_value(key: str, value: Any) -> Damage:
    return change_json(lambda values: values.update({key: value}))


def json_damages(path: Path) -> dict[str, Damage]:
    """Wrong shapes; for each key of the object: removed, and a wrong value."""
    damages = {name: text_file(content) for name, content in SHAPES.items()}
    values = json.loads(path.read_text().split("\n")[0] if path.suffix == ".jsonl" else path.read_text())
    damages["an extra key"] = with_value("surprise", [1, {"a": None}])
    for number, (key, value) in enumerate(values.items()):
        if key not in KEYS.get(path.name, values):
            continue
        damages[f"without {key}"] = without_key(key)
        wrong = WRONG_VALUES[number % len(WRONG_VALUES)]
        if type(wrong) is type(value):
            wrong = [value]
        damages[f"{key}={json.dumps(wrong)}"] = with_value(key, wrong)
    return damages


def yaml_damages(path: Path) -> dict[str, Damage]:
    damages = {name: text_file(content) for name, content in SHAPES.items()}
    damages |= {
        "an unknown key": _content(lambda content: content + b"surprise: 1\n"),
        "a key twice": _content(lambda content: content + b"max_steps: 1\n"),
        "a Python object": _content(lambda content: content + b"seed: !!python/object/apply:os.getpid []\n"),
        "an alias": _content(lambda content: content + b"seed: &a 1\nstride: *a\n"),
        "a nested key": _content(lambda content: content + b"seed: {a: 1}\n"),
        "a list of lists": _content(lambda content: content + b"sample_prompts: [[a], [b]]\n"),
        "a tab": _content(lambda content: b"\tmax_steps: 1\n" + content),
        "two documents": _content(lambda content: content + b"---\nseed: 1\n"),
        "a key that is a number": _content(lambda content: content + b"1: 2\n"),
        "a key that is a list": _content(lambda content: content + b"? [a]\n: 2\n"),
        "a date": _content(lambda content: content + b"seed: 2001-01-01\n"),
        "not a number": _content(lambda content: content + b"learning_rate: .nan\n"),
        "a huge number": _content(lambda content: content + b"hidden_size: 1000000000000\n"),
        "a control character": _content(lambda content: content + b"run_name: a\x07b\n"),
        "NUL in a path": _content(lambda content: content + b'train_file: "a\\0b"\n'),
    }
    return damages


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(path: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def _largest(tensors: dict[str, torch.Tensor]) -> str:
    return max(sorted(tensors), key=lambda name: tensors[name].numel())


def _fill(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[_largest(tensors)].view(-1)[3:4].fill_(value)


def _header(content: str, size: int | None = None) -> Damage:
    data = content.encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(data) if size is None else size) + data) and None


def _pickle_only(path: Path) -> None:
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def _replace_tensor(make: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = _largest(tensors)
        tensors[name] = make(tensors[name]).contiguous()

    return _tensors(change)


SAFETENSORS: dict[str, Damage] = {
    "NaN": _tensors(_fill(float("nan"))),
    "infinite": _tensors(_fill(float("inf"))),
    "without a tensor": _tensors(lambda tensors: tensors.pop(_largest(tensors))),
    "without tensors": _tensors(lambda tensors: tensors.clear()),
    "an extra tensor": _tensors(lambda tensors: tensors.update({"surprise.weight": torch.ones(3)})),
    "another shape": _replace_tensor(lambda tensor: tensor[:-1]),
    "another rank": _replace_tensor(lambda tensor: tensor.reshape(-1)),
    "whole numbers": _replace_tensor(lambda tensor: tensor.to(torch.int64)),
    "a header of 10^15 bytes": _header("{}", 10**15),
    "a header that is not JSON": _header("{not JSON"),
    "a header that is a list": _header("[1, 2]"),
    "offsets outside the file": _header('{"a": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}'),
    "an absurd shape": _header('{"a": {"dtype": "F32", "shape": [1000000000000, 9], "data_offsets": [0, 8]}}'),
    "pickle only": _pickle_only,
}  # fmt: skip
OPTIMIZER = {name: damage for name, damage in SAFETENSORS.items() if name not in ("NaN", "infinite", "pickle only")}


def _table(columns: dict[str, Any]) -> Damage:
    def damage(path: Path) -> None:
        table = pa.table(columns)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)

    return damage


TABLES: dict[str, Damage] = {
    "another column": _table({"body": ["a text"] * 9}),
    "numbers": _table({"text": [1, 2, 3]}),
    "a null": _table({"text": ["a", None, "b"]}),
    "nested": _table({"text": [["a"], ["b"]]}),
    "no rows": _table({"text": pa.array([], pa.string())}),
    "no columns": _table({}),
    "bytes": _table({"text": pa.array([b"\xff\xfe", b"a"], pa.binary())}),
}
JSON_LINES: dict[str, Damage] = {
    **{name: text_file(content + "\n") for name, content in SHAPES.items()},
    "a null text": text_file('{"text": null}\n'),
    "a number as text": text_file('{"text": 1}\n'),
    "a nested text": text_file('{"text": {"text": "a"}}\n'),
    "half of a surrogate": text_file('{"text": "\\ud800 and more text"}\n' * 99),
    "a bad second line": text_file('{"text": "a good line"}\n{"text": \n'),
    "blank lines only": text_file("\n\n  \n"),
}
CHAT_LINES: dict[str, Damage] = {
    "a null prompt": text_file('{"prompt": null, "completion": "a"}\n'),
    "no completion": text_file('{"prompt": "a"}\n'),
    "messages of numbers": text_file('{"messages": [1, 2]}\n'),
    "no messages": text_file('{"messages": []}\n'),
    "a message without a role": text_file('{"messages": [{"content": "a"}]}\n'),
    "half of a surrogate": text_file('{"prompt": "\\ud800", "completion": "b"}\n' * 99),
}
IDS: dict[str, Damage] = {
    "an odd number of bytes": _content(lambda content: content[:-1]),
    "ids outside the vocabulary": _content(lambda content: content[:-8] + b"\xff" * 8),
}


def _save_array(array: Any) -> Damage:
    def damage(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=True)

    return damage


ARRAYS: dict[str, Damage] = {
    "floats": _save_array(np.ones(500)),
    "two dimensions": _save_array(np.ones((50, 50), "<u2")),
    "objects": _save_array(np.array([{"a": 1}], dtype=object)),
    "no ids": _save_array(np.ones(0, "<u2")),
    "a number": _save_array(np.uint16(3)),
    "an absurd shape": lambda path: path.write_bytes(
        path.read_bytes().replace(b"'shape': (", b"'shape': (99999999", 1)
    ) and None,
}  # fmt: skip
LLMC: dict[str, Damage] = {
    "an absurd count": _content(lambda content: content[:8] + struct.pack("<i", 2**31 - 1) + content[12:]),
    "a negative count": _content(lambda content: content[:8] + struct.pack("<i", -5) + content[12:]),
    "the header alone": _content(lambda content: content[:1024]),
}


def damages_of(path: Path) -> dict[str, Damage]:
    """Every damage that fits the format of a file."""
    by_suffix: dict[str, dict[str, Damage]] = {
        ".safetensors": OPTIMIZER if path.name.startswith("optimizer") else SAFETENSORS,
        ".yaml": yaml_damages(path) if path.suffix == ".yaml" else {},
        ".parquet": TABLES,
        ".arrow": TABLES,
        ".jsonl": {"chat.jsonl": CHAT_LINES, "story.jsonl": JSON_LINES}.get(path.name, {}),
        ".bin": {**IDS, **(LLMC if path.parent.name == "llmcshards" else {})},
        ".npy": ARRAYS,
    }
    special = by_suffix.get(path.suffix, {})
    if path.suffix == ".json" or path.name in ("metrics.jsonl", "quiz.jsonl"):
        special = json_damages(path)
    return {**PLACES, **BYTES, **special}


def mount_read_only(folder: Path) -> bool:
    """Whether `folder` could be made an empty file system that is read-only for root as well."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True)
    return made.returncode == 0

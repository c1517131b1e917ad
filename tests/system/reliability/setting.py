"""The text, the options and the commands that all experiments share."""

import json
import random
import subprocess
from pathlib import Path

from support.runs import command, metrics
from support.tensors import different_tensors

WORDS = ["cat", "dog", "bird", "sees", "hears", "the", "a", "tree", "and", "follows"]
TINY = """
    --tokenizer char --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --block_size 16
    --per_device_eval_batch_size 32 --learning_rate 1e-2 --warmup_steps 2 --logging_steps 1 --eval_steps 0
    --sample_max_new_tokens 1 --report_to none --use_cpu
""".split()  # noqa: SIM905


def write_text(path: Path) -> None:
    """Write short documents: a sample has room for one, two or three."""
    generator = random.Random(0)
    documents = [" ".join(generator.choices(WORDS, k=generator.randint(1, 4))) for _ in range(2000)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")


def train(options: list[str], processes: int = 1, env: dict[str, str] | None = None) -> None:
    """Train to the end."""
    subprocess.run(command(*options, processes=processes), check=True, capture_output=True, env=env)


def same(first: Path, second: Path) -> bool:
    """Whether two runs have the same weights and logged the same losses, bit for bit."""
    return not different_tensors(first, second) and metrics(first, "train/loss") == metrics(second, "train/loss")

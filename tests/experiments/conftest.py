"""The run that experiments repeat."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def tiny_config(text_file: Path, cache_dir: Path, tmp_path: Path) -> Path:
    """A run of twelve steps that takes a second."""
    options = {
        "train_file": str(text_file), "tokenizer": "char", "cache_dir": str(cache_dir), "hidden_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 16, "dropout": 0.0, "max_steps": 12,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 32, "learning_rate": 3e-3, "eval_steps": 0,
        "save_steps": 0, "sample_max_new_tokens": 1, "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return path

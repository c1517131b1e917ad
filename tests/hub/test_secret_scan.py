"""Secrets in files and on command lines are found and named, and never printed."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from minigpt.hub.secret_scan import (
    SECRET_PATTERNS,
    find_secrets,
    refuse_secrets,
    refuse_secrets_on_command_line,
    safetensors_header,
    secret_values,
)

# concatenated here, so that no scanner takes this file for a leak
SECRETS = {
    "a Hugging Face token": "hf_" + "a1B2" * 8,
    "an AWS access key": "AKIA" + "ABCD1234" * 2,
    "an AWS secret key": "aws_secret_access_key = " + "aB3/" * 10,
    "a Weights & Biases key": "WANDB_API_KEY=" + "0a" * 20,
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "an API key": "sk-" + "a1B2" * 9,
    "a URL with a password": "postgres://me:" + "s3cret" + "@db.example.org/runs",
    "a private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", SECRET_PATTERNS)
def test_every_kind_of_secret_is_found_on_its_line(kind: str) -> None:
    content = f"one\ntwo\n  x={SECRETS[kind]}\n".encode()
    assert (3, kind) in list(find_secrets(content, {}))


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/docs@main and a:b@c",
        "from huggingface_hub import hf_hub_download",
        "hf_argparser.HfArgumentParser",
        "task-" + "a" * 40,
        "0a" * 20,
    ],
)
def test_ordinary_text_and_hashes_are_not_secrets(text: str) -> None:
    assert not list(find_secrets(text.encode(), {}))


def test_values_of_secret_variables_are_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse")
    monkeypatch.setenv("OTHER_TOKEN", "none")  # too short: it would match in ordinary text
    assert b"none" not in secret_values()
    with pytest.raises(ValueError, match=r"b\.json line 1: the value of MY_SERVICE_PASSWORD") as error:
        refuse_secrets({"a.json": b"none", "b.json": b'{"x": "correct horse"}'})
    assert "correct horse" not in str(error.value)


def test_secret_on_the_command_line_is_refused_and_not_shown() -> None:
    refuse_secrets_on_command_line(["--tokenizer", "bpe", "--shard_tokens", "1000", "--run_name", "a"])
    for words in (["--token=x"], ["--hub_token", "x"], [f"--run_name={SECRETS['a GitHub token']}"]):
        with pytest.raises(ValueError, match="word 1 of the command line contains a") as error:
            refuse_secrets_on_command_line(words)
        assert SECRETS["a GitHub token"] not in str(error.value)


@pytest.mark.parametrize("name", ["DB_PASS", "MY_PASSPHRASE_2", "STRIPE_KEY", "GCP_CREDENTIALS", "SSH_KEY_ID"])
def test_variables_named_like_secrets_are_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "tr0ub4dor&3")
    assert secret_values()[b"tr0ub4dor&3"] == f"the value of {name}"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_text_in_utf_16_is_searched(encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    content = (mark + "one\ntwo " + SECRETS["a GitHub token"]).encode(encoding)
    assert (2, "a GitHub token") in list(find_secrets(content, {}))


def test_the_metadata_of_weights_is_searched_and_the_numbers_are_not(tmp_path: Path) -> None:
    weights = np.frombuffer((SECRETS["a GitHub token"] * 4).encode(), dtype=np.uint8)
    save_file({"weight": weights}, tmp_path / "clean.safetensors")
    save_file({"weight": weights}, tmp_path / "leak.safetensors", {"by": SECRETS["a Hugging Face token"]})
    assert not list(find_secrets(safetensors_header(tmp_path / "clean.safetensors"), {}))
    assert list(find_secrets(safetensors_header(tmp_path / "leak.safetensors"), {})) == [(1, "a Hugging Face token")]

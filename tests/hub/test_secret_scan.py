"""Secrets in files and on command lines are found and named, and never printed."""

import pytest

from minigpt.hub.secret_scan import (
    SECRET_PATTERNS,
    find_secrets,
    refuse_secrets,
    refuse_secrets_on_command_line,
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
    "a private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", SECRET_PATTERNS)
def test_every_kind_of_secret_is_found_on_its_line(kind: str) -> None:
    content = f"one\ntwo\n  x={SECRETS[kind]}\n".encode()
    assert (3, kind) in list(find_secrets(content, {}))


@pytest.mark.parametrize(
    "text",
    ["from huggingface_hub import hf_hub_download", "hf_argparser.HfArgumentParser", "task-" + "a" * 40, "0a" * 20],
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

"""Find secrets in files and command lines before anything is published."""

import codecs
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from minigpt.utils.errors import UserError

_NAME_START = r"(?<![A-Za-z0-9_])"

# Each is long enough not to match a name in ordinary code: `hf_hub_download` has underscores, a token has none.
SECRET_PATTERNS = {
    "a Hugging Face token": _NAME_START + r"(?:hf|api_org)_[A-Za-z0-9]{16,}",
    "an AWS access key": _NAME_START + r"(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])",
    "an AWS secret key": _NAME_START + r"(?i:aws_?secret_?(?:access_?)?key)\W{1,6}[A-Za-z0-9/+=]{40}",
    "a Weights & Biases key": _NAME_START + r"(?i:wandb_?api_?key)\W{1,6}[0-9a-f]{40}",
    "a GitHub token": _NAME_START + r"(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,})",
    "an API key": _NAME_START
    + r"(?:sk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}|AIza[0-9A-Za-z_-]{35}|xox[abprs]-[0-9A-Za-z-]{10,})",
    "a URL with a password": r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@\"'<>]+:[^\s/@\"'<>]{3,}@[A-Za-z0-9]",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",  # in JSON, the letter n of a line break can precede it
}

_COMPILED_PATTERNS = {kind: re.compile(pattern.encode()) for kind, pattern in SECRET_PATTERNS.items()}

_SECRET_VARIABLE = re.compile(r"(?:TOKEN|SECRET|CREDENTIALS?|PASS(?:WORD|WD|PHRASE)?|_KEY(?:_ID)?)(?:_|$)")

_ALWAYS_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")

_TOKEN_OPTION = re.compile(r"--(?:hub[_-])?(?:token|api[_-]key)(?:=|$)")

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

_MIN_VALUE_LENGTH = 8  # a shorter value ("1", "none") occurs in any text


def secret_values() -> dict[bytes, str]:
    """The secrets of this machine, each with its description: environment variables, and the token of `hf auth login`.

    A variable counts as secret by its name, such as MY_PASSWORD.
    """
    from huggingface_hub import get_token

    variables = {name: value.strip() for name, value in os.environ.items() if _SECRET_VARIABLE.search(name.upper())}
    values = {
        value.encode(errors="surrogateescape"): f"the value of {name}"
        for name, value in variables.items()
        # a password that is a plain word would match in every vocabulary
        if len(value) >= _MIN_VALUE_LENGTH and (name in _ALWAYS_SECRET_VARIABLES or not value.isalpha())
    }
    token = get_token()
    return values | ({token.encode(): "your Hugging Face token"} if token else {})


def find_secrets(content: bytes, values: dict[bytes, str]) -> Iterator[tuple[int, str]]:
    """(line number, kind) of the first occurrence of each of `values`, and of each pattern of a secret.

    A text in UTF-16 is searched, too, if it starts with a byte-order mark.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", errors="replace").encode()
    for value, kind in values.items():
        position = content.find(value)
        if position >= 0:
            yield _line_number(content, position), kind
    for kind, pattern in _COMPILED_PATTERNS.items():
        match = pattern.search(content)
        if match:
            yield _line_number(content, match.start()), kind


def safetensors_header(path: Path) -> bytes:
    """The JSON at the start of a safetensors file, which holds names, shapes and free metadata."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, MAX_HEADER_BYTES))


def refuse_secrets(contents: dict[str, bytes]) -> None:
    """Raises UserError with the file, line and kind of every secret. `contents` are the bytes by file name."""
    values = secret_values()
    findings = [
        f"{name} line {line}: {kind}"
        for name, content in contents.items()
        for line, kind in sorted(set(find_secrets(content, values)))
    ]
    if findings:
        raise UserError(
            f"{'; '.join(findings)}. Nothing was published. Remove the secret, and replace it by a new one if others "
            "have seen it"
        )


def refuse_secrets_on_command_line(words: Sequence[str]) -> None:
    """Raises UserError if a word of the command line holds a secret: other users of the machine can read it there."""
    values = secret_values()
    for number, word in enumerate(words, start=1):
        kinds = [kind for _, kind in find_secrets(word.encode(errors="surrogateescape"), values)]
        if _TOKEN_OPTION.match(word):
            kinds.append("a token")
        if kinds:
            raise UserError(
                f"word {number} of the command line contains {kinds[0]}; others can read it there, and logs keep it: "
                "set HF_TOKEN or run `hf auth login` instead"
            )


def _line_number(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1

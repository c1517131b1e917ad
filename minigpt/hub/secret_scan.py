"""Find secrets in files and command lines before they are published."""

import os
import re
from collections.abc import Iterator, Sequence

from minigpt.utils.errors import UserError

# Long enough that no name in ordinary code is taken for one (`hf_hub_download` has underscores, tokens have none).
KINDS = {
    "a Hugging Face token": r"(?:hf|api_org)_[A-Za-z0-9]{16,}",
    "an AWS access key": r"(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])",
    "an AWS secret key": r"(?i:aws_?secret_?(?:access_?)?key)\W{1,6}[A-Za-z0-9/+=]{40}",
    "a Weights & Biases key": r"(?i:wandb_?api_?key)\W{1,6}[0-9a-f]{40}",
    "a GitHub token": r"(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,})",
    "an API key": r"(?:sk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}|AIza[0-9A-Za-z_-]{35}|xox[abprs]-[0-9A-Za-z-]{10,})",
}

_PATTERNS = {kind: re.compile(rb"(?<![A-Za-z0-9_])" + pattern.encode()) for kind, pattern in KINDS.items()}

_PATTERNS["a private key"] = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY")

_SECRET_NAME = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY(?:_ID)?)$")

_ALWAYS_SECRET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")

_TOKEN_OPTION = re.compile(r"--(?:hub[_-])?(?:token|api[_-]key)(?:=|$)")

_SHORTEST_VALUE = 8  # shorter values of such variables ("1", "none") are found in any text


def secret_values() -> dict[bytes, str]:
    """What must not leave this machine, with where it is from: variables named like secrets, and `hf auth login`."""
    from huggingface_hub import get_token

    found = {name: value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    values = {
        value.encode(errors="surrogateescape"): f"the value of {name}"
        for name, value in found.items()
        # a password that is a plain word would be found in every vocabulary
        if len(value) >= _SHORTEST_VALUE and (name in _ALWAYS_SECRET or not value.isalpha())
    }
    token = get_token()
    return values | ({token.encode(): "your Hugging Face token"} if token else {})


def find_secrets(content: bytes, values: dict[bytes, str]) -> Iterator[tuple[int, str]]:
    """(line number, kind) of everything in `content` that is one of `values` or looks like a secret."""
    for value, kind in values.items():
        place = content.find(value)
        if place >= 0:
            yield content.count(b"\n", 0, place) + 1, kind
    for kind, pattern in _PATTERNS.items():
        match = pattern.search(content)
        if match:
            yield content.count(b"\n", 0, match.start()) + 1, kind


def refuse_secrets(texts: dict[str, bytes]) -> None:
    """Raises UserError that names every file and line with a secret. `texts` are contents by name."""
    values = secret_values()
    found = [
        f"{name} line {line}: {kind}"
        for name, content in texts.items()
        for line, kind in sorted(set(find_secrets(content, values)))
    ]
    if found:
        raise UserError(f"{'; '.join(found)}. Nothing was published; take it out, and make a new one if it was shown")


def refuse_secret_words(words: Sequence[str]) -> None:
    """Raises UserError when a word of a command line holds a secret: others can read it there."""
    values = secret_values()
    for number, word in enumerate(words, start=1):
        kinds = [kind for _, kind in find_secrets(word.encode(errors="surrogateescape"), values)]
        if _TOKEN_OPTION.match(word):
            kinds.append("a token")
        if kinds:
            raise UserError(
                f"word {number} of the command line gives {kinds[0]}; others can read it there, and files and logs "
                "keep it: set HF_TOKEN or run `hf auth login` instead"
            )

"""Upload a run to the Hub: which files go, and one commit."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, LocalTokenNotFoundError

from minigpt.hub.model_card import is_edited, model_card
from minigpt.hub.run_summary import read_run_summary
from minigpt.hub.secret_scan import refuse_secrets
from minigpt.utils.errors import UserError
from minigpt.utils.formatting import format_bytes
from minigpt.utils.run_files import CARD_FILE

# A list of what goes, not of what stays: no new kind of file can slip into an upload.
MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "configuration_*.py", "modeling_*.py", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip

RECORD_FILES = ("metrics.jsonl", "data.json", "environment.json", "*.png", "*.pdf")

EVENT_FILES = "tensorboard/**/*.tfevents.*"


@dataclass(frozen=True)
class Item:
    """One file of an upload. Weights stay on the disk; all else is read once, so what is checked is what goes."""

    name: str
    content: Path | bytes
    generated: bool = False  # a card that nobody has edited

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Destination:
    """Where a run goes, and how: a repository on the Hub, and how the commit is made."""

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None
    commit_message: str = "Upload a MiniGPT run"
    license: str = "mit"
    repo_type: str = "model"  # or "space"


def collect(destination: Destination, run_dir: Path, model_dir: Path | None = None) -> list[Item]:
    """The files that go up, with the card. Raises UserError when no model is there, or a file holds a secret."""
    model_dir = model_dir or run_dir
    if not (model_dir / "config.json").is_file() or not any(model_dir.glob("model*.safetensors")):
        there = ", ".join(str(path) for path in sorted(run_dir.glob("checkpoint-*")))
        raise UserError(
            f"{run_dir}: no model is there (config.json and model.safetensors); "
            + (f"try one of its checkpoints: {there}" if there else "give the folder of a run")
        )
    paths = {path.relative_to(model_dir): path for pattern in MODEL_FILES for path in model_dir.glob(pattern)}
    paths |= {path.relative_to(run_dir): path for pattern in RECORD_FILES for path in run_dir.glob(pattern)}
    items = [
        Item(name.as_posix(), path if path.suffix == ".safetensors" else path.read_bytes())
        for name, path in sorted(paths.items())
        if path.is_file()
    ]
    items += [
        Item(public_name(path.relative_to(run_dir).as_posix()), public_content(path))
        for path in sorted(run_dir.glob(EVENT_FILES))
    ]
    card = run_dir / CARD_FILE
    if is_edited(card):
        items.append(Item(CARD_FILE, card.read_bytes()))
    else:
        facts = read_run_summary(run_dir, model_dir)
        text = model_card(facts, destination.repo_id, destination.license, destination.revision)
        items.append(Item(CARD_FILE, text.encode(), generated=True))
    return without_secrets(items)


def without_secrets(items: list[Item]) -> list[Item]:
    """The same files. Raises UserError that names every file and line with a secret."""
    refuse_secrets({item.name: item.content for item in items if isinstance(item.content, bytes)})
    return items


def left_out(run_dir: Path, items: list[Item]) -> list[str]:
    """The entries of the run's folder of which nothing goes up."""
    going = {item.name.split("/")[0] for item in items}
    return [
        f"{path.name}{'/' if path.is_dir() else ''}" for path in sorted(run_dir.iterdir()) if path.name not in going
    ]


def publish(destination: Destination, items: list[Item]) -> str:
    """Create the repository if there is none, and commit what has changed. Returns a sentence on what happened.

    Files that arrived whole before an interruption are not sent again. Raises UserError in one line when the Hub
    does not let us or cannot be reached.
    """
    api = HfApi()
    with plain_errors(destination.repo_id):
        create_repository(api, destination)
        return commit(api, destination, items)


def commit(api: HfApi, destination: Destination, items: list[Item]) -> str:
    """Commit what has changed, in one commit, and tag it. Returns a sentence on what happened.

    A card that was edited on the Hub stays as it is there, unless the run's own is a person's too.
    """
    repo_id, revision, kind = destination.repo_id, destination.revision, destination.repo_type
    if _is_edited_there(api, destination):
        items = [item for item in items if not item.generated]
    head = api.repo_info(repo_id, revision=revision, repo_type=kind).sha
    made = api.create_commit(
        repo_id,
        [CommitOperationAdd(item.name, item.content) for item in items],
        commit_message=destination.commit_message,
        revision=revision,
        repo_type=kind,
        create_pr=destination.create_pr,
    )
    if destination.tag:
        _tag(api, destination, made.oid)
    if made.oid == head:
        return f"nothing to upload: {described(destination)} has these {len(items)} files already (commit {head[:8]})"
    size = sum(item.size for item in items)
    return f"uploaded {len(items)} files ({format_bytes(size)}): {made.pr_url or made.commit_url}"


def described(destination: Destination) -> str:
    """The repository in words."""
    return f"the Space {destination.repo_id}" if destination.repo_type == "space" else destination.repo_id


def _is_edited_there(api: HfApi, destination: Destination) -> bool:
    repo_id, revision, kind = destination.repo_id, destination.revision, destination.repo_type
    if kind == "space" and not api.file_exists(repo_id, "app.py", revision=revision, repo_type=kind):
        return False  # a new Space comes with a card of the Hub's
    try:
        return is_edited(Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision, repo_type=kind)))
    except EntryNotFoundError:
        return False


def create_repository(api: HfApi, destination: Destination) -> None:
    """Make sure that repository and branch are there. Raises UserError when a private one was asked for in vain."""
    repo_id, revision, kind = destination.repo_id, destination.revision, destination.repo_type
    api.whoami()  # the clearest answer to a wrong token
    sdk = "gradio" if kind == "space" else None
    api.create_repo(repo_id, private=destination.private or None, repo_type=kind, space_sdk=sdk, exist_ok=True)
    if destination.private and not api.repo_info(repo_id, repo_type=kind).private:
        raise UserError(f"{repo_id} exists and is public; make it private in its settings, or leave --private out")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _tag(api: HfApi, destination: Destination, commit: str) -> None:
    assert destination.tag
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(destination.repo_id).tags}
    there = tags.get(destination.tag)
    if there is None:
        api.create_tag(destination.repo_id, tag=destination.tag, revision=commit)
    elif there != commit:
        raise UserError(f"the files are uploaded, but tag {destination.tag} is another commit already ({there[:8]})")


@contextmanager
def plain_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a ValueError of one line that says what to do."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: what the client makes of a failed large file
        raise UserError(_explain(error, repo_id)) from error


def _explain(error: BaseException, repo_id: str) -> str:
    endpoint = constants.ENDPOINT
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in causes):
        return "there is no token for the Hub: set HF_TOKEN, or run `hf auth login`"
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answer is None:
        return f"{endpoint} cannot be reached, or broke off ({_one_line(causes[-1])}); run the same command again"
    status, said = answer.response.status_code, answer.response.headers.get("X-Error-Message") or answer.server_message
    if status == 401:
        return f"{endpoint} does not accept the token; make one that may write at {endpoint}/settings/tokens"
    if status == 403:
        return f"{repo_id}: this token may not write there; is the owner you, and may the token write? ({said})"
    if status == 404:
        return f"{repo_id}: not found on {endpoint}, or not visible with this token ({said})"
    return f"{repo_id}: {endpoint} answered {status}: {said or _one_line(answer)}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


PRIVATE_TAG = "arguments/"

_HOST = re.compile(r"(events\.out\.tfevents\.\d+)\..*\.(\d+\.\d+)$")


def public_name(name: str) -> str:
    """The name of an event file without the name of the machine that wrote it."""
    return _HOST.sub(r"\1.\2", name)


def public_content(path: Path) -> bytes:
    """An event file without the run's options. A record that is cut off at the end is left out."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    kept = io.BytesIO()
    writer = RecordWriter(kept)
    for record in RawEventFileLoader(str(path)).Load():
        if not any(value.tag.startswith(PRIVATE_TAG) for value in Event.FromString(record).summary.value):
            writer.write(record)
    return kept.getvalue()

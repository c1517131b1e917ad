"""Choose the files of a run that are published, and commit them to the Hub."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from minigpt.hub.model_card import is_edited_card, model_card
from minigpt.hub.run_summary import read_run_summary
from minigpt.hub.secret_scan import refuse_secrets, safetensors_header
from minigpt.training.provenance import is_local
from minigpt.utils.errors import UserError
from minigpt.utils.files import read_bytes, read_json
from minigpt.utils.formatting import format_bytes
from minigpt.utils.run_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD_FILE,
    CURVE_FILES,
    DATA_FILE,
    ENVIRONMENT_FILE,
    LOCK_FILE,
    METRICS_FILE,
    MODEL_FILES,
    PAGE_WEIGHTS_FILE,
    find_checkpoints,
)

# These lists name what is published, not what is kept back: a new kind of file is never published by accident.
RECORD_FILES = (METRICS_FILE, DATA_FILE, ENVIRONMENT_FILE, *CURVE_FILES)
EVENT_FILES = "tensorboard/**/*.tfevents.*"

ONNX_FOLDER = "onnx"

EVENT_FILE_HOST = re.compile(r"(events\.out\.tfevents\.\d+)\..*\.(\d+\.\d+)$")


@dataclass(frozen=True)
class UploadTarget:
    """A repository on the Hub, and how the files are committed to it."""

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None
    commit_message: str = "Upload a MiniGPT run"
    license: str = "mit"
    repo_type: str = "model"  # or "space"
    space_sdk: str = "gradio"  # of a Space; or "static"

    @property
    def description(self) -> str:
        """How messages name the repository."""
        return f"the Space {self.repo_id}" if self.repo_type == "space" else self.repo_id


@dataclass(frozen=True)
class UploadFile:
    """One file of an upload: the path of a file with weights, or the bytes of any other file.

    Bytes are read once, so that what was scanned for secrets is what is sent.
    """

    name: str
    content: Path | bytes
    is_generated_card: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def files_to_upload(
    target: UploadTarget, run_dir: Path, model_dir: Path | None = None, engine_files: Sequence[UploadFile] = ()
) -> list[UploadFile]:
    """The files of a run that are published, with its card. The model may be in another folder than the records.

    engine_files: the model in the formats of other engines. The card shows how to run them.

    Raises UserError if there is no model, if it is an adapter of a model on this machine, or if a file holds a secret.
    """
    model_dir = model_dir or run_dir
    if (model_dir / ADAPTER_WEIGHTS).is_file() and (model_dir / ADAPTER_CONFIG).is_file():
        _refuse_local_base(model_dir)
    elif not (model_dir / "config.json").is_file() or not any(model_dir.glob("model*.safetensors")):
        checkpoints = ", ".join(map(str, find_checkpoints(run_dir)))
        way_out = f"try one of its checkpoints: {checkpoints}" if checkpoints else "give the folder of a run"
        raise UserError(f"{run_dir} holds no model (config.json and model.safetensors); {way_out}")
    paths = _matching_files(model_dir, MODEL_FILES) | _matching_files(run_dir, RECORD_FILES)
    files = [
        UploadFile(name, path if path.suffix == ".safetensors" else read_bytes(path)) for name, path in paths.items()
    ]
    event_files = _matching_files(run_dir, (EVENT_FILES,))
    files += [UploadFile(public_name(name), read_bytes(path)) for name, path in event_files.items()]
    card_path = run_dir / CARD_FILE
    if is_edited_card(card_path):
        files.append(UploadFile(CARD_FILE, read_bytes(card_path)))
    else:
        summary, names = read_run_summary(run_dir, model_dir), [file.name for file in engine_files]
        card = model_card(summary, target.repo_id, target.license, target.revision, names)
        files.append(UploadFile(CARD_FILE, card.encode(), is_generated_card=True))
    files += engine_files
    refuse_secrets_in_files(files)
    return files


def _refuse_local_base(folder: Path) -> None:
    """Raises UserError if the adapter in `folder` names a base model that nobody else can load."""
    config = read_json(folder / ADAPTER_CONFIG, "the configuration of an adapter", ["base_model_name_or_path"])
    base = config["base_model_name_or_path"]
    if not isinstance(base, str) or is_local(base):
        raise UserError(
            f"{folder} is an adapter of {base}, which only this machine has; publish that model and train with its "
            f"name on the Hub as model_name_or_path, or publish the whole model: minigpt merge {folder} DIR"
        )


def _matching_files(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """The matching files in `folder`, by relative name. Raises UserError for a link that leaves the folder."""
    files = {}
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link to {path.resolve()}, outside {folder}; put a copy of the file there")
        if not path.is_file():
            raise UserError(f"{path} is not a file; remove it, or put a copy of the file there")
        files[name.as_posix()] = path
    return files


def public_name(name: str) -> str:
    """The name of an event file without the host name that TensorBoard puts into it. Other names stay the same."""
    return EVENT_FILE_HOST.sub(r"\1.\2", name)


def refuse_secrets_in_files(files: list[UploadFile]) -> None:
    """Raises UserError with the name and line of every secret.

    Of safetensors files the header is scanned. GGUF and ONNX files are not: they are made from files that are.
    """
    contents = {}
    for file in files:
        if isinstance(file.content, bytes):
            contents[file.name] = file.content
        elif file.content.suffix == ".safetensors":
            contents[file.name] = safetensors_header(file.content)
    refuse_secrets(contents)


def files_not_uploaded(run_dir: Path, files: list[UploadFile]) -> list[str]:
    """The files and folders at the top of `run_dir` that are not published; a folder's name ends with a slash."""
    published = {file.name.split("/")[0] for file in files}
    return [
        f"{path.name}/" if path.is_dir() else path.name
        for path in sorted(run_dir.iterdir())
        if path.name not in published and not path.name.startswith(LOCK_FILE)
    ]


def check_git_name(option: str, name: str) -> None:
    """Raises UserError if git allows no branch or tag of this name."""
    if re.search(r"[\s~^:?*\[\\\x00-\x20\x7f]|\.\.|@\{|//|\.$|\.lock$|^[-/]|/$", name):
        raise UserError(f"{option}={name} is not a valid name of a branch or tag")


def check_repo_id(repo_id: str) -> None:
    """Raises UserError if `repo_id` is not of the form USER/NAME with the characters that the Hub allows."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id} is not a valid name of a repository: {error}") from error
    if "/" not in repo_id:
        raise UserError(f"{repo_id} has no owner; give USER/{repo_id} or ORGANIZATION/{repo_id}")


def publish(target: UploadTarget, files: list[UploadFile]) -> str:
    """Create the repository if it does not exist and commit the files that changed. Returns a sentence for the user.

    Files that arrived before an interruption are not sent again. Raises UserError if the Hub refuses the upload or
    cannot be reached.
    """
    api = HfApi()
    with hub_errors_are_user_errors(target.repo_id):
        create_repository(api, target)
        return commit_files(api, target, files)


def create_repository(api: HfApi, target: UploadTarget) -> None:
    """Make sure that the repository and the branch exist.

    Raises UserError if a private repository is wanted and a public one exists.
    """
    repo_id, revision, repo_type = target.repo_id, target.revision, target.repo_type
    api.whoami()  # a wrong token gets a clearer answer here than from create_repo
    space_sdk = target.space_sdk if repo_type == "space" else None
    api.create_repo(repo_id, private=target.private or None, repo_type=repo_type, space_sdk=space_sdk, exist_ok=True)
    if target.private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise UserError(
            f"{repo_id} exists and is public; make it private in its settings, or do not ask for a private one"
        )
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def commit_files(api: HfApi, target: UploadTarget, files: list[UploadFile]) -> str:
    """Commit the files that changed, in one commit, and tag it. Returns a sentence for the user.

    A card that was edited on the Hub is kept, unless the card in the run's folder was edited as well.
    """
    repo_id, revision, repo_type = target.repo_id, target.revision, target.repo_type
    if _card_on_hub_is_edited(api, target):
        files = [file for file in files if not file.is_generated_card]
    head = api.repo_info(repo_id, revision=revision, repo_type=repo_type).sha
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(file.name, file.content) for file in files],
        commit_message=target.commit_message,
        revision=revision,
        repo_type=repo_type,
        create_pr=target.create_pr,
    )
    if target.tag:
        _add_tag(api, repo_id, target.tag, commit.oid)
    if commit.oid == head:
        return f"nothing to upload: {target.description} already has these {len(files)} files (commit {head[:8]})"
    size = format_bytes(sum(file.size for file in files))
    return f"uploaded {len(files)} files ({size}): {commit.pr_url or commit.commit_url}"


def _card_on_hub_is_edited(api: HfApi, target: UploadTarget) -> bool:
    repo_id, revision, repo_type = target.repo_id, target.revision, target.repo_type
    # the Hub puts a card of its own into a new Space, and a page of its own into a static one
    own_file = {"gradio": "app.py", "static": PAGE_WEIGHTS_FILE}[target.space_sdk]
    if repo_type == "space" and not api.file_exists(repo_id, own_file, revision=revision, repo_type=repo_type):
        return False
    try:
        return is_edited_card(Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision, repo_type=repo_type)))
    except EntryNotFoundError:
        return False


def _add_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    tagged_commits = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    tagged_commit = tagged_commits.get(tag)
    if tagged_commit is None:
        api.create_tag(repo_id, tag=tag, revision=commit)
    elif tagged_commit != commit:
        raise UserError(
            f"the files are uploaded, but tag {tag} already exists at another commit ({tagged_commit[:8]}); "
            "give another --tag"
        )


@contextmanager
def hub_errors_are_user_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a UserError with the way out."""
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{repo_id}: {error}") from error
    except ValueError as error:  # the client's own class for a card that the Hub rejects
        if not isinstance(error.__cause__, HfHubHTTPError):
            raise
        raise UserError(f"{repo_id}: {error}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: a large file that could not be sent
        raise UserError(_explain(error, repo_id)) from error


def _explain(error: BaseException, repo_id: str) -> str:
    endpoint, causes = constants.ENDPOINT, [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in causes):
        return "there is no token for the Hub; set HF_TOKEN, or run `hf auth login`"
    for cause in causes:
        if isinstance(cause, OSError) and cause.filename is not None:
            return f"{cause.filename}: {cause.strerror}"
    response_error = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if response_error is None:
        reason = _one_line(causes[-1])
        return f"{endpoint} cannot be reached, or the connection broke ({reason}); run the same command again"
    status = response_error.response.status_code
    message = response_error.response.headers.get("X-Error-Message") or response_error.server_message
    if status == 401:
        return f"{endpoint} does not accept the token; create one with write access at {endpoint}/settings/tokens"
    if status == 403:
        return (
            f"{repo_id}: this token has no write access to it; check the owner's name and the token's permissions "
            f"({message})"
        )
    if status == 404:
        return f"{repo_id} was not found on {endpoint}, or this token cannot read it ({message})"
    return f"{repo_id}: {endpoint} answered {status}: {message or _one_line(response_error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())

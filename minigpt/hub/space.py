"""Build a demo Space for a model: an app with its requirements, or a page that runs the model; and the card."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import yaml

from minigpt.hub.model_card import GENERATED_MARKER
from minigpt.hub.run_summary import read_run_summary
from minigpt.hub.upload import UploadFile, UploadTarget, refuse_secrets_in_files
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import CARD_FILE, PAGE_FILE, PAGE_WEIGHTS_FILE

GRADIO_VERSION = "6.31.0"  # the version that the app was tested with

PYTHON_VERSION = "3.11"

TEMPLATES = Path(__file__).parent / "templates"

APP_CONSTANTS = 'MODEL = "USER/NAME"\nREVISION = None\nPROMPT = "The"\n'  # the lines of a template to replace

REQUIREMENTS = ("torch", "transformers", "safetensors")


def space_target(model: UploadTarget, space_id: str, sdk: str = "gradio") -> UploadTarget:
    """Where the Space of `model` is uploaded: always to the main branch, since that is what the Hub runs.

    sdk: "gradio" runs the model on the Hub's machine, "static" in the visitor's browser.
    Raises UserError if the model is uploaded as a pull request.
    """
    if model.create_pr:
        raise UserError("--space shows a published model, and --create_pr only proposes one; omit one of them")
    message = f"A demo of {model.repo_id}"
    return replace(
        model, repo_id=space_id, repo_type="space", space_sdk=sdk, revision=None, tag=None, commit_message=message
    )


def space_files(model: UploadTarget, space: UploadTarget, run_dir: Path) -> list[UploadFile]:
    """The files of the Space that shows the model in `run_dir`.

    Raises UserError if one of them holds a secret, for example in a sample prompt, for an adapter with a Gradio Space,
    and for a model that the page's engine cannot run with a static one.
    """
    summary = read_run_summary(run_dir)
    purpose = "Chats" if summary.is_chat_model else "Continues a text"
    card = UploadFile(CARD_FILE, space_card(model, space, purpose).encode(), is_generated_card=True)
    if space.space_sdk == "static":
        from minigpt.export.html import static_page  # loads torch

        files = [UploadFile(name, content) for name, content in static_page(run_dir).items()]
        refuse_secrets_in_files([card, *(file for file in files if file.name == PAGE_FILE)])
        return [card, *files]
    if summary.is_adapter:
        raise UserError(
            f"{run_dir} is an adapter, and a Space needs a whole model; run `minigpt merge {run_dir} MERGED`"
        )
    template = TEMPLATES / ("space_chat_app.py" if summary.is_chat_model else "space_app.py")
    files = [
        card,
        UploadFile("app.py", _app(template, model, summary.example_prompt).encode()),
        UploadFile("requirements.txt", _requirements().encode()),
    ]
    refuse_secrets_in_files(files)
    return files


def space_card(model: UploadTarget, space: UploadTarget, purpose: str) -> str:
    """README.md of the Space. The Hub reads from its front matter how to run the app."""
    is_static = space.space_sdk == "static"
    app = {} if is_static else {"sdk_version": GRADIO_VERSION, "python_version": PYTHON_VERSION, "app_file": "app.py"}
    front_matter = {
        "title": space.repo_id.split("/")[-1],
        "emoji": "🧵",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": space.space_sdk,
        **app,
        "license": model.license,
        "models": [model.repo_id],
    }
    how = (
        f"The page holds its weights, rounded to 8 bits, in `{PAGE_WEIGHTS_FILE}` and runs in the visitor's browser."
        if is_static
        else "If the model is private, add a secret `HF_TOKEN` that can read it to this Space."
    )
    return (
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True)}---\n\n{GENERATED_MARKER}\n\n"
        f"# {front_matter['title']}\n\n{purpose} with the model `{model.repo_id}`. {how}\n"
    )


def _app(template: Path, model: UploadTarget, prompt: str) -> str:
    app = template.read_text(encoding="utf-8")
    assert app.count(APP_CONSTANTS) == 1, f"{template} does not have the lines\n{APP_CONSTANTS}"
    constants = f"MODEL = {model.repo_id!r}\nREVISION = {model.revision!r}\nPROMPT = {prompt!r}\n"
    return app.replace(APP_CONSTANTS, constants)


def _requirements() -> str:
    """The installed versions, without a build suffix such as +cpu."""
    return "".join(f"{name}=={version(name).split('+')[0]}\n" for name in REQUIREMENTS)

"""A demo Space for a model: its page, card and requirements."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import yaml

from minigpt.hub.model_card import MARK, example_prompt
from minigpt.hub.run_summary import read_run_summary
from minigpt.hub.upload import Destination, Item, without_secrets
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import CARD_FILE

GRADIO = "6.31.0"  # the version that the page was tried with

PYTHON = "3.11"

APP = Path(__file__).parent / "templates" / "space_app.py"

PLACE = 'MODEL, REVISION, PROMPT = "USER/NAME", None, "The"\n'

REQUIRED = ("torch", "transformers", "safetensors")


def space_of(model: Destination, space_id: str) -> Destination:
    """Where the Space goes: always to the main branch, since that is what runs. Raises UserError with a request."""
    if model.create_pr:
        raise UserError("--space shows a model that is published: leave --create_pr out, or --space")
    message = f"A demo of {model.repo_id}"
    return replace(model, repo_id=space_id, repo_type="space", revision=None, tag=None, commit_message=message)


def collect_space(model: Destination, space: Destination, run_dir: Path) -> list[Item]:
    """The files of the Space that shows the model; both say where they go.

    Raises UserError when one of them holds a secret, such as a sample prompt.
    """
    prompt = example_prompt(read_run_summary(run_dir))
    source = APP.read_text(encoding="utf-8")
    assert source.count(PLACE) == 1, f"{APP} has no line {PLACE}"
    chosen = (model.repo_id, model.revision, prompt)
    app = source.replace(PLACE, f"MODEL, REVISION, PROMPT = {', '.join(map(repr, chosen))}\n")
    versions = {name: version(name).split("+")[0] for name in REQUIRED}  # without the build, such as +cpu
    return without_secrets(
        [
            Item(CARD_FILE, space_card(model, space.repo_id).encode(), generated=True),
            Item("app.py", app.encode()),
            Item("requirements.txt", "".join(f"{n}=={number}\n" for n, number in versions.items()).encode()),
        ]
    )


def space_card(model: Destination, space_id: str) -> str:
    """README.md of the Space, whose front matter tells the Hub how to run it."""
    front = {
        "title": space_id.split("/")[-1],
        "emoji": "🧵",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": PYTHON,
        "app_file": "app.py",
        "license": model.license,
        "models": [model.repo_id],
    }
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{MARK}\n\n"
        f"# {front['title']}\n\nContinues a text with the model `{model.repo_id}`. If that is private, give the "
        "Space a secret `HF_TOKEN` that may read it.\n"
    )

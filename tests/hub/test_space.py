"""Publishing a demo Space to a Hub on loopback, and running its app against that Hub."""

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.export.html import static_page
from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import Sampling, sample_text
from minigpt.hub.space import space_files, space_target
from minigpt.hub.upload import UploadTarget
from minigpt.utils.errors import UserError
from support.hub_client import TOKEN, USERS, call, environment, upload
from support.hub_server import Blob, Hub, running_hub
from support.tiny import CONTEXT, byte_tokenizer, tiny_model

GRADIO_STUB = "class Error(Exception): pass\ndef __getattr__(name): return lambda *words, **options: None\n"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub(USERS) as hub:
        yield hub


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(folder)
    byte_tokenizer(eos_token="<|endoftext|>").save_pretrained(folder)
    (folder / "arguments.yaml").write_text('sample_prompts: ["it\'s"]\n')
    return folder


def test_space_is_published_in_one_commit_and_a_second_upload_sends_nothing(
    hub: Hub, run_dir: Path, tmp_path: Path
) -> None:
    first = upload(run_dir, "ann/one", "--space", hub=hub, home=tmp_path)
    assert "model.safetensors" in hub.repos["ann/one"].files()
    assert re.search(rf"uploaded 3 files \(.* kB\): {hub.endpoint}/spaces/ann/one/commit/", first)
    space = hub.repos["spaces/ann/one"]
    assert space.messages == ["initial commit", "A demo of ann/one"]
    assert sorted(space.files()) == ["README.md", "app.py", "requirements.txt"]
    front = yaml.safe_load(space.files()["README.md"].decode().split("---\n")[1])
    assert front["sdk"] == "gradio"
    assert front["app_file"] == "app.py"
    assert front["models"] == ["ann/one"]
    assert b"\nMODEL = 'ann/one'\nREVISION = None\nPROMPT = \"it's\"\n" in space.files()["app.py"]
    assert b"transformers==" in space.files()["requirements.txt"]
    again = upload(run_dir, "ann/one", "--space", hub=hub, home=tmp_path)
    assert "nothing to upload: ann/one already has" in again
    assert "nothing to upload: the Space ann/one already has these 3 files" in again
    assert len(space.messages) == 2


@pytest.mark.slow
def test_static_space_holds_the_page_with_its_weights_instead_of_an_app(
    hub: Hub, run_dir: Path, tmp_path: Path
) -> None:
    upload(run_dir, "ann/page", "--space", "--static", hub=hub, home=tmp_path)
    space = hub.repos["spaces/ann/page"]
    files = space.files()
    expected = static_page(run_dir)
    assert {name: files[name] for name in expected} == expected
    assert sorted(files) == ["README.md", *sorted(expected)]
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["sdk"] == "static"
    assert front["models"] == ["ann/page"]
    assert not {"app_file", "sdk_version"} & set(front)
    again = upload(run_dir, "ann/page", "--space", "--static", hub=hub, home=tmp_path)
    assert "nothing to upload: the Space ann/page already has these 3 files" in again


@pytest.mark.slow
def test_published_app_generates_what_the_model_generates(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    options = ["--space", "ann/demo", "--private", "--revision", "dev"]
    upload(run_dir, "ann/two", *options, hub=hub, home=tmp_path)
    assert hub.repos["spaces/ann/demo"].private
    assert list(hub.repos["spaces/ann/demo"].branches) == ["main"]
    (tmp_path / "app.py").write_bytes(hub.repos["spaces/ann/demo"].files()["app.py"])
    if importlib.util.find_spec("gradio") is None:
        (tmp_path / "gradio.py").write_text(GRADIO_STUB)
    program = (
        "import json, app\n"
        "try: list(app.generate('x' * 40, 8, 0, 50, 1, 0))\n"
        "except app.gr.Error as error: refused = str(error)\n"
        "greedy = [list(app.generate(prompt, 8, 0, 50, 1, 0)) for prompt in ('ab', '')]\n"
        "sampled = [list(app.generate('ab', 1000, 1.5, 0, 0.9, seed))[-1] for seed in (1, 1, 2)]\n"
        "print('\\n' + json.dumps([refused, greedy, sampled]))\n"
    )
    printed = call([sys.executable, "-c", program], environment(hub, tmp_path, PYTHONPATH=str(tmp_path)))
    answers = next(line for line in printed.splitlines() if line.startswith('["'))
    refused, greedy, sampled = json.loads(answers)
    assert f"The prompt has 40 tokens, but the limit is {CONTEXT - 1}" in refused
    model, tokenizer = tiny_model(), byte_tokenizer(eos_token="<|endoftext|>")
    texts = sample_text(model, tokenizer, ["ab", ""], max_new_tokens=8, temperature=0)
    assert [steps[-1] for steps in greedy] == texts
    assert greedy[0][0] == "ab"
    assert len(greedy[0]) > 2  # it streams
    assert sampled[0] == sampled[1] != sampled[2]


def test_app_of_a_chat_model_answers_as_a_conversation_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    set_chat_template(tokenizer, read_chat_template("chatml"))
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128)
    sampling = Sampling(20, temperature=0)
    unended = Conversation(model, tokenizer).ask("why?", sampling, 0)
    model.generation_config.eos_token_id = [unended.token_ids[9]]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    target = UploadTarget(str(tmp_path))
    files = {file.name: file.content for file in space_files(target, space_target(target, "ann/chat"), tmp_path)}
    assert "Chats with the model" in bytes(files["README.md"]).decode()

    if importlib.util.find_spec("gradio") is None:
        monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
        exec(GRADIO_STUB, vars(sys.modules["gradio"]))
    app: dict = {"__name__": "app"}
    exec(files["app.py"], app)

    def answers(question: str, messages: list[dict], system_prompt: str | None) -> tuple[list[str], Conversation]:
        """Of the app, while it grows, and a conversation with that of the project."""
        conversation = Conversation(model, tokenizer, system_prompt)
        conversation.messages += messages
        conversation.ask(question, sampling, 0)
        history = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
        return list(app["answer"](question, history, system_prompt or "", 20, 0, 1)), conversation

    steps, conversation = answers("why?", [], None)
    assert steps[-1].strip() == conversation.messages[-1]["content"]
    assert len(steps) > 2  # it streams
    assert len(steps[-1]) < len(unended.continuation)  # and stops at the end of the turn
    turns = [{"role": role, "content": 10 * "ab "} for role in ("user", "assistant") * 3]
    steps, conversation = answers("and then?", turns, "Be kind")
    assert conversation.dropped_turns > 0
    assert steps[-1].strip() == conversation.messages[-1]["content"]
    with pytest.raises(app["gr"].Error, match="The question has 149 tokens, but the limit is 108"):
        list(app["answer"](130 * "x", turns, "", 20, 0, 1))


def test_space_of_an_adapter_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    target = UploadTarget("ann/adapter")
    with pytest.raises(UserError, match="minigpt merge"):
        space_files(target, space_target(target, "ann/demo"), tmp_path)


def test_space_card_edited_on_the_hub_is_kept(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    upload(run_dir, "ann/three", "--space", hub=hub, home=tmp_path)
    space = hub.repos["spaces/ann/three"]
    published = {name: Blob(content, large=False) for name, content in space.files().items()}
    space.add_commit("main", "edited", published | {"README.md": Blob(b"---\nsdk: gradio\n---\nmine", large=False)})
    assert "nothing to upload: the Space" in upload(run_dir, "ann/three", "--space", hub=hub, home=tmp_path)
    assert space.files()["README.md"].endswith(b"mine")


def test_dry_run_lists_the_files_of_the_space_as_well(run_dir: Path, tmp_path: Path) -> None:
    output = upload(run_dir, "ann/dry", "--dry_run", "--space", "ann/demo", hub=None, home=tmp_path, HF_TOKEN="")
    assert "files would be uploaded to ann/dry\n" in output
    assert "  app.py\n" in output
    assert "in 3 files would be uploaded to the Space ann/demo\n" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--space", "demo"], "demo has no owner; give USER/demo"),
        (["--static"], "--static is a kind of Space; add --space"),
        (["--space", "--create_pr"], "--space shows a published model, and --create_pr only proposes one"),
    ],
)
def test_space_that_cannot_be_published_is_one_line(
    hub: Hub, run_dir: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    error = upload(run_dir, "ann/none", *options, hub=hub, home=tmp_path, code=2)
    assert message in error
    assert len(error.splitlines()) == 1
    assert "ann/none" not in hub.repos


@pytest.mark.parametrize(("options", "file"), [(["--space"], "app.py"), (["--space", "--static"], "index.html")])
def test_secret_in_a_sample_prompt_is_refused_before_anything_is_sent(
    hub: Hub, run_dir: Path, tmp_path: Path, options: list[str], file: str
) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    (copy / "README.md").write_text("# An edited card\n")  # a generated card would hold the prompt as well
    (copy / "arguments.yaml").write_text(f"sample_prompts: [{TOKEN}]\n")
    error = upload(copy, "ann/leak", *options, hub=hub, home=tmp_path, code=2)
    assert f"{file} line" in error
    assert "ann/leak" not in hub.repos
